//! A checkpoint in progress: it is not in the catalogue until it is complete.

use crate::checkpoint::Checkpoints;
use crate::disk::{Disk, RealDisk};
use crate::error::{Error, Result};
use crate::manifest::{self, BlobRef, CheckpointRecord};
use parking_lot::Mutex;
use std::collections::{BTreeMap, BTreeSet};
use std::mem;
use std::time::{SystemTime, UNIX_EPOCH};
use volary_core::Digest;
use volary_core::{Epoch, ShardId, Step, Timeline};

/// A checkpoint in progress. If it is dropped before it is complete, the next retention removes its blobs.
#[derive(Debug)]
pub struct Pending<D: Disk = RealDisk> {
    checkpoints: Checkpoints<D>,
    step: Step,
    timeline: Timeline,
    epoch: Epoch,
    config_hash: Digest,
    expected: BTreeSet<ShardId>,
    added: Mutex<BTreeMap<ShardId, BlobRef>>,
}

impl<D: Disk> Pending<D> {
    pub(crate) fn new(
        checkpoints: Checkpoints<D>,
        (step, timeline, epoch): (Step, Timeline, Epoch),
        config_hash: Digest,
        expected: BTreeSet<ShardId>,
    ) -> Self {
        Self { checkpoints, step, timeline, epoch, config_hash, expected, added: Mutex::default() }
    }

    /// The step of the weights.
    #[must_use]
    pub fn step(&self) -> Step {
        self.step
    }

    /// The missing shards, ascending.
    #[must_use]
    pub fn missing(&self) -> Vec<ShardId> {
        let added = self.added.lock();
        self.expected.iter().filter(|shard| !added.contains_key(shard)).copied().collect()
    }

    /// Writes a shard; several threads may do so concurrently. Repeating it with the same bytes has no
    /// effect.
    ///
    /// # Errors
    /// [`Error::NoShard`] for an unexpected shard, [`Error::ShardDiffers`] when it was added with other
    /// bytes, [`Error::NoSpace`] or [`Error::Io`].
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
            .and_then(|()| self.record(shard, blob));
        // One pin per recorded shard: refused and repeated ones are unpinned.
        if !matches!(written, Ok(true)) {
            self.checkpoints.unpin(&blob.digest);
        }
        written.map(|_| blob.digest)
    }

    /// Publishes the checkpoint. When this returns, it survives a crash and a power failure.
    ///
    /// # Errors
    /// [`Error::Incomplete`] when shards are missing, [`Error::AlreadyCheckpointed`] when there is another
    /// checkpoint at the step, [`Error::NoSpace`], [`Error::Io`] or [`Error::Database`].
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
            timeline: self.timeline,
            epoch: self.epoch,
            config_hash: self.config_hash,
            created_unix_ms: unix_ms(),
            shards: self.added.lock().clone(),
        };
        self.checkpoints.publish(record)
    }

    /// Records a shard; returns whether it is new.
    fn record(&self, shard: ShardId, blob: BlobRef) -> Result<bool> {
        let mut added = self.added.lock();
        match added.get(&shard) {
            Some(existing) if *existing == blob => Ok(false),
            Some(_) => Err(Error::ShardDiffers { step: self.step, shard }),
            None => Ok(added.insert(shard, blob).is_none()),
        }
    }
}

impl<D: Disk> Drop for Pending<D> {
    fn drop(&mut self) {
        for blob in mem::take(&mut *self.added.lock()).values() {
            self.checkpoints.unpin(&blob.digest);
        }
    }
}

fn unix_ms() -> u64 {
    // A wrong clock is no reason to lose a checkpoint.
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
