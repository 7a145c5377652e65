//! Durable state of a run: a journal in sled, tensors in content-addressed files.
//!
//! All functions but those of [`mirror`] block; an asynchronous caller wraps them in `spawn_blocking`. The
//! modules and their place in a run directory:
//!
//! | module | contents | place |
//! | --- | --- | --- |
//! | [`layout`] | the paths of a run directory | |
//! | [`lock`] | one supervisor at a time | `flock` on `lock` |
//! | [`journal`] | committed steps, the run's identity | sled in `state/` |
//! | [`table`] | small named values: facts, access tokens, certificates | sled in `state/` |
//! | `database`, `record` | durable writes to sled; the layout of a record, with its checksum | |
//! | [`blobs`] | tensors, named by their BLAKE3 digests | files in `blobs/` |
//! | [`checkpoint`], [`pending`] | the run's checkpoints, and a checkpoint in progress | |
//! | `catalogue` | the entries of checkpoints | sled in `state/` |
//! | [`mirror`] | copies of checkpoints, for another machine | an object store |
//! | `reconcile` | a catalogue and a journal that a crash left apart | |
//! | [`manifest`], [`reader`] | the catalogue for processes without access to sled | `checkpoints/*.json` |
//! | [`disk`] | file operations, as a trait for fault injection | |
//! | [`lines`] | metrics and events | JSONL files |
//! | [`error`] | [`Error`] | |
//! | [`limits`] | every bound | |
//!
//! The order of writes is an invariant: a blob is durable before a catalogue entry names it, and the entry is
//! durable before its manifest. Removal takes the reverse order.
//!
//! ```
//! use volary_core::{Epoch, LayerId, ShardId, Step, Timeline};
//! use volary_storage::{BlobStore, CheckpointReader, Checkpoints, Digest, RunDir, Store};
//!
//! let directory = tempfile::tempdir()?;
//! let run = RunDir::create(directory.path().join("run"))?;
//! let store = Store::open(&run)?;
//! store.commit(Step(1), &"the committed state of step 1")?;
//!
//! let checkpoints = Checkpoints::open(&run, store.clone(), BlobStore::open(run.blobs())?)?;
//! let shards = [ShardId::Embedding, ShardId::Dense { layer: LayerId(0) }];
//! let pending = checkpoints.begin((Step(1), Timeline(0), Epoch(1)), Digest::of(b"configuration"), shards);
//! pending.add(ShardId::Embedding, &[0; 8])?;
//! pending.add(ShardId::Dense { layer: LayerId(0) }, &[1; 8])?;
//! pending.complete()?;
//!
//! // Another process reads by the manifests, without access to the database.
//! let reader = CheckpointReader::open(&run)?;
//! let latest = reader.latest()?.expect("a checkpoint");
//! assert_eq!((latest.step, latest.bytes()), (Step(1), 16));
//! assert_eq!(reader.read(latest.step, ShardId::Embedding)?, [0; 8]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

pub mod blobs;
mod catalogue;
pub mod checkpoint;
mod database;
pub mod disk;
pub mod error;
pub mod journal;
pub mod layout;
pub mod limits;
pub mod lines;
pub mod lock;
pub mod manifest;
pub mod mirror;
pub mod pending;
pub mod reader;
mod reconcile;
mod record;
pub mod table;

#[cfg(test)]
mod blobs_tests;
#[cfg(test)]
mod checkpoint_tests;
#[cfg(test)]
mod crash_tests;
#[cfg(test)]
mod journal_tests;
#[cfg(test)]
mod testing;

pub use blobs::{BlobStore, RemovedReport, write_file};
pub use checkpoint::Checkpoints;
pub use disk::{Disk, RealDisk};
pub use error::{Error, Result};
pub use journal::{RunIdentity, Store};
pub use layout::RunDir;
pub use lines::JsonLines;
pub use lock::RunLock;
pub use manifest::{BlobRef, CheckpointDigest, CheckpointRecord};
pub use mirror::Mirror;
pub use pending::Pending;
pub use reader::CheckpointReader;
pub use reconcile::{Reconciled, reconcile};
pub use table::Table;
pub use volary_core::Digest;

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
