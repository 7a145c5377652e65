//! What only the inside of an endpoint can try: another version, and a peer that speaks rubbish.
use super::*;
use crate::identity::Authority;
use crate::loopback::probe_frame;

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
    let accepted = tokio::spawn(async move { accepting.accept_peer().await.unwrap() });
    let role = Role::Peer { name: "left".into() };
    let (connection, ..) = left.dial(right.local_addr(), "right", config, role).await.unwrap();
    let mut inbound = accepted.await.unwrap().serve();
    let mut stream = connection.open_uni().await.unwrap();
    stream.write_all(&[0xaa; 4096]).await.unwrap();
    assert!(inbound.next().await.is_none(), "the link is closed");
    connection.closed().await;

    let accepting = right.clone();
    let accepted = tokio::spawn(async move { accepting.accept_peer().await.unwrap() });
    let link = left.connect(right.local_addr(), "right").await.unwrap();
    let mut inbound = accepted.await.unwrap().serve();
    link.send(probe_frame(10)).await.unwrap();
    assert_eq!(inbound.next().await.unwrap().frame, probe_frame(10));
}
