//! From options to a folder of token files that the run owns.

use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::cache::{self, ABANDONED, Partial};
use crate::corpus::{self, Report};
use crate::error::Error;
use crate::manifest::{MANIFEST, Manifest};
use crate::options::DataOptions;
use crate::source::Source;

/// What [`prepare`] is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// Finding the sources' files.
    Reading,
    /// Reading the sample that the tokenizer is trained on, then training it.
    TrainingTokenizer,
    /// Turning the text into tokens.
    Tokenizing,
}

/// How far [`prepare`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// The stage.
    pub stage: Stage,
    /// How much text has passed through the stage, in bytes.
    pub done_bytes: u64,
    /// About how much there is, in bytes; it grows where compressed files hold more than foreseen.
    pub total_bytes: u64,
}

/// What [`prepare`] has found or made.
#[derive(Clone, Debug, PartialEq)]
pub struct Prepared {
    /// The corpus in the run's folder.
    pub manifest: Manifest,
    /// Whether the run's folder already held it.
    pub resumed: bool,
    /// Whether it was taken from the cache.
    pub from_cache: bool,
}

/// Puts a tokenised corpus into `dir`, the run's own folder.
///
/// A corpus that is there already is verified and used, whatever became of the sources. Otherwise it is taken from the cache,
/// or built and left there for the next run. It depends on the options and the files only: not on a seed, the machine, the
/// number of threads or what the cache held. `sequence_length` (in tokens) matters to sources that are too small for
/// a split by documents: they hold out at least one sequence for validation.
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
    let mut report = Report { progress, stage: Stage::Reading, done_bytes: 0, total_bytes: 0 };
    report.begin(Stage::Reading, 0);
    // Work in the run's folder first: that it cannot be written must not come out after an hour of tokenising.
    // The folder is this run's alone, so what an earlier try left there is of no use.
    let fallback = Partial::create(dir, Duration::ZERO)?;
    let sources = options.sources.iter().map(Source::find).collect::<Result<Vec<_>, _>>()?;
    let key = cache::key(options, &sources)?;
    let folder = cache::folder(options);
    if let Some((from, manifest)) =
        folder.as_deref().and_then(|folder| cache::find(folder, &key, sequence_length))
    {
        cache::install(&from, &manifest, dir)?;
        return Ok(Prepared { manifest, resumed: false, from_cache: true });
    }
    let shared = folder.as_deref().and_then(shared_partial);
    let partial = shared.as_ref().map_or(&fallback, |(_, partial)| partial);
    let manifest = corpus::build(options, &sources, sequence_length, &partial.path, &mut report)?;
    match &shared {
        Some((folder, partial)) => {
            let entry = cache::store(folder, &key, sequence_length, partial, &manifest)?;
            cache::install(&entry, &manifest, dir)?;
        }
        None => cache::install(&partial.path, &manifest, dir)?,
    }
    Ok(Prepared { manifest, resumed: false, from_cache: false })
}

/// A new folder in the cache; `None`, with a warning, if the cache cannot be written.
fn shared_partial(folder: &Path) -> Option<(&Path, Partial)> {
    match Partial::create(folder, ABANDONED) {
        Ok(partial) => Some((folder, partial)),
        Err(error) => {
            tracing::warn!(%error, "the data cache cannot be used; the corpus is prepared for this run only");
            None
        }
    }
}
