//! What an unfinished preparation has on disk, so that one that was killed goes on where it was.
//!
//! Three kinds of results are kept in its folder: the choice of the documents, the tokenizer, and the tokens
//! of each source with a record of how far they go. A record is replaced only when the tokens that it counts
//! are durable; what lies beyond them is cut off. From the start of the split into training and validation
//! text on, tokens move between files, and a preparation that is killed then tokenizes again.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::Error;
use crate::manifest::{Manifest, TOKENIZER};
use crate::tokenizer::Tokenizer;

/// The lock of the process that works in the folder.
pub(crate) const LOCK: &str = "lock";
/// The choice of the documents.
const SELECTION: &str = "selection";
/// Exists while tokens move between files.
const SPLITTING: &str = "splitting";

/// The folder of an unfinished preparation.
pub(crate) struct Unfinished<'a> {
    dir: &'a Path,
}

impl<'a> Unfinished<'a> {
    /// Opens a folder, and clears what cannot be used of it.
    pub(crate) fn open(dir: &'a Path) -> Result<Self, Error> {
        if dir.join(SPLITTING).exists() {
            remove_all_but(dir, &[LOCK, SELECTION, TOKENIZER])?;
        }
        Ok(Self { dir })
    }

    /// The choice of the documents, made by `choose` unless it was finished.
    pub(crate) fn selection<T: Serialize + DeserializeOwned>(
        &self,
        choose: impl FnOnce() -> Result<T, Error>,
    ) -> Result<T, Error> {
        let path = self.dir.join(SELECTION);
        if let Some(saved) = load(&path) {
            return Ok(saved);
        }
        let chosen = choose()?;
        save(&path, &chosen)?;
        Ok(chosen)
    }

    /// The tokenizer, made by `make` unless it was finished.
    pub(crate) fn tokenizer(
        &self,
        make: impl FnOnce() -> Result<Tokenizer, Error>,
    ) -> Result<Tokenizer, Error> {
        let path = self.dir.join(TOKENIZER);
        if let Some(saved) = path.exists().then(|| Tokenizer::load(&path)).and_then(Result::ok) {
            return Ok(saved);
        }
        let tokenizer = make()?;
        let new = self.dir.join("tokenizer.new");
        tokenizer.save(&new)?;
        replace(&new, &path)?;
        Ok(tokenizer)
    }

    /// From now on the tokens of a preparation that is killed are of no use.
    pub(crate) fn begin_split(&self) -> Result<(), Error> {
        let path = self.dir.join(SPLITTING);
        File::create(&path).and_then(|file| file.sync_all()).map_err(Error::write(&path))?;
        File::open(self.dir).and_then(|dir| dir.sync_all()).map_err(Error::write(self.dir))
    }

    /// Leaves only the files of the finished corpus, and the lock.
    pub(crate) fn finish(&self, manifest: &Manifest) -> Result<(), Error> {
        let names = manifest.file_names();
        let names: Vec<&str> = names.iter().map(String::as_str).chain([LOCK]).collect();
        remove_all_but(self.dir, &names)
    }
}

fn remove_all_but(dir: &Path, names: &[&str]) -> Result<(), Error> {
    for entry in fs::read_dir(dir).map_err(Error::read(dir))? {
        let path = entry.map_err(Error::read(dir))?.path();
        let is_kept = path.file_name().is_some_and(|name| names.iter().any(|kept| name == *kept));
        if !is_kept {
            let removed = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
            removed.map_err(Error::write(&path))?;
        }
    }
    Ok(())
}

/// Reads a record; `None` if there is none that can be read.
pub(crate) fn load<T: DeserializeOwned>(path: &Path) -> Option<T> {
    postcard::from_bytes(&fs::read(path).ok()?).ok()
}

/// Replaces a record. It is durable before this returns.
pub(crate) fn save<T: Serialize>(path: &Path, record: &T) -> Result<(), Error> {
    let new = PathBuf::from(format!("{}.new", path.display()));
    let bytes = postcard::to_allocvec(record).map_err(|e| Error::write(path)(std::io::Error::other(e)))?;
    let mut file = File::create(&new).map_err(Error::write(&new))?;
    file.write_all(&bytes).map_err(Error::write(&new))?;
    replace(&new, path)
}

fn replace(new: &Path, path: &Path) -> Result<(), Error> {
    File::open(new).and_then(|file| file.sync_all()).map_err(Error::write(new))?;
    fs::rename(new, path).map_err(Error::write(path))
}
