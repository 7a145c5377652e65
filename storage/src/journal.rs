//! The committed steps, in sled: once [`Store::commit`] has returned, the step survives a loss of power.
//!
//! sled's flush hands the bytes to the kernel and no further, so every durable write syncs the database's file too.
//! sled may also lose the end of a damaged log without a word: each record has a checksum, and opening counts steps.

use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::layout::RunDir;
use crate::record::{self, Place};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};
use volary_core::Step;

/// The format of a run directory that this version writes.
pub const FORMAT: u16 = 4;

const CACHE_BYTES: u64 = 8 * 1024 * 1024;
/// A quarter of it holds sixteen of the largest records, which is as many as sled puts into one page. Never to be
/// changed: sled opens a database only with the size that it was made with.
const SEGMENT_BYTES: usize = 8 * 1024 * 1024;
/// A database that was just closed stays locked until sled's last thread lets go of it.
const LOCK_PATIENCE: Duration = Duration::from_secs(2);
const JOURNAL: &str = "journal";
const CATALOGUE: &str = "catalogue";
const RUN: &str = "run";
const IDENTITY: &[u8] = b"identity";

/// What makes a run this run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunIdentity {
    /// The run's name.
    pub name: String,
    /// The seed of every random draw.
    pub seed: u64,
    /// The digest of those options that decide the weights.
    pub config_hash: Digest,
    /// The format of the run directory: [`FORMAT`].
    pub format: u16,
}

/// The run's database, open; clones share it.
#[derive(Clone, Debug)]
pub struct Store {
    pub(crate) journal: sled::Tree,
    pub(crate) catalogue: sled::Tree,
    pub(crate) catalogue_pages: sled::Tree,
    pub(crate) facts: sled::Tree,
    pub(crate) tokens: sled::Tree,
    pub(crate) certificates: sled::Tree,
    run: sled::Tree,
    disk: Arc<Durable>,
    /// Held from looking at the journal's end to having written after it.
    committing: Arc<Mutex<()>>,
}

/// The way to the disk, past sled's flush.
#[derive(Debug)]
struct Durable {
    db: sled::Db,
    file: File,
    folder: PathBuf,
}

impl Store {
    /// Opens the run's database and makes sure that no committed step is damaged or missing between others.
    pub fn open(dir: &RunDir) -> Result<Self> {
        let folder = dir.state();
        let db = open_database(&folder)?;
        let tree = |name: &str| db.open_tree(name).map_err(|e| Error::database("open a tree", &folder, e));
        let (journal, catalogue) = (tree(JOURNAL)?, tree(CATALOGUE)?);
        let catalogue_pages = tree("catalogue_pages")?;
        let (facts, tokens, run) = (tree("facts")?, tree("tokens")?, tree(RUN)?);
        let certificates = tree("certificates")?;
        let path = folder.join("db");
        let file = File::open(&path).map_err(|e| Error::io("open", &path, e))?;
        let disk = Arc::new(Durable { db, file, folder });
        let store = Self {
            journal,
            catalogue,
            catalogue_pages,
            facts,
            tokens,
            certificates,
            run,
            disk,
            committing: Arc::default(),
        };
        store.make_durable()?;
        store.sync_folders()?;
        store.check_steps()?;
        Ok(store)
    }

    /// Writes down whose run this is, or makes sure that it is the same as when this was first called.
    pub fn identify(&self, given: &RunIdentity) -> Result<()> {
        let Some(kept) = self.identity()? else { return self.put_identity(given) };
        let differs = |field, kept: &dyn ToString, given: &dyn ToString| {
            Err(Error::OtherRun { field, kept: kept.to_string(), given: given.to_string() })
        };
        match (&kept, given) {
            (k, g) if k.name != g.name => differs("name", &k.name, &g.name),
            (k, g) if k.seed != g.seed => differs("seed", &k.seed, &g.seed),
            (k, g) if k.config_hash != g.config_hash => differs("config", &k.config_hash, &g.config_hash),
            _ => Ok(()),
        }
    }

    /// Whose run this is, if that was ever written down.
    pub fn identity(&self) -> Result<Option<RunIdentity>> {
        let kept: Option<RunIdentity> = self.read(&self.run, RUN, IDENTITY)?;
        match kept {
            Some(RunIdentity { format, .. }) if format != FORMAT => {
                Err(Error::Format { what: "the run directory".to_owned(), found: format, known: FORMAT })
            }
            kept => Ok(kept),
        }
    }

    /// Replaces what was written about whose run this is: for options that may change between two starts.
    pub fn put_identity(&self, identity: &RunIdentity) -> Result<()> {
        let bytes = record::seal(Place { tree: RUN, key: IDENTITY }, identity)?;
        self.run.insert(IDENTITY, bytes).map_err(|e| self.failed("write the identity", e))?;
        self.make_durable()
    }

    /// Bytes of the database on the disk; 0 when that cannot be said.
    #[must_use]
    pub fn bytes_on_disk(&self) -> u64 {
        self.disk.db.size_on_disk().unwrap_or(0)
    }

