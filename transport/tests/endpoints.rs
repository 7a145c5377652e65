//! Endpoints over QUIC and in memory: joining, admission, refusals, closing. The same tests run over both
//! networks.
#![expect(clippy::expect_used, clippy::unwrap_used, reason = "tests")]

use std::sync::Arc;
use std::time::Duration;
use volary_transport::loopback::probe_frame;
use volary_transport::{
    AccessRole, AccessToken, AccessTokenRecord, AccessTokenTerms, Authority, ClientAuth, Endpoint, Error,
    IssuedCertificate, Link, Network, PeerRole, Refusal, RefusalCode, TransportOptions, memory,
};

const ANY: ([u8; 4], u16) = ([127, 0, 0, 1], 0);
const LONG: Duration = Duration::from_secs(20);

macro_rules! over_both {
    ($($name:ident)*) => {
        mod quic {
            use super::*;
            $(#[tokio::test]
            async fn $name() {
                tokio::time::timeout(LONG, super::$name(Network::quic())).await.expect("in time");
            })*
        }
        mod in_memory {
            use super::*;
            $(#[tokio::test]
            async fn $name() {
                let network = memory::Network::new();
                tokio::time::timeout(LONG, super::$name(network.handle())).await.expect("in time");
            })*
        }
    };
}

over_both! {
    a_token_is_exchanged_for_an_identity_and_an_invalid_one_is_refused
    a_token_of_another_cluster_never_reaches_the_supervisor
    nodes_need_a_certificate_of_the_same_authority_and_the_dialed_name
    a_node_refuses_the_role_of_a_supervisor
    the_supervisor_admits_nodes_that_prove_their_names
    an_operator_needs_no_certificate
    a_joined_node_can_link_to_other_nodes
    an_identity_is_replaced_by_one_of_the_same_name_only
    a_revoked_certificate_is_refused_in_both_directions
    a_closed_endpoint_closes_its_links_and_accepts_no_more
    the_end_of_a_peer_is_noticed
    an_address_in_use_is_named
    a_refused_link_has_the_code
}

fn options() -> TransportOptions {
    TransportOptions::default()
}

fn node(network: &Network, authority: &Authority, name: &str) -> Endpoint {
    let identity = authority.identity(name).unwrap();
    network.bind(ANY.into(), identity, ClientAuth::Required, &options()).unwrap()
}

fn token(
    authority: &Authority,
    role: AccessRole,
    lifetime_s: Option<u64>,
) -> (AccessToken, AccessTokenRecord) {
    let lifetime = lifetime_s.map(Duration::from_secs);
    let terms = AccessTokenTerms { lifetime, ..AccessTokenTerms::default() };
    AccessToken::issue(authority.fingerprint(), role, 1_000, terms).unwrap()
}

/// Keeps the links of an endpoint open: a link closes with its last handle.
fn keep_links(endpoint: &Endpoint) {
    let accepting = endpoint.clone();
    tokio::spawn(async move {
        let mut links = Vec::new();
        while let Some(link) = accepting.next_peer().await {
            links.push(link);
        }
    });
}

async fn pair(network: &Network, authority: &Authority) -> (Link, Link, Endpoint, Endpoint) {
    let (left, right) = (node(network, authority, "left"), node(network, authority, "right"));
    let accepting = right.clone();
    let accepted = tokio::spawn(async move { accepting.next_peer().await });
    let link = left.connect(right.local_addr(), "right").await.expect("a link");
    (link, accepted.await.unwrap().expect("a link"), left, right)
}

/// A supervisor that admits holders of a token, issues certificates, and echoes on control streams.
struct Supervisor {
    authority: Arc<Authority>,
    record: AccessTokenRecord,
    now_unix_s: u64,
}

impl Supervisor {
    fn start(self, network: &Network) -> Endpoint {
        let identity = self.authority.identity("supervisor").unwrap();
        let endpoint = network.bind(ANY.into(), identity, ClientAuth::Optional, &options()).unwrap();
        let (accepting, supervisor) = (endpoint.clone(), Arc::new(self));
        tokio::spawn(async move {
            while let Some(accepted) = accepting.accept().await {
                tokio::spawn(Arc::clone(&supervisor).serve(accepted));
            }
        });
        endpoint
    }

