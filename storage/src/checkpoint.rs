//! The checkpoints of a run. A checkpoint exists once its catalogue entry is durable; its blobs are durable
//! before.
//!
//! Each entry has a manifest, written after the entry and removed before it. A manifest without an entry
//! therefore means that the database has lost the entry, and opening restores it. An entry without a manifest
//! means a crash in between, and opening writes the manifest.
//!
//! Opening reads no blobs: a checkpoint is verified when it is about to be used. Nothing is deleted because
//! it cannot be read; what is proven to be damaged is set aside, for people to look at.

use crate::blobs::{BlobStore, RemovedReport};
use crate::catalogue::Catalogue;
use crate::disk::{Disk, RealDisk};
use crate::error::{Error, Result};
use crate::journal::Store;
use crate::layout::RunDir;
use crate::manifest::{self, CheckpointDigest, CheckpointRecord};
use crate::pending::Pending;
use parking_lot::Mutex;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use volary_core::Digest;
use volary_core::{Epoch, ShardId, Step, Timeline};

/// The run's checkpoints. Clones are handles of the same catalogue.
#[derive(Debug)]
pub struct Checkpoints<D: Disk = RealDisk> {
    inner: Arc<Inner<D>>,
}

#[derive(Debug)]
struct Inner<D: Disk> {
    dir: RunDir,
    catalogue: Catalogue,
    blobs: BlobStore<D>,
    /// Blobs of checkpoints in progress, with reference counts: retention does not remove them.
    pinned: Mutex<HashMap<Digest, usize>>,
    /// Held while an entry and its manifest are written or removed.
    changing: Mutex<()>,
}

impl<D: Disk> Clone for Checkpoints<D> {
    fn clone(&self) -> Self {
        Self { inner: Arc::clone(&self.inner) }
    }
}

impl<D: Disk> Checkpoints<D> {
    /// Opens the catalogue and reconciles it with the manifests.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Database`] when a read or write fails, [`Error::NoBlobs`] when the newest
    /// checkpoint has no blob at all.
    pub fn open(dir: &RunDir, store: Store, blobs: BlobStore<D>) -> Result<Self> {
        let inner = Inner {
            dir: dir.clone(),
            catalogue: Catalogue::new(store),
            blobs,
            pinned: Mutex::default(),
            changing: Mutex::default(),
        };
        let checkpoints = Self { inner: Arc::new(inner) };
        for step in checkpoints.rebuild_catalogue()? {
            tracing::warn!(%step, "restored a checkpoint from its manifest; the database had lost it");
        }
        checkpoints.write_missing_manifests()?;
        checkpoints.check_folder_of_blobs()?;
        checkpoints.inner.catalogue.remove_pages(None)?;
        Ok(checkpoints)
    }

    /// Begins a checkpoint of exactly these shards.
    pub fn begin(
        &self,
        at: (Step, Timeline, Epoch),
        config_hash: Digest,
        expected: impl IntoIterator<Item = ShardId>,
    ) -> Pending<D> {
        Pending::new(self.clone(), at, config_hash, expected.into_iter().collect())
    }

    /// The newest checkpoint.
    ///
    /// # Errors
    /// [`Error::Database`] or [`Error::DamagedRecord`].
    pub fn latest(&self) -> Result<Option<CheckpointRecord>> {
        self.steps()?.last().map(|step| self.at(*step)).transpose()
    }

    /// The checkpoint at a step.
    ///
    /// # Errors
    /// [`Error::NoCheckpoint`], [`Error::Database`] or [`Error::DamagedRecord`].
    pub fn at(&self, step: Step) -> Result<CheckpointRecord> {
        self.inner.catalogue.find(step)?.ok_or(Error::NoCheckpoint { step })
    }

    /// The steps with a checkpoint, ascending.
    ///
    /// # Errors
    /// [`Error::Database`] or [`Error::DamagedRecord`].
    pub fn steps(&self) -> Result<Vec<Step>> {
        self.inner.catalogue.steps()
    }

