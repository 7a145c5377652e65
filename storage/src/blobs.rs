//! Tensors in files named by their content: what is there is whole, and what is there twice is stored once.
//!
//! A blob is written to a temporary name, synced, and renamed; the folder is synced by [`BlobStore::sync`], once for
//! many blobs. A process that dies leaves a temporary file at most, and the next opening removes it.

use crate::digest::Digest;
use crate::disk::{Disk, RealDisk};
use crate::error::{Error, Result};
use std::collections::HashSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

const TEMPORARY: &str = "tmp-";

/// What [`BlobStore::remove_unreferenced`] did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RemovedReport {
    /// Blobs removed.
    pub removed: u64,
    /// The bytes that they had.
    pub removed_bytes: u64,
    /// Blobs still there.
    pub kept: u64,
}

/// A folder of blobs.
#[derive(Debug)]
pub struct BlobStore<D: Disk = RealDisk> {
    folder: PathBuf,
    disk: D,
    /// Whether names were written that the folder's last sync did not cover.
    unsynced: Mutex<bool>,
    /// Makes temporary names differ within the process.
    written: AtomicU64,
    /// Blobs that were found damaged: the next time that their bytes are put, the file is written anew.
    damaged: Mutex<HashSet<Digest>>,
}

impl BlobStore {
    /// Opens the folder, makes it if need be, and removes what a dead writer left half-written.
    ///
    /// One process at a time may do this; others read with [`read_blob`].
    pub fn open(folder: impl AsRef<Path>) -> Result<Self> {
        Self::open_on(folder, RealDisk)
    }
}

impl<D: Disk> BlobStore<D> {
    /// As [`BlobStore::open`], on another disk.
    pub fn open_on(folder: impl AsRef<Path>, disk: D) -> Result<Self> {
        let folder = folder.as_ref().to_owned();
        fs::create_dir_all(&folder).map_err(|e| Error::io("create", &folder, e))?;
        // Unsynced from the start: a name may be there that the last process did not live to sync.
        let unsynced = Mutex::new(true);
        let store = Self { folder, disk, unsynced, written: AtomicU64::new(0), damaged: Mutex::default() };
        store.remove_leftovers()?;
        Ok(store)
    }

    /// The folder.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The file of a blob, there or not.
    #[must_use]
    pub fn path(&self, digest: &Digest) -> PathBuf {
        blob_path(&self.folder, digest)
    }

    /// Stores bytes under their digest; they outlive a loss of power only after the next [`BlobStore::sync`].
    pub fn put(&self, bytes: &[u8]) -> Result<Digest> {
        let digest = Digest::of(bytes);
        self.put_as(&digest, bytes).map_err(|e| e.while_writing(|| format!("blob {digest}")))?;
        Ok(digest)
    }

    /// As [`BlobStore::put`], with the digest known; the caller answers for it.
    pub(crate) fn put_as(&self, digest: &Digest, bytes: &[u8]) -> Result<()> {
        let path = self.path(digest);
        // Names are only given to whole files, so the size is a check on the disk, not on ourselves.
        let there = fs::metadata(&path).is_ok_and(|meta| meta.len() == bytes.len() as u64);
        if !there || self.damaged().contains(digest) {
            replace(&self.disk, &self.temporary(), &path, bytes)?;
            self.damaged().remove(digest);
        }
        // Also when it was there: another thread may have renamed it a moment ago.
        *self.unsynced() = true;
        Ok(())
    }

    /// Makes every blob put so far outlive a loss of power.
    pub fn sync(&self) -> Result<()> {
        // Held while the folder is synced: who finds nothing to do here may rely on its being done.
        let mut unsynced = self.unsynced();
        if *unsynced {
            self.disk.sync_folder(&self.folder).map_err(|e| Error::io("sync", &self.folder, e))?;
            *unsynced = false;
        }
        Ok(())
    }

    /// A blob's bytes, checked against its name.
    pub fn get(&self, digest: &Digest) -> Result<Vec<u8>> {
        let read = read_blob(&self.folder, digest);
        if matches!(read, Err(Error::DamagedBlob { .. })) {
            self.damaged().insert(*digest);
        }
        read
    }

