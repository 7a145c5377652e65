//! The run's truth in sled, and tensors in content-addressed files.
//!
//! Everything here blocks: an async caller wraps it in `spawn_blocking`. What lies where, in a run directory:
//!
//! | file | what | kept by |
//! | --- | --- | --- |
//! | [`layout`] | the map of the run directory | the caller |
//! | [`lock`] | one supervisor at a time | `flock` on `lock` |
//! | [`journal`], [`table`] | committed steps, the run's identity, facts, tokens | sled in `state/` |
//! | [`blobs`], [`disk`] | tensors, named by their BLAKE3 | files in `blobs/` |
//! | [`checkpoint`], [`pending`] | which blobs make a checkpoint | sled, and `checkpoints/*.json` beside it |
//! | [`manifest`], [`reader`] | the same for processes that do not hold sled | `checkpoints/*.json` |
//! | [`lines`] | metrics and events | JSONL files |
//!
//! The order of writing is the contract: a blob is on the disk before a catalogue entry names it, and the entry is
//! on the disk before its manifest. Removal goes the other way round.

pub mod blobs;
pub mod checkpoint;
pub mod digest;
pub mod disk;
pub mod error;
pub mod journal;
pub mod layout;
pub mod lines;
pub mod lock;
pub mod manifest;
pub mod pending;
pub mod reader;
mod record;
pub mod table;

#[cfg(test)]
mod blobs_tests;
#[cfg(test)]
mod checkpoint_tests;
#[cfg(test)]
mod journal_tests;
#[cfg(test)]
mod testing;

pub use blobs::{BlobStore, RemovedReport};
pub use checkpoint::Checkpoints;
pub use digest::Digest;
pub use disk::{Disk, RealDisk};
pub use error::{Error, Result};
pub use journal::{RunIdentity, Store};
pub use layout::RunDir;
pub use lines::JsonLines;
pub use lock::RunLock;
pub use manifest::{BlobRef, CheckpointDigest, CheckpointRecord};
pub use pending::Pending;
pub use reader::CheckpointReader;
pub use table::Table;

/// Reads bytes as a checkpoint's manifest, for fuzzing.
#[doc(hidden)]
pub fn fuzz_manifest(bytes: &[u8]) {
    manifest::fuzz(bytes);
}

/// A manifest, for fuzzing.
#[doc(hidden)]
#[must_use]
pub fn fuzz_manifest_seed() -> Vec<u8> {
    manifest::fuzz_seed()
}
