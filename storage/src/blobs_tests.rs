//! Tests of blobs: durability, damage, a full disk.

use crate::testing::TestDisk;
use crate::{BlobStore, Digest, Error};
use proptest::prelude::*;
use std::collections::HashSet;
use std::fs;

fn store() -> (tempfile::TempDir, TestDisk, BlobStore<TestDisk>) {
    let temp = tempfile::tempdir().unwrap();
    let disk = TestDisk::default();
    let store = BlobStore::open_on(temp.path().join("blobs"), disk.clone()).unwrap();
    (temp, disk, store)
}

#[test]
fn equal_bytes_are_written_once_and_many_blobs_need_one_sync() {
    let (_temp, disk, store) = store();
    let first = store.put(b"one").unwrap();
    assert_eq!(store.put(b"one").unwrap(), first);
    store.put(b"two").unwrap();
    assert_eq!(disk.count("write"), 2);
    store.sync().unwrap();
    store.sync().unwrap();
    assert_eq!(disk.count("sync"), 1);
    assert_eq!(store.get(&first).unwrap(), b"one");
    assert_eq!(store.len(&first).unwrap(), 3);
    assert!(!store.is_empty().unwrap());
}

#[test]
fn a_truncated_blob_is_named_and_rewritten() {
    let (_temp, _disk, store) = store();
    let digest = store.put(b"some weights").unwrap();
    fs::File::options().write(true).open(store.path(&digest)).unwrap().set_len(4).unwrap();
    let error = store.get(&digest).unwrap_err();
    assert!(matches!(error, Error::DamagedBlob { bytes: 4, .. }));
    assert!(error.to_string().contains(store.path(&digest).to_str().unwrap()), "{error}");
    store.put(b"some weights").unwrap();
    assert_eq!(store.get(&digest).unwrap(), b"some weights");
}

#[test]
fn a_damaged_blob_of_the_right_size_is_rewritten() {
    let (_temp, _disk, store) = store();
    let digest = store.put(b"some weights").unwrap();
    fs::write(store.path(&digest), b"SOME WEIGHTS").unwrap();
    assert!(store.get(&digest).is_err());
    store.put(b"some weights").unwrap();
    assert_eq!(store.get(&digest).unwrap(), b"some weights");
}

#[test]
fn a_missing_blob_is_named() {
    let (_temp, _disk, store) = store();
    let digest = Digest::of(b"never put");
    assert!(matches!(store.get(&digest).unwrap_err(), Error::NoBlob { .. }));
    assert!(store.len(&digest).unwrap_err().to_string().contains(&digest.to_string()));
}

#[test]
fn a_full_disk_is_reported_and_leaves_no_partial_file() {
    let (_temp, disk, store) = store();
    let before = store.put(b"before").unwrap();
    disk.fill();
    let error = store.put(b"does not fit").unwrap_err();
    assert!(matches!(error, Error::NoSpace { .. }));
    assert!(error.to_string().starts_with("no space left on device while writing blob "), "{error}");
    assert_eq!(fs::read_dir(store.folder()).unwrap().count(), 1);
    assert_eq!(store.get(&before).unwrap(), b"before");
    disk.free();
    store.put(b"does not fit").unwrap();
}

#[test]
fn opening_removes_the_temporary_files_of_a_crashed_writer() {
    let (_temp, disk, store) = store();
    let kept = store.put(b"kept").unwrap();
    let folder = store.folder().to_owned();
    fs::write(folder.join("tmp-1-0"), b"half").unwrap();
    fs::write(folder.join("README"), b"not ours").unwrap();
    let store = BlobStore::open_on(&folder, disk).unwrap();
    assert_eq!(store.digests().unwrap(), [kept]);
    assert!(folder.join("README").exists() && !folder.join("tmp-1-0").exists());
}

#[test]
fn only_unreferenced_blobs_are_removed() {
    let (_temp, _disk, store) = store();
    let kept = store.put(b"kept").unwrap();
    let unreferenced = store.put(b"other").unwrap();
    let report = store.remove_unreferenced(&HashSet::from([kept])).unwrap();
    assert_eq!((report.removed, report.removed_bytes, report.kept), (1, 5, 1));
    assert_eq!(store.get(&kept).unwrap(), b"kept");
    assert!(matches!(store.get(&unreferenced).unwrap_err(), Error::NoBlob { .. }));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    #[test]
    fn any_flipped_byte_of_a_blob_is_detected(
        bytes in proptest::collection::vec(any::<u8>(), 1..2000),
        at in any::<prop::sample::Index>(),
        flip in 1..=255_u8,
    ) {
        let (_temp, _disk, store) = store();
        let digest = store.put(&bytes).unwrap();
        prop_assert_eq!(&store.get(&digest).unwrap(), &bytes);
        let mut flipped = bytes;
        let at = at.index(flipped.len());
        flipped[at] ^= flip;
        fs::write(store.path(&digest), &flipped).unwrap();
        let found = matches!(store.get(&digest), Err(Error::DamagedBlob { .. }));
        prop_assert!(found);
    }
}