    async fn serve(self: Arc<Self>, accepted: volary_transport::Accepted) {
        match accepted.role.clone() {
            PeerRole::Join { token, request, name } => match self.check(&token, AccessRole::Node) {
                Ok(()) => {
                    let name = name.unwrap_or_else(|| "node-1".into());
                    let issued: IssuedCertificate =
                        self.authority.issue(&request, &name, Duration::from_secs(3_600)).unwrap();
                    let ca = self.authority.certificate().to_vec();
                    accepted.certify(name, issued, ca).await.unwrap();
                }
                Err(refusal) => accepted.refuse(refusal).await,
            },
            PeerRole::Operator { token } => match self.check(&token, AccessRole::Operator) {
                Ok(()) => echo_control(accepted).await,
                Err(refusal) => accepted.refuse(refusal).await,
            },
            PeerRole::Node { .. } => echo_control(accepted).await,
            PeerRole::Peer { .. } => {
                accepted.refuse(Refusal::new(RefusalCode::NotANode, "this is a supervisor")).await;
            }
        }
    }

    fn check(&self, token: &str, role: AccessRole) -> Result<(), Refusal> {
        let token = token.parse::<AccessToken>()?;
        Ok(self.record.verify(&token, role, self.now_unix_s)?)
    }
}

async fn echo_control(accepted: volary_transport::Accepted) {
    let (_link, mut sender, mut receiver) = accepted.welcome().await.unwrap();
    while let Ok(Some(text)) = receiver.recv::<String>().await {
        sender.send(&text).await.unwrap();
    }
}

fn echo(link: &Link) {
    let mut inbound = link.serve();
    tokio::spawn(async move {
        while let Some(inbound) = inbound.next().await {
            if let Some(reply) = inbound.reply {
                reply.reply(inbound.frame).await.unwrap();
            }
        }
    });
}

async fn a_token_is_exchanged_for_an_identity_and_an_invalid_one_is_refused(network: Network) {
    let authority = Arc::new(Authority::create().unwrap());
    let (valid, record) = token(&authority, AccessRole::Node, Some(60));
    let supervisor =
        Supervisor { authority: Arc::clone(&authority), record: record.clone(), now_unix_s: 1_000 };
    let supervisor = supervisor.start(&network);
    let address = supervisor.local_addr();
    assert_eq!(network.join(address, &valid, None, &options()).await.unwrap().name(), "node-1");

    let (other, _) = token(&authority, AccessRole::Node, Some(60));
    let error = network.join(address, &other, None, &options()).await.unwrap_err();
    assert_eq!(error.refusal_code(), Some(RefusalCode::AccessTokenInvalid));
    assert_eq!(error.to_string(), "refused: the access token's secret is wrong");
    assert_eq!(supervisor.refused(), 1);

    let late = Supervisor { authority: Arc::clone(&authority), record, now_unix_s: 1_060 }.start(&network);
    let error = network.join(late.local_addr(), &valid, None, &options()).await.unwrap_err();
    assert_eq!(error.refusal_code(), Some(RefusalCode::AccessTokenExpired));
    assert_eq!(error.to_string(), "refused: the access token has expired");
}

async fn a_token_of_another_cluster_never_reaches_the_supervisor(network: Network) {
    let (authority, other) = (Arc::new(Authority::create().unwrap()), Authority::create().unwrap());
    let (_, record) = token(&authority, AccessRole::Node, None);
    let supervisor = Supervisor { authority, record, now_unix_s: 1_000 }.start(&network);
    let (stranger, _) = token(&other, AccessRole::Node, None);
    let error = network.join(supervisor.local_addr(), &stranger, None, &options()).await.unwrap_err();
    assert!(error.to_string().contains("another cluster"), "{error}");
    assert!(matches!(error, Error::Connection { .. }));
}

