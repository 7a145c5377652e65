//! `volary generate`: continues a prompt with a trained model, in this process.

use crate::config::Config;
use anyhow::Context;
use std::path::{Path, PathBuf};
use volary_core::Step;
use volary_data::Tokenizer;
use volary_model::device;
use volary_model::reference::Reference;
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
    /// Tokens to write, at most.
    #[arg(long, default_value_t = 64)]
    max_tokens: usize,
    /// 0 takes the likeliest token; 1 draws as the model says.
    #[arg(long, default_value_t = 0.8, value_parser = temperature)]
    temperature: f64,
    /// The seed of the draws.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// The checkpoint's step; the newest when left out.
    #[arg(long)]
    step: Option<u64>,
    /// auto, cpu or cuda:N.
    #[arg(long, default_value = "cpu")]
    device: String,
}

fn temperature(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if value.is_finite() && value >= 0.0 => Ok(value),
        _ => Err("expected a number that is not negative".into()),
    }
}

/// Runs the command.
///
/// # Errors
/// When there is no such run or checkpoint, or the tokenizer does not fit it.
pub fn run(args: Args) -> anyhow::Result<()> {
    let text = continue_prompt(
        &args.run,
        args.step,
        &args.prompt,
        args.max_tokens,
        args.temperature,
        args.seed,
        &args.device,
    )?;
    println!("{}{text}", args.prompt);
    Ok(())
}

/// The text that the model of a run writes after `prompt`.
pub(crate) fn continue_prompt(
    run: &Path,
    step: Option<u64>,
    prompt: &str,
    max_tokens: usize,
    temperature: f64,
    seed: u64,
    device: &str,
) -> anyhow::Result<String> {
    device::single_thread();
    let dir = RunDir::find(run)?;
    let config = Config::load(&dir.config(), &[])?;
    let reader = CheckpointReader::open(&dir)?;
    let step = match step {
        Some(step) => Step(step),
        None => reader.latest()?.with_context(|| format!("{} holds no checkpoint yet", run.display()))?.step,
    };
    let tokenizer = Tokenizer::load(&dir.tokenizer())?;
    if tokenizer.vocabulary() > config.model.vocabulary {
        anyhow::bail!(
            "{} has {} tokens, and the checkpoint's model knows {}",
            dir.tokenizer().display(),
            tokenizer.vocabulary(),
            config.model.vocabulary
        );
    }
    let fetch = |shard| reader.read(step, shard).map_err(|error| error.to_string());
    let model = Reference::load(&config.model, &config.training, device::parse(device)?, fetch)?;
    let ids = tokenizer.encode(prompt)?;
    let ids = if ids.is_empty() { vec![tokenizer.end_of_text()] } else { ids };
    let written = model.generate(&ids, max_tokens, temperature, seed, Some(tokenizer.end_of_text()))?;
    Ok(tokenizer.decode(&written)?)
}
