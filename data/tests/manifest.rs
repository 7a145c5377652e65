//! A source with a manifest reads exactly the listed files, with exactly the listed content.
#![allow(clippy::unwrap_used, reason = "a helper that fails is a test that fails")]

mod common;

use std::path::{Path, PathBuf};

use common::{document, jsonl, options, prepare_16, source, write};
use tempfile::{TempDir, tempdir};
use volary_data::{Error, FileManifest, ListedFile, Source, SourceOptions};

/// Two registries: `a` lacks `two.txt`, `b` has all files.
fn registries() -> TempDir {
    let dir = tempdir().unwrap();
    for name in ["a/one.txt", "b/one.txt", "b/x/two.txt", "b/three.txt", "b/unlisted.txt"] {
        let text: String = name.bytes().map(|byte| document(byte.into())).collect();
        write(dir.path(), name, text);
    }
    std::fs::copy(dir.path().join("b/one.txt"), dir.path().join("a/one.txt")).unwrap();
    dir
}

fn manifest(dir: &Path, files: &[&str]) -> PathBuf {
    let hash = |file: &str| blake3::hash(&std::fs::read(dir.join("b").join(file)).unwrap());
    let files = files.iter().map(|file| ListedFile { blake3: hash(file), relative: (*file).into() });
    write(dir, "list.manifest", FileManifest { files: files.collect() }.to_string())
}

fn listed(path: &Path, manifest: &Path) -> SourceOptions {
    SourceOptions { manifest: Some(manifest.into()), ..source("crates", path) }
}

fn error(options: &SourceOptions) -> Error {
    Source::find(options).unwrap_err()
}

#[test]
fn the_listed_files_are_read_in_order_each_from_the_first_folder_that_has_it() {
    let dir = registries();
    let manifest = manifest(dir.path(), &["x/two.txt", "one.txt", "three.txt"]);
    let found = Source::find(&listed(&dir.path().join("*"), &manifest)).unwrap();
    let paths: Vec<_> =
        found.files.iter().map(|f| f.path.strip_prefix(dir.path()).unwrap().to_str().unwrap()).collect();
    assert_eq!(paths, ["b/x/two.txt", "a/one.txt", "b/three.txt"]);
    let relative: Vec<_> = found.files.iter().map(|f| f.relative.as_str()).collect();
    assert_eq!(relative, ["x/two.txt", "one.txt", "three.txt"]);
    let texts: Vec<_> = found.documents(true).map(|d| d.unwrap().text).collect();
    assert!(texts.iter().zip(&found.files).all(|(t, f)| *t == std::fs::read_to_string(&f.path).unwrap()));
}

#[test]
fn the_format_is_that_of_b3sum() {
    let dir = registries();
    let path = manifest(dir.path(), &["one.txt", "x/two.txt"]);
    let text = std::fs::read_to_string(&path).unwrap();
    let hash = blake3::hash(&std::fs::read(dir.path().join("b/one.txt")).unwrap()).to_hex();
    assert!(text.starts_with(&format!("{hash}  one.txt\n")), "{text}");
    assert_eq!(FileManifest::load(&path).unwrap().to_string(), text);
}

#[test]
fn a_missing_file_is_one_error_that_names_the_file_the_folders_and_a_remedy() {
    let dir = registries();
    let manifest = manifest(dir.path(), &["one.txt", "x/two.txt"]);
    std::fs::remove_file(dir.path().join("b/x/two.txt")).unwrap();
    let message = error(&listed(&dir.path().join("[ab]"), &manifest)).to_string();
    let folders = ["/a", "/b"].map(|folder| format!("{}{folder}", dir.path().display()));
    for part in ["crates", "x/two.txt", "list.manifest", "[ab]", &folders[0], &folders[1]] {
        assert!(message.contains(part), "{message} lacks {part}");
    }
    for part in ["build the workspace first", "regenerate the manifest"] {
        assert!(message.contains(part), "{message} lacks {part}");
    }
    // The same where the glob matches no folder at all.
    let message = error(&listed(&dir.path().join("none-*"), &manifest)).to_string();
    assert!(
        message.contains("one.txt") && message.contains("none-*") && message.contains("no folder matches"),
        "{message}"
    );
}

#[test]
fn a_changed_file_is_an_error_with_both_hashes() {
    let dir = registries();
    let manifest = manifest(dir.path(), &["one.txt", "x/two.txt"]);
    let changed = write(dir.path(), "b/x/two.txt", "changed");
    let error = error(&listed(&dir.path().join("b"), &manifest));
    assert!(matches!(&error, Error::ListedFileChanged { path, .. } if *path == changed), "{error}");
    let message = error.to_string();
    assert!(message.contains(blake3::hash(b"changed").to_hex().as_str()), "{message}");
}

#[test]
fn malformed_manifests_are_rejected_with_their_line() {
    let dir = registries();
    let hash = blake3::hash(b"").to_hex();
    let good = format!("{hash}  one.txt\n");
    for (bad, reason) in [
        (format!("{hash} two.txt"), "two spaces"),
        (format!("{}  two.txt", &hash[1..]), "hexadecimal"),
        (format!("{hash}  /etc/passwd"), "relative path"),
        (format!("{hash}  x/../../two.txt"), "relative path"),
        (format!("{hash}  x/"), "relative path"),
        (format!("{hash}  "), "relative path"),
        (good.clone(), "twice"),
        (String::from("# comment"), "two spaces"),
    ] {
        let path = write(dir.path(), "bad.manifest", format!("{good}{bad}\n"));
        let error = error(&listed(&dir.path().join("b"), &path));
        assert!(matches!(&error, Error::FileManifestLine { line: 2, .. }), "{error}");
        assert!(error.to_string().contains(reason), "{error}");
    }
    let empty = write(dir.path(), "empty.manifest", "");
    assert!(matches!(error(&listed(&dir.path().join("b"), &empty)), Error::FileManifest { .. }));
    let missing = listed(&dir.path().join("b"), &dir.path().join("none.manifest"));
    assert!(error(&missing).to_string().contains("none.manifest"));
}

#[test]
fn the_cache_depends_on_the_listed_content_not_on_places_and_times() {
    let dir = tempdir().unwrap();
    let place = |name: &str| write(dir.path(), &format!("{name}/a.jsonl"), jsonl(0..200));
    let list = |name: &str, content: &[u8]| {
        let files = vec![ListedFile { blake3: blake3::hash(content), relative: "a.jsonl".into() }];
        write(dir.path(), name, FileManifest { files }.to_string())
    };
    let run = |name: &str, source: SourceOptions| {
        prepare_16(&options(dir.path(), vec![source]), &dir.path().join(name)).unwrap()
    };
    let first_file = place("registry-1/src");
    let content = std::fs::read(&first_file).unwrap();
    let glob = dir.path().join("registry-*/src");
    let first = run("one", listed(&glob, &list("one.manifest", &content)));
    assert!(!first.from_cache);
    // The file moves and is written again, and the manifest has another name.
    std::fs::remove_file(first_file).unwrap();
    place("registry-2/src");
    let second = run("two", listed(&glob, &list("two.manifest", &content)));
    assert!(second.from_cache && second.manifest == first.manifest);
    let changed = jsonl(0..201);
    write(dir.path(), "registry-2/src/a.jsonl", &changed);
    assert!(!run("three", listed(&glob, &list("two.manifest", changed.as_bytes()))).from_cache);
}