    /// Commits a step, for good: when this returns, it survives whatever happens to the process or the power.
    ///
    /// The same step with the same content is welcome again (a supervisor that died may not know that it committed);
    /// with another content it is an error, and so is a step that does not follow the last one.
    #[tracing::instrument(target = "volary::trace", name = "journal.write", skip_all)]
    pub fn commit<T: Serialize>(&self, step: Step, value: &T) -> Result<()> {
        let key = step.0.to_be_bytes();
        let bytes = record::seal(Place { tree: JOURNAL, key: &key }, value)?;
        let _guard = self.committing.lock().unwrap_or_else(PoisonError::into_inner);
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
            Err(there) if there.current.as_deref() != Some(bytes.as_slice()) => {
                Err(Error::AlreadyCommitted { step })
            }
            // Also when it was there: whoever wrote it may have died before it was durable.
            _ => self.make_durable(),
        }
    }

    /// What was committed at a step.
    pub fn committed<T: DeserializeOwned>(&self, step: Step) -> Result<Option<T>> {
        self.read(&self.journal, JOURNAL, &step.0.to_be_bytes())
    }

    /// The last committed step.
    pub fn last_committed(&self) -> Result<Option<Step>> {
        let last = self.journal.last().map_err(|e| self.failed("read the journal's end", e))?;
        last.map(|(key, _)| step_of(JOURNAL, &key)).transpose()
    }

    /// Every committed step from `from` on, in order.
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

    /// Forgets every step after `step`, all or none; how many there were. For a run that goes back to a checkpoint.
    pub fn truncate_after(&self, step: Step) -> Result<usize> {
        let Some(first) = step.0.checked_add(1) else { return Ok(0) };
        self.remove_steps(self.journal.range(first.to_be_bytes()..))
    }

    /// Forgets every step before `step`, all or none; how many there were. For what no checkpoint needs any more.
    pub fn prune_before(&self, step: Step) -> Result<usize> {
        self.remove_steps(self.journal.range(..step.0.to_be_bytes()))
    }

    /// Makes everything written so far outlive a loss of power.
    pub(crate) fn make_durable(&self) -> Result<()> {
        let Durable { db, file, folder } = &*self.disk;
        db.flush().map_err(|e| Error::database("flush", folder, e))?;
        // sled's flush is a request to the kernel (sync_file_range), no fsync.
        file.sync_all().map_err(|e| Error::io("sync", &folder.join("db"), e))
    }

    /// A record of a tree, checked.
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
        Error::database(what, &self.disk.folder, source)
    }

    fn is_committed(&self, step: Step) -> Result<bool> {
        self.journal.contains_key(step.0.to_be_bytes()).map_err(|e| self.failed("read the journal", e))
    }

    fn remove_steps(&self, steps: sled::Iter) -> Result<usize> {
        let _guard = self.committing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut batch = sled::Batch::default();
        let mut count = 0;
        for key in steps.keys() {
            batch.remove(key.map_err(|e| self.failed("read the journal", e))?);
            count += 1;
        }
        self.journal.apply_batch(batch).map_err(|e| self.failed("forget steps", e))?;
        self.make_durable()?;
        Ok(count)
    }

    /// The names of a new database's files last only once their folders are synced.
    fn sync_folders(&self) -> Result<()> {
        let folder = &self.disk.folder;
        for path in [Some(folder.as_path()), folder.parent()].into_iter().flatten() {
            File::open(path).and_then(|f| f.sync_all()).map_err(|e| Error::io("sync", path, e))?;
        }
        Ok(())
    }

    fn check_steps(&self) -> Result<()> {
        let mut before: Option<Step> = None;
        for item in &self.journal {
            let (key, bytes) = item.map_err(|e| self.failed("read the journal", e))?;
            let step = step_of(JOURNAL, &key)?;
            record::check(Place { tree: JOURNAL, key: &key }, &bytes)?;
            if let Some(last) = before
                && last.next() != step
            {
                let path = self.disk.folder.clone();
                return Err(Error::Hole { first: last.next(), last: step.previous(), path });
            }
            before = Some(step);
        }
        Ok(())
    }
}

/// The step that a key stands for.
pub(crate) fn step_of(tree: &'static str, key: &[u8]) -> Result<Step> {
    let bytes = <[u8; 8]>::try_from(key).map_err(|_| Error::DamagedRecord {
        tree,
        key: format!("{key:02x?}"),
        reason: "its key is no step".to_owned(),
    })?;
    Ok(Step(u64::from_be_bytes(bytes)))
}

fn open_database(folder: &Path) -> Result<sled::Db> {
    fs::create_dir_all(folder).map_err(|e| Error::io("create", folder, e))?;
    // No flushing by a clock: what is durable is what `make_durable` made so.
    let config = sled::Config::new()
        .path(folder)
        .flush_every_ms(None)
        .cache_capacity(CACHE_BYTES)
        .segment_size(SEGMENT_BYTES);
    let start = Instant::now();
    loop {
        match config.open() {
            Err(e) if is_locked(&e) && start.elapsed() < LOCK_PATIENCE => {
                thread::sleep(Duration::from_millis(20));
            }
            opened => return opened.map_err(|e| Error::database("open", folder, e)),
        }
    }
}

/// sled wraps the lock's refusal in an error of no kind.
fn is_locked(error: &sled::Error) -> bool {
    matches!(error, sled::Error::Io(e) if e.kind() == io::ErrorKind::WouldBlock || e.to_string().contains("lock"))
}
