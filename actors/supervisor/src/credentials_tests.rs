//! What keys promise.

use super::*;
use tempfile::TempDir;
use volary_storage::RunDir;
use volary_transport::KeyRequest;

/// Credentials of a new run; the folder lives as long as they do.
fn keys() -> (TempDir, Credentials) {
    let folder = tempfile::tempdir().expect("a folder");
    let dir = RunDir::create(folder.path()).expect("a run");
    let store = Store::open(&dir).expect("a store");
    let authority = Authority::create().expect("an authority");
    (folder, Credentials::new(authority, store, Duration::from_secs(60)))
}

fn token(credentials: &Credentials, uses: Option<u32>, labels: &[(&str, &str)]) -> String {
    let labels = labels.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
    credentials
        .issue_token(AccessRole::Node, AccessTokenTerms { lifetime: None, uses, labels })
        .expect("a token")
        .reveal()
}

fn request() -> Vec<u8> {
    KeyRequest::new().expect("a key").der().to_vec()
}

#[test]
fn a_token_is_good_for_as_many_nodes_as_it_says() {
    let (_folder, credentials) = keys();
    let token = token(&credentials, Some(2), &[]);
    for name in ["a", "b"] {
        assert!(credentials.exchange(&token, &request(), Some(name.into())).is_ok());
    }
    let error = credentials.exchange(&token, &request(), Some("c".into())).expect_err("used up");
    assert!(error.contains("as often as it may be"), "{error}");
    // A request that is no request uses nothing up.
    let other = self::token(&credentials, Some(1), &[]);
    assert!(credentials.exchange(&other, b"rubbish", Some("d".into())).is_err());
    assert!(credentials.exchange(&other, &request(), Some("d".into())).is_ok());
}

#[test]
fn two_who_come_at_once_do_not_both_get_the_last_use() {
    let (_folder, credentials) = keys();
    let token = token(&credentials, Some(5), &[]);
    let won: usize = std::thread::scope(|scope| {
        let join = |name: usize| {
            let (credentials, token) = (&credentials, &token);
            scope.spawn(move || credentials.exchange(token, &request(), Some(format!("n{name}"))).is_ok())
        };
        let all: Vec<_> = (0..12).map(join).collect();
        all.into_iter().map(|one| usize::from(one.join().expect("a thread"))).sum()
    });
    assert_eq!(won, 5);
}

#[test]
fn certificates_let_their_node_in_until_they_are_revoked_and_renewals_with_them() {
    let (_folder, credentials) = keys();
    let token = token(&credentials, None, &[("zone", "rack-1")]);
    let (name, first) =
        credentials.exchange(&token, &request(), Some("node-1".into())).expect("a certificate");
    assert_eq!(name, "node-1");
    assert_eq!(credentials.admit("node-1", Some(first.fingerprint())), Ok(Some("rack-1".into())));
    assert!(credentials.admit("node-2", Some(first.fingerprint())).is_err(), "another's");
    assert!(credentials.admit("node-1", Some([7; 32])).is_err(), "unknown");
    assert!(credentials.admit("node-1", None).is_err(), "none");
    let second = credentials.renew("node-1", first.fingerprint(), &request()).expect("a renewal");
    assert_eq!(credentials.admit("node-1", Some(second.fingerprint())), Ok(Some("rack-1".into())));
    credentials.revoke_certificates(&NodeId::new("node-1"), "it was shut out").expect("revoked");
    for certificate in [&first, &second] {
        let error = credentials.admit("node-1", Some(certificate.fingerprint())).expect_err("revoked");
        assert!(error.starts_with(NO_CERTIFICATE) && error.contains("shut out"), "{error}");
        assert!(credentials.renew("node-1", certificate.fingerprint(), &request()).is_err());
    }
    assert_eq!(credentials.revoked().expect("a list").len(), 2);
    // With its token it may join anew.
    let (_, third) = credentials.exchange(&token, &request(), Some("node-1".into())).expect("a certificate");
    assert!(credentials.admit("node-1", Some(third.fingerprint())).is_ok());
}

#[test]
fn tokens_are_listed_without_secrets_and_revoked_for_good() {
    let (_folder, credentials) = keys();
    let text = token(&credentials, Some(3), &[("owner", "lab")]);
    let Some(OperatorReply::AccessTokens(all)) = credentials.answer(&OperatorRequest::AccessTokenList) else {
        panic!("no list");
    };
    let secret = text.rsplit('.').next().expect("a secret");
    assert!(!format!("{all:?}").contains(secret));
    assert_eq!((all.len(), all[0].uses_left, all[0].labels.len()), (1, Some(3), 1));
    let id = all[0].id.clone();
    let revoke = OperatorRequest::AccessTokenRevoke { id };
    assert!(matches!(credentials.answer(&revoke), Some(OperatorReply::Done { .. })));
    assert!(matches!(credentials.answer(&revoke), Some(OperatorReply::Failed { .. })));
    assert!(credentials.exchange(&text, &request(), None).is_err());
    assert_eq!(credentials.answer(&OperatorRequest::Status), None);
}

#[test]
fn a_token_that_is_brought_along_again_stays_revoked() {
    let (_folder, credentials) = keys();
    let (token, _) = AccessToken::issue(
        credentials.authority().fingerprint(),
        AccessRole::Node,
        0,
        AccessTokenTerms::default(),
    )
    .expect("a token");
    credentials.import(AccessRole::Node, &token.reveal()).expect("taken");
    assert!(credentials.check(&token.reveal(), AccessRole::Node).is_ok());
    credentials.answer(&OperatorRequest::AccessTokenRevoke { id: token.id().to_owned() });
    credentials.import(AccessRole::Node, &token.reveal()).expect("looked at");
    assert!(credentials.check(&token.reveal(), AccessRole::Node).is_err());
}

#[test]
fn only_a_token_of_the_right_kind_and_authority_is_taken() {
    let (_folder, credentials) = keys();
    let node = token(&credentials, None, &[]);
    assert!(credentials.check(&node, AccessRole::Node).is_ok());
    assert!(
        credentials.check(&node, AccessRole::Operator).is_err()
            && credentials.check("rubbish", AccessRole::Node).is_err()
    );
    let (stranger, _) =
        AccessToken::issue([1; 32], AccessRole::Node, 0, AccessTokenTerms::default()).expect("a token");
    assert!(credentials.import(AccessRole::Node, &stranger.reveal()).is_err());
    let error = credentials.exchange(&node, &request(), Some(SUPERVISOR.into())).expect_err("reserved");
    assert!(error.contains("taken"), "{error}");
    // Certificates are checked without regard to capitals.
    let error = credentials.exchange(&node, &request(), Some("Supervisor".into())).expect_err("reserved");
    assert!(error.contains("small letters"), "{error}");
}
