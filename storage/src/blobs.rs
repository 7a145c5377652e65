//! Tensors in files named by their content: every blob is complete, and equal blobs are stored once.
//!
//! A blob is written to a temporary name, synced, and renamed. [`BlobStore::sync`] syncs the directory, once
//! for many blobs. A crash leaves at most temporary files, which the next opening removes.

use crate::disk::{Disk, RealDisk};
use crate::error::{Error, Result};
use parking_lot::Mutex;
use std::collections::HashSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process;
use std::sync::atomic::{AtomicU64, Ordering};
use volary_core::Digest;

const TEMPORARY: &str = "tmp-";

/// The result of [`BlobStore::remove_unreferenced`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RemovedReport {
    /// Removed blobs.
    pub removed: u64,
    /// Bytes of the removed blobs.
    pub removed_bytes: u64,
    /// Remaining blobs.
    pub kept: u64,
}

/// A directory of blobs.
#[derive(Debug)]
pub struct BlobStore<D: Disk = RealDisk> {
    folder: PathBuf,
    disk: D,
    /// Whether names were written after the directory's last sync.
    unsynced: Mutex<bool>,
    /// Makes temporary names unique within the process.
    written: AtomicU64,
    /// Damaged blobs: the next [`BlobStore::put`] of their bytes rewrites the file.
    damaged: Mutex<HashSet<Digest>>,
}

impl BlobStore {
    /// Opens or creates the directory, and removes temporary files of a crashed writer. One process at a time
    /// may do this; others read with [`read_blob`].
    ///
    /// # Errors
    /// [`Error::Io`] when the directory cannot be created, listed or cleaned.
    pub fn open(folder: impl AsRef<Path>) -> Result<Self> {
        Self::open_on(folder, RealDisk)
    }
}

impl<D: Disk> BlobStore<D> {
    /// [`BlobStore::open`] on another disk.
    ///
    /// # Errors
    /// As [`BlobStore::open`].
    pub fn open_on(folder: impl AsRef<Path>, disk: D) -> Result<Self> {
        let folder = folder.as_ref().to_owned();
        fs::create_dir_all(&folder).map_err(|e| Error::io("create", &folder, e))?;
        // Unsynced from the start: the previous process may have died before its sync.
        let unsynced = Mutex::new(true);
        let store = Self { folder, disk, unsynced, written: AtomicU64::new(0), damaged: Mutex::default() };
        store.remove_leftovers()?;
        Ok(store)
    }

    /// The directory.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The path of a blob, whether or not it exists.
    #[must_use]
    pub fn path(&self, digest: &Digest) -> PathBuf {
        blob_path(&self.folder, digest)
    }

    /// Stores bytes under their digest. They are durable after the next [`BlobStore::sync`].
    ///
    /// # Errors
    /// [`Error::NoSpace`] when the disk is full, [`Error::Io`] for other failures.
    pub fn put(&self, bytes: &[u8]) -> Result<Digest> {
        let digest = Digest::of(bytes);
        self.put_as(&digest, bytes).map_err(|e| e.while_writing(|| format!("blob {digest}")))?;
        Ok(digest)
    }

    /// [`BlobStore::put`] with a known digest, which must be correct.
    pub(crate) fn put_as(&self, digest: &Digest, bytes: &[u8]) -> Result<()> {
        let path = self.path(digest);
        // Only complete files get a name; the size guards against damage on the disk.
        let exists = fs::metadata(&path).is_ok_and(|meta| meta.len() == bytes.len() as u64);
        if !exists || self.damaged.lock().contains(digest) {
            replace(&self.disk, &self.temporary(), &path, bytes)?;
            self.damaged.lock().remove(digest);
        }
        // Also when it exists: another thread may just have renamed it.
        *self.unsynced.lock() = true;
        Ok(())
    }

    /// Makes all stored blobs durable.
    ///
    /// # Errors
    /// [`Error::Io`] when the directory cannot be synced.
    pub fn sync(&self) -> Result<()> {
        // Held during the sync: a caller that finds nothing unsynced relies on a completed sync.
        let mut unsynced = self.unsynced.lock();
        if *unsynced {
            self.disk.sync_folder(&self.folder).map_err(|e| Error::io("sync", &self.folder, e))?;
            *unsynced = false;
        }
        Ok(())
    }

