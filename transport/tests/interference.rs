//! What a disturbed network does to a link: it waits, goes on, or ends, and what comes through is whole.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::time::Duration;
use volary_transport::loopback::probe_frame;
use volary_transport::{Authority, ClientAuth, Endpoint, Interference, Link, Network, TransportOptions};

const ANY: ([u8; 4], u16) = ([127, 0, 0, 1], 0);
const IDLE_MS: u64 = 600;
const LONG: Duration = Duration::from_secs(30);

fn node(authority: &Authority, name: &str, hook: &Interference) -> Endpoint {
    let options = TransportOptions { idle_timeout_ms: IDLE_MS, ..TransportOptions::default() };
    let identity = authority.identity(name).unwrap();
    Network::quic_with_interference(hook.clone())
        .bind(ANY.into(), identity, ClientAuth::Required, &options)
        .unwrap()
}

async fn link(from: &Endpoint, to: &Endpoint, name: &str) -> (Link, Link) {
    let accepting = to.clone();
    let accepted = tokio::spawn(async move { accepting.next_peer().await });
    let link = from.connect(to.local_addr(), name).await.unwrap();
    (link, accepted.await.unwrap().unwrap())
}

/// Sends a frame through; whether it came, whole.
async fn passes(from: &Link, inbound: &mut volary_transport::Inbound, bytes: usize) -> bool {
    let (link, frame) = (from.clone(), probe_frame(bytes));
    let sent = tokio::spawn(async move { link.send(frame).await });
    let came = tokio::time::timeout(LONG, inbound.next()).await.unwrap();
    drop(sent.await.unwrap());
    came.is_some_and(|came| came.frame == probe_frame(bytes))
}

#[tokio::test]
async fn with_a_third_of_the_datagrams_lost_every_byte_still_comes() {
    let (authority, hook) = (Authority::create().unwrap(), Interference::default());
    let (left, right) =
        (node(&authority, "left", &hook), node(&authority, "right", &Interference::default()));
    let (link, other) = link(&left, &right, "right").await;
    let mut inbound = other.serve();
    hook.drop_fraction(0.3, LONG);
    assert!(passes(&link, &mut inbound, 1 << 20).await);
}

#[tokio::test]
async fn a_partition_shorter_than_the_limit_is_waited_for_and_a_longer_one_ends_the_link() {
    let (authority, hook) = (Authority::create().unwrap(), Interference::default());
    let (left, right) =
        (node(&authority, "left", &hook), node(&authority, "right", &Interference::default()));
    let (link, other) = link(&left, &right, "right").await;
    let mut inbound = other.serve();
    hook.partition(Duration::from_millis(IDLE_MS / 4));
    assert!(passes(&link, &mut inbound, 1000).await);
    hook.partition(LONG);
    assert!(!passes(&link, &mut inbound, 1000).await);
    // Each end finds out by its own clock.
    tokio::time::timeout(LONG, link.closed()).await.unwrap();
    assert!(!link.is_open());
}

#[tokio::test]
async fn a_cut_between_two_leaves_the_third_alone() {
    let (authority, hook) = (Authority::create().unwrap(), Interference::default());
    let left = node(&authority, "left", &hook);
    let (right, third) = (
        node(&authority, "right", &Interference::default()),
        node(&authority, "third", &Interference::default()),
    );
    let (to_right, at_right) = link(&left, &right, "right").await;
    let (to_third, at_third) = link(&left, &third, "third").await;
    let (mut right_in, mut third_in) = (at_right.serve(), at_third.serve());
    hook.block_peer(right.local_addr(), LONG);
    assert!(!passes(&to_right, &mut right_in, 1000).await);
    assert!(passes(&to_third, &mut third_in, 1000).await);
}
