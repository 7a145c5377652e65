//! Links over a faulty network: they wait, continue, or close, and every received frame is intact.
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

/// Sends a frame; whether it arrived intact.
async fn arrives(from: &Link, inbound: &mut volary_transport::Inbound, bytes: usize) -> bool {
    let (link, frame) = (from.clone(), probe_frame(bytes));
    let sent = tokio::spawn(async move { link.send(frame).await });
    let received = tokio::time::timeout(LONG, inbound.next()).await.unwrap();
    drop(sent.await.unwrap());
    received.is_some_and(|received| received.frame == probe_frame(bytes))
}

#[tokio::test]
async fn with_a_third_of_the_datagrams_lost_every_byte_still_arrives() {
    let (authority, hook) = (Authority::create().unwrap(), Interference::default());
    let (left, right) =
        (node(&authority, "left", &hook), node(&authority, "right", &Interference::default()));
    let (link, other) = link(&left, &right, "right").await;
    let mut inbound = other.serve();
    hook.drop_fraction(0.3, LONG);
    assert!(arrives(&link, &mut inbound, 1 << 20).await);
}

#[tokio::test]
async fn a_short_partition_delays_a_frame_and_a_long_one_closes_the_link() {
    let (authority, hook) = (Authority::create().unwrap(), Interference::default());
    let (left, right) =
        (node(&authority, "left", &hook), node(&authority, "right", &Interference::default()));
    let (link, other) = link(&left, &right, "right").await;
    let mut inbound = other.serve();
    hook.partition(Duration::from_millis(IDLE_MS / 4));
    assert!(arrives(&link, &mut inbound, 1000).await);
    hook.partition(LONG);
    assert!(!arrives(&link, &mut inbound, 1000).await);
    // Each end detects it by its own clock.
    tokio::time::timeout(LONG, link.closed()).await.unwrap();
    assert!(!link.is_open());
}

#[tokio::test]
async fn a_block_between_two_peers_does_not_affect_a_third() {
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
    assert!(!arrives(&to_right, &mut right_in, 1000).await);
    assert!(arrives(&to_third, &mut third_in, 1000).await);
}
