//! What credentials promise.

use super::*;
use tempfile::TempDir;
use volary_storage::RunDir;
use volary_transport::KeyRequest;

/// Credentials of a new run; the folder lives as long as they do.
fn credentials() -> (TempDir, Credentials) {
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
fn an_access_token_is_valid_for_its_number_of_uses() {
    let (_folder, credentials) = credentials();
    let token = token(&credentials, Some(2), &[]);
    for name in ["a", "b"] {
        assert!(credentials.exchange(&token, &request(), Some(name.into())).is_ok());
    }
    let error = credentials.exchange(&token, &request(), Some("c".into())).expect_err("used up");
    assert_eq!(error.refusal().code, RefusalCode::AccessTokenUsedUp);
    // A malformed request uses nothing up.
    let other = self::token(&credentials, Some(1), &[]);
    assert!(credentials.exchange(&other, b"rubbish", Some("d".into())).is_err());
    assert!(credentials.exchange(&other, &request(), Some("d".into())).is_ok());
}

#[test]
fn concurrent_uses_do_not_exceed_the_number_of_uses() {
    let (_folder, credentials) = credentials();
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
fn a_certificate_admits_its_node_until_it_is_revoked_with_its_renewals() {
    let (_folder, credentials) = credentials();
    let token = token(&credentials, None, &[("zone", "rack-1")]);
    let Exchanged { name, issued: first, revoked } =
        credentials.exchange(&token, &request(), Some("node-1".into())).expect("a certificate");
    assert_eq!((name.as_str(), revoked.len()), ("node-1", 0));
    let zone = |certificate: &IssuedCertificate| {
        credentials.admit("node-1", Some(certificate.fingerprint())).expect("admitted")
    };
    assert_eq!(zone(&first).as_deref(), Some("rack-1"));
    assert!(credentials.admit("node-2", Some(first.fingerprint())).is_err(), "another's");
    assert!(credentials.admit("node-1", Some([7; 32])).is_err(), "unknown");
    assert!(credentials.admit("node-1", None).is_err(), "none");
    let second = credentials.renew("node-1", first.fingerprint(), &request()).expect("a renewal");
    assert_eq!(zone(&second).as_deref(), Some("rack-1"));
    credentials.revoke_certificates(&NodeId::new("node-1"), "the node was fenced").expect("revoked");
    for certificate in [&first, &second] {
        let error = credentials.admit("node-1", Some(certificate.fingerprint())).expect_err("revoked");
        assert_eq!(error.refusal().code, RefusalCode::CertificateRevoked);
        assert!(error.to_string().contains("fenced"), "{error}");
        assert!(credentials.renew("node-1", certificate.fingerprint(), &request()).is_err());
    }
    assert_eq!(credentials.revoked().expect("a list").len(), 2);
    // With its access token the node may join again.
    let third = credentials.exchange(&token, &request(), Some("node-1".into())).expect("a certificate");
    assert!(credentials.admit("node-1", Some(third.issued.fingerprint())).is_ok());
}

/// Of all processes that ever had a name, the certificates of one are good.
#[test]
fn a_join_revokes_the_earlier_certificates_of_its_name_and_of_no_other() {
    let (_folder, credentials) = credentials();
    let token = token(&credentials, None, &[]);
    let join =
        |name: &str| credentials.exchange(&token, &request(), Some(name.to_owned())).expect("a certificate");
    let (first, other) = (join("node-1").issued.fingerprint(), join("node-2").issued.fingerprint());
    let renewed = credentials.renew("node-1", first, &request()).expect("a renewal").fingerprint();
    let second = join("node-1");
    let revoked = |hash| second.revoked.contains(&hash);
    assert!(revoked(first) && revoked(renewed) && second.revoked.len() == 2, "{second:?}");
    for before in [first, renewed] {
        let error = credentials.admit("node-1", Some(before)).expect_err("revoked");
        assert_eq!(error.refusal().code, RefusalCode::CertificateRevoked);
        assert!(credentials.renew("node-1", before, &request()).is_err(), "a chain cannot be prolonged");
    }
    assert!(credentials.admit("node-1", Some(second.issued.fingerprint())).is_ok());
    assert!(credentials.admit("node-2", Some(other)).is_ok());
}

#[test]
fn access_tokens_are_listed_without_secrets_and_revoked_for_good() {
    let (_folder, credentials) = credentials();
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
fn a_revoked_access_token_stays_revoked_when_it_is_imported_again() {
    let (_folder, credentials) = credentials();
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
fn only_an_access_token_of_the_right_role_and_authority_is_accepted() {
    let (_folder, credentials) = credentials();
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
    assert!(matches!(error, CredentialError::ReservedName { .. }), "{error}");
    // Certificates are compared without regard to case.
    let error = credentials.exchange(&node, &request(), Some("Supervisor".into())).expect_err("reserved");
    assert!(error.to_string().contains("lowercase letters"), "{error}");
}
