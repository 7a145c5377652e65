//! The in-memory network: addresses, faults per pair of endpoints, crashes, and a paused clock.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::net::SocketAddr;
use std::time::Duration;
use tokio::time::Instant;
use volary_transport::loopback::probe_frame;
use volary_transport::memory::{Faults, Network};
use volary_transport::{
    Authority, ClientAuth, CloseReason, ControlReceiver, ControlSender, Endpoint, Error, Link, PeerRole,
    TransportOptions,
};

const ANY: ([u8; 4], u16) = ([127, 0, 0, 1], 0);
const PARTITION: Faults = Faults { drop: 0, delay_ms: 0, partition: true };

struct Cluster {
    network: Network,
    authority: Authority,
}

impl Cluster {
    fn new() -> Self {
        Self { network: Network::new(), authority: Authority::create().unwrap() }
    }

    fn node(&self, name: &str) -> Endpoint {
        self.node_at(name, ANY.into())
    }

    fn node_at(&self, name: &str, address: SocketAddr) -> Endpoint {
        let identity = self.authority.identity(name).unwrap();
        let options = TransportOptions::default();
        self.network.handle().bind(address, identity, ClientAuth::Required, &options).unwrap()
    }
}

async fn link(from: &Endpoint, to: &Endpoint, name: &str) -> (Link, Link) {
    let accepting = to.clone();
    let accepted = tokio::spawn(async move { accepting.next_peer().await });
    let link = from.connect(to.local_addr(), name).await.unwrap();
    (link, accepted.await.unwrap().unwrap())
}

fn is_unreachable(result: &Result<Link, Error>) -> bool {
    matches!(result, Err(Error::Connection { reason, .. }) if reason == "connection refused")
}

#[tokio::test(start_paused = true)]
async fn an_address_without_a_listener_refuses_at_once() {
    let cluster = Cluster::new();
    let (left, right) = (cluster.node("left"), cluster.node("right"));
    let (address, start) = (right.local_addr(), Instant::now());
    assert_eq!(cluster.network.addresses(), [left.local_addr(), address]);
    assert!(is_unreachable(&left.connect(([127, 0, 0, 1], 1).into(), "right").await), "never bound");
    right.close("leaving");
    assert!(is_unreachable(&left.connect(address, "right").await), "closed");
    drop(right);
    assert!(is_unreachable(&left.connect(address, "right").await), "dropped");
    let right = cluster.node_at("right", address);
    assert_eq!(right.local_addr(), address);
    cluster.network.crash(address);
    assert!(is_unreachable(&left.connect(address, "right").await), "crashed");
    let dialing = cluster.network.handle().dial_only(address, &TransportOptions::default()).unwrap();
    assert!(is_unreachable(&left.connect(dialing.local_addr(), "right").await), "does not listen");
    assert_eq!(start.elapsed(), Duration::ZERO);
}

#[tokio::test(start_paused = true)]
async fn a_crash_resets_all_links_and_leaves_other_links_open() {
    let cluster = Cluster::new();
    let (left, right, third) = (cluster.node("left"), cluster.node("right"), cluster.node("third"));
    let (to_right, _at_right) = link(&left, &right, "right").await;
    let (_from_right, at_left) = link(&right, &left, "left").await;
    let (to_third, _at_third) = link(&left, &third, "third").await;
    let request = tokio::spawn({
        let to_right = to_right.clone();
        async move { to_right.request(probe_frame(1)).await }
    });
    tokio::task::yield_now().await;
    let address = right.local_addr();
    cluster.network.crash(address);
    let reset = CloseReason::Broken("reset by peer".into());
    assert_eq!(to_right.closed().await, reset);
    assert_eq!(at_left.closed().await, reset);
    assert!(matches!(request.await.unwrap(), Err(Error::Connection { .. })));
    assert!(to_third.is_open());
    assert!(right.accept().await.is_none());
    assert!(right.connect(left.local_addr(), "left").await.is_err(), "a dead process does not dial");

    // Its successor has the address, and the end of the dead process does not touch it.
    let successor = cluster.node_at("right", address);
    drop(right);
    let (to_successor, _at_successor) = link(&left, &successor, "right").await;
    assert!(to_successor.is_open());
}

