//! Before a run starts: its directory, the check that it is the same run, and its tokens.

use crate::config::Config;
use crate::output;
use crate::progress::PhaseDisplay;
use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};
use std::path::Path;
use volary_data::{Manifest, PreparationStage, Prepared, Progress};
use volary_storage::{CheckpointReader, RunDir, RunLock, Store, mirror};

/// The phase of a run before it starts.
pub const PREPARING: &str = "preparing the data";

/// A run's directory while one process prepares it, which holds its lock. A directory that this process has
/// created is removed again unless the run starts.
#[derive(Debug)]
pub struct ClaimedDir {
    /// The directory.
    pub dir: RunDir,
    /// Whether it holds committed steps or checkpoints.
    pub holds_run: bool,
    _lock: RunLock,
    created: bool,
}

impl ClaimedDir {
    /// Creates a directory, or takes an existing one.
    ///
    /// # Errors
    /// When it cannot be written, or another process uses it.
    pub fn take(path: &Path, address: &str) -> anyhow::Result<Self> {
        let created = !path.exists();
        let dir = RunDir::create(path)?;
        let lock = RunLock::acquire(&dir, std::process::id(), address)?;
        // Checkpoints outlive a lost journal, which is restored from them.
        let has_checkpoints = || Ok::<_, anyhow::Error>(!CheckpointReader::open(&dir)?.steps()?.is_empty());
        let holds_run = !created && (Store::has_steps(&dir)? || has_checkpoints()?);
        Ok(Self { dir, holds_run, _lock: lock, created })
    }

    /// Clears what a start that was refused or cut off has left, and writes the configuration.
    ///
    /// # Errors
    /// When the directory holds another run, or cannot be written.
    pub fn configure(&self, config: &Config) -> anyhow::Result<()> {
        let path = self.dir.config();
        let before = if path.exists() { Config::load(&path, &[]).map(Some) } else { Ok(None) };
        match before {
            Ok(Some(before)) => {
                if let Some(difference) = config.first_difference(&before) {
                    if self.holds_run {
                        bail!("{} holds another run: {difference}", self.dir.root().display());
                    }
                    self.dir.clear()?;
                }
            }
            Ok(None) => {}
            Err(error) if self.holds_run => return Err(error),
            Err(_) => self.dir.clear()?,
        }
        let text = toml::to_string(config)?;
        // A full disk must not stop a run that resumes unchanged.
        if std::fs::read_to_string(&path).ok().as_deref() != Some(&text) {
            volary_storage::write_file(&path, text.as_bytes())?;
        }
        Ok(())
    }

    /// Fetches the newest checkpoint of an object store into a directory that has none.
    ///
    /// # Errors
    /// When the store holds no checkpoint or another run's, or a transfer fails.
    pub fn restore(&mut self, address: &str, config: &Config) -> anyhow::Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let text = runtime.block_on(mirror::configuration(address))?;
        let name = format!("{address}/config.toml");
        let before = Config::parse(&String::from_utf8_lossy(&text), &name, &[])?;
        if before.identity() != config.identity() {
            let difference = config.first_difference(&before).unwrap_or_default();
            bail!("{address} holds another run: {difference}");
        }
        let step = runtime.block_on(mirror::restore(address, &self.dir))?;
        self.holds_run = true;
        output::note(format_args!("step {step} from {address}"));
        Ok(())
    }

    /// Keeps the directory: the run starts.
    pub fn keep(&mut self) {
        self.created = false;
    }

    /// Keeps the directory and unlocks it for the process that continues with it.
    #[must_use]
    pub fn release(mut self) -> RunDir {
        self.keep();
        self.dir.clone()
    }
}

impl Drop for ClaimedDir {
    fn drop(&mut self) {
        if self.created {
            // What is left holds no step, and the next start clears it.
            let _ = std::fs::remove_dir_all(self.dir.root());
        }
    }
}

