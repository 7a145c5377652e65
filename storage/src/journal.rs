//! The committed steps, in sled: once [`Store::commit`] has returned, the step survives a power failure.
//!
//! sled may silently lose the end of a damaged log: each record has a checksum, and opening checks the
//! sequence of steps.
//!
//! The journal begins after its *base*: steps up to it are pruned, or known by a checkpoint only.

use crate::catalogue::{CATALOGUE, CATALOGUE_PAGES};
use crate::database::{Database, SyncFile};
use crate::error::{Error, Result};
use crate::layout::RunDir;
use crate::limits::PRUNED_AT_ONCE_MAX;
use crate::record::{self, Place};
use parking_lot::Mutex;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sled::transaction::{TransactionError, Transactional, TransactionalTree};
use std::fs::File;
use std::sync::Arc;
use volary_core::Digest;
use volary_core::Step;

/// The format of run directories of this version.
pub const FORMAT: u16 = 6;

const JOURNAL: &str = "journal";
const RUN: &str = "run";
const IDENTITY: &[u8] = b"identity";
const BASE: &[u8] = b"base";

/// The trees of one transaction: the journal, the run's own records, its facts.
type Trees<'a> = (&'a TransactionalTree, &'a TransactionalTree, &'a TransactionalTree);

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
        Self::open_with(dir, File::sync_all)
    }

    pub(crate) fn open_with(dir: &RunDir, sync: SyncFile) -> Result<Self> {
        let database = Database::open(dir.state(), sync)?;
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

    /// Whether a directory holds committed steps. One without them is of a run that was refused or cut off
    /// before its first step. Hold the run's lock.
    ///
    /// # Errors
    /// As [`Store::open`].
    pub fn has_steps(dir: &RunDir) -> Result<bool> {
        // Opening would create it.
        if !dir.state().join("db").exists() {
            return Ok(false);
        }
        Ok(Self::open(dir)?.last_committed()?.is_some_and(|step| step > Step(0)))
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

    /// The last committed step: that of the last record, or the base.
    ///
    /// # Errors
    /// [`Error::Database`] or [`Error::DamagedRecord`].
    pub fn last_committed(&self) -> Result<Option<Step>> {
        let last = self.journal.last().map_err(|e| self.failed("read the journal's end", e))?;
        let last = last.map(|(key, _)| step_of(JOURNAL, &key)).transpose()?;
        Ok(last.max(self.base()?))
    }

    /// The step before the first record, if records before it are pruned or lost.
    fn base(&self) -> Result<Option<Step>> {
        self.read(&self.run, RUN, BASE)
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

    /// Goes back to `step`: removes all steps after it and stores a fact about the run, both in one durable
    /// transaction. Returns the number of removed steps.
    ///
    /// # Errors
    /// [`Error::Unstorable`], [`Error::Database`], [`Error::Io`] or [`Error::NoSpace`].
    pub fn go_back<T: Serialize>(&self, step: Step, fact: &str, value: &T) -> Result<usize> {
        let _guard = self.committing.lock();
        let first = step.next().0.to_be_bytes();
        let removed = self.keys(self.journal.range(first..), usize::MAX)?;
        let fact = (fact, record::seal(crate::table::fact(fact), value)?);
        // Records from a base after `step` on are gone: the journal starts again.
        let base = self.base()?.filter(|base| *base > step).map(|_| step);
        self.transact(&removed, base, Some(fact))?;
        Ok(removed.len())
    }

    /// Makes `step`, which a checkpoint has and the journal lacks, the base of the journal. What the journal
    /// has are earlier steps.
    ///
    /// # Errors
    /// [`Error::OutOfOrder`] when the journal is not behind `step`; otherwise as [`Store::go_back`].
    pub fn rebase(&self, step: Step) -> Result<()> {
        let _guard = self.committing.lock();
        if let Some(last) = self.last_committed()?.filter(|last| *last >= step) {
            return Err(Error::OutOfOrder { step, last });
        }
        let removed = self.keys(self.journal.iter(), usize::MAX)?;
        self.transact(&removed, Some(step), None)
    }

    /// Removes steps before `step`, at most [`PRUNED_AT_ONCE_MAX`] of them, when neither a checkpoint nor a
    /// reader needs them. Returns their number.
    ///
    /// # Errors
    /// [`Error::Database`], [`Error::Io`] or [`Error::NoSpace`].
    pub fn prune_before(&self, step: Step) -> Result<usize> {
        let _guard = self.committing.lock();
        let removed = self.keys(self.journal.range(..step.0.to_be_bytes()), PRUNED_AT_ONCE_MAX)?;
        let Some(last) = removed.last() else { return Ok(0) };
        let base = step_of(JOURNAL, last)?;
        self.transact(&removed, Some(base), None)?;
        Ok(removed.len())
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

    fn keys(&self, steps: sled::Iter, most: usize) -> Result<Vec<sled::IVec>> {
        let keys = steps.keys().take(most);
        keys.collect::<sled::Result<_>>().map_err(|e| self.failed("read the journal", e))
    }

    /// Removes steps, and writes a new base and a fact, all or nothing.
    fn transact(
        &self,
        removed: &[sled::IVec],
        base: Option<Step>,
        fact: Option<(&str, Vec<u8>)>,
    ) -> Result<()> {
        let base = base.map(|base| record::seal(Place { tree: RUN, key: BASE }, &base)).transpose()?;
        let change = |(journal, run, facts): &Trees<'_>| {
            for key in removed {
                journal.remove(key)?;
            }
            if let Some(base) = &base {
                run.insert(BASE, base.as_slice())?;
            }
            if let Some((name, value)) = &fact {
                facts.insert(name.as_bytes(), value.as_slice())?;
            }
            Ok(())
        };
        let changed: sled::transaction::TransactionResult<(), sled::Error> =
            (&self.journal, &self.run, &self.facts)
                .transaction(|trees| change(&(&trees.0, &trees.1, &trees.2)));
        changed.map_err(|error| match error {
            TransactionError::Abort(error) | TransactionError::Storage(error) => {
                self.failed("change the journal", error)
            }
        })?;
        self.make_durable()
    }

    fn check_steps(&self) -> Result<()> {
        let mut previous = self.base()?;
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
