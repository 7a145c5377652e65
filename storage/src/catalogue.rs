//! The catalogue of checkpoints in the database.
//!
//! An entry has as many shards as fit in one record. The others are in pages in a tree of their own, written
//! before the entry and removed after it.

use crate::error::{Error, Result};
use crate::journal::{Store, step_of};
use crate::limits::SHARDS_PER_RECORD;
use crate::manifest::{BlobRef, CheckpointRecord};
use crate::record::{self, Place};
use serde::{Deserialize, Serialize};
use volary_core::{ShardId, Step};

/// The tree of entries.
pub(crate) const CATALOGUE: &str = "catalogue";
/// The tree of pages.
pub(crate) const CATALOGUE_PAGES: &str = "catalogue_pages";

/// A checkpoint's entry in the catalogue.
#[derive(Serialize, Deserialize)]
struct Entry {
    /// The checkpoint with the first of its shards.
    record: CheckpointRecord,
    /// The number of pages with the others.
    pages: u32,
}

/// The key of a page of a checkpoint's entry.
fn page_key(step: Step, page: u32) -> [u8; 12] {
    let mut key = [0; 12];
    key[..8].copy_from_slice(&step.0.to_be_bytes());
    key[8..].copy_from_slice(&page.to_be_bytes());
    key
}

/// The entries and their pages.
#[derive(Debug)]
pub(crate) struct Catalogue {
    store: Store,
}

impl Catalogue {
    pub(crate) fn new(store: Store) -> Self {
        Self { store }
    }

    #[cfg(test)]
    pub(crate) fn store(&self) -> &Store {
        &self.store
    }

    /// The steps with an entry, ascending.
    pub(crate) fn steps(&self) -> Result<Vec<Step>> {
        let step = |key: sled::Result<sled::IVec>| {
            step_of(CATALOGUE, &key.map_err(|e| self.store.failed("read the catalogue", e))?)
        };
        self.store.catalogue.iter().keys().map(step).collect()
    }

    pub(crate) fn contains(&self, step: Step) -> Result<bool> {
        let store = &self.store;
        store.catalogue.contains_key(step.0.to_be_bytes()).map_err(|e| store.failed("read the catalogue", e))
    }

    pub(crate) fn find(&self, step: Step) -> Result<Option<CheckpointRecord>> {
        let store = &self.store;
        let entry: Option<Entry> = store.read(&store.catalogue, CATALOGUE, &step.0.to_be_bytes())?;
        let Some(Entry { mut record, pages }) = entry else { return Ok(None) };
        for page in 0..pages {
            let shards: Option<Vec<(ShardId, BlobRef)>> =
                store.read(&store.catalogue_pages, CATALOGUE_PAGES, &page_key(step, page))?;
            let missing = || Error::DamagedRecord {
                tree: CATALOGUE_PAGES,
                key: format!("step {step}"),
                reason: format!("page {page} of {pages} is missing"),
            };
            record.shards.extend(shards.ok_or_else(missing)?);
        }
        Ok(Some(record))
    }

    /// Writes a checkpoint durably.
    pub(crate) fn insert(&self, record: &CheckpointRecord) -> Result<()> {
        let store = &self.store;
        let failed = |e| store.failed("catalogue a checkpoint", e);
        let shards: Vec<(ShardId, BlobRef)> = record.shards.iter().map(|(&s, &b)| (s, b)).collect();
        let (first, others) = shards.split_at(shards.len().min(SHARDS_PER_RECORD));
        let mut pages = 0;
        for page in others.chunks(SHARDS_PER_RECORD) {
            let key = page_key(record.step, pages);
            let bytes = record::seal(Place { tree: CATALOGUE_PAGES, key: &key }, &page)?;
            store.catalogue_pages.insert(key, bytes).map_err(failed)?;
            pages += 1;
        }
        let head = CheckpointRecord { shards: first.iter().copied().collect(), ..record.clone() };
        let key = record.step.0.to_be_bytes();
        let bytes = record::seal(Place { tree: CATALOGUE, key: &key }, &Entry { record: head, pages })?;
        store.catalogue.insert(key, bytes).map_err(failed)?;
        store.make_durable()
    }

    /// Removes a checkpoint durably.
    pub(crate) fn remove(&self, step: Step) -> Result<()> {
        let store = &self.store;
        store.catalogue.remove(step.0.to_be_bytes()).map_err(|e| store.failed("remove a checkpoint", e))?;
        self.remove_pages(Some(step))?;
        store.make_durable()
    }

    /// Removes the pages of a step, or with `None` those of all steps without an entry.
    pub(crate) fn remove_pages(&self, step: Option<Step>) -> Result<()> {
        let store = &self.store;
        let failed = |e| store.failed("remove a page of the catalogue", e);
        let all = match step {
            Some(step) => store.catalogue_pages.scan_prefix(step.0.to_be_bytes()),
            None => store.catalogue_pages.iter(),
        };
        for key in all.keys() {
            let key = key.map_err(failed)?;
            if step.is_some()
                || !self.contains(step_of(CATALOGUE_PAGES, key.get(..8).unwrap_or_default())?)?
            {
                store.catalogue_pages.remove(key).map_err(failed)?;
            }
        }
        Ok(())
    }
}
