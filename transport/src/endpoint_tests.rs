//! What only the inside of an endpoint can try: another version, and a peer that speaks rubbish.
use super::*;
use crate::identity::{Authority, fingerprint};
use crate::limits::STREAMS_MAX;
use crate::link::InboundFrame;
use crate::loopback::probe_frame;
use std::net::UdpSocket;

const ANY: ([u8; 4], u16) = ([127, 0, 0, 1], 0);

fn node(authority: &Authority, name: &str) -> Endpoint {
    let options = TransportOptions::default();
    Endpoint::bind(ANY.into(), authority.identity(name).unwrap(), Admit::Certified, &options).unwrap()
}

#[tokio::test]
async fn another_version_is_refused_with_both_versions_named() {
    let authority = Authority::create().unwrap();
    let (left, right) = (node(&authority, "left"), node(&authority, "right"));
    let config = tls::client(&left.identity().unwrap()).unwrap();
    let role = Role::Peer { name: "left".into() };
    let error =
        left.dial_as(right.local_addr(), "right", config, role, PROTOCOL + 1).await.unwrap_err().to_string();
    assert!(error.contains("protocol 2)") && error.contains("protocol 3)"), "{error}");
}

#[tokio::test]
async fn a_name_that_the_certificate_does_not_prove_is_refused() {
    let authority = Authority::create().unwrap();
    let (left, right) = (node(&authority, "left"), node(&authority, "right"));
    let config = tls::client(&left.identity().unwrap()).unwrap();
    let role = Role::Peer { name: "somebody-else".into() };
    let error =
        left.dial_as(right.local_addr(), "right", config, role, PROTOCOL).await.unwrap_err().to_string();
    assert!(error.contains("does not prove the name"), "{error}");
}

#[tokio::test]
async fn a_peer_that_speaks_rubbish_is_cut_off_and_the_endpoint_lives_on() {
    let authority = Authority::create().unwrap();
    let (left, right) = (node(&authority, "left"), node(&authority, "right"));
    let config = tls::client(&left.identity().unwrap()).unwrap();
    let accepting = right.clone();
    let accepted = tokio::spawn(async move { accepting.next_peer().await.unwrap() });
    let role = Role::Peer { name: "left".into() };
    let (connection, ..) = left.dial(right.local_addr(), "right", config, role).await.unwrap();
    let mut inbound = accepted.await.unwrap().serve();
    let mut stream = connection.open_uni().await.unwrap();
    stream.write_all(&[0xaa; 4096]).await.unwrap();
    assert!(inbound.next().await.is_none(), "the link is closed");
    connection.closed().await;

    let accepting = right.clone();
    let accepted = tokio::spawn(async move { accepting.next_peer().await.unwrap() });
    let link = left.connect(right.local_addr(), "right").await.unwrap();
    let mut inbound = accepted.await.unwrap().serve();
    link.send(probe_frame(10)).await.unwrap();
    assert_eq!(inbound.next().await.unwrap().frame, probe_frame(10));
}

/// A node that is attacked, with the attacker's bare connection and an honest peer's link.
struct Attacked {
    right: Endpoint,
    attacker: Connection,
    inbound: crate::link::Inbound,
    honest: Link,
    _ends: (Endpoint, Endpoint),
}

impl Attacked {
    async fn new() -> Self {
        let authority = Authority::create().unwrap();
        let (left, right, third) =
            (node(&authority, "left"), node(&authority, "right"), node(&authority, "third"));
        let config = tls::client(&left.identity().unwrap()).unwrap();
        let accepting = right.clone();
        let accepted = tokio::spawn(async move { accepting.next_peer().await.unwrap() });
        let role = Role::Peer { name: "left".into() };
        let (attacker, ..) = left.dial(right.local_addr(), "right", config, role).await.unwrap();
        let inbound = accepted.await.unwrap().serve();
        let accepting = right.clone();
        let accepted = tokio::spawn(async move { accepting.next_peer().await.unwrap() });
        let honest = third.connect(right.local_addr(), "right").await.unwrap();
        let mut frames = accepted.await.unwrap().serve();
        tokio::spawn(async move {
            while let Some(InboundFrame { frame, reply }) = frames.next().await {
                if let Some(reply) = reply {
                    reply.reply(frame).await.unwrap();
                }
            }
        });
        Self { right, attacker, inbound, honest, _ends: (left, third) }
    }

    /// Whoever is honest is answered, at once.
    async fn goes_on(&self) {
        let answer = self.honest.request_within(probe_frame(5_000), Duration::from_secs(5)).await;
        assert_eq!(answer.expect("an answer"), probe_frame(5_000));
    }

    async fn must_cut_off(mut self) {
        self.goes_on().await;
        let end = tokio::time::timeout(Duration::from_secs(5), self.inbound.next()).await;
        assert!(matches!(end, Ok(None)), "the link is closed");
        self.attacker.closed().await;
        assert!(self.right.refused() >= 1, "it is counted");
        self.goes_on().await;
    }
}

/// A frame's first bytes, with tensors that are far beyond any bound.
fn lying() -> Vec<u8> {
    let mut bytes = probe_frame(1_000).encode().unwrap().concat();
    // The lengths stand behind the fixed head: whatever they are, they are too much now.
    for byte in bytes.iter_mut().skip(crate::frame::FIXED) {
        *byte = 0xff;
    }
    bytes
}

