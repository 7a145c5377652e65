//! `volary generate`: continues a prompt with a trained model, in this process.

use crate::arguments::InvalidArgument;
use crate::config::Config;
use crate::output;
use anyhow::Context;
use std::path::{Path, PathBuf};
use volary_core::Step;
use volary_data::Tokenizer;
use volary_model::device;
use volary_model::reference::Reference;
use volary_model::sampling::Sampling;
use volary_storage::{CheckpointReader, RunDir};

/// Continue a prompt with a trained model.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  volary generate --run runs/quickstart --prompt 'pub fn new('
  volary generate --run runs/quickstart --prompt '# ' --temperature 0 --max-tokens 40")]
pub struct Args {
    /// The run's directory.
    #[arg(long)]
    run: PathBuf,
    /// The text to continue.
    #[arg(long)]
    prompt: String,
    /// The maximum number of new tokens.
    #[arg(long, default_value_t = 64)]
    max_tokens: usize,
    /// Sampling temperature: 0 takes the most likely token, 1 samples from the model's distribution.
    #[arg(long, default_value_t = 0.8, value_parser = temperature, allow_negative_numbers = true)]
    temperature: f64,
    /// The seed of sampling.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// The step of the checkpoint; by default the newest one.
    #[arg(long)]
    step: Option<u64>,
    /// Device: auto, cpu or cuda:N.
    #[arg(long, default_value = "cpu")]
    device: String,
}

fn temperature(text: &str) -> Result<f64, InvalidArgument> {
    match text.parse::<f64>() {
        Ok(value) if value.is_finite() && value >= 0.0 => Ok(value),
        _ => Err(InvalidArgument::new("a number that is not negative")),
    }
}

/// Runs the command.
///
/// # Errors
/// When there is no such run or checkpoint, or the tokenizer does not fit it.
pub fn run(args: Args) -> anyhow::Result<()> {
    let sampling = Sampling {
        max_tokens: args.max_tokens,
        temperature: args.temperature,
        seed: args.seed,
        ..Sampling::default()
    };
    let text = continue_prompt(&args.run, args.step.map(Step), &args.prompt, sampling, &args.device)?;
    output::line(format_args!("{}{text}", args.prompt))?;
    Ok(())
}

/// The continuation of a prompt by the model of a run, up to the end of the text.
pub(crate) fn continue_prompt(
    run: &Path,
    step: Option<Step>,
    prompt: &str,
    sampling: Sampling,
    device: &str,
) -> anyhow::Result<String> {
    device::single_thread();
    let dir = RunDir::find(run)?;
    let config = Config::load(&dir.config(), &[])?;
    let reader = CheckpointReader::open(&dir)?;
    let step = match step {
        Some(step) => step,
        None => reader.latest()?.with_context(|| format!("{} has no checkpoint yet", run.display()))?.step,
    };
    let tokenizer = Tokenizer::load(&dir.tokenizer())?;
    if tokenizer.vocabulary() > config.model.vocabulary {
        anyhow::bail!(
            "{} has {} tokens, but the checkpoint's model has a vocabulary of {}",
            dir.tokenizer().display(),
            tokenizer.vocabulary(),
            config.model.vocabulary
        );
    }
    let fetch = |shard| reader.read(step, shard);
    let device = device::parse(device)?;
    let model = Reference::load(&config.model, &config.training, config.run.seed, device, fetch)?;
    let ids = tokenizer.encode(prompt)?;
    let ids = if ids.is_empty() { vec![tokenizer.end_of_text()] } else { ids };
    let (stop, vocabulary) = (Some(tokenizer.end_of_text()), tokenizer.vocabulary());
    let continuation = model.generate(&ids, &Sampling { stop, vocabulary, ..sampling })?;
    tokenizer.decode_continuation(&ids, &continuation).map_err(Into::into)
}
