//! Folders that appear only when they are complete.

use crate::error::{Error, Result};
use serde::Serialize;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// A folder that is being written beside its final place, to which it moves at the end. Dropped before, it
/// leaves nothing behind.
#[derive(Debug)]
pub struct NewFolder {
    partial: TempDir,
    target: PathBuf,
}

impl NewFolder {
    /// A new folder at `target`, whose parent is created where it is missing.
    ///
    /// # Errors
    /// [`Error::Exists`] or [`Error::Write`].
    pub fn create(target: &Path) -> Result<Self> {
        if target.symlink_metadata().is_ok() {
            return Err(Error::Exists { path: target.into() });
        }
        let parent = match target.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        fs::create_dir_all(parent).map_err(Error::write(parent))?;
        let partial = tempfile::Builder::new().prefix(".volary-export-").tempdir_in(parent);
        Ok(Self { partial: partial.map_err(Error::write(parent))?, target: target.into() })
    }

    /// The path of a file in it, until it is complete.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.partial.path().join(name)
    }

    /// Writes a file.
    ///
    /// # Errors
    /// [`Error::Write`].
    pub fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> Result<()> {
        fs::write(self.path(name), bytes).map_err(Error::write(self.target.join(name)))
    }

    /// Writes a value as JSON.
    ///
    /// # Errors
    /// [`Error::Json`] or [`Error::Write`].
    pub fn write_json(&self, name: &str, value: &impl Serialize) -> Result<()> {
        self.write(name, serde_json::to_string_pretty(value)? + "\n")
    }

    /// Copies a file.
    ///
    /// # Errors
    /// [`Error::Write`].
    pub fn copy(&self, from: &Path, name: &str) -> Result<()> {
        fs::copy(from, self.path(name)).map(drop).map_err(Error::write(self.target.join(name)))
    }

    /// Moves the folder to its place.
    ///
    /// # Errors
    /// [`Error::Write`]; [`Error::Exists`] if something was put there meanwhile.
    pub fn finish(self) -> Result<()> {
        let write = |path: &Path| Error::write(path.to_owned());
        self.publish().map_err(write(&self.target))?;
        if self.target.symlink_metadata().is_ok() {
            return Err(Error::Exists { path: self.target });
        }
        fs::rename(self.partial.path(), &self.target).map_err(write(&self.target))
    }

    /// Gives the folder and its files the permissions that the user's new ones have: a temporary folder is
    /// private, and so are files that the library of safetensors writes.
    fn publish(&self) -> io::Result<()> {
        let path = self.path(".permissions");
        fs::write(&path, [])?;
        let mode = fs::metadata(&path)?.permissions().mode();
        fs::remove_file(&path)?;
        for entry in fs::read_dir(self.partial.path())? {
            fs::set_permissions(entry?.path(), fs::Permissions::from_mode(mode))?;
        }
        // To open its files, a reader needs the execute bit of the folder as well.
        let folder = mode | (mode & 0o444) >> 2;
        fs::set_permissions(self.partial.path(), fs::Permissions::from_mode(folder))
    }
}