#[tokio::test]
async fn a_peer_that_lies_about_lengths_is_cut_off() {
    let attacked = Attacked::new().await;
    let mut stream = attacked.attacker.open_uni().await.unwrap();
    stream.write_all(&lying()).await.unwrap();
    attacked.must_cut_off().await;
}

#[tokio::test]
async fn a_peer_that_stalls_in_the_middle_of_a_frame_is_cut_off() {
    let attacked = Attacked::new().await;
    let whole = probe_frame(100_000).encode().unwrap().concat();
    let mut stream = attacked.attacker.open_uni().await.unwrap();
    stream.write_all(&whole[..whole.len() / 2]).await.unwrap();
    attacked.must_cut_off().await;
}

#[tokio::test]
async fn streams_that_are_opened_and_abandoned_hold_up_nobody() {
    let attacked = Attacked::new().await;
    let whole = probe_frame(10_000).encode().unwrap().concat();
    for round in 0..3 * STREAMS_MAX {
        let mut stream = attacked.attacker.open_uni().await.unwrap();
        stream.write_all(&whole[..64]).await.unwrap();
        let _ = stream.reset(VarInt::from_u32(1));
        if round % STREAMS_MAX == 0 {
            attacked.goes_on().await;
        }
    }
    attacked.goes_on().await;
}

#[tokio::test]
async fn a_peer_that_floods_fills_its_own_link_and_no_other() {
    let attacked = Attacked::new().await;
    // Nobody takes its frames up: beyond what may wait, its streams wait on its side.
    let attacker = attacked.attacker.clone();
    let flood = tokio::spawn(async move {
        let whole = probe_frame(10_000).encode().unwrap().concat();
        let mut sent = 0u32;
        while let Ok(Ok(mut stream)) =
            tokio::time::timeout(Duration::from_millis(300), attacker.open_uni()).await
        {
            if tokio::time::timeout(Duration::from_millis(300), stream.write_all(&whole)).await.is_err() {
                break;
            }
            let _ = stream.finish();
            sent += 1;
            assert!(sent < 100_000, "somebody takes all of it up");
        }
        sent
    });
    for _ in 0..20 {
        attacked.goes_on().await;
    }
    assert!(flood.await.unwrap() > 0);
    attacked.goes_on().await;
}

#[tokio::test]
async fn strangers_that_knock_and_say_nothing_are_dropped_and_counted() {
    let attacked = Attacked::new().await;
    let stranger = Authority::create().unwrap();
    let other = node(&stranger, "left");
    for _ in 0..20 {
        assert!(other.connect(attacked.right.local_addr(), "right").await.is_err());
    }
    // Bytes that are no QUIC at all.
    let socket = UdpSocket::bind(SocketAddr::from(ANY)).unwrap();
    for length in [0, 1, 20, 1_200, 30_000] {
        socket.send_to(&vec![0x5a; length], attacked.right.local_addr()).unwrap();
    }
    attacked.goes_on().await;
}

#[tokio::test]
async fn a_revoked_certificate_lets_nobody_in_and_nobody_is_dialled_who_has_one() {
    let authority = Authority::create().unwrap();
    let (left, right) = (node(&authority, "left"), node(&authority, "right"));
    let accepting = right.clone();
    tokio::spawn(async move {
        // A link ends with its last handle.
        let mut kept = Vec::new();
        while let Some(link) = accepting.next_peer().await {
            kept.push(link);
        }
    });
    let link = left.connect(right.local_addr(), "right").await.unwrap();
    let (of_right, of_left) =
        (link.certificate().unwrap(), fingerprint(&left.identity().unwrap().certificate));
    left.revoke([of_right]);
    let error = left.connect(right.local_addr(), "right").await.unwrap_err().to_string();
    assert!(error.contains("not trusted"), "{error}");
    right.revoke([of_left]);
    let third = node(&authority, "third");
    assert!(third.connect(right.local_addr(), "right").await.is_ok());
    let fresh = node(&authority, "left");
    assert!(fresh.connect(right.local_addr(), "right").await.is_ok(), "another certificate of the same name");
    let other =
        Endpoint::bind(ANY.into(), left.identity().unwrap(), Admit::Certified, &TransportOptions::default());
    let error = other.unwrap().connect(right.local_addr(), "right").await.unwrap_err().to_string();
    assert!(error.contains("not good any more"), "{error}");
}

#[tokio::test]
async fn no_node_passes_for_the_supervisor() {
    let authority = Authority::create().unwrap();
    assert!(
        authority.issue(KeyRequest::new().unwrap().der(), "Supervisor", Duration::from_secs(60)).is_err()
    );
    let certificate = authority.identity("node-1").unwrap().certificate;
    assert!(tls::is_named(&certificate, "node-1"));
    assert!(!tls::is_named(&certificate, SUPERVISOR) && !tls::is_named(&certificate, "node-1.node"));
    assert!(!tls::is_named(&authority.identity(SUPERVISOR).unwrap().certificate, "supervisor.node"));
}