#[tokio::test(start_paused = true)]
async fn a_partition_closes_links_of_its_pair_after_the_idle_timeout() {
    let cluster = Cluster::new();
    let (left, right, third) = (cluster.node("left"), cluster.node("right"), cluster.node("third"));
    left.set_idle_timeout(700).unwrap();
    let (to_right, at_right) = link(&left, &right, "right").await;
    let (to_third, _at_third) = link(&left, &third, "third").await;
    let (a, b) = (left.local_addr(), right.local_addr());
    let start = Instant::now();
    cluster.network.set_faults(b, a, PARTITION);
    assert_eq!(to_right.closed().await, CloseReason::TimedOut);
    assert_eq!(at_right.closed().await, CloseReason::TimedOut);
    assert_eq!(start.elapsed(), Duration::from_millis(700), "the shorter timeout of both ends");
    assert!(to_third.is_open());

    // New links meet the same faults, until they end.
    let start = Instant::now();
    let error = left.connect(b, "right").await.unwrap_err();
    assert!(error.to_string().contains("timed out"), "{error}");
    assert_eq!(start.elapsed(), Duration::from_millis(700));
    cluster.network.set_faults(a, b, Faults::default());
    link(&left, &right, "right").await;
}

#[tokio::test(start_paused = true)]
async fn a_delay_takes_exactly_its_time() {
    let cluster = Cluster::new();
    let (left, right) = (cluster.node("left"), cluster.node("right"));
    let (a, b) = (left.local_addr(), right.local_addr());
    cluster.network.set_faults(a, b, Faults { delay_ms: 30, ..Faults::default() });
    let start = Instant::now();
    let (near, far) = link(&left, &right, "right").await;
    // The first flight, the greeting, the answer.
    assert_eq!(start.elapsed(), Duration::from_millis(90));
    assert_eq!(near.stats().round_trip, Duration::from_millis(60));
    let mut inbound = far.serve();
    tokio::spawn(async move {
        let inbound = inbound.next().await.unwrap();
        inbound.reply.unwrap().reply(inbound.frame).await.unwrap();
    });
    let start = Instant::now();
    near.request(probe_frame(5)).await.unwrap();
    assert_eq!(start.elapsed(), Duration::from_millis(60));
}

/// A refusal arrives in spite of a delay, although the link closes right after it.
#[tokio::test(start_paused = true)]
async fn a_delayed_refusal_arrives() {
    let cluster = Cluster::new();
    let (left, right) = (cluster.node("left"), cluster.node("right"));
    cluster.network.set_faults(
        left.local_addr(),
        right.local_addr(),
        Faults { delay_ms: 200, ..Faults::default() },
    );
    right.revoke([certificate_of(&cluster, &left).await]);
    let accepting = right.clone();
    tokio::spawn(async move { accepting.next_peer().await });
    let error = left.connect(right.local_addr(), "right").await.unwrap_err();
    assert!(matches!(error, Error::Refused { .. }), "{error}");
}

async fn certificate_of(cluster: &Cluster, endpoint: &Endpoint) -> [u8; 32] {
    let other = cluster.node("other");
    let (_link, far) = link(endpoint, &other, "other").await;
    far.certificate().unwrap()
}

#[tokio::test(start_paused = true)]
async fn control_messages_keep_their_order_when_a_delay_ends() {
    let cluster = Cluster::new();
    let (left, right) = (cluster.node("left"), cluster.node("right"));
    let (near, far) = link(&left, &right, "right").await;
    let (mut sender, _receiver): (ControlSender, ControlReceiver) = near.take_control().unwrap();
    let (_sender, mut receiver) = far.take_control().unwrap();
    let (a, b) = (left.local_addr(), right.local_addr());
    cluster.network.set_faults(a, b, Faults { delay_ms: 500, ..Faults::default() });
    sender.send(&1u8).await.unwrap();
    cluster.network.set_faults(a, b, Faults::default());
    sender.send(&2u8).await.unwrap();
    assert_eq!(receiver.recv().await.unwrap(), Some(1u8));
    assert_eq!(receiver.recv().await.unwrap(), Some(2u8));
}

#[tokio::test(start_paused = true)]
async fn a_connection_waits_for_admission_and_ends_with_the_accepting_endpoint() {
    let cluster = Cluster::new();
    let (left, right) = (cluster.node("left"), cluster.node("right"));
    let dialing = tokio::spawn({
        let (left, address) = (left.clone(), right.local_addr());
        async move { left.connect(address, "right").await }
    });
    let accepted = right.accept().await.unwrap();
    assert_eq!(accepted.role, PeerRole::Peer { name: "left".into() });
    assert!(accepted.certificate.is_some());
    right.close("leaving");
    assert!(matches!(dialing.await.unwrap(), Err(Error::Connection { .. })));
    assert!(accepted.welcome().await.is_err());
}
