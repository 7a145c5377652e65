//! `volary import`: begins a run with a model from another program.

use crate::config::Config;
use crate::output;
use crate::preparation::ClaimedDir;
use crate::rundir;
use anyhow::{Context, bail};
use clap::ValueEnum;
use std::path::{Path, PathBuf};
use volary_core::{Digest, Epoch, Step, Timeline};
use volary_data::Tokenizer;
use volary_formats::qwen3;
use volary_model::store_given;
use volary_storage::{BlobStore, Checkpoints, RunDir, Store};

/// Where a preparation listens: nowhere.
const ADDRESS: &str = "importing";
/// Steps of a run without a configuration.
const STEPS: u64 = 1000;
/// The context of a run without a configuration, in tokens.
const SEQUENCE_LENGTH: u64 = 512;

/// Begin a run with a model from another program.
#[derive(clap::Args)]
#[command(after_help = "\
Step 0 of the run has the model's weights, with a new optimizer state. The model's shape and tokenizer come from the
folder: the configuration has neither. `volary generate`, `eval` and `serve` can use the run at once.

Examples:
  volary import --format hf Qwen3-0.6B --config tune.toml --dir runs/tuned
  volary train runs/tuned/config.toml --dir runs/tuned --resume        goes on with its training
  volary import --format hf Qwen3-0.6B --upcycle 8 --dir runs/sparse   each expert starts as a copy of the layer")]
pub struct Args {
    /// The format.
    #[arg(long, value_enum)]
    format: Format,
    /// The folder with the model.
    folder: PathBuf,
    /// The configuration of the run, without [model]; by default one without text.
    #[arg(long)]
    config: Option<PathBuf>,
    /// A TOML value for any key of the configuration.
    #[arg(long, value_name = "KEY.PATH=VALUE")]
    set: Vec<String>,
    /// The run's directory; by default runs/NAME, or runs/NAME-2 and so on if that exists.
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Make a dense model sparse: so many experts in every other layer, each a copy of its feed-forward.
    #[arg(long, value_name = "EXPERTS")]
    upcycle: Option<usize>,
}

/// A format of other programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    /// A folder that Hugging Face's transformers read, of model type qwen3 or qwen3_moe.
    Hf,
}

/// Runs the command.
///
/// # Errors
/// When the folder holds no such model, the configuration is invalid, or the directory holds a run.
pub fn run(args: Args) -> anyhow::Result<()> {
    let Format::Hf = args.format;
    let mut model = qwen3::Import::open(&args.folder)?;
    if let Some(experts) = args.upcycle {
        model = model.upcycle(experts)?;
    }
    let tokenizer = model.tokenizer();
    check_tokenizer(&tokenizer, model.architecture().vocabulary)?;
    let (text, name) = match &args.config {
        Some(path) => {
            let text = std::fs::read_to_string(path).with_context(|| format!("config {}", path.display()))?;
            (text, path.display().to_string())
        }
        None => (default_config(&args.folder), "the default configuration".into()),
    };
    let beside = args.config.as_deref().and_then(Path::parent).unwrap_or_else(|| Path::new(""));
    let mut config = Config::with_model(&text, &name, &args.set, model.architecture())?;
    config.data.resolve_paths(beside)?;

    let claimed = match &args.dir {
        Some(path) => ClaimedDir::take(path, ADDRESS)?,
        None => rundir::claim_new(&config.run.name, ADDRESS)?,
    };
    let root = claimed.dir.root().to_owned();
    if claimed.holds_run {
        bail!("{} already holds a run: choose another --dir", root.display());
    }
    let own = std::path::absolute(claimed.dir.tokenizer())?;
    config.data.tokenizer = Some(own.clone());
    claimed.configure(&config)?;
    std::fs::copy(&tokenizer, &own).with_context(|| tokenizer.display().to_string())?;
    write_checkpoint(&claimed.dir, &model, &config)?;
    let dir = claimed.release();

    let (parameters, path) = (config.model.parameters(), dir.root().display());
    output::line(format_args!("{} as step 0 in {path}: {parameters} parameters", args.folder.display()))?;
    let file = dir.config();
    let first = if config.data.sources.is_empty() { "add text to data.sources, then " } else { "" };
    output::line(format_args!("{first}volary train {} --dir {path} --resume", file.display()))?;
    Ok(())
}

/// Writes the model as the checkpoint of step 0.
fn write_checkpoint(dir: &RunDir, model: &qwen3::Import, config: &Config) -> anyhow::Result<()> {
    let checkpoints = Checkpoints::open(dir, Store::open(dir)?, BlobStore::open(dir.blobs())?)?;
    let shards = config.model.shards();
    let hash = Digest::of(config.identity().as_bytes());
    let at = (Step(0), Timeline::default(), Epoch::default());
    let pending = checkpoints.begin(at, hash, shards.iter().copied());
    for shard in shards {
        let given = model.parameters(shard)?;
        let stored = store_given(&config.model, &config.training.optimizer, config.run.seed, shard, given)?;
        pending.add(shard, &stored)?;
    }
    pending.complete()?;
    Ok(())
}

fn check_tokenizer(path: &Path, vocabulary: usize) -> anyhow::Result<()> {
    let found = Tokenizer::load(path)?.vocabulary();
    if found > vocabulary {
        bail!("{} has {found} tokens, but the model has a vocabulary of {vocabulary}", path.display());
    }
    Ok(())
}

/// A configuration without text, named like the folder.
fn default_config(folder: &Path) -> String {
    let name = folder.canonicalize().ok();
    let name = name.as_deref().and_then(Path::file_name).map(|name| name.to_string_lossy().into_owned());
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    let name: String =
        name.iter().flat_map(|name| name.chars()).map(|c| if is_plain(c) { c } else { '-' }).collect();
    let name = name.trim_start_matches('.');
    let name = if name.is_empty() { "imported" } else { name };
    format!(
        "[run]\nname = {name:?}\n\n[data]\nsources = []\n\n[training]\nsteps = {STEPS}\nsequence_length = \
         {SEQUENCE_LENGTH}\n"
    )
}
