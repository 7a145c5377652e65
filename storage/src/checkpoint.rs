//! The catalogue: which checkpoints there are. One is there once its entry is flushed, after all its blobs are.
//!
//! Each entry has a manifest beside it, written after the entry and removed before it. So a manifest without an entry
//! means that the database has lost it, and opening puts it back; an entry without a manifest means that a process
//! died between the two, and opening writes it.
//!
//! An entry holds as many shards as one record takes, and the others are in pages of a tree of their own: written before the entry,
//! removed after it.

use crate::blobs::{BlobStore, RemovedReport};
use crate::digest::Digest;
use crate::disk::{Disk, RealDisk};
use crate::error::{Error, Result};
use crate::journal::{Store, step_of};
use crate::layout::RunDir;
use crate::manifest::{self, BlobRef, CheckpointDigest, CheckpointRecord};
use crate::pending::Pending;
use crate::record::{self, Place};
use serde::{Deserialize, Serialize};
use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use volary_core::{Epoch, ShardId, Step};

const CATALOGUE: &str = "catalogue";
const PAGES: &str = "catalogue_pages";
/// Shards in one record: each is some forty bytes, and a record holds 120 KiB.
const SHARDS_PER_RECORD: usize = 2_000;

/// A checkpoint's entry in the catalogue.
#[derive(Serialize, Deserialize)]
struct Entry {
    /// The checkpoint with the first of its shards.
    record: CheckpointRecord,
    /// Pages with the others.
    pages: u32,
}

/// Where a page of a checkpoint's entry lies.
fn page_key(step: Step, page: u32) -> [u8; 12] {
    let mut key = [0; 12];
    key[..8].copy_from_slice(&step.0.to_be_bytes());
    key[8..].copy_from_slice(&page.to_be_bytes());
    key
}

/// The run's checkpoints; clones share them.
#[derive(Debug)]
pub struct Checkpoints<D: Disk = RealDisk> {
    inner: Arc<Inner<D>>,
}

#[derive(Debug)]
struct Inner<D: Disk> {
    dir: RunDir,
    store: Store,
    blobs: BlobStore<D>,
    /// Blobs of checkpoints that are being written, and by how many: retention leaves them alone.
    pinned: Mutex<HashMap<Digest, usize>>,
    /// Held while an entry and its manifest come or go together.
    changing: Mutex<()>,
}

impl<D: Disk> Clone for Checkpoints<D> {
    fn clone(&self) -> Self {
        Self { inner: Arc::clone(&self.inner) }
    }
}

impl<D: Disk> Checkpoints<D> {
    /// Opens the catalogue and brings the manifests and it to agree.
    pub fn open(dir: &RunDir, store: Store, blobs: BlobStore<D>) -> Result<Self> {
        let inner =
            Inner { dir: dir.clone(), store, blobs, pinned: Mutex::default(), changing: Mutex::default() };
        let checkpoints = Self { inner: Arc::new(inner) };
        for step in checkpoints.rebuild_catalogue()? {
            tracing::warn!(%step, "the database had lost a checkpoint; put back from its manifest");
        }
        checkpoints.write_missing_manifests()?;
        checkpoints.remove_pages(None)?;
        Ok(checkpoints)
    }

    /// Starts a checkpoint that will hold exactly these shards.
    pub fn begin(
        &self,
        step: Step,
        epoch: Epoch,
        config_hash: Digest,
        expected: impl IntoIterator<Item = ShardId>,
    ) -> Pending<D> {
        Pending::new(self.clone(), step, epoch, config_hash, expected.into_iter().collect())
    }

    /// The newest checkpoint.
    pub fn latest(&self) -> Result<Option<CheckpointRecord>> {
        self.steps()?.last().map(|step| self.at(*step)).transpose()
    }

    /// The newest checkpoint of which every byte is as it was written; newer ones that are not are warned about.
    pub fn latest_intact(&self) -> Result<Option<CheckpointRecord>> {
        for step in self.steps()?.into_iter().rev() {
            match self.verify(step) {
                Ok(()) => return self.at(step).map(Some),
                Err(error) => tracing::warn!(%step, %error, "a checkpoint is damaged; trying the one before"),
            }
        }
        Ok(None)
    }

    /// The checkpoint at a step.
    pub fn at(&self, step: Step) -> Result<CheckpointRecord> {
        self.find(step)?.ok_or(Error::NoCheckpoint { step })
    }

