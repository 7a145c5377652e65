//! The file operations of blobs and manifests as a trait, so that tests can inject a slow, full, failing or
//! crashing disk.

use std::fs::{self, File};
use std::io;
use std::path::Path;

/// File operations. A successful one is complete; a failed one may be partial.
pub trait Disk: Send + Sync + 'static {
    /// Reads a file.
    ///
    /// # Errors
    /// When the operating system fails, or the file does not exist.
    fn read(&self, path: &Path) -> io::Result<Vec<u8>>;

    /// Writes a new file.
    ///
    /// # Errors
    /// When a write fails; part of the file may exist.
    fn write(&self, path: &Path, bytes: &[u8]) -> io::Result<()>;

    /// Makes the content of a file durable.
    ///
    /// # Errors
    /// When the sync fails, or the file does not exist.
    fn sync_file(&self, path: &Path) -> io::Result<()>;

    /// Renames a file, replacing an existing one.
    ///
    /// # Errors
    /// When the operating system fails.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Makes the names in a directory durable.
    ///
    /// # Errors
    /// When the sync fails.
    fn sync_folder(&self, path: &Path) -> io::Result<()>;

    /// Removes a file.
    ///
    /// # Errors
    /// When the operating system fails, or the file does not exist.
    fn remove(&self, path: &Path) -> io::Result<()>;
}

/// The operating system's file system.
#[derive(Clone, Copy, Debug, Default)]
pub struct RealDisk;

impl Disk for RealDisk {
    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        fs::read(path)
    }

    fn write(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        fs::write(path, bytes)
    }

    fn sync_file(&self, path: &Path) -> io::Result<()> {
        File::open(path)?.sync_all()
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn sync_folder(&self, path: &Path) -> io::Result<()> {
        File::open(path)?.sync_all()
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }
}
