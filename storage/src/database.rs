//! The sled database below the journal: opening it, and durable writes.
//!
//! sled's flush passes the bytes to the kernel only, so each durable write also syncs the database's file.

use crate::error::{Error, Result};
use crate::limits::{CACHE_BYTES, DATABASE_LOCK_MAX, DATABASE_LOCK_RETRY, SEGMENT_BYTES};
use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Instant;

/// Makes a file's content durable; [`File::sync_all`] but in tests.
pub(crate) type SyncFile = fn(&File) -> io::Result<()>;

/// An open database.
#[derive(Debug)]
pub(crate) struct Database {
    sled: sled::Db,
    file: File,
    sync: SyncFile,
    directory: PathBuf,
}

impl Database {
    pub(crate) fn open(directory: PathBuf, sync: SyncFile) -> Result<Self> {
        let sled = open(&directory)?;
        let path = directory.join("db");
        let file = File::open(&path).map_err(|e| Error::io("open", &path, e))?;
        Ok(Self { sled, file, sync, directory })
    }

    pub(crate) fn directory(&self) -> &Path {
        &self.directory
    }

    pub(crate) fn tree(&self, name: &str) -> Result<sled::Tree> {
        self.sled.open_tree(name).map_err(|e| self.failed("open a tree", e))
    }

    /// Bytes on disk; 0 when unknown.
    pub(crate) fn bytes_on_disk(&self) -> u64 {
        self.sled.size_on_disk().unwrap_or(0)
    }

    /// Makes all writes so far durable.
    pub(crate) fn make_durable(&self) -> Result<()> {
        self.sled.flush().map_err(|e| self.failed("flush", e))?;
        // sled's flush is a request to the kernel (sync_file_range), not an fsync.
        (self.sync)(&self.file).map_err(|e| Error::io("sync", &self.directory.join("db"), e))
    }

    /// The names of a new database's files are durable once their directories are synced.
    pub(crate) fn sync_directories(&self) -> Result<()> {
        for path in [Some(self.directory.as_path()), self.directory.parent()].into_iter().flatten() {
            File::open(path).and_then(|f| f.sync_all()).map_err(|e| Error::io("sync", path, e))?;
        }
        Ok(())
    }

    /// An error of this database.
    pub(crate) fn failed(&self, what: &'static str, source: sled::Error) -> Error {
        Error::database(what, &self.directory, source)
    }
}

fn open(folder: &Path) -> Result<sled::Db> {
    fs::create_dir_all(folder).map_err(|e| Error::io("create", folder, e))?;
    // No periodic flush: `make_durable` alone makes writes durable.
    let config = sled::Config::new()
        .path(folder)
        .flush_every_ms(None)
        .cache_capacity(CACHE_BYTES)
        .segment_size(SEGMENT_BYTES);
    wait_until_unlocked(&folder.join("db"));
    config.open().map_err(|e| Error::database("open", folder, e))
}

/// A database that was just closed stays locked until sled's last thread ends. sled's error for that has no
/// kind of its own, hence a probe of its lock.
fn wait_until_unlocked(path: &Path) {
    let start = Instant::now();
    while start.elapsed() < DATABASE_LOCK_MAX {
        // Without a file there is no lock; other failures are sled's to report.
        let probed = File::open(path).map(|file| file.try_lock());
        if !matches!(probed, Ok(Err(TryLockError::WouldBlock))) {
            return;
        }
        thread::sleep(DATABASE_LOCK_RETRY);
    }
}
