//! Fuzz targets: all decoders of input from peers, files and people, as functions of arbitrary bytes.
//!
//! A target must return for any input: no panic, bounded memory, bounded time. A decoded value must encode to
//! a form that decodes to the same value. `make test` runs each target with its seeds and random mutations of
//! them; `make fuzz TARGET=NAME` searches with coverage (`cargo fuzz`, libFuzzer).
//!
//! | file | content |
//! | --- | --- |
//! | `lib.rs` | the targets |
//! | [`seeds`] | valid inputs, from which mutations start |
//!
//! ```no_run
//! let (name, target) = volary_fuzz::TARGETS[0];
//! for seed in volary_fuzz::seeds::of(name) {
//!     target(&seed);
//! }
//! ```

pub mod seeds;

use bytes::Bytes;
use parking_lot::Mutex;
use std::path::Path;
use std::sync::LazyLock;
use tempfile::TempDir;
use volary_core::architecture::Architecture;
use volary_core::compute::Compute;
use volary_core::options::TrainingOptions;
use volary_core::{LayerId, ShardId, Step};
use volary_model::{Glam, device};
use volary_transport::{AccessToken, Authority, Frame};

/// A name and a function of bytes.
pub type Target = (&'static str, fn(&[u8]));

/// All targets.
pub const TARGETS: [Target; 13] = [
    ("frame", frame),
    ("handshake", handshake),
    ("messages", messages),
    ("access_token", access_token),
    ("certificate_request", certificate_request),
    ("authority", authority),
    ("config", config),
    ("inventory", inventory),
    ("shard", shard),
    ("tokenizer", tokenizer),
    ("records", records),
    ("manifest", manifest),
    ("http", http),
];

/// A frame from the network.
pub fn frame(bytes: &[u8]) {
    if let Ok(frame) = Frame::decode(&Bytes::copy_from_slice(bytes)) {
        let pieces = frame.encode().unwrap_or_default();
        let decoded = Frame::decode(&Bytes::from(pieces.concat()));
        assert!(decoded.is_ok_and(|decoded| decoded == frame), "a decoded frame encodes to the same frame");
    }
}

/// The first message of a connection.
pub fn handshake(bytes: &[u8]) {
    volary_transport::fuzz_handshake(bytes);
}

/// The messages on control streams, and the headers of frames.
pub fn messages(bytes: &[u8]) {
    volary_protocol::fuzz_messages(bytes);
}

/// The text of an access token.
pub fn access_token(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    if let Ok(token) = text.parse::<AccessToken>() {
        assert_eq!(token.reveal().parse::<AccessToken>().ok(), Some(token));
    }
}

static AUTHORITY: LazyLock<Option<Authority>> = LazyLock::new(|| Authority::create().ok());

/// A request for a certificate.
pub fn certificate_request(bytes: &[u8]) {
    if let Some(authority) = AUTHORITY.as_ref() {
        // Refused or not: the authority chooses the name.
        drop(authority.issue(bytes, "node-1", std::time::Duration::from_secs(60)));
    }
}

/// The PEM files of an authority.
pub fn authority(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let (certificate, key) = text.split_once("\n\n").unwrap_or((&text, ""));
    drop(Authority::from_pem(certificate, key));
}

/// A configuration file and `--set`.
pub fn config(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let (file, set) = text.split_once('\0').unwrap_or((&text, ""));
    let set: Vec<String> = set.lines().map(str::to_owned).collect();
    drop(volary_cli::config::Config::parse(file, "c.toml", &set));
}

/// The folder of targets that read files.
static FOLDER: LazyLock<Mutex<Option<TempDir>>> = LazyLock::new(|| Mutex::new(TempDir::new().ok()));

/// Writes the bytes to a file and reads it; one call at a time.
fn with_file(name: &str, bytes: &[u8], read: impl FnOnce(&Path)) {
    let folder = FOLDER.lock();
    let Some(folder) = folder.as_ref() else { return };
    let path = folder.path().join(name);
    if std::fs::write(&path, bytes).is_ok() {
        read(&path);
    }
}

/// An inventory of machines.
pub fn inventory(bytes: &[u8]) {
    with_file("inventory.toml", bytes, |path| {
        drop(volary_cli::inventory::Inventory::load(path));
    });
}

/// The model of the shard target: small, so that mutations reach all of it.
pub(crate) fn tiny() -> Option<(Architecture, TrainingOptions)> {
    let config = volary_cli::config::Config::parse(seeds::CONFIG, "c.toml", &[]).ok()?;
    Some((config.model, config.training))
}

pub(crate) static GLAM: LazyLock<Option<Glam>> = LazyLock::new(|| {
    let (model, training) = tiny()?;
    Glam::new(&model, &training, 1, device::parse("cpu").ok()?).ok()
});

/// A router and a dense layer.
pub(crate) const SHARDS: [ShardId; 2] =
    [ShardId::Router { layer: LayerId(0) }, ShardId::Dense { layer: LayerId(1) }];

/// A shard from a checkpoint or another node: safetensors with names, shapes and a version.
pub fn shard(bytes: &[u8]) {
    let Some(glam) = GLAM.as_ref() else { return };
    for shard in SHARDS {
        if let Ok(state) = glam.load(shard, bytes) {
            let reloaded =
                glam.store(shard, Step(1), &state).and_then(|stored| glam.load(shard, &stored).map(drop));
            assert!(reloaded.is_ok(), "a loaded shard can be stored and loaded: {reloaded:?}");
        }
    }
}

/// A tokenizer file.
pub fn tokenizer(bytes: &[u8]) {
    with_file("tokenizer.json", bytes, |path| {
        if let Ok(tokenizer) = volary_data::Tokenizer::load(path) {
            drop(tokenizer.encode("The lane runs.").map(|ids| tokenizer.decode(&ids)));
        }
    });
}

/// Data files of all formats, chosen by the first byte.
pub fn records(bytes: &[u8]) {
    const NAMES: [&str; 6] =
        ["data.txt", "data.jsonl", "data.parquet", "data.jsonl.gz", "data.txt.zst", "data.txt.gz"];
    let Some((first, rest)) = bytes.split_first() else { return };
    with_file(NAMES[usize::from(*first) % NAMES.len()], rest, |path| {
        volary_data::fuzz_records(path);
    });
}

/// A checkpoint's manifest.
pub fn manifest(bytes: &[u8]) {
    volary_storage::fuzz_manifest(bytes);
}

/// Requests to the HTTP port.
pub fn http(bytes: &[u8]) {
    volary_cli::http::fuzz_http(bytes);
}
