//! The manifests of the quickstart match Cargo.lock and the registry of this machine.
#![allow(clippy::unwrap_used, reason = "a helper that fails is a test that fails")]

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use volary_data::FileManifest;

const REMEDY: &str = "after a build: cargo run --release -p volary-data --example quickstart_manifest";

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The files of both manifests: hash, `name-version` of the crate, path below it.
fn listed() -> Vec<(blake3::Hash, String, String)> {
    let folder = root().join("examples/quickstart");
    let manifests = ["code.manifest", "prose.manifest"].map(|name| FileManifest::load(&folder.join(name)));
    let files = manifests.into_iter().flat_map(|manifest| manifest.unwrap().files);
    files
        .map(|file| {
            let (package, path) = file.relative.split_once('/').unwrap();
            (file.blake3, package.to_string(), path.to_string())
        })
        .collect()
}

#[test]
fn every_listed_crate_has_the_version_of_cargo_lock() {
    let lock = std::fs::read_to_string(root().join("Cargo.lock")).unwrap();
    let value = |line: &str, key: &str| Some(line.strip_prefix(key)?.trim_matches('"').to_string());
    let names = lock.lines().filter_map(|line| value(line, "name = "));
    let versions = lock.lines().skip_while(|l| *l != "[[package]]").filter_map(|l| value(l, "version = "));
    let locked: HashSet<String> =
        names.zip(versions).map(|(name, version)| format!("{name}-{version}")).collect();
    assert!(locked.iter().any(|package| package.starts_with("volary-data-")));
    let missing: HashSet<String> = listed()
        .into_iter()
        .map(|(_, package, _)| package)
        .filter(|package| !locked.contains(package))
        .collect();
    assert!(missing.is_empty(), "not in Cargo.lock: {missing:?}; {REMEDY}");
}

#[test]
fn every_listed_file_in_the_registry_of_this_machine_has_its_hash() {
    let home = std::env::var("CARGO_HOME").or_else(|_| std::env::var("HOME").map(|home| home + "/.cargo"));
    let registries = std::fs::read_dir(Path::new(&home.unwrap()).join("registry/src")).unwrap();
    let registries: Vec<PathBuf> = registries.map(|entry| entry.unwrap().path()).collect();
    let mut absent = HashSet::new();
    for (hash, package, path) in listed() {
        // A build of a few members of the workspace does not unpack all crates.
        let Some(folder) = registries.iter().map(|r| r.join(&package)).find(|folder| folder.is_dir()) else {
            absent.insert(package);
            continue;
        };
        let file = folder.join(path);
        let content = std::fs::read(&file).unwrap_or_else(|e| panic!("{}: {e}; {REMEDY}", file.display()));
        assert_eq!(blake3::hash(&content), hash, "{}; {REMEDY}", file.display());
    }
    if !absent.is_empty() {
        eprintln!("not checked, because the registry of this machine lacks them: {absent:?}");
    }
}
