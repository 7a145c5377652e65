//! Tests that need a bare QUIC connection: another protocol version, malformed and hostile peers.
use super::*;
use crate::endpoint::Endpoint;
use crate::handshake::{PROTOCOL, PeerRole};
use crate::identity::{Authority, KeyRequest, SUPERVISOR, fingerprint};
use crate::limits::STREAMS_MAX;
use crate::link::{Inbound, InboundFrame, Link};
use crate::loopback::probe_frame;
use crate::refusal::RefusalCode;
use std::time::Duration;

const ANY: ([u8; 4], u16) = ([127, 0, 0, 1], 0);

fn node(authority: &Authority, name: &str) -> Endpoint {
    let options = TransportOptions::default();
    Endpoint::bind(ANY.into(), authority.identity(name).unwrap(), ClientAuth::Required, &options).unwrap()
}

/// The bare socket of the node `left`, and a dial from it to `right` under any name and version.
struct Left {
    socket: QuicSocket,
    identity: Identity,
}

impl Left {
    fn new(authority: &Authority) -> Self {
        let (options, refused) = (TransportOptions::default(), RefusedCount::default());
        let identity = authority.identity("left").unwrap();
        let server = Some((identity.clone(), ClientAuth::Required));
        let args = SocketArgs { address: ANY.into(), server, options: &options, refused };
        Self { socket: QuicSocket::open(args, None).unwrap(), identity }
    }

    fn dial(&self, right: &Endpoint, name: &str, protocol: u16) -> Dial {
        let credential = Credential::Certificate(self.identity.clone());
        let role = PeerRole::Peer { name: name.into() };
        Dial { protocol, ..Dial::new(right.local_addr(), "right", credential, role) }
    }

    async fn connect(&self, right: &Endpoint) -> (Connection, Control) {
        let (connection, _, control) = self.socket.connect(self.dial(right, "left", PROTOCOL)).await.unwrap();
        (connection, control)
    }
}

#[tokio::test]
async fn another_version_is_refused_with_both_versions_named() {
    let authority = Authority::create().unwrap();
    let (left, right) = (Left::new(&authority), node(&authority, "right"));
    let error = left.socket.connect(left.dial(&right, "left", PROTOCOL + 1)).await.unwrap_err();
    assert_eq!(error.refusal_code(), Some(RefusalCode::Version));
    let error = error.to_string();
    let (ours, theirs) = (format!("protocol {PROTOCOL})"), format!("protocol {})", PROTOCOL + 1));
    assert!(error.contains(&ours) && error.contains(&theirs), "{error}");
}

#[tokio::test]
async fn a_name_that_the_certificate_does_not_prove_is_refused() {
    let authority = Authority::create().unwrap();
    let (left, right) = (Left::new(&authority), node(&authority, "right"));
    let error = left.socket.connect(left.dial(&right, "another-name", PROTOCOL)).await.unwrap_err();
    assert_eq!(error.refusal_code(), Some(RefusalCode::NameNotProven));
    assert!(error.to_string().contains("does not prove the name"), "{error}");
}

#[tokio::test]
async fn a_malformed_frame_closes_its_link_and_not_the_endpoint() {
    let authority = Authority::create().unwrap();
    let (left, right, third) = (Left::new(&authority), node(&authority, "right"), node(&authority, "third"));
    let accepting = right.clone();
    let accepted = tokio::spawn(async move { accepting.next_peer().await.unwrap() });
    let (connection, _control) = left.connect(&right).await;
    let mut inbound = accepted.await.unwrap().serve();
    let mut stream = connection.open_uni().await.unwrap();
    stream.write_all(&[0xaa; 4096]).await.unwrap();
    assert!(inbound.next().await.is_none(), "the link is closed");
    connection.closed().await;

    let accepting = right.clone();
    let accepted = tokio::spawn(async move { accepting.next_peer().await.unwrap() });
    let link = third.connect(right.local_addr(), "right").await.unwrap();
    let mut inbound = accepted.await.unwrap().serve();
    link.send(probe_frame(10)).await.unwrap();
    assert_eq!(inbound.next().await.unwrap().frame, probe_frame(10));
}

/// A node under attack, with the attacker's bare connection and an honest peer's link.
struct Attacked {
    right: Endpoint,
    attacker: Connection,
    inbound: Inbound,
    honest: Link,
    _ends: (Left, Endpoint),
}

impl Attacked {
    async fn new() -> Self {
        let authority = Authority::create().unwrap();
        let (left, right, third) =
            (Left::new(&authority), node(&authority, "right"), node(&authority, "third"));
        let accepting = right.clone();
        let accepted = tokio::spawn(async move { accepting.next_peer().await.unwrap() });
        let (attacker, _control) = left.connect(&right).await;
        let inbound = accepted.await.unwrap().serve();
        let accepting = right.clone();
        let accepted = tokio::spawn(async move { accepting.next_peer().await.unwrap() });
        let honest = third.connect(right.local_addr(), "right").await.unwrap();
        let mut frames = accepted.await.unwrap().serve();
        tokio::spawn(async move {
            while let Some(InboundFrame { frame, reply, .. }) = frames.next().await {
                if let Some(reply) = reply {
                    reply.reply(frame).await.unwrap();
                }
            }
        });
        Self { right, attacker, inbound, honest, _ends: (left, third) }
    }