    /// A blob's bytes, verified against its digest.
    ///
    /// # Errors
    /// [`Error::NoBlob`], [`Error::DamagedBlob`] or [`Error::Io`].
    pub fn get(&self, digest: &Digest) -> Result<Vec<u8>> {
        let read = read_blob_on(&self.disk, &self.folder, digest);
        if matches!(read, Err(Error::DamagedBlob { .. })) {
            self.damaged.lock().insert(*digest);
        }
        read
    }

    /// The size of a blob in bytes.
    ///
    /// # Errors
    /// [`Error::NoBlob`] or [`Error::Io`].
    pub fn len(&self, digest: &Digest) -> Result<u64> {
        let path = self.path(digest);
        fs::metadata(&path).map(|meta| meta.len()).map_err(|e| missing_or("inspect", path, e))
    }

    /// Whether there are no blobs.
    ///
    /// # Errors
    /// [`Error::Io`] when the directory cannot be listed.
    pub fn is_empty(&self) -> Result<bool> {
        Ok(self.digests()?.is_empty())
    }

    /// All blobs, in no particular order.
    ///
    /// # Errors
    /// [`Error::Io`] when the directory cannot be listed.
    pub fn digests(&self) -> Result<Vec<Digest>> {
        // Files with other names are not blobs.
        Ok(self.names()?.iter().filter_map(|name| name.parse().ok()).collect())
    }

    /// Removes all blobs that are not in `referenced`.
    ///
    /// # Errors
    /// [`Error::Io`] when a blob cannot be removed.
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

    /// The disk of this store.
    pub(crate) fn disk(&self) -> &D {
        &self.disk
    }

    fn temporary(&self) -> PathBuf {
        let number = self.written.fetch_add(1, Ordering::Relaxed);
        self.folder.join(format!("{TEMPORARY}{}-{number}", process::id()))
    }

    fn remove_leftovers(&self) -> Result<()> {
        for name in self.names()?.iter().filter(|name| name.starts_with(TEMPORARY)) {
            let path = self.folder.join(name);
            tracing::warn!(path = %path.display(), "removing a temporary file of a crashed process");
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

/// Writes a file atomically, by a temporary file, which is removed on failure.
pub(crate) fn replace(disk: &impl Disk, temporary: &Path, path: &Path, bytes: &[u8]) -> Result<()> {
    let written = disk
        .write(temporary, bytes)
        .and_then(|()| disk.sync_file(temporary))
        .map_err(|e| Error::io("write", temporary, e))
        .and_then(|()| disk.rename(temporary, path).map_err(|e| Error::io("rename", temporary, e)));
    if written.is_err()
        && let Err(error) = disk.remove(temporary)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(path = %temporary.display(), %error, "cannot remove a temporary file");
    }
    written
}

/// Replaces a file durably: after a crash at any moment it has its old or its new content.
///
/// # Errors
/// [`Error::NoSpace`] or [`Error::Io`].
pub fn write_file(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(format!(".{TEMPORARY}{}", process::id()));
    replace(&RealDisk, Path::new(&temporary), path, bytes)
        .map_err(|e| e.while_writing(|| path.display().to_string()))?;
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or_else(|| Path::new("."));
    RealDisk.sync_folder(folder).map_err(|e| Error::io("sync", folder, e))
}

/// A blob's bytes, verified against its digest, for processes that only read.
///
/// # Errors
/// [`Error::NoBlob`], [`Error::DamagedBlob`] or [`Error::Io`].
pub fn read_blob(folder: &Path, digest: &Digest) -> Result<Vec<u8>> {
    read_blob_on(&RealDisk, folder, digest)
}

fn read_blob_on(disk: &impl Disk, folder: &Path, digest: &Digest) -> Result<Vec<u8>> {
    let path = blob_path(folder, digest);
    let bytes = match disk.read(&path) {
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
