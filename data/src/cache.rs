//! The cache of tokenized corpora that runs share. Entries are complete or absent.

use std::collections::BTreeSet;
use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::error::Error;
use crate::files::SourceFile;
use crate::manifest::{HeldOut, Manifest, VERSION};
use crate::options::DataOptions;
use crate::source::Source;
use crate::unfinished;

/// The prefix of folders under construction.
const PARTIAL: &str = ".partial-";

/// The version of the rules by which a corpus follows from its text; part of the key. Version 3: the
/// content of a file decides its format, and near-duplicates of held-out documents are left out.
const RULES: u32 = 3;

/// The folder of the cache: the option, `$XDG_CACHE_HOME/volary` or `~/.cache/volary`; `None` without a home
/// folder.
pub(crate) fn folder(options: &DataOptions) -> Option<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let default =
        || set("XDG_CACHE_HOME").or_else(|| Some(set("HOME")?.join(".cache"))).map(|p| p.join("volary"));
    Some(options.cache.clone().or_else(default)?.join("data"))
}

/// The key of a corpus: its options and its files. A file is identified by its hash if its source has a
/// manifest, and otherwise by its path, size and [`Stamp`](crate::files::Stamp).
pub(crate) fn key(options: &DataOptions, sources: &[Source]) -> Result<String, Error> {
    let mut hasher = blake3::Hasher::new();
    let classifier = options.quality.as_ref().map(|quality| quality.classifier.clone());
    let mut options = DataOptions { cache: None, ..options.clone() };
    if let Some(quality) = &mut options.quality {
        // The content of the file matters, not its path.
        quality.classifier = PathBuf::new();
    }
    for source in &mut options.sources {
        // The content of the manifest matters, not its path.
        source.manifest = None;
    }
    // The lengths separate the fields: no two lists of fields give the same bytes.
    let mut add = |bytes: &[u8]| {
        hasher.update(&(bytes.len() as u64).to_le_bytes());
        hasher.update(bytes);
    };
    add(&VERSION.to_le_bytes());
    add(&RULES.to_le_bytes());
    let json = serde_json::to_vec(&options);
    add(&json.map_err(|e| Error::Option { option: "data".into(), reason: e.to_string() })?);
    if let Some(path) = &options.tokenizer {
        add(&fs::read(path).map_err(Error::read(path))?);
    }
    if let Some(path) = classifier {
        add(&fs::read(&path).map_err(Error::read(&path))?);
    }
    for source in sources {
        add(&(source.files.len() as u64).to_le_bytes());
        for SourceFile { path, relative, bytes, stamp, blake3 } in &source.files {
            if let Some(hash) = blake3 {
                add(relative.as_bytes());
                add(hash.as_bytes());
            } else {
                add(path.as_os_str().as_encoded_bytes());
                add(&bytes.to_le_bytes());
                stamp.fields().iter().for_each(|field| add(&field.to_le_bytes()));
            }
        }
    }
    Ok(hasher.finalize().to_hex()[..32].to_string())
}

/// The entry of a corpus. A corpus with a split by position is for one sequence length only.
fn entry(folder: &Path, key: &str, sequence_length: Option<usize>) -> PathBuf {
    match sequence_length {
        Some(length) => folder.join(format!("{key}-{length}")),
        None => folder.join(key),
    }
}

/// Finds an undamaged corpus that suits the sequence length.
pub(crate) fn find(folder: &Path, key: &str, sequence_length: usize) -> Option<(PathBuf, Manifest)> {
    [None, Some(sequence_length)].into_iter().find_map(|length| {
        let path = entry(folder, key, length);
        if !path.exists() {
            return None;
        }
        match Manifest::verify(&path) {
            Ok(manifest) => {
                let suits = manifest.sources.iter().all(|source| source.suits(sequence_length));
                suits.then_some((path, manifest))
            }
            Err(error) => {
                tracing::warn!(%error, "discarding a damaged entry of the data cache");
                // If this fails, the new entry replaces it later.
                let _ = fs::remove_dir_all(&path);
                None
            }
        }
    })
}

/// A folder for a corpus under construction.
pub(crate) struct Partial {
    pub(crate) path: PathBuf,
    /// The lock of a folder that stays for a later attempt at the same corpus; another is removed when this
    /// is dropped.
    lock: Option<File>,
}

/// The folders under construction of this process.
static PARTIALS: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());

