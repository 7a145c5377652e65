//! `volary digest`: a hash over the exact bits of a checkpoint, wherever its shards were placed.

use std::path::PathBuf;
use volary_core::Step;
use volary_storage::{CheckpointReader, RunDir};

/// Hash the exact bits of a checkpoint: one line per shard and one for the whole.
#[derive(clap::Args)]
#[command(after_help = "\
Two runs that are bit-equal print the same last line.

Examples:
  volary digest runs/quickstart
  volary digest runs/quickstart --step 100 | tail -n 1")]
pub struct Args {
    /// The run's directory.
    run_dir: PathBuf,
    /// The checkpoint's step; the newest when left out.
    #[arg(long)]
    step: Option<u64>,
}

/// Runs the command.
///
/// # Errors
/// When there is no such run or checkpoint, or it is damaged.
pub fn run(args: Args) -> anyhow::Result<()> {
    let reader = CheckpointReader::open(&RunDir::find(&args.run_dir)?)?;
    let step = match args.step {
        Some(step) => Step(step),
        None => match reader.latest()? {
            Some(record) => record.step,
            None => anyhow::bail!("{} holds no checkpoint yet", args.run_dir.display()),
        },
    };
    let digest = reader.digest(step)?;
    for (shard, hash) in &digest.shards {
        println!("{hash}  {shard}");
    }
    println!("{}  step {step}", digest.whole);
    Ok(())
}