    /// A shard's bytes, verified.
    ///
    /// # Errors
    /// [`Error::NoCheckpoint`], [`Error::NoShard`], [`Error::NoBlob`], [`Error::DamagedBlob`], or a failed
    /// read.
    pub fn read(&self, step: Step, shard: ShardId) -> Result<Vec<u8>> {
        self.at(step)?.read(|digest| self.inner.blobs.get(digest), shard)
    }

    /// Verifies all bytes of a checkpoint.
    ///
    /// # Errors
    /// As [`Checkpoints::read`], for the first damaged shard.
    pub fn verify(&self, step: Step) -> Result<()> {
        self.digest(step).map(drop)
    }

    /// The digest of a checkpoint's weights, computed from its bytes.
    ///
    /// # Errors
    /// As [`Checkpoints::read`], for the first damaged shard.
    pub fn digest(&self, step: Step) -> Result<CheckpointDigest> {
        self.at(step)?.digest(|digest| self.inner.blobs.get(digest))
    }

    /// Removes all but the newest `keep` checkpoints and those that `must_stay`, and all unreferenced blobs.
    /// One at step 0 always stays: its weights came from elsewhere, and a run that goes back to its beginning
    /// could not make them again.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Database`] or [`Error::DamagedRecord`].
    pub fn retain(&self, keep: usize, must_stay: &[Option<Step>]) -> Result<RemovedReport> {
        let _changing = self.inner.changing.lock();
        let steps = self.steps()?;
        let old = &steps[..steps.len().saturating_sub(keep)];
        for step in old.iter().filter(|step| **step > Step(0) && !must_stay.contains(&Some(**step))) {
            self.remove(*step)?;
        }
        self.remove_unreferenced()
    }

    /// Takes a checkpoint out of the catalogue. Its manifest is renamed, and its blobs stay, until somebody
    /// removes the manifest.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Database`].
    pub fn set_aside(&self, step: Step) -> Result<()> {
        let _changing = self.inner.changing.lock();
        let Inner { dir, catalogue, blobs, .. } = &*self.inner;
        manifest::set_aside(blobs.disk(), dir, step)?;
        catalogue.remove(step)
    }

    /// Removes a checkpoint that is void.
    pub(crate) fn discard(&self, step: Step) -> Result<()> {
        let _changing = self.inner.changing.lock();
        self.remove(step)
    }

    /// Removes all checkpoints after `step`, newest first, for a rollback to it; returns their number.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Database`] or [`Error::DamagedRecord`].
    pub fn truncate_after(&self, step: Step) -> Result<usize> {
        let _changing = self.inner.changing.lock();
        let newer: Vec<Step> = self.steps()?.into_iter().filter(|s| *s > step).collect();
        for step in newer.iter().rev() {
            self.remove(*step)?;
        }
        Ok(newer.len())
    }

