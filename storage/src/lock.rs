//! One supervisor at a time: a lock that the kernel releases at any death of its holder.

use crate::error::{Error, Result};
use crate::layout::RunDir;
use crate::limits::{HOLDER_READ_RETRY, HOLDER_READS_MAX, LOCK_ATTEMPTS_MAX};
use serde::{Deserialize, Serialize};
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::thread;

/// The holder of the run, as written in the lock file.
#[derive(Debug, Serialize, Deserialize)]
struct Holder {
    pid: u32,
    address: String,
}

/// The exclusive right to supervise a run, until it is dropped or the process ends.
#[derive(Debug)]
pub struct RunLock {
    file: File,
    path: PathBuf,
}

impl RunLock {
    /// Locks the run.
    ///
    /// # Errors
    /// [`Error::Held`] or [`Error::HeldUnnamed`] when another process holds it, [`Error::Io`] for other
    /// failures.
    pub fn acquire(dir: &RunDir, pid: u32, address: &str) -> Result<Self> {
        let path = dir.lock();
        // Not truncated: until the lock is acquired, the content belongs to another process.
        let opened = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path);
        let file = opened.map_err(|e| Error::io("open", &path, e))?;
        // A process that only looks whether the run is held has the lock for a moment.
        let mut locked = file.try_lock();
        for _ in 0..LOCK_ATTEMPTS_MAX {
            if !matches!(locked, Err(TryLockError::WouldBlock)) {
                break;
            }
            thread::sleep(HOLDER_READ_RETRY);
            locked = file.try_lock();
        }
        match locked {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(held(&path)),
            Err(TryLockError::Error(e)) => return Err(Error::io("lock", &path, e)),
        }
        let mut lock = Self { file, path };
        lock.write_holder(&Holder { pid, address: address.to_owned() })?;
        Ok(lock)
    }

    /// Whether a process holds the run now.
    #[must_use]
    pub fn is_held(dir: &RunDir) -> bool {
        // A shared lock, which no other reader notices, is released at once.
        let locked = File::open(dir.lock()).map(|file| file.try_lock_shared());
        matches!(locked, Ok(Err(TryLockError::WouldBlock)))
    }

    /// The lock file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn write_holder(&mut self, holder: &Holder) -> Result<()> {
        let text = serde_json::to_string(holder)
            .map_err(|e| Error::Unstorable { what: "the lock's holder".to_owned(), reason: e.to_string() })?;
        self.file
            .set_len(0)
            .and_then(|()| self.file.write_all(text.as_bytes()))
            .map_err(|e| Error::io("write", &self.path, e))
    }
}

impl Drop for RunLock {
    fn drop(&mut self) {
        // The content is erased before the lock is released. Closing the file releases it in any case.
        if let Err(error) = self.file.set_len(0) {
            tracing::debug!(path = %self.path.display(), %error, "cannot erase the lock's holder");
        }
    }
}

/// The error with the holder, who writes its identity just after it has locked.
fn held(path: &Path) -> Error {
    for _ in 0..HOLDER_READS_MAX {
        let text = fs::read_to_string(path).unwrap_or_default();
        if let Ok(Holder { pid, address }) = serde_json::from_str(&text) {
            return Error::Held { pid, address, path: path.to_owned() };
        }
        thread::sleep(HOLDER_READ_RETRY);
    }
    Error::HeldUnnamed { path: path.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_held_run_names_its_holder_and_is_free_afterwards() {
        let temp = tempfile::tempdir().unwrap();
        let dir = RunDir::create(temp.path()).unwrap();
        let lock = RunLock::acquire(&dir, 4242, "127.0.0.1:7000").unwrap();
        let error = RunLock::acquire(&dir, 1, "elsewhere").unwrap_err();
        assert!(matches!(error, Error::Held { pid: 4242, .. }), "{error}");
        let text = error.to_string();
        assert!(text.contains("4242") && text.contains("127.0.0.1:7000"), "{text}");
        drop(lock);
        drop(RunLock::acquire(&dir, 1, "elsewhere").unwrap());
    }

    #[test]
    fn a_run_is_held_for_as_long_as_its_holder_lives() {
        let temp = tempfile::tempdir().unwrap();
        let dir = RunDir::create(temp.path()).unwrap();
        assert!(!RunLock::is_held(&dir));
        let lock = RunLock::acquire(&dir, 1, "a").unwrap();
        assert!(RunLock::is_held(&dir));
        drop(lock);
        assert!(!RunLock::is_held(&dir));
    }

    #[test]
    fn the_file_of_a_dead_holder_does_not_hold_the_run() {
        let temp = tempfile::tempdir().unwrap();
        let dir = RunDir::create(temp.path()).unwrap();
        fs::write(dir.lock(), r#"{"pid":99999,"address":"a long address of a dead process"}"#).unwrap();
        let _lock = RunLock::acquire(&dir, 7, "b").unwrap();
        let error = RunLock::acquire(&dir, 8, "c").unwrap_err();
        assert!(matches!(error, Error::Held { pid: 7, .. }), "{error}");
    }

    #[test]
    fn a_holder_without_an_identity_holds_the_run() {
        let temp = tempfile::tempdir().unwrap();
        let dir = RunDir::create(temp.path()).unwrap();
        let lock = RunLock::acquire(&dir, 7, "b").unwrap();
        lock.file.set_len(0).unwrap();
        assert!(matches!(RunLock::acquire(&dir, 8, "c").unwrap_err(), Error::HeldUnnamed { .. }));
    }
}