impl Partial {
    /// Creates one in `folder` under a name that no other process on any machine has, and removes those there
    /// in which nothing was modified for `abandoned` or longer.
    pub(crate) fn create(folder: &Path, abandoned: Duration) -> Result<Self, Error> {
        fs::create_dir_all(folder).map_err(Error::write(folder))?;
        remove_abandoned(folder, abandoned);
        let created = tempfile::Builder::new().prefix(PARTIAL).tempdir_in(folder);
        let path = created.map_err(Error::write(folder))?.keep();
        lock_partials().insert(path.clone());
        Ok(Self { path, lock: None })
    }

    /// The folder in `folder` of all attempts at the corpus of `key`; `None` while another process works in
    /// it.
    pub(crate) fn resume(folder: &Path, key: &str, abandoned: Duration) -> Result<Option<Self>, Error> {
        remove_abandoned(folder, abandoned);
        let path = folder.join(format!("{PARTIAL}{key}"));
        fs::create_dir_all(&path).map_err(Error::write(&path))?;
        let file = path.join(unfinished::LOCK);
        let lock = File::options().write(true).create(true).truncate(false).open(&file);
        let lock = lock.map_err(Error::write(&file))?;
        match lock.try_lock() {
            Ok(()) => Ok(Some(Self { path, lock: Some(lock) })),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(error)) => Err(Error::Write { path: file, error }),
        }
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if self.lock.is_some() {
            return;
        }
        // After the folder became an entry, there is nothing to remove.
        let _ = fs::remove_dir_all(&self.path);
        lock_partials().remove(&self.path);
    }
}

fn lock_partials() -> MutexGuard<'static, BTreeSet<PathBuf>> {
    PARTIALS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Removes the folders in which this process builds a corpus, for a process that ends before the preparation
/// does. The preparation fails afterwards.
pub fn remove_partial_folders() {
    for path in &*lock_partials() {
        // A thread that still writes there may have added a file meanwhile: once more.
        if fs::remove_dir_all(path).is_err() {
            let _ = fs::remove_dir_all(path);
        }
    }
}

fn remove_abandoned(folder: &Path, abandoned: Duration) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        if entry.file_name().as_encoded_bytes().starts_with(PARTIAL.as_bytes())
            && since_modified(&entry.path()).is_some_and(|age| age >= abandoned)
        {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

/// The time since the last change of a folder or of a file in it. The folder's own time does not tell: it
/// stays while a file grows.
fn since_modified(folder: &Path) -> Option<Duration> {
    let files = fs::read_dir(folder).ok()?.flatten().map(|entry| entry.path());
    let age = |path: PathBuf| fs::metadata(path).ok()?.modified().ok()?.elapsed().ok();
    std::iter::once(folder.to_path_buf()).chain(files).filter_map(age).min()
}

/// Turns a finished folder into an entry and returns its path.
pub(crate) fn store(
    folder: &Path,
    key: &str,
    sequence_length: usize,
    partial: &Partial,
    manifest: &Manifest,
) -> Result<PathBuf, Error> {
    let by_position = manifest.sources.iter().any(|source| source.held_out == HeldOut::Tail);
    let path = entry(folder, key, by_position.then_some(sequence_length));
    if fs::rename(&partial.path, &path).is_err() {
        if Manifest::verify(&path).is_ok() {
            // Another process was faster; its entry is equal, and may be in use.
            return Ok(path);
        }
        fs::remove_dir_all(&path).map_err(Error::write(&path))?;
        fs::rename(&partial.path, &path).map_err(Error::write(&path))?;
    }
    // Under the folder's old name another process may begin again; under the new one it needs no lock.
    let _ = fs::remove_file(path.join(unfinished::LOCK));
    sync_folder(folder)?;
    Ok(path)
}

/// Installs the corpus in `from` into `dir`, the manifest last. Hard links, where possible, make the run
/// independent of the cache at no cost.
pub(crate) fn install(from: &Path, manifest: &Manifest, dir: &Path) -> Result<(), Error> {
    for name in manifest.file_names() {
        let (source, target) = (from.join(&name), dir.join(&name));
        let new = dir.join(format!(".{name}.new"));
        for stale in [&new, &target] {
            match fs::remove_file(stale) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(Error::Write { path: stale.clone(), error });
                }
                _ => {}
            }
        }
        if fs::hard_link(&source, &new).is_err() {
            fs::copy(&source, &new).and_then(|_| File::open(&new)?.sync_all()).map_err(Error::write(&new))?;
        }
        if name == crate::manifest::MANIFEST {
            // The files are durable before the manifest that lists them.
            sync_folder(dir)?;
        }
        fs::rename(&new, &target).map_err(Error::write(&target))?;
    }
    sync_folder(dir)
}

fn sync_folder(dir: &Path) -> Result<(), Error> {
    File::open(dir).and_then(|folder| folder.sync_all()).map_err(Error::write(dir))
}
