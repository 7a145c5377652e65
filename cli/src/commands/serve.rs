//! `volary serve`: answers completion requests over HTTP.

use crate::http::HttpListener;
use crate::limits::{FOLLOW_POLL, MODEL_BOUNDS, SERVED_SLOTS_MAX, SIGNAL_POLL};
use crate::output;
use crate::rundir;
use crate::serve::{Scheduler, Served, Server, Setup};
use crate::signals::Interrupts;
use crate::trained::{ModelArgs, Trained};
use anyhow::Context;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use volary_core::Step;
use volary_storage::{CheckpointReader, RunDir};
use volary_telemetry::metrics::ModelServerMetrics;

/// Answer completion requests over HTTP, with the interface of OpenAI's API.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  volary serve --run runs/quickstart --follow
  curl http://127.0.0.1:8000/v1/completions -d '{\"prompt\": \"pub fn new(\", \"max_tokens\": 40}'")]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Answer later requests with each new checkpoint of the run.
    #[arg(long, conflicts_with = "step")]
    follow: bool,
    /// The address to listen on; by default port 8000 of localhost, or any free one.
    #[arg(long)]
    http: Option<String>,
    /// A file with the access token that requests must send; required beyond localhost.
    #[arg(long)]
    token_file: Option<PathBuf>,
    /// Continuations that are computed at a time; others wait.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u64).range(1..=SERVED_SLOTS_MAX))]
    parallel: u64,
}

/// The port unless `--http` is given; another one if it is in use.
const PORT: u16 = 8000;

/// Runs the command until it is interrupted.
///
/// # Errors
/// When there is no such run or checkpoint, the address is in use, or it is not localhost and no access token
/// is given.
pub fn run(args: Args) -> anyhow::Result<()> {
    let interrupts = Interrupts::listen()?;
    let address = args.http.as_deref().map(rundir::resolve).transpose()?;
    let listener = HttpListener::bind(address, PORT)?.with_bounds(MODEL_BOUNDS);
    let address = listener.address;
    let token = args.token_file.as_ref().map(|path| access_token(path)).transpose()?;
    if token.is_none() && !address.ip().is_loopback() {
        anyhow::bail!("--http {address}: anyone in the network could use the model: add --token-file FILE");
    }
    let Trained { decoder, tokenizer, run, step } = Trained::open(&args.model)?;
    let served = Served {
        name: run.clone(),
        created: crate::units::since_1970().as_secs(),
        tokenizer: tokenizer.clone(),
        context: decoder.context(),
    };
    let metrics = Arc::new(ModelServerMetrics::default());
    let slots = args.parallel as usize;
    let setup = Setup { decoder, step, tokenizer, slots, metrics: Arc::clone(&metrics) };
    let scheduler = Scheduler::start(setup)?;
    listener.serve(Server::new(served, scheduler.clone(), metrics, token.as_deref()).routes())?;
    output::line(format_args!("{run} at step {step}: http://{address}/v1/completions"))?;
    let mut follower = if args.follow { Some(Follower::new(&args.model, step)?) } else { None };
    while !interrupts.is_interrupted() {
        match &mut follower {
            Some(follower) => follower.look(&args.model, &scheduler)?,
            None => std::thread::sleep(SIGNAL_POLL),
        }
    }
    Ok(())
}

/// Looks for newer checkpoints of a run.
struct Follower {
    reader: CheckpointReader,
    step: Step,
}

impl Follower {
    fn new(model: &ModelArgs, step: Step) -> anyhow::Result<Self> {
        Ok(Self { reader: CheckpointReader::open(&RunDir::find(&model.run)?)?, step })
    }

    /// Waits a moment, and loads the newest checkpoint if it is another one: a run may also return to an
    /// earlier one.
    fn look(&mut self, model: &ModelArgs, scheduler: &Scheduler) -> anyhow::Result<()> {
        std::thread::sleep(FOLLOW_POLL);
        let Some(record) = self.reader.latest()?.filter(|record| record.step != self.step) else {
            return Ok(());
        };
        match Trained::open(model) {
            Ok(trained) => {
                self.step = trained.step;
                output::note(format_args!("new requests are answered by step {}", trained.step));
                scheduler.replace(trained.decoder, trained.step)
            }
            // It may have been removed meanwhile: the next look finds a newer one.
            Err(error) => {
                tracing::warn!(step = %record.step, error = %output::with_causes(&error), "checkpoint not loaded");
                Ok(())
            }
        }
    }
}

/// The access token of a file.
fn access_token(path: &Path) -> anyhow::Result<String> {
    let text = std::fs::read_to_string(path).with_context(|| format!("--token-file {}", path.display()))?;
    match text.trim() {
        "" => anyhow::bail!("--token-file {}: the file is empty", path.display()),
        token => Ok(token.to_owned()),
    }
}