/// Shows the progress of a preparation.
pub fn progress(mut phases: PhaseDisplay) -> impl FnMut(Progress) + Send {
    move |progress| {
        let phase = match progress.stage {
            PreparationStage::Reading => "reading text",
            PreparationStage::Filtering => "choosing documents",
            PreparationStage::TrainingTokenizer => "training the tokenizer",
            PreparationStage::Tokenizing => "tokenizing",
        };
        // The tokenizer's training does not tell how far it is: only the reading of its sample does.
        let is_measured =
            matches!(progress.stage, PreparationStage::Filtering | PreparationStage::Tokenizing);
        let is_known = is_measured && progress.total_bytes > 0;
        phases.show(phase, is_known.then(|| progress.done_bytes as f64 / progress.total_bytes as f64));
    }
}

/// `RUN_DIR/corpus.json`: the hashes of what the run trains on. They stay when `RUN_DIR/data` is prepared
/// again.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Fingerprints {
    tokenizer: String,
    sources: Vec<SourceFingerprint>,
}

/// The hashes of one source's tokens.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct SourceFingerprint {
    name: String,
    train: String,
    validation: String,
}

impl Fingerprints {
    fn of(manifest: &Manifest) -> Self {
        let source = |source: &volary_data::SourceManifest| SourceFingerprint {
            name: source.name.clone(),
            train: source.train.blake3.clone(),
            validation: source.validation.blake3.clone(),
        };
        let sources = manifest.sources.iter().map(source).collect();
        Self { tokenizer: manifest.tokenizer.clone(), sources }
    }

    /// The first difference to what the run was trained on before.
    fn difference(&self, before: &Self) -> Option<String> {
        if self.tokenizer != before.tokenizer {
            return Some(format!("the tokenizer: {}, now {}", before.tokenizer, self.tokenizer));
        }
        let mut pairs = self.sources.iter().zip(&before.sources);
        let (now, before) = pairs.find(|(now, before)| now != before)?;
        Some(format!("the text of data source {:?}: tokens {}, now {}", before.name, before.train, now.train))
    }
}

/// Prepares the run's tokens, unless they are prepared already, and checks that they are those of the run and
/// that the tokenizer fits the model.
///
/// # Errors
/// As [`volary_data::prepare`]; when the tokens differ from those that the run was trained on, or the
/// tokenizer has more tokens than the model.
pub fn prepare_data(
    config: &Config,
    dir: &RunDir,
    progress: &mut dyn FnMut(volary_data::Progress),
) -> anyhow::Result<Prepared> {
    let prepared =
        volary_data::prepare(&config.data, config.training.sequence_length, &dir.data(), progress)?;
    check_fingerprints(dir, &prepared.manifest)?;
    let source = dir.data().join(volary_data::manifest::TOKENIZER);
    if !dir.tokenizer().exists() {
        let tokenizer = std::fs::read(&source).with_context(|| source.display().to_string())?;
        volary_storage::write_file(&dir.tokenizer(), &tokenizer)?;
    }
    let tokenizer = volary_data::Tokenizer::load(&dir.tokenizer())?;
    if tokenizer.vocabulary() > config.model.vocabulary {
        bail!(
            "model.vocabulary = {}: expected at least the {} tokens of the tokenizer",
            config.model.vocabulary,
            tokenizer.vocabulary()
        );
    }
    Ok(prepared)
}

fn check_fingerprints(dir: &RunDir, manifest: &Manifest) -> anyhow::Result<()> {
    let path = dir.corpus();
    let now = Fingerprints::of(manifest);
    let Ok(text) = std::fs::read_to_string(&path) else {
        return Ok(volary_storage::write_file(&path, &serde_json::to_vec(&now)?)?);
    };
    let before: Fingerprints = serde_json::from_str(&text).with_context(|| path.display().to_string())?;
    if let Some(difference) = now.difference(&before) {
        // Otherwise the next start would take them without a look.
        std::fs::remove_dir_all(dir.data()).with_context(|| dir.data().display().to_string())?;
        bail!(
            "{} was trained on other data: {difference}; restore the source, or begin a new run",
            dir.root().display()
        );
    }
    Ok(())
}