    /// Restores all catalogue entries that are lost but have a manifest, and returns their steps. A damaged
    /// manifest is set aside.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Database`], [`Error::Format`] or [`Error::Unstorable`].
    pub fn rebuild_catalogue(&self) -> Result<Vec<Step>> {
        let Inner { dir, catalogue, blobs, .. } = &*self.inner;
        let mut rebuilt = Vec::new();
        for step in manifest::steps(dir)? {
            if catalogue.contains(step)? {
                continue;
            }
            match manifest::read_on(blobs.disk(), dir, step) {
                Ok(Some(record)) => {
                    catalogue.insert(&record)?;
                    rebuilt.push(step);
                }
                Ok(None) => {}
                Err(error) if error.is_damage() => {
                    tracing::warn!(%step, %error, "a checkpoint is set aside");
                    manifest::set_aside(blobs.disk(), dir, step)?;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(rebuilt)
    }

    /// The run's database.
    #[cfg(test)]
    pub(crate) fn store(&self) -> &Store {
        self.inner.catalogue.store()
    }

    /// The blobs, for [`Pending`].
    pub(crate) fn blobs(&self) -> &BlobStore<D> {
        &self.inner.blobs
    }

    /// Protects a blob from retention until [`Checkpoints::unpin`]. Call it before the blob is written.
    pub(crate) fn pin(&self, digest: Digest) {
        *self.inner.pinned.lock().entry(digest).or_default() += 1;
    }

    /// Reverts one [`Checkpoints::pin`].
    pub(crate) fn unpin(&self, digest: &Digest) {
        let mut pinned = self.inner.pinned.lock();
        if let Some(count) = pinned.get_mut(digest) {
            *count -= 1;
            if *count == 0 {
                pinned.remove(digest);
            }
        }
    }

    /// Publishes a checkpoint whose blobs are durable. Returns the catalogued record: the given one, or an
    /// earlier one with the same content.
    pub(crate) fn publish(&self, record: CheckpointRecord) -> Result<CheckpointRecord> {
        let _changing = self.inner.changing.lock();
        let record = match self.inner.catalogue.find(record.step)? {
            Some(existing) if existing.same_content(&record) => existing,
            Some(_) => return Err(Error::AlreadyCheckpointed { step: record.step }),
            None => record,
        };
        self.inner.catalogue.insert(&record)?;
        // It exists from here on. Opening writes a manifest that is missing.
        if let Err(error) = manifest::write(self.inner.blobs.disk(), &self.inner.dir, &record) {
            tracing::warn!(step = %record.step, %error, "a checkpoint has no manifest yet");
        }
        Ok(record)
    }

    /// A folder without any blob of the newest checkpoint is not the folder of this run: a file system that
    /// is not mounted looks like that.
    fn check_folder_of_blobs(&self) -> Result<()> {
        let Some(record) = self.latest()? else { return Ok(()) };
        for blob in record.shards.values() {
            match self.inner.blobs.len(&blob.digest) {
                Ok(_) => return Ok(()),
                Err(Error::NoBlob { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Err(Error::NoBlobs { folder: self.inner.blobs.folder().to_owned(), step: record.step })
    }

    /// Repairs entries and manifests from each other.
    fn write_missing_manifests(&self) -> Result<()> {
        let Inner { dir, blobs, catalogue, .. } = &*self.inner;
        for step in self.steps()? {
            let (entry, manifest) = (self.at(step), manifest::read_on(blobs.disk(), dir, step));
            match (entry, manifest) {
                (Ok(_), Ok(Some(_))) => {}
                (Ok(record), Ok(None)) => manifest::write(blobs.disk(), dir, &record)?,
                (Ok(record), Err(error)) if error.is_damage() => {
                    manifest::write(blobs.disk(), dir, &record)?;
                }
                (Err(error), Ok(Some(record))) if error.is_damage() => catalogue.insert(&record)?,
                (Err(error), Ok(None)) if error.is_damage() => {
                    tracing::warn!(%step, %error, "a checkpoint without a manifest is left out");
                    catalogue.remove(step)?;
                }
                (Err(error), _) | (_, Err(error)) => return Err(error),
            }
        }
        Ok(())
    }

    /// The manifest is removed first: after a crash in between, opening finds an entry with all its blobs.
    fn remove(&self, step: Step) -> Result<()> {
        let Inner { dir, catalogue, blobs, .. } = &*self.inner;
        manifest::remove(blobs.disk(), dir, step)?;
        catalogue.remove(step)
    }

    fn remove_unreferenced(&self) -> Result<RemovedReport> {
        // Held to the end: a concurrent write of a blob either has pinned it, or rewrites the removed file.
        let pinned = self.inner.pinned.lock();
        let mut referenced: HashSet<Digest> = pinned.keys().copied().collect();
        for step in self.steps()? {
            referenced.extend(self.at(step)?.shards.values().map(|blob| blob.digest));
        }
        match manifest::all_aside(self.inner.blobs.disk(), &self.inner.dir) {
            Ok(aside) => {
                referenced.extend(aside.iter().flat_map(|record| record.shards.values().map(|b| b.digest)));
            }
            Err(error) => {
                tracing::warn!(%error, "no blobs are removed while a checkpoint that was set aside is unreadable");
                return Ok(RemovedReport::default());
            }
        }
        let removed = self.inner.blobs.remove_unreferenced(&referenced);
        drop(pinned);
        removed
    }
}