    /// The steps that have a checkpoint, in order.
    pub fn steps(&self) -> Result<Vec<Step>> {
        let key = |key: sled::Result<sled::IVec>| {
            step_of(CATALOGUE, &key.map_err(|e| self.inner.store.failed("read the catalogue", e))?)
        };
        self.inner.store.catalogue.iter().keys().map(key).collect()
    }

    /// A shard's bytes, checked.
    pub fn read(&self, step: Step, shard: ShardId) -> Result<Vec<u8>> {
        self.at(step)?.read(|digest| self.inner.blobs.get(digest), shard)
    }

    /// Reads every byte of a checkpoint and says whether all are as they were written.
    pub fn verify(&self, step: Step) -> Result<()> {
        self.digest(step).map(drop)
    }

    /// The digest of a checkpoint's weights, from its bytes.
    pub fn digest(&self, step: Step) -> Result<CheckpointDigest> {
        self.at(step)?.digest(|digest| self.inner.blobs.get(digest))
    }

    /// Keeps the newest `keep` checkpoints, removes the others, and then every blob that nothing refers to.
    pub fn retain(&self, keep: usize) -> Result<RemovedReport> {
        let _changing = self.changing();
        let steps = self.steps()?;
        for step in &steps[..steps.len().saturating_sub(keep)] {
            self.remove(*step)?;
        }
        self.remove_unreferenced()
    }

    /// Removes every checkpoint after `step`, newest first, for a run that goes back to it; how many there were.
    pub fn truncate_after(&self, step: Step) -> Result<usize> {
        let _changing = self.changing();
        let newer: Vec<Step> = self.steps()?.into_iter().filter(|s| *s > step).collect();
        for step in newer.iter().rev() {
            self.remove(*step)?;
        }
        Ok(newer.len())
    }

    /// Puts back every entry that has a manifest and intact blobs but is not in the catalogue; which steps those are.
    pub fn rebuild_catalogue(&self) -> Result<Vec<Step>> {
        let mut rebuilt = Vec::new();
        for step in manifest::steps(&self.inner.dir)? {
            if self.is_catalogued(step)? {
                continue;
            }
            match self.intact_manifest(step) {
                Ok(Some(record)) => {
                    self.catalogue(&record)?;
                    rebuilt.push(step);
                }
                Ok(None) => {}
                Err(error) => tracing::warn!(%step, %error, "a checkpoint cannot be put back"),
            }
        }
        Ok(rebuilt)
    }

    /// The blobs, for [`Pending`].
    pub(crate) fn blobs(&self) -> &BlobStore<D> {
        &self.inner.blobs
    }

    /// Keeps a blob from retention until [`Checkpoints::unpin`]; to be called before it is written.
    pub(crate) fn pin(&self, digest: Digest) {
        *self.pinned().entry(digest).or_default() += 1;
    }

    /// Takes one [`Checkpoints::pin`] back.
    pub(crate) fn unpin(&self, digest: &Digest) {
        let mut pinned = self.pinned();
        if let Some(count) = pinned.get_mut(digest) {
            *count -= 1;
            if *count == 0 {
                pinned.remove(digest);
            }
        }
    }

    /// Makes a checkpoint exist: its blobs are durable when this is called. What is catalogued when it returns is the
    /// given record, or the one with the same content that was there before.
    pub(crate) fn publish(&self, record: CheckpointRecord) -> Result<CheckpointRecord> {
        let _changing = self.changing();
        let record = match self.find(record.step)? {
            Some(there) if there.same_content(&record) => there,
            Some(_) => return Err(Error::AlreadyCheckpointed { step: record.step }),
            None => record,
        };
        self.catalogue(&record)?;
        manifest::write(self.inner.blobs.disk(), &self.inner.dir, &record)?;
        Ok(record)
    }

