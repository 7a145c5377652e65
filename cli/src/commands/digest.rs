//! `volary digest`: a hash over the exact bits of a checkpoint, independent of its placement.

use crate::output;
use crate::rundir::checkpoint_step;
use std::fmt;
use std::path::PathBuf;
use volary_core::Step;
use volary_storage::{CheckpointDigest, CheckpointReader, RunDir};

/// Hash the exact bits of a checkpoint: one line per shard and one for the whole checkpoint.
#[derive(clap::Args)]
#[command(after_help = "\
Two runs with equal bits print the same last line.

Examples:
  volary digest runs/quickstart
  volary digest runs/quickstart --step 100 | tail -n 1")]
pub struct Args {
    /// The run's directory.
    run_dir: PathBuf,
    /// The step of the checkpoint; by default the newest one.
    #[arg(long)]
    step: Option<u64>,
}

/// Runs the command.
///
/// # Errors
/// When there is no such run or checkpoint, or it is damaged.
pub fn run(args: Args) -> anyhow::Result<()> {
    let reader = CheckpointReader::open(&RunDir::find(&args.run_dir)?)?;
    let step = checkpoint_step(&reader, &args.run_dir, args.step)?;
    let digest = reader.digest(step)?;
    output::text(Lines { digest: &digest, step })?;
    Ok(())
}

/// A digest as text.
struct Lines<'a> {
    digest: &'a CheckpointDigest,
    step: Step,
}

impl fmt::Display for Lines<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (shard, hash) in &self.digest.shards {
            writeln!(f, "{hash}  {shard}")?;
        }
        writeln!(f, "{}  step {}", self.digest.whole, self.step)
    }
}
