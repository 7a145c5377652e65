//! Links over real QUIC on loopback: who gets in, what gets through, what happens when a peer is gone or speaks rubbish.
#![expect(clippy::expect_used, clippy::unwrap_used, reason = "tests")]

use bytes::Bytes;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};
use volary_transport::loopback::probe_frame;
use volary_transport::{
    AccessRole, AccessToken, AccessTokenTerms, Admit, Authority, Dtype, Endpoint, Frame, Issued, Kind, Link,
    Part, Role, TraceHeader, TransportOptions, join,
};

const ANY: ([u8; 4], u16) = ([127, 0, 0, 1], 0);

fn options() -> TransportOptions {
    TransportOptions::default()
}

fn node(authority: &Authority, name: &str) -> Endpoint {
    Endpoint::bind(ANY.into(), authority.identity(name).unwrap(), Admit::Certified, &options()).unwrap()
}

fn terms(lifetime: Option<Duration>) -> AccessTokenTerms {
    AccessTokenTerms { lifetime, ..AccessTokenTerms::default() }
}

/// A certificate that nobody will show.
fn issued() -> Issued {
    Issued { certificate: vec![1, 2, 3], lifetime: Duration::from_secs(60) }
}

async fn pair(authority: &Authority) -> (Link, Link, Endpoint, Endpoint) {
    let (left, right) = (node(authority, "left"), node(authority, "right"));
    let accepting = right.clone();
    let accepted = tokio::spawn(async move { accepting.next_peer().await });
    let link = left.connect(right.local_addr(), "right").await.expect("a link");
    (link, accepted.await.unwrap().expect("a link"), left, right)
}

/// A supervisor that lets in whoever holds `token`.
fn supervisor(
    authority: &Authority,
    record: volary_transport::AccessTokenRecord,
    now: u64,
) -> (Endpoint, SocketAddr) {
    let endpoint =
        Endpoint::bind(ANY.into(), authority.identity("supervisor").unwrap(), Admit::Anybody, &options())
            .unwrap();
    let (door, address) = (endpoint.clone(), endpoint.local_addr());
    let ca = authority.certificate().to_vec();
    tokio::spawn(async move {
        while let Some(accepted) = door.accept().await {
            match accepted.role.clone() {
                Role::Join { token, .. } => {
                    let verdict = token
                        .parse::<AccessToken>()
                        .and_then(|token| record.verify(&token, AccessRole::Node, now));
                    match verdict {
                        Ok(()) => accepted.certify("node-1".into(), issued(), ca.clone()).await.unwrap(),
                        Err(error) => accepted.refuse(&error.to_string()).await,
                    }
                }
                Role::Node { .. } => {
                    let (_link, mut sender, mut receiver) = accepted.welcome().await.unwrap();
                    tokio::spawn(async move {
                        while let Ok(Some(text)) = receiver.recv::<String>().await {
                            sender.send(&text).await.unwrap();
                        }
                    });
                }
                _ => accepted.refuse("not here").await,
            }
        }
    });
    (endpoint, address)
}

#[tokio::test]
async fn a_token_is_exchanged_for_an_identity_and_a_bad_one_is_told_why() {
    let authority = Authority::create().unwrap();
    let lifetime = Some(Duration::from_secs(60));
    let (token, record) =
        AccessToken::issue(authority.fingerprint(), AccessRole::Node, 1_000, terms(lifetime)).unwrap();
    let (_endpoint, address) = supervisor(&authority, record.clone(), 1_000);
    assert_eq!(join(address, &token, None, &options()).await.unwrap().name(), "node-1");

    let (other, _) =
        AccessToken::issue(authority.fingerprint(), AccessRole::Node, 1_000, terms(lifetime)).unwrap();
    let error = join(address, &other, None, &options()).await.unwrap_err();
    assert_eq!(error.to_string(), "refused: the token's secret is wrong");

    let (_endpoint, late) = supervisor(&authority, record, 1_060);
    let error = join(late, &token, None, &options()).await.unwrap_err();
    assert_eq!(error.to_string(), "refused: the token has expired");
}

#[tokio::test]
async fn a_token_of_another_cluster_never_reaches_the_supervisor() {
    let (authority, other) = (Authority::create().unwrap(), Authority::create().unwrap());
    let (_, record) =
        AccessToken::issue(authority.fingerprint(), AccessRole::Node, 0, AccessTokenTerms::default())
            .unwrap();
    let (_endpoint, address) = supervisor(&authority, record, 0);
    let (stranger, _) =
        AccessToken::issue(other.fingerprint(), AccessRole::Node, 0, AccessTokenTerms::default()).unwrap();
    let error = join(address, &stranger, None, &options()).await.unwrap_err().to_string();
    assert!(error.contains("another cluster"), "{error}");
}