    fn catalogue(&self, record: &CheckpointRecord) -> Result<()> {
        let Inner { store, .. } = &*self.inner;
        let failed = |e| store.failed("catalogue a checkpoint", e);
        let shards: Vec<(ShardId, BlobRef)> = record.shards.iter().map(|(&s, &b)| (s, b)).collect();
        let (first, others) = shards.split_at(shards.len().min(SHARDS_PER_RECORD));
        let mut pages = 0;
        for page in others.chunks(SHARDS_PER_RECORD) {
            let key = page_key(record.step, pages);
            let bytes = record::seal(Place { tree: PAGES, key: &key }, &page)?;
            store.catalogue_pages.insert(key, bytes).map_err(failed)?;
            pages += 1;
        }
        let head = CheckpointRecord { shards: first.iter().copied().collect(), ..record.clone() };
        let key = record.step.0.to_be_bytes();
        let bytes = record::seal(Place { tree: CATALOGUE, key: &key }, &Entry { record: head, pages })?;
        store.catalogue.insert(key, bytes).map_err(failed)?;
        store.make_durable()
    }

    fn find(&self, step: Step) -> Result<Option<CheckpointRecord>> {
        let Inner { store, .. } = &*self.inner;
        let entry: Option<Entry> = store.read(&store.catalogue, CATALOGUE, &step.0.to_be_bytes())?;
        let Some(Entry { mut record, pages }) = entry else { return Ok(None) };
        for page in 0..pages {
            let shards: Option<Vec<(ShardId, BlobRef)>> =
                store.read(&store.catalogue_pages, PAGES, &page_key(step, page))?;
            let missing = || Error::DamagedRecord {
                tree: PAGES,
                key: format!("step {step}"),
                reason: format!("page {page} of {pages} is missing"),
            };
            record.shards.extend(shards.ok_or_else(missing)?);
        }
        Ok(Some(record))
    }

    /// Removes a step's pages, or with `None` those of every step that is not catalogued.
    fn remove_pages(&self, step: Option<Step>) -> Result<()> {
        let Inner { store, .. } = &*self.inner;
        let failed = |e| store.failed("forget a page of the catalogue", e);
        let all = match step {
            Some(step) => store.catalogue_pages.scan_prefix(step.0.to_be_bytes()),
            None => store.catalogue_pages.iter(),
        };
        for key in all.keys() {
            let key = key.map_err(failed)?;
            if step.is_some() || !self.is_catalogued(step_of(PAGES, key.get(..8).unwrap_or_default())?)? {
                store.catalogue_pages.remove(key).map_err(failed)?;
            }
        }
        Ok(())
    }

    fn is_catalogued(&self, step: Step) -> Result<bool> {
        let Inner { store, .. } = &*self.inner;
        store.catalogue.contains_key(step.0.to_be_bytes()).map_err(|e| store.failed("read the catalogue", e))
    }

    fn intact_manifest(&self, step: Step) -> Result<Option<CheckpointRecord>> {
        let Some(record) = manifest::read(&self.inner.dir, step)? else { return Ok(None) };
        record.digest(|digest| self.inner.blobs.get(digest))?;
        Ok(Some(record))
    }

    fn write_missing_manifests(&self) -> Result<()> {
        let Inner { dir, blobs, .. } = &*self.inner;
        for step in self.steps()? {
            if matches!(manifest::read(dir, step), Ok(Some(_))) {
                continue;
            }
            match self.at(step) {
                Ok(record) => manifest::write(blobs.disk(), dir, &record)?,
                // Reading that checkpoint will say so again; the others are as good as ever.
                Err(error) => tracing::warn!(%step, %error, "a checkpoint's entry is damaged"),
            }
        }
        Ok(())
    }

    /// The manifest goes first: should the process die in between, opening finds an entry whose blobs are all there.
    fn remove(&self, step: Step) -> Result<()> {
        let Inner { dir, store, blobs, .. } = &*self.inner;
        manifest::remove(blobs.disk(), dir, step)?;
        store.catalogue.remove(step.0.to_be_bytes()).map_err(|e| store.failed("forget a checkpoint", e))?;
        self.remove_pages(Some(step))?;
        store.make_durable()
    }

    fn remove_unreferenced(&self) -> Result<RemovedReport> {
        // Held to the end: a blob that is put meanwhile is either pinned already or finds its file gone and writes it.
        let pinned = self.pinned();
        let mut referenced: HashSet<Digest> = pinned.keys().copied().collect();
        for step in self.steps()? {
            referenced.extend(self.at(step)?.shards.values().map(|blob| blob.digest));
        }
        let removed = self.inner.blobs.remove_unreferenced(&referenced);
        drop(pinned);
        removed
    }

    fn pinned(&self) -> MutexGuard<'_, HashMap<Digest, usize>> {
        self.inner.pinned.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn changing(&self) -> MutexGuard<'_, ()> {
        self.inner.changing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
