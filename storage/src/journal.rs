//! The committed steps, in sled: once [`Store::commit`] has returned, the step survives a power failure.
//!
//! sled may silently lose the end of a damaged log: each record has a checksum, and opening checks the
//! sequence of steps.

use crate::catalogue::{CATALOGUE, CATALOGUE_PAGES};
use crate::database::Database;
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::layout::RunDir;
use crate::record::{self, Place};
use parking_lot::Mutex;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use volary_core::Step;

/// The format of run directories of this version.
pub const FORMAT: u16 = 4;

const JOURNAL: &str = "journal";
const RUN: &str = "run";
const IDENTITY: &[u8] = b"identity";

/// The identity of a run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunIdentity {
    /// The run's name.
    pub name: String,
    /// The seed of every random draw.
    pub seed: u64,
    /// The digest of the options that determine the weights.
    pub config_hash: Digest,
    /// The format of the run directory: [`FORMAT`].
    pub format: u16,
}

/// The run's open database. Clones are handles of the same database.
#[derive(Clone, Debug)]
pub struct Store {
    pub(crate) journal: sled::Tree,
    pub(crate) catalogue: sled::Tree,
    pub(crate) catalogue_pages: sled::Tree,
    pub(crate) facts: sled::Tree,
    pub(crate) tokens: sled::Tree,
    pub(crate) certificates: sled::Tree,
    run: sled::Tree,
    database: Arc<Database>,
    /// Held from the check of the journal's end until the write after it.
    committing: Arc<Mutex<()>>,
}

impl Store {
    /// Opens the run's database and checks that no committed step is damaged or missing.
    ///
    /// # Errors
    /// [`Error::Database`], [`Error::Io`], [`Error::DamagedRecord`] or [`Error::Gap`].
    pub fn open(dir: &RunDir) -> Result<Self> {
        let database = Database::open(dir.state())?;
        let store = Self {
            journal: database.tree(JOURNAL)?,
            catalogue: database.tree(CATALOGUE)?,
            catalogue_pages: database.tree(CATALOGUE_PAGES)?,
            facts: database.tree("facts")?,
            tokens: database.tree("tokens")?,
            certificates: database.tree("certificates")?,
            run: database.tree(RUN)?,
            database: Arc::new(database),
            committing: Arc::default(),
        };
        store.make_durable()?;
        store.database.sync_directories()?;
        store.check_steps()?;
        Ok(store)
    }

    /// Stores the identity of the run at the first call, and compares it at later calls.
    ///
    /// # Errors
    /// [`Error::OtherRun`] when the identities differ; otherwise as [`Store::identity`].
    pub fn identify(&self, given: &RunIdentity) -> Result<()> {
        let Some(stored) = self.identity()? else { return self.put_identity(given) };
        let differs = |field, stored: &dyn ToString, given: &dyn ToString| {
            Err(Error::OtherRun { field, stored: stored.to_string(), given: given.to_string() })
        };
        match (&stored, given) {
            (s, g) if s.name != g.name => differs("name", &s.name, &g.name),
            (s, g) if s.seed != g.seed => differs("seed", &s.seed, &g.seed),
            (s, g) if s.config_hash != g.config_hash => differs("config", &s.config_hash, &g.config_hash),
            _ => Ok(()),
        }
    }

    /// The stored identity of the run.
    ///
    /// # Errors
    /// [`Error::Format`] for a run directory of another format, [`Error::Database`] or
    /// [`Error::DamagedRecord`].
    pub fn identity(&self) -> Result<Option<RunIdentity>> {
        let stored: Option<RunIdentity> = self.read(&self.run, RUN, IDENTITY)?;
        match stored {
            Some(RunIdentity { format, .. }) if format != FORMAT => {
                Err(Error::Format { what: "the run directory".to_owned(), found: format, known: FORMAT })
            }
            stored => Ok(stored),
        }
    }

    /// Replaces the stored identity, for options that may change between two starts.
    ///
    /// # Errors
    /// [`Error::Database`], [`Error::Io`] or [`Error::NoSpace`].
    pub fn put_identity(&self, identity: &RunIdentity) -> Result<()> {
        let bytes = record::seal(Place { tree: RUN, key: IDENTITY }, identity)?;
        self.run.insert(IDENTITY, bytes).map_err(|e| self.failed("write the identity", e))?;
        self.make_durable()
    }

    /// Bytes of the database on disk; 0 when unknown.
    #[must_use]
    pub fn bytes_on_disk(&self) -> u64 {
        self.database.bytes_on_disk()
    }

