//! What keys promise.

use super::*;
use tempfile::TempDir;
use volary_storage::RunDir;
use volary_transport::KeyRequest;

/// Keys of a new run; the folder lives as long as they do.
fn keys() -> (TempDir, Keys) {
    let folder = tempfile::tempdir().expect("a folder");
    let dir = RunDir::create(folder.path()).expect("a run");
    let store = Store::open(&dir).expect("a store");
    let authority = Authority::create().expect("an authority");
    (folder, Keys::new(authority, store, Duration::from_secs(60)))
}

fn token(keys: &Keys, uses: Option<u32>, labels: &[(&str, &str)]) -> String {
    let labels = labels.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
    keys.mint(TokenRole::Node, TokenTerms { lifetime: None, uses, labels }).expect("a token").reveal()
}

fn request() -> Vec<u8> {
    KeyRequest::new().expect("a key").der().to_vec()
}

#[test]
fn a_token_is_good_for_as_many_nodes_as_it_says() {
    let (_folder, keys) = keys();
    let token = token(&keys, Some(2), &[]);
    for name in ["a", "b"] {
        assert!(keys.exchange(&token, &request(), Some(name.into())).is_ok());
    }
    let error = keys.exchange(&token, &request(), Some("c".into())).expect_err("used up");
    assert!(error.contains("as often as it may be"), "{error}");
    // A request that is no request uses nothing up.
    let other = self::token(&keys, Some(1), &[]);
    assert!(keys.exchange(&other, b"rubbish", Some("d".into())).is_err());
    assert!(keys.exchange(&other, &request(), Some("d".into())).is_ok());
}

#[test]
fn two_who_come_at_once_do_not_both_get_the_last_use() {
    let (_folder, keys) = keys();
    let token = token(&keys, Some(5), &[]);
    let won: usize = std::thread::scope(|scope| {
        let join = |name: usize| {
            let (keys, token) = (&keys, &token);
            scope.spawn(move || keys.exchange(token, &request(), Some(format!("n{name}"))).is_ok())
        };
        let all: Vec<_> = (0..12).map(join).collect();
        all.into_iter().map(|one| usize::from(one.join().expect("a thread"))).sum()
    });
    assert_eq!(won, 5);
}

#[test]
fn certificates_let_their_node_in_until_they_are_revoked_and_renewals_with_them() {
    let (_folder, keys) = keys();
    let token = token(&keys, None, &[("zone", "rack-1")]);
    let (name, first) = keys.exchange(&token, &request(), Some("node-1".into())).expect("a certificate");
    assert_eq!(name, "node-1");
    assert_eq!(keys.admit("node-1", Some(first.fingerprint())), Ok(Some("rack-1".into())));
    assert!(keys.admit("node-2", Some(first.fingerprint())).is_err(), "another's");
    assert!(keys.admit("node-1", Some([7; 32])).is_err(), "unknown");
    assert!(keys.admit("node-1", None).is_err(), "none");
    let second = keys.renew("node-1", first.fingerprint(), &request()).expect("a renewal");
    assert_eq!(keys.admit("node-1", Some(second.fingerprint())), Ok(Some("rack-1".into())));
    keys.revoke_certificates(&NodeId::new("node-1"), "it was shut out").expect("revoked");
    for certificate in [&first, &second] {
        let error = keys.admit("node-1", Some(certificate.fingerprint())).expect_err("revoked");
        assert!(error.starts_with(NO_CERTIFICATE) && error.contains("shut out"), "{error}");
        assert!(keys.renew("node-1", certificate.fingerprint(), &request()).is_err());
    }
    assert_eq!(keys.revoked().expect("a list").len(), 2);
    // With its token it may join anew.
    let (_, third) = keys.exchange(&token, &request(), Some("node-1".into())).expect("a certificate");
    assert!(keys.admit("node-1", Some(third.fingerprint())).is_ok());
}

#[test]
fn tokens_are_listed_without_secrets_and_revoked_for_good() {
    let (_folder, keys) = keys();
    let text = token(&keys, Some(3), &[("owner", "lab")]);
    let Some(OperatorReply::Tokens(all)) = keys.answer(&OperatorRequest::TokenList) else {
        panic!("no list");
    };
    let secret = text.rsplit('.').next().expect("a secret");
    assert!(!format!("{all:?}").contains(secret));
    assert_eq!((all.len(), all[0].uses_left, all[0].labels.len()), (1, Some(3), 1));
    let id = all[0].id.clone();
    let revoke = OperatorRequest::TokenRevoke { id };
    assert!(matches!(keys.answer(&revoke), Some(OperatorReply::Done { .. })));
    assert!(matches!(keys.answer(&revoke), Some(OperatorReply::Failed { .. })));
    assert!(keys.exchange(&text, &request(), None).is_err());
    assert_eq!(keys.answer(&OperatorRequest::Status), None);
}

#[test]
fn a_token_that_is_brought_along_again_stays_revoked() {
    let (_folder, keys) = keys();
    let (token, _) = Token::mint(keys.authority().fingerprint(), TokenRole::Node, 0, TokenTerms::default())
        .expect("a token");
    keys.take_in(TokenRole::Node, &token.reveal()).expect("taken");
    assert!(keys.check(&token.reveal(), TokenRole::Node).is_ok());
    keys.answer(&OperatorRequest::TokenRevoke { id: token.id().to_owned() });
    keys.take_in(TokenRole::Node, &token.reveal()).expect("looked at");
    assert!(keys.check(&token.reveal(), TokenRole::Node).is_err());
}

#[test]
fn only_a_token_of_the_right_kind_and_authority_is_taken() {
    let (_folder, keys) = keys();
    let node = token(&keys, None, &[]);
    assert!(keys.check(&node, TokenRole::Node).is_ok());
    assert!(
        keys.check(&node, TokenRole::Operator).is_err() && keys.check("rubbish", TokenRole::Node).is_err()
    );
    let (stranger, _) = Token::mint([1; 32], TokenRole::Node, 0, TokenTerms::default()).expect("a token");
    assert!(keys.take_in(TokenRole::Node, &stranger.reveal()).is_err());
    let error = keys.exchange(&node, &request(), Some(SUPERVISOR.into())).expect_err("reserved");
    assert!(error.contains("taken"), "{error}");
    // Certificates are checked without regard to capitals.
    let error = keys.exchange(&node, &request(), Some("Supervisor".into())).expect_err("reserved");
    assert!(error.contains("small letters"), "{error}");
}