#[tokio::test]
async fn nodes_need_a_certificate_of_the_same_authority_and_their_own_name() {
    let (authority, other) = (Authority::create().unwrap(), Authority::create().unwrap());
    let right = node(&authority, "right");
    let accepting = right.clone();
    tokio::spawn(async move {
        // Kept, since a link ends with its last handle.
        let mut links = Vec::new();
        while let Some(link) = accepting.next_peer().await {
            links.push(link);
        }
    });
    assert!(node(&other, "left").connect(right.local_addr(), "right").await.is_err(), "another authority");
    assert!(node(&authority, "left").connect(right.local_addr(), "middle").await.is_err(), "another name");
    let (token, _) =
        AccessToken::issue(authority.fingerprint(), AccessRole::Operator, 0, AccessTokenTerms::default())
            .unwrap();
    let bare = Endpoint::dial_only(right.local_addr(), &options()).unwrap();
    assert!(bare.operate(right.local_addr(), &token).await.is_err(), "no certificate");
    assert!(node(&authority, "left").connect(right.local_addr(), "right").await.is_ok());
}

#[tokio::test]
async fn the_supervisor_hears_only_nodes_that_prove_their_names() {
    let authority = Authority::create().unwrap();
    let (_, record) =
        AccessToken::issue(authority.fingerprint(), AccessRole::Node, 0, AccessTokenTerms::default())
            .unwrap();
    let (_endpoint, address) = supervisor(&authority, record, 0);
    let endpoint = node(&authority, "a");
    let (_link, mut sender, mut receiver) = endpoint.connect_supervisor(address).await.unwrap();
    sender.send(&"hello".to_owned()).await.unwrap();
    assert_eq!(receiver.recv::<String>().await.unwrap().as_deref(), Some("hello"));
}

fn patterned(length: usize, seed: u8) -> Frame {
    let data: Vec<u8> = (0..length * 4).map(|i| (i as u8).wrapping_mul(31).wrapping_add(seed)).collect();
    let part = Part { dtype: Dtype::F32, shape: vec![length as u64], data: data.into() };
    let meta = Bytes::from(vec![seed]);
    Frame { kind: Kind::Forward, epoch: 1, step: 2, trace: TraceHeader::default(), meta, parts: vec![part] }
}

fn echo(link: &Link) {
    let mut inbound = link.serve();
    tokio::spawn(async move {
        while let Some(inbound) = inbound.next().await {
            if let Some(reply) = inbound.reply {
                tokio::spawn(async move { reply.reply(inbound.frame).await });
            }
        }
    });
}

#[tokio::test]
async fn a_hundred_requests_at_once_come_back_as_they_were() {
    let authority = Authority::create().unwrap();
    let (link, other, _left, _right) = pair(&authority).await;
    echo(&other);
    let calls = (0..100u8).map(|i| {
        let link = link.clone();
        tokio::spawn(async move {
            let frame = patterned(usize::from(i) * 777, i);
            assert_eq!(link.request(frame.clone()).await.unwrap(), frame);
        })
    });
    for call in calls.collect::<Vec<_>>() {
        call.await.unwrap();
    }
}

