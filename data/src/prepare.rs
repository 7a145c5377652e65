//! From options to a folder of token files that belongs to the run.

use std::collections::HashMap;
use std::path::Path;
use std::time::Duration;

use crate::cache::{self, Partial};
use crate::corpus;
use crate::error::Error;
use crate::files::SourceFile;
use crate::limits::ABANDONED_AFTER;
use crate::manifest::{MANIFEST, Manifest};
use crate::options::{DataOptions, SourceOptions};
use crate::progress::{Progress, Reporter};
use crate::source::Source;

/// The result of [`prepare`].
#[derive(Clone, Debug, PartialEq)]
pub struct Prepared {
    /// The corpus in the run's folder.
    pub manifest: Manifest,
    /// Whether the run's folder already held it.
    pub resumed: bool,
    /// Whether it came from the cache.
    pub from_cache: bool,
}

/// Puts a tokenized corpus into `dir`, the run's own folder.
///
/// A corpus in `dir` is verified and used, even if its sources have changed. Otherwise it comes from the
/// cache, or it is built and added to the cache. It depends on the options and the files only: not on a seed,
/// the machine, the number of threads or the content of the cache. `sequence_length` (in tokens) matters only
/// to sources that are too small for a split by documents: they hold out at least one sequence for
/// validation.
///
/// # Errors
/// An [`Error`] that names the option or the file: options out of range, files that are missing, unreadable
/// or different from their manifest, records that do not match their format, sources without enough text, a
/// folder that cannot be written, a corpus in `dir` that is damaged.
pub fn prepare(
    options: &DataOptions,
    sequence_length: usize,
    dir: &Path,
    progress: &mut dyn FnMut(Progress),
) -> Result<Prepared, Error> {
    if sequence_length == 0 {
        return Err(Error::Option { option: "sequence_length".into(), reason: "must not be 0".into() });
    }
    if dir.join(MANIFEST).exists() {
        let manifest = Manifest::verify(dir)?;
        return Ok(Prepared { manifest, resumed: true, from_cache: false });
    }
    options.validate()?;
    let mut reporter = Reporter::new(progress);
    // A folder that cannot be written must fail now, not after an hour of tokenizing. Leftovers of an earlier
    // attempt are of no use, because no other run uses this folder.
    let fallback = Partial::create(dir, Duration::ZERO)?;
    let mut sources = options.sources.iter().map(Source::find).collect::<Result<Vec<_>, _>>()?;
    let key = cache::key(options, &sources)?;
    let folder = cache::folder(options);
    if let Some((from, manifest)) =
        folder.as_deref().and_then(|folder| cache::find(folder, &key, sequence_length))
    {
        cache::install(&from, &manifest, dir)?;
        return Ok(Prepared { manifest, resumed: false, from_cache: true });
    }
    sources.iter_mut().try_for_each(Source::check)?;
    let shared = folder.as_deref().and_then(|folder| shared_partial(folder, &key));
    let partial = shared.as_ref().map_or(&fallback, |(_, partial)| partial);
    let manifest = corpus::build(options, &sources, sequence_length, &partial.path, &mut reporter)?;
    check_unchanged(&options.sources, &sources)?;
    match &shared {
        Some((folder, partial)) => {
            let entry = cache::store(folder, &key, sequence_length, partial, &manifest)?;
            cache::install(&entry, &manifest, dir)?;
        }
        None => cache::install(&partial.path, &manifest, dir)?,
    }
    Ok(Prepared { manifest, resumed: false, from_cache: false })
}

/// Refuses a corpus of which files have changed while they were read: it would be of no state of the text,
/// and other runs would take it from the cache.
fn check_unchanged(options: &[SourceOptions], read: &[Source]) -> Result<(), Error> {
    for (options, read) in options.iter().zip(read) {
        let now = Source::find(options)?;
        let stamps: HashMap<_, _> =
            now.files.iter().map(|file| (&file.path, (file.bytes, file.stamp))).collect();
        let is_changed = |file: &&SourceFile| stamps.get(&file.path) != Some(&(file.bytes, file.stamp));
        if let Some(file) = read.files.iter().find(is_changed) {
            return Err(Error::ChangedWhileRead { path: file.path.clone() });
        }
    }
    Ok(())
}

/// A folder in the cache: that of an earlier attempt, or a new one. `None`, with a warning, if the cache
/// cannot be written.
fn shared_partial<'a>(folder: &'a Path, key: &str) -> Option<(&'a Path, Partial)> {
    let resumed = Partial::resume(folder, key, ABANDONED_AFTER).transpose();
    match resumed.unwrap_or_else(|| Partial::create(folder, ABANDONED_AFTER)) {
        Ok(partial) => Some((folder, partial)),
        Err(error) => {
            tracing::warn!(%error, "the data cache cannot be written; the corpus is not shared with other runs");
            None
        }
    }
}
