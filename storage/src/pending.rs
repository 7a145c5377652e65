//! A checkpoint that is being written: it leaves nothing in the catalogue until it is complete.

use crate::checkpoint::Checkpoints;
use crate::digest::Digest;
use crate::disk::{Disk, RealDisk};
use crate::error::{Error, Result};
use crate::manifest::{self, BlobRef, CheckpointRecord};
use std::collections::{BTreeMap, BTreeSet};
use std::mem;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};
use volary_core::{Epoch, ShardId, Step};

/// A checkpoint on its way. Dropped before it is complete, it never was; its blobs go with the next retention.
#[derive(Debug)]
pub struct Pending<D: Disk = RealDisk> {
    checkpoints: Checkpoints<D>,
    step: Step,
    epoch: Epoch,
    config_hash: Digest,
    expected: BTreeSet<ShardId>,
    added: Mutex<BTreeMap<ShardId, BlobRef>>,
}

impl<D: Disk> Pending<D> {
    pub(crate) fn new(
        checkpoints: Checkpoints<D>,
        step: Step,
        epoch: Epoch,
        config_hash: Digest,
        expected: BTreeSet<ShardId>,
    ) -> Self {
        Self { checkpoints, step, epoch, config_hash, expected, added: Mutex::default() }
    }

    /// The step whose weights these are.
    #[must_use]
    pub fn step(&self) -> Step {
        self.step
    }

    /// The shards that are still to be added, in order.
    #[must_use]
    pub fn missing(&self) -> Vec<ShardId> {
        let added = self.added();
        self.expected.iter().filter(|shard| !added.contains_key(shard)).copied().collect()
    }

    /// Writes a shard's bytes; from several threads at once if need be. The same bytes again change nothing.
    #[tracing::instrument(target = "volary::trace", name = "shard.write", skip_all, fields(%shard, bytes = bytes.len()))]
    pub fn add(&self, shard: ShardId, bytes: &[u8]) -> Result<Digest> {
        let step = self.step;
        if !self.expected.contains(&shard) {
            return Err(Error::NoShard { step, shard });
        }
        let blob = BlobRef { digest: Digest::of(bytes), bytes: bytes.len() as u64 };
        self.checkpoints.pin(blob.digest);
        let written = self
            .checkpoints
            .blobs()
            .put_as(&blob.digest, bytes)
            .map_err(|e| e.while_writing(|| format!("shard {shard} of step {step}")))
            .and_then(|()| self.note(shard, blob));
        // Noted once, pinned once: what was refused or there already gives its pin back.
        if !matches!(written, Ok(true)) {
            self.checkpoints.unpin(&blob.digest);
        }
        written.map(|_| blob.digest)
    }

    /// Makes the checkpoint exist. When this returns, it survives whatever happens to the process or the power.
    #[tracing::instrument(target = "volary::trace", name = "catalogue.write", skip_all)]
    pub fn complete(self) -> Result<CheckpointRecord> {
        let missing = self.missing();
        if !missing.is_empty() {
            return Err(Error::Incomplete { step: self.step, missing });
        }
        self.checkpoints.blobs().sync()?;
        let record = CheckpointRecord {
            format: manifest::FORMAT,
            step: self.step,
            epoch: self.epoch,
            config_hash: self.config_hash,
            created_unix_ms: unix_ms(),
            shards: self.added().clone(),
        };
        self.checkpoints.publish(record)
    }

    /// Whether the shard is new here.
    fn note(&self, shard: ShardId, blob: BlobRef) -> Result<bool> {
        let mut added = self.added();
        match added.get(&shard) {
            Some(there) if *there == blob => Ok(false),
            Some(_) => Err(Error::ShardDiffers { step: self.step, shard }),
            None => Ok(added.insert(shard, blob).is_none()),
        }
    }

    fn added(&self) -> MutexGuard<'_, BTreeMap<ShardId, BlobRef>> {
        self.added.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<D: Disk> Drop for Pending<D> {
    fn drop(&mut self) {
        for blob in mem::take(&mut *self.added()).values() {
            self.checkpoints.unpin(&blob.digest);
        }
    }
}

fn unix_ms() -> u64 {
    // A clock before 1970 is wrong, and no reason to lose a checkpoint.
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
