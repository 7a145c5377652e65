//! Files of identities: private, and never replaced by accident.

use std::os::unix::fs::PermissionsExt;
use volary_transport::{Authority, write_secret};

#[test]
fn an_authority_is_stored_for_its_owner_only_and_reloads() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("identity");
    let created = Authority::load_or_create(&path).unwrap();
    assert_eq!(Authority::load_or_create(&path).unwrap().fingerprint(), created.fingerprint());
    for file in std::fs::read_dir(&path).unwrap() {
        assert_eq!(file.unwrap().metadata().unwrap().permissions().mode() & 0o777, 0o600);
    }
    assert!(created.identity("../up").is_err());
    std::fs::remove_file(path.join("ca.key")).unwrap();
    let error = Authority::load_or_create(&path).unwrap_err().to_string();
    assert!(error.contains("ca.key"), "a lost key is not replaced by another authority: {error}");
}

#[test]
fn a_secret_is_private_even_beside_a_readable_leftover() {
    let folder = tempfile::tempdir().unwrap();
    let leftover = folder.path().join("node.new");
    std::fs::write(&leftover, "old").unwrap();
    std::fs::set_permissions(&leftover, std::fs::Permissions::from_mode(0o644)).unwrap();
    let path = folder.path().join("node.token");
    write_secret(&path, b"secret").unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), b"secret");
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    assert!(!leftover.exists());
}
