//! The folder of tokenised corpora that runs share: entries appear whole, or not at all.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::error::Error;
use crate::manifest::{HeldOut, Manifest, VERSION};
use crate::options::DataOptions;
use crate::source::Source;

/// Folders under construction begin with this.
const PARTIAL: &str = ".partial-";

/// A folder under construction that nobody has touched for this long was left by a process that died.
pub(crate) const ABANDONED: Duration = Duration::from_secs(24 * 3600);

/// Where corpora are shared: the option, `$XDG_CACHE_HOME/volary` or `~/.cache/volary`; `None` without a home.
pub(crate) fn folder(options: &DataOptions) -> Option<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let default =
        || set("XDG_CACHE_HOME").or_else(|| Some(set("HOME")?.join(".cache"))).map(|p| p.join("volary"));
    Some(options.cache.clone().or_else(default)?.join("data"))
}

/// The key of a corpus: its options and the paths, sizes and times of change of everything it is read from.
pub(crate) fn key(options: &DataOptions, sources: &[Source]) -> Result<String, Error> {
    let mut hasher = blake3::Hasher::new();
    let options = DataOptions { cache: None, ..options.clone() };
    // Lengths part the fields from each other: no two lists of fields give the same bytes.
    let mut add = |bytes: &[u8]| {
        hasher.update(&(bytes.len() as u64).to_le_bytes());
        hasher.update(bytes);
    };
    add(&VERSION.to_le_bytes());
    let json = serde_json::to_vec(&options);
    add(&json.map_err(|e| Error::Option { option: "data".into(), reason: e.to_string() })?);
    if let Some(path) = &options.tokenizer {
        add(&fs::read(path).map_err(Error::read(path))?);
    }
    for source in sources {
        add(&(source.files.len() as u64).to_le_bytes());
        for file in &source.files {
            add(file.path.as_os_str().as_encoded_bytes());
            add(&file.bytes.to_le_bytes());
            add(&file.modified_ns.to_le_bytes());
        }
    }
    Ok(hasher.finalize().to_hex()[..32].to_string())
}

/// The entry of a corpus. One that was parted by position somewhere fits its sequence length only.
fn entry(folder: &Path, key: &str, sequence_length: Option<usize>) -> PathBuf {
    match sequence_length {
        Some(length) => folder.join(format!("{key}-{length}")),
        None => folder.join(key),
    }
}

/// Finds a corpus that suits the sequence length, whole and undamaged.
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
                tracing::warn!(%error, "a damaged entry of the data cache is discarded");
                // Should it stay, storing the new one replaces it.
                let _ = fs::remove_dir_all(&path);
                None
            }
        }
    })
}

/// A new folder to build a corpus in; it is removed when dropped.
pub(crate) struct Partial {
    pub(crate) path: PathBuf,
}

impl Partial {
    /// Makes one in `folder` and clears those there that were left alone for `abandoned` or longer.
    pub(crate) fn create(folder: &Path, abandoned: Duration) -> Result<Self, Error> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = folder.join(format!("{PARTIAL}{}-{number}", std::process::id()));
        fs::create_dir_all(folder).map_err(Error::write(folder))?;
        clear_abandoned(folder, abandoned);
        // A namesake, left by a process that died, is of no use to anyone.
        let _ = fs::remove_dir_all(&path);
        fs::create_dir(&path).map_err(Error::write(&path))?;
        Ok(Self { path })
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        // Nothing there after the folder became an entry.
        let _ = fs::remove_dir_all(&self.path);
    }
}

fn clear_abandoned(folder: &Path, abandoned: Duration) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        let age = entry.metadata().ok().and_then(|m| m.modified().ok()).and_then(|t| t.elapsed().ok());
        if entry.file_name().as_encoded_bytes().starts_with(PARTIAL.as_bytes())
            && age.is_some_and(|a| a >= abandoned)
        {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

/// Makes a finished folder an entry and gives its new place.
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
            // Another process was quicker; its entry is equal, and may be in use.
            return Ok(path);
        }
        fs::remove_dir_all(&path).map_err(Error::write(&path))?;
        fs::rename(&partial.path, &path).map_err(Error::write(&path))?;
    }
    sync_folder(folder)?;
    Ok(path)
}

/// Gives `dir` the corpus in `from`: by hard links where possible, so that the run owns its data at no cost,
/// whatever becomes of the cache; the manifest last.
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
            // What the manifest speaks of is durable before the manifest is.
            sync_folder(dir)?;
        }
        fs::rename(&new, &target).map_err(Error::write(&target))?;
    }
    sync_folder(dir)
}

fn sync_folder(dir: &Path) -> Result<(), Error> {
    File::open(dir).and_then(|folder| folder.sync_all()).map_err(Error::write(dir))
}