    /// The honest peer gets its reply, at once.
    async fn serves_the_honest_peer(&self) {
        let answer = self.honest.request_within(probe_frame(5_000), Duration::from_secs(5)).await;
        assert_eq!(answer.expect("an answer"), probe_frame(5_000));
    }

    async fn must_close_the_link(mut self) {
        self.serves_the_honest_peer().await;
        let end = tokio::time::timeout(Duration::from_secs(5), self.inbound.next()).await;
        assert!(matches!(end, Ok(None)), "the link is closed");
        self.attacker.closed().await;
        assert!(self.right.refused() >= 1, "it is counted");
        self.serves_the_honest_peer().await;
    }
}

/// The first bytes of a frame whose tensors exceed every bound.
fn oversized() -> Vec<u8> {
    let mut bytes = probe_frame(1_000).encode().unwrap().concat();
    // The lengths follow the fixed header; now all are too large.
    for byte in bytes.iter_mut().skip(crate::frame::FIXED) {
        *byte = 0xff;
    }
    bytes
}

#[tokio::test]
async fn oversized_lengths_close_the_link() {
    let attacked = Attacked::new().await;
    let mut stream = attacked.attacker.open_uni().await.unwrap();
    stream.write_all(&oversized()).await.unwrap();
    attacked.must_close_the_link().await;
}

#[tokio::test]
async fn a_stall_in_the_middle_of_a_frame_closes_the_link() {
    let attacked = Attacked::new().await;
    let whole = probe_frame(100_000).encode().unwrap().concat();
    let mut stream = attacked.attacker.open_uni().await.unwrap();
    stream.write_all(&whole[..whole.len() / 2]).await.unwrap();
    attacked.must_close_the_link().await;
}

#[tokio::test]
async fn abandoned_streams_block_no_other_link() {
    let attacked = Attacked::new().await;
    let whole = probe_frame(10_000).encode().unwrap().concat();
    for round in 0..3 * STREAMS_MAX {
        let mut stream = attacked.attacker.open_uni().await.unwrap();
        stream.write_all(&whole[..64]).await.unwrap();
        let _ = stream.reset(VarInt::from_u32(1));
        if round % STREAMS_MAX == 0 {
            attacked.serves_the_honest_peer().await;
        }
    }
    attacked.serves_the_honest_peer().await;
}

#[tokio::test]
async fn a_flood_of_frames_fills_its_own_link_and_no_other() {
    let attacked = Attacked::new().await;
    // Its frames are not received: when the queue is full, its streams wait on its side.
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
            assert!(sent < 100_000, "all of it is received");
        }
        sent
    });
    for _ in 0..20 {
        attacked.serves_the_honest_peer().await;
    }
    assert!(flood.await.unwrap() > 0);
    attacked.serves_the_honest_peer().await;
}

#[tokio::test]
async fn unauthenticated_peers_and_arbitrary_datagrams_do_no_harm() {
    let attacked = Attacked::new().await;
    let stranger = Authority::create().unwrap();
    let other = node(&stranger, "left");
    for _ in 0..20 {
        assert!(other.connect(attacked.right.local_addr(), "right").await.is_err());
    }
    // Bytes that are not QUIC.
    let socket = UdpSocket::bind(SocketAddr::from(ANY)).unwrap();
    for length in [0, 1, 20, 1_200, 30_000] {
        socket.send_to(&vec![0x5a; length], attacked.right.local_addr()).unwrap();
    }
    attacked.serves_the_honest_peer().await;
}

#[tokio::test]
async fn a_revoked_certificate_is_refused_in_both_directions() {
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
    let error = left.connect(right.local_addr(), "right").await.unwrap_err();
    assert_eq!(error.refusal_code(), Some(RefusalCode::CertificateRevoked));
    assert!(error.to_string().contains("the certificate of right is revoked"), "{error}");
    right.revoke([of_left]);
    let third = node(&authority, "third");
    assert!(third.connect(right.local_addr(), "right").await.is_ok());
    let fresh = node(&authority, "left");
    assert!(fresh.connect(right.local_addr(), "right").await.is_ok(), "another certificate of the same name");
    let other = Endpoint::bind(
        ANY.into(),
        left.identity().unwrap(),
        ClientAuth::Required,
        &TransportOptions::default(),
    );
    let error = other.unwrap().connect(right.local_addr(), "right").await.unwrap_err();
    assert_eq!(error.refusal_code(), Some(RefusalCode::CertificateRevoked));
    assert!(error.to_string().contains("the certificate is revoked"), "{error}");
}

#[test]
fn no_node_can_pose_as_the_supervisor() {
    let authority = Authority::create().unwrap();
    assert!(
        authority.issue(KeyRequest::new().unwrap().der(), "Supervisor", Duration::from_secs(60)).is_err()
    );
    let certificate = authority.identity("node-1").unwrap().certificate;
    assert!(tls::is_named(&certificate, "node-1"));
    assert!(!tls::is_named(&certificate, SUPERVISOR) && !tls::is_named(&certificate, "node-1.node"));
    assert!(!tls::is_named(&authority.identity(SUPERVISOR).unwrap().certificate, "supervisor.node"));
}