async fn nodes_need_a_certificate_of_the_same_authority_and_the_dialed_name(network: Network) {
    let (authority, other) = (Authority::create().unwrap(), Authority::create().unwrap());
    let right = node(&network, &authority, "right");
    keep_links(&right);
    let (address, left) = (right.local_addr(), node(&network, &authority, "left"));
    assert!(node(&network, &other, "left").connect(address, "right").await.is_err(), "another authority");
    assert!(left.connect(address, "middle").await.is_err(), "another name");
    assert!(left.connect_supervisor(address).await.is_err(), "another kind of certificate");
    let (operator, _) = token(&authority, AccessRole::Operator, None);
    let bare = network.dial_only(address, &options()).unwrap();
    assert!(bare.operate(address, &operator).await.is_err(), "no certificate");
    assert!(bare.connect(address, "right").await.is_err(), "no identity");
    assert!(left.connect(address, "right").await.is_ok());
}

async fn a_node_refuses_the_role_of_a_supervisor(network: Network) {
    // Even a node with a certificate of the supervisor refuses the role.
    let authority = Authority::create().unwrap();
    let right = node(&network, &authority, "supervisor");
    keep_links(&right);
    let left = node(&network, &authority, "left");
    let error = left.connect_supervisor(right.local_addr()).await.unwrap_err();
    assert_eq!(error.refusal_code(), Some(RefusalCode::NotASupervisor));
    assert_eq!(right.refused(), 1);
    assert_eq!(right.refused_counter()(), 1);
}

async fn the_supervisor_admits_nodes_that_prove_their_names(network: Network) {
    let authority = Arc::new(Authority::create().unwrap());
    let (_, record) = token(&authority, AccessRole::Node, None);
    let supervisor = Supervisor { authority: Arc::clone(&authority), record, now_unix_s: 1_000 };
    let supervisor = supervisor.start(&network);
    let endpoint = node(&network, &authority, "a");
    let (link, mut sender, mut receiver) =
        endpoint.connect_supervisor(supervisor.local_addr()).await.unwrap();
    sender.send(&"hello".to_owned()).await.unwrap();
    assert_eq!(receiver.recv::<String>().await.unwrap().as_deref(), Some("hello"));
    assert_eq!(link.remote_address(), supervisor.local_addr());
    let error = endpoint.connect(supervisor.local_addr(), "supervisor").await.unwrap_err();
    assert_eq!(error.refusal_code(), Some(RefusalCode::NotANode));
}

async fn an_operator_needs_no_certificate(network: Network) {
    let authority = Arc::new(Authority::create().unwrap());
    let (operator, record) = token(&authority, AccessRole::Operator, None);
    let supervisor = Supervisor { authority: Arc::clone(&authority), record, now_unix_s: 1_000 };
    let supervisor = supervisor.start(&network);
    let address = supervisor.local_addr();
    let bare = network.dial_only(address, &options()).unwrap();
    let (_link, mut sender, mut receiver) = bare.operate(address, &operator).await.unwrap();
    sender.send(&"status".to_owned()).await.unwrap();
    assert_eq!(receiver.recv::<String>().await.unwrap().as_deref(), Some("status"));
    let error = network.join(address, &operator, None, &options()).await.unwrap_err();
    assert_eq!(error.refusal_code(), Some(RefusalCode::AccessTokenWrongRole));
}

/// From a token to a link between nodes, as a cluster does it.
async fn a_joined_node_can_link_to_other_nodes(network: Network) {
    let authority = Arc::new(Authority::create().unwrap());
    let (token, record) = token(&authority, AccessRole::Node, None);
    let supervisor = Supervisor { authority, record, now_unix_s: 1_000 }.start(&network);
    let address = supervisor.local_addr();
    let enter = async |name: &str| {
        let identity = network.join(address, &token, Some(name.into()), &options()).await.unwrap();
        assert_eq!(identity.name(), name);
        network.bind(ANY.into(), identity, ClientAuth::Required, &options()).unwrap()
    };
    let (left, right) = (enter("left").await, enter("right").await);
    let accepting = right.clone();
    let accepted = tokio::spawn(async move { accepting.next_peer().await.unwrap() });
    let link = left.connect(right.local_addr(), "right").await.unwrap();
    let other = accepted.await.unwrap();
    assert_eq!((link.peer(), other.peer()), ("right", "left"));
    assert_eq!((link.remote_address(), other.remote_address()), (right.local_addr(), left.local_addr()));
    assert!(link.certificate().is_some() && other.certificate().is_some());
    assert_ne!(link.certificate(), other.certificate());
    echo(&other);
    assert_eq!(link.request(probe_frame(1_000)).await.unwrap(), probe_frame(1_000));
}