    /// A blob's length on the disk.
    pub fn len(&self, digest: &Digest) -> Result<u64> {
        let path = self.path(digest);
        fs::metadata(&path).map(|meta| meta.len()).map_err(|e| missing_or("look at", path, e))
    }

    /// Whether no blob is there.
    pub fn is_empty(&self) -> Result<bool> {
        Ok(self.digests()?.is_empty())
    }

    /// Every blob that is there, in no order.
    pub fn digests(&self) -> Result<Vec<Digest>> {
        // A file that somebody put there under another name is not ours to touch.
        Ok(self.names()?.iter().filter_map(|name| name.parse().ok()).collect())
    }

    /// Removes every blob that is not in `referenced`.
    pub fn remove_unreferenced(&self, referenced: &HashSet<Digest>) -> Result<RemovedReport> {
        let mut report = RemovedReport::default();
        for digest in self.digests()? {
            if referenced.contains(&digest) {
                report.kept += 1;
                continue;
            }
            let bytes = self.len(&digest)?;
            let path = self.path(&digest);
            self.disk.remove(&path).map_err(|e| Error::io("remove", &path, e))?;
            report.removed += 1;
            report.removed_bytes += bytes;
        }
        Ok(report)
    }

    /// The disk that this store writes to.
    pub(crate) fn disk(&self) -> &D {
        &self.disk
    }

    fn unsynced(&self) -> MutexGuard<'_, bool> {
        self.unsynced.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn damaged(&self) -> MutexGuard<'_, HashSet<Digest>> {
        self.damaged.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn temporary(&self) -> PathBuf {
        let number = self.written.fetch_add(1, Ordering::Relaxed);
        self.folder.join(format!("{TEMPORARY}{}-{number}", process::id()))
    }

    fn remove_leftovers(&self) -> Result<()> {
        for name in self.names()?.iter().filter(|name| name.starts_with(TEMPORARY)) {
            let path = self.folder.join(name);
            tracing::warn!(path = %path.display(), "removing a half-written blob that a dead process left");
            self.disk.remove(&path).map_err(|e| Error::io("remove", &path, e))?;
        }
        Ok(())
    }

    fn names(&self) -> Result<Vec<String>> {
        let listed = fs::read_dir(&self.folder).and_then(|entries| {
            entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
        });
        listed.map_err(|e| Error::io("list", &self.folder, e))
    }
}

/// Writes a file so that its name never leads to a part of it; on failure the temporary file goes.
pub(crate) fn replace(disk: &impl Disk, temporary: &Path, path: &Path, bytes: &[u8]) -> Result<()> {
    let written = disk
        .write(temporary, bytes)
        .map_err(|e| Error::io("write", temporary, e))
        .and_then(|()| disk.rename(temporary, path).map_err(|e| Error::io("rename", temporary, e)));
    if written.is_err()
        && let Err(error) = disk.remove(temporary)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(path = %temporary.display(), %error, "a half-written file could not be removed");
    }
    written
}

/// A blob's bytes, checked against its name; for processes that only read.
pub fn read_blob(folder: &Path, digest: &Digest) -> Result<Vec<u8>> {
    let path = blob_path(folder, digest);
    let bytes = match fs::read(&path) {
        Ok(bytes) => bytes,
        Err(e) => return Err(missing_or("read", path, e)),
    };
    let found = Digest::of(&bytes);
    if found == *digest {
        Ok(bytes)
    } else {
        Err(Error::DamagedBlob { path, found, bytes: bytes.len() as u64 })
    }
}

fn blob_path(folder: &Path, digest: &Digest) -> PathBuf {
    folder.join(digest.to_string())
}

fn missing_or(what: &'static str, path: PathBuf, source: io::Error) -> Error {
    match source.kind() {
        io::ErrorKind::NotFound => Error::NoBlob { path },
        _ => Error::io(what, &path, source),
    }
}
