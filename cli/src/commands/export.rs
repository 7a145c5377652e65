//! `volary export`: writes a trained model in a format of other programs.

use crate::config::Config;
use crate::output;
use crate::progress::validations;
use crate::rundir::checkpoint_step;
use clap::ValueEnum;
use std::path::PathBuf;
use volary_core::Lane;
use volary_data::{Dataset, Tokenizer};
use volary_formats::export::{Export, Origin};
use volary_formats::{glam, qwen3};
use volary_storage::{CheckpointReader, RunDir};

/// Write a trained model in a format of other programs.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  volary export --format safetensors runs/quickstart exported
  python examples/export/glam.py exported                  the same validation loss, in PyTorch
  volary export --format hf runs/mine exported             for transformers, of family = \"qwen3_moe\"")]
pub struct Args {
    /// The format.
    #[arg(long, value_enum)]
    format: Format,
    /// The run's directory.
    run_dir: PathBuf,
    /// The folder to create.
    out: PathBuf,
    /// The step of the checkpoint; by default the newest one.
    #[arg(long)]
    step: Option<u64>,
}

/// A format of other programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    /// The weights in f32 with their names, the architecture, the tokenizer, and the validation tokens.
    Safetensors,
    /// What Hugging Face's transformers read, of models with family = "qwen3_moe".
    Hf,
}

/// Runs the command.
///
/// # Errors
/// When there is no such run or checkpoint, or the target exists or cannot be written.
pub fn run(args: Args) -> anyhow::Result<()> {
    let dir = RunDir::find(&args.run_dir)?;
    let config = Config::load(&dir.config(), &[])?;
    let reader = CheckpointReader::open(&dir)?;
    let step = checkpoint_step(&reader, &args.run_dir, args.step)?;
    let origin = Origin {
        run: config.run.name.clone(),
        step,
        digest: reader.digest(step)?.whole.to_string(),
        validation_loss: validations(&dir.validation())
            .into_iter()
            .rfind(|validation| validation.step == step.0)
            .map(|validation| validation.loss),
        parameters: config.model.parameters(),
        activated_parameters: config.model.activated_parameters(),
    };
    let tokenizer = Tokenizer::load(&dir.tokenizer())?;
    let end_of_text = tokenizer.token(tokenizer.end_of_text());
    let validation = match args.format {
        Format::Safetensors => validation_sequences(&config, &dir)?,
        Format::Hf => Vec::new(),
    };
    let export = Export {
        architecture: &config.model,
        sequence_length: config.training.sequence_length,
        origin: &origin,
        tokenizer: &dir.tokenizer(),
        end_of_text: &end_of_text,
        validation: &validation,
    };
    let fetch = |shard| reader.read(step, shard);
    match args.format {
        Format::Safetensors => glam::export(&export, &args.out, fetch)?,
        Format::Hf => {
            let beside = (config.training.aux_loss, tokenizer.end_of_text());
            qwen3::export(&export, beside, &args.out, fetch)?;
        }
    }
    output::line(format_args!("step {step} of {} in {}", args.run_dir.display(), args.out.display()))?;
    Ok(())
}

/// The sequences of the run's validation, in the order in which it takes them.
fn validation_sequences(config: &Config, dir: &RunDir) -> anyhow::Result<Vec<Vec<u32>>> {
    let (training, seed) = (&config.training, config.run.seed);
    let (length, per_lane) = (training.sequence_length, training.sequences_per_lane);
    let data = Dataset::open(&dir.data(), length, per_lane, training.lanes, seed)?;
    let mut sequences = Vec::new();
    for round in 0..config.validation.rounds {
        for lane in Lane::first(training.lanes) {
            let tokens = data.validation(round, lane)?;
            sequences.extend(tokens.chunks_exact(length + 1).map(<[u32]>::to_vec));
        }
    }
    Ok(sequences)
}