async fn an_identity_is_replaced_by_one_of_the_same_name_only(network: Network) {
    let (authority, other) = (Authority::create().unwrap(), Authority::create().unwrap());
    let right = node(&network, &authority, "right");
    assert!(right.set_identity(authority.identity("left").unwrap()).is_err(), "another name");
    assert!(right.set_identity(other.identity("right").unwrap()).is_err(), "another authority");
    keep_links(&right);
    let left = node(&network, &authority, "left");
    let before = left.connect(right.local_addr(), "right").await.unwrap();
    right.set_identity(authority.identity("right").unwrap()).unwrap();
    let after = left.connect(right.local_addr(), "right").await.unwrap();
    assert!(before.is_open());
    assert_ne!(before.certificate(), after.certificate());
}

async fn a_revoked_certificate_is_refused_in_both_directions(network: Network) {
    let authority = Authority::create().unwrap();
    let (left, right) = (node(&network, &authority, "left"), node(&network, &authority, "right"));
    let accepting = right.clone();
    let accepted = tokio::spawn(async move { accepting.next_peer().await.unwrap() });
    let link = left.connect(right.local_addr(), "right").await.unwrap();
    let far = accepted.await.unwrap();
    keep_links(&right);
    left.revoke(link.certificate());
    assert!(left.is_revoked(link.certificate()) && !left.is_revoked(far.certificate()));
    let error = left.connect(right.local_addr(), "right").await.unwrap_err();
    assert_eq!(error.refusal_code(), Some(RefusalCode::CertificateRevoked));
    right.revoke(far.certificate());
    let identity = left.identity().unwrap();
    let same = network.bind(ANY.into(), identity, ClientAuth::Required, &options()).unwrap();
    let error = same.connect(right.local_addr(), "right").await.unwrap_err();
    assert_eq!(error.refusal_code(), Some(RefusalCode::CertificateRevoked));
    let fresh = node(&network, &authority, "left");
    assert!(fresh.connect(right.local_addr(), "right").await.is_ok(), "another certificate of that name");
}

async fn a_closed_endpoint_closes_its_links_and_accepts_no_more(network: Network) {
    let authority = Authority::create().unwrap();
    let (link, _other, _left, right) = pair(&network, &authority).await;
    right.close("the node leaves");
    let reason = tokio::time::timeout(Duration::from_secs(10), link.closed()).await.expect("noticed");
    assert_eq!(reason.to_string(), "closed by peer: the node leaves (code 0)");
    assert_eq!(reason.refusal_code(), None);
    assert!(right.accept().await.is_none());
}

async fn the_end_of_a_peer_is_noticed(network: Network) {
    let authority = Authority::create().unwrap();
    let (link, other, left, right) = pair(&network, &authority).await;
    drop((other, right));
    let reason = tokio::time::timeout(Duration::from_secs(10), link.closed()).await.expect("noticed");
    assert!(!reason.to_string().is_empty());
    assert_eq!(link.close_reason(), Some(reason));
    assert!(link.request(probe_frame(1)).await.is_err());
    drop(left);
}

async fn an_address_in_use_is_named(network: Network) {
    let authority = Authority::create().unwrap();
    let first = node(&network, &authority, "first");
    let identity = authority.identity("b").unwrap();
    let second = network.bind(first.local_addr(), identity, ClientAuth::Required, &options());
    let error = second.unwrap_err().to_string();
    assert!(error.contains(&first.local_addr().to_string()) && error.contains("in use"), "{error}");
}

async fn a_refused_link_has_the_code(network: Network) {
    let authority = Authority::create().unwrap();
    let (link, other, _left, _right) = pair(&network, &authority).await;
    other.refuse(&Refusal::new(RefusalCode::RunEnded, "the run has ended"));
    let reason = link.closed().await;
    assert_eq!(reason.refusal_code(), Some(RefusalCode::RunEnded));
    assert_eq!(reason.to_string(), "closed by peer: the run has ended (code 120)");
}