#[tokio::test]
async fn a_big_frame_does_not_hold_up_a_small_one() {
    let authority = Authority::create().unwrap();
    let (link, other, _left, _right) = pair(&authority).await;
    echo(&other);
    let bulk = link.clone();
    let bulk = tokio::spawn(async move { bulk.request(probe_frame(128 << 20)).await });
    tokio::time::sleep(Duration::from_millis(20)).await;
    let start = Instant::now();
    link.request(probe_frame(16)).await.unwrap();
    let small = start.elapsed();
    assert!(!bulk.is_finished(), "the big one was meant to be under way");
    assert!(small < Duration::from_millis(500), "{small:?}");
    bulk.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_control_message_overtakes_bulk() {
    let authority = Authority::create().unwrap();
    let (link, other, _left, _right) = pair(&authority).await;
    echo(&other);
    let (mut near, mut far) = (link.control().unwrap(), other.control().unwrap());
    tokio::spawn(async move {
        while let Ok(Some(number)) = far.1.recv::<u32>().await {
            far.0.send(&number).await.unwrap();
        }
    });
    let bulk = link.clone();
    let bulk = tokio::spawn(async move { bulk.request(probe_frame(128 << 20)).await });
    tokio::time::sleep(Duration::from_millis(20)).await;
    let start = Instant::now();
    near.0.send(&5u32).await.unwrap();
    assert_eq!(near.1.recv::<u32>().await.unwrap(), Some(5));
    let trip = start.elapsed();
    assert!(!bulk.is_finished(), "the big one was meant to be under way");
    assert!(trip < Duration::from_millis(500), "{trip:?}");
    bulk.await.unwrap().unwrap();
}

/// From a token to a link between nodes, as a cluster does it.
#[tokio::test]
async fn the_certificate_that_a_token_buys_opens_links_between_nodes() {
    let authority = Arc::new(Authority::create().unwrap());
    let (token, record) =
        AccessToken::issue(authority.fingerprint(), AccessRole::Node, 0, AccessTokenTerms::default())
            .unwrap();
    let door =
        Endpoint::bind(ANY.into(), authority.identity("supervisor").unwrap(), Admit::Anybody, &options())
            .unwrap();
    let address = door.local_addr();
    let issuing = Arc::clone(&authority);
    tokio::spawn(async move {
        while let Some(accepted) = door.accept().await {
            let Role::Join { token, request, name } = accepted.role.clone() else {
                continue;
            };
            record.verify(&token.parse().unwrap(), AccessRole::Node, 0).unwrap();
            let name = name.expect("a name");
            let certificate = issuing.issue(&request, &name, Duration::from_secs(3_600)).unwrap();
            accepted.certify(name, certificate, issuing.certificate().to_vec()).await.unwrap();
        }
    });
    let enter = async |name: &str| {
        let identity = join(address, &token, Some(name.into()), &options()).await.unwrap();
        assert_eq!(identity.name(), name);
        Endpoint::bind(ANY.into(), identity, Admit::Certified, &options()).unwrap()
    };
    let (left, right) = (enter("left").await, enter("right").await);
    let accepting = right.clone();
    let accepted = tokio::spawn(async move { accepting.next_peer().await.unwrap() });
    let link = left.connect(right.local_addr(), "right").await.unwrap();
    let other = accepted.await.unwrap();
    assert_eq!((link.peer(), other.peer()), ("right", "left"));
    echo(&other);
    assert_eq!(link.request(patterned(1_000, 1)).await.unwrap(), patterned(1_000, 1));
}

#[tokio::test]
async fn a_closed_endpoint_closes_its_links_and_takes_up_no_more() {
    let authority = Authority::create().unwrap();
    let (link, _other, _left, right) = pair(&authority).await;
    right.close("the node leaves");
    let reason = tokio::time::timeout(Duration::from_secs(10), link.closed()).await.expect("noticed");
    assert_eq!(reason, "closed by peer: the node leaves (code 0)");
    assert!(right.accept().await.is_none());
}

#[tokio::test]
async fn a_peer_that_is_gone_is_noticed() {
    let authority = Authority::create().unwrap();
    let (link, other, left, right) = pair(&authority).await;
    drop((other, right));
    let reason = tokio::time::timeout(Duration::from_secs(10), link.closed()).await.expect("noticed");
    assert!(!reason.is_empty());
    assert!(link.request(probe_frame(1)).await.is_err());
    drop(left);
}

#[tokio::test]
async fn an_address_in_use_is_named() {
    let authority = Authority::create().unwrap();
    let first = node(&authority, "first");
    let again =
        Endpoint::bind(first.local_addr(), authority.identity("b").unwrap(), Admit::Certified, &options());
    let error = again.unwrap_err().to_string();
    assert!(error.contains(&first.local_addr().to_string()) && error.contains("in use"), "{error}");
}

#[test]
fn an_authority_is_kept_for_its_owner_only_and_comes_back() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("identity");
    let made = Authority::load_or_create(&path).unwrap();
    assert_eq!(Authority::load_or_create(&path).unwrap().fingerprint(), made.fingerprint());
    for file in std::fs::read_dir(&path).unwrap() {
        assert_eq!(file.unwrap().metadata().unwrap().permissions().mode() & 0o777, 0o600);
    }
    assert!(made.identity("../up").is_err());
    std::fs::remove_file(path.join("ca.key")).unwrap();
    let error = Authority::load_or_create(&path).unwrap_err().to_string();
    assert!(error.contains("ca.key"), "a lost key is not replaced by another authority: {error}");
}

#[test]
fn a_secret_is_private_even_where_a_readable_leftover_lies() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().unwrap();
    let leftover = folder.path().join("node.new");
    std::fs::write(&leftover, "old").unwrap();
    std::fs::set_permissions(&leftover, std::fs::Permissions::from_mode(0o644)).unwrap();
    let path = folder.path().join("node.token");
    volary_transport::write_secret(&path, b"secret").unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), b"secret");
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    assert!(!leftover.exists());
}