    /// Commits a step durably: when this returns, the step survives a crash and a power failure.
    ///
    /// A repeated commit of a step with the same content succeeds, since a supervisor may crash before it
    /// knows of its commit.
    ///
    /// # Errors
    /// [`Error::AlreadyCommitted`] for a step with different content, [`Error::OutOfOrder`] for a step that
    /// does not follow the last one, [`Error::Unstorable`], [`Error::Database`], [`Error::Io`] or
    /// [`Error::NoSpace`].
    #[tracing::instrument(target = "volary::trace", name = "journal.write", skip_all)]
    pub fn commit<T: Serialize>(&self, step: Step, value: &T) -> Result<()> {
        let key = step.0.to_be_bytes();
        let bytes = record::seal(Place { tree: JOURNAL, key: &key }, value)?;
        let _guard = self.committing.lock();
        if let Some(last) = self.last_committed()?
            && step != last.next()
            && !self.is_committed(step)?
        {
            return Err(Error::OutOfOrder { step, last });
        }
        let swapped = self
            .journal
            .compare_and_swap(key, None::<&[u8]>, Some(bytes.as_slice()))
            .map_err(|e| self.failed("commit a step", e))?;
        match swapped {
            Err(existing) if existing.current.as_deref() != Some(bytes.as_slice()) => {
                Err(Error::AlreadyCommitted { step })
            }
            // Also when it exists: its writer may have crashed before it was durable.
            _ => self.make_durable(),
        }
    }

    /// The content of a committed step.
    ///
    /// # Errors
    /// [`Error::Database`] or [`Error::DamagedRecord`].
    pub fn committed<T: DeserializeOwned>(&self, step: Step) -> Result<Option<T>> {
        self.read(&self.journal, JOURNAL, &step.0.to_be_bytes())
    }

    /// The last committed step.
    ///
    /// # Errors
    /// [`Error::Database`] or [`Error::DamagedRecord`].
    pub fn last_committed(&self) -> Result<Option<Step>> {
        let last = self.journal.last().map_err(|e| self.failed("read the journal's end", e))?;
        last.map(|(key, _)| step_of(JOURNAL, &key)).transpose()
    }

    /// All committed steps from `from` on, ascending.
    pub fn committed_range<T: DeserializeOwned>(
        &self,
        from: Step,
    ) -> impl Iterator<Item = Result<(Step, T)>> + use<T> {
        let store = self.clone();
        self.journal.range(from.0.to_be_bytes()..).map(move |item| {
            let (key, bytes) = item.map_err(|e| store.failed("read the journal", e))?;
            Ok((step_of(JOURNAL, &key)?, record::open(Place { tree: JOURNAL, key: &key }, &bytes)?))
        })
    }

    /// Removes all steps after `step` atomically, for a rollback to a checkpoint; returns their number.
    ///
    /// # Errors
    /// [`Error::Database`], [`Error::Io`] or [`Error::NoSpace`].
    pub fn truncate_after(&self, step: Step) -> Result<usize> {
        let Some(first) = step.0.checked_add(1) else { return Ok(0) };
        self.remove_steps(self.journal.range(first.to_be_bytes()..))
    }

    /// Removes all steps before `step` atomically, when no checkpoint needs them; returns their number.
    ///
    /// # Errors
    /// [`Error::Database`], [`Error::Io`] or [`Error::NoSpace`].
    pub fn prune_before(&self, step: Step) -> Result<usize> {
        self.remove_steps(self.journal.range(..step.0.to_be_bytes()))
    }

    /// Makes all writes so far durable.
    pub(crate) fn make_durable(&self) -> Result<()> {
        self.database.make_durable()
    }

    /// A record of a tree, verified.
    pub(crate) fn read<T: DeserializeOwned>(
        &self,
        tree: &sled::Tree,
        name: &'static str,
        key: &[u8],
    ) -> Result<Option<T>> {
        let bytes = tree.get(key).map_err(|e| self.failed("read a record", e))?;
        bytes.map(|bytes| record::open(Place { tree: name, key }, &bytes)).transpose()
    }

    /// An error of this database.
    pub(crate) fn failed(&self, what: &'static str, source: sled::Error) -> Error {
        self.database.failed(what, source)
    }

    fn is_committed(&self, step: Step) -> Result<bool> {
        self.journal.contains_key(step.0.to_be_bytes()).map_err(|e| self.failed("read the journal", e))
    }

    fn remove_steps(&self, steps: sled::Iter) -> Result<usize> {
        let _guard = self.committing.lock();
        let mut batch = sled::Batch::default();
        let mut count = 0;
        for key in steps.keys() {
            batch.remove(key.map_err(|e| self.failed("read the journal", e))?);
            count += 1;
        }
        self.journal.apply_batch(batch).map_err(|e| self.failed("remove steps", e))?;
        self.make_durable()?;
        Ok(count)
    }

    fn check_steps(&self) -> Result<()> {
        let mut previous: Option<Step> = None;
        for item in &self.journal {
            let (key, bytes) = item.map_err(|e| self.failed("read the journal", e))?;
            let step = step_of(JOURNAL, &key)?;
            record::check(Place { tree: JOURNAL, key: &key }, &bytes)?;
            if let Some(last) = previous
                && last.next() != step
            {
                let path = self.database.directory().to_owned();
                return Err(Error::Gap { first: last.next(), last: step.previous(), path });
            }
            previous = Some(step);
        }
        Ok(())
    }
}

/// The step of a key.
pub(crate) fn step_of(tree: &'static str, key: &[u8]) -> Result<Step> {
    let bytes = <[u8; 8]>::try_from(key).map_err(|_| Error::DamagedRecord {
        tree,
        key: format!("{key:02x?}"),
        reason: "its key is not a step".to_owned(),
    })?;
    Ok(Step(u64::from_be_bytes(bytes)))
}
