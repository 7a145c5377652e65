//! `volary serve`: answers completion requests over HTTP.

use crate::http::HttpListener;
use crate::limits::{MODEL_BOUNDS, SERVED_SLOTS_MAX, SIGNAL_POLL};
use crate::output;
use crate::rundir;
use crate::serve::{Scheduler, Served, Server};
use crate::signals::Interrupts;
use crate::trained::{ModelArgs, Trained};
use anyhow::Context;
use std::path::PathBuf;
use volary_inference::Generator;

/// Answer completion requests over HTTP, with the interface of OpenAI's API.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  volary serve --run runs/quickstart
  curl http://127.0.0.1:8000/v1/completions -d '{\"prompt\": \"pub fn new(\", \"max_tokens\": 40}'")]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
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
    let token = args.token_file.as_ref().map(|path| access_token(path)).transpose()?;
    if token.is_none() && !listener.address.ip().is_loopback() {
        anyhow::bail!(
            "--http {}: anyone in the network could use the model: add --token-file FILE",
            listener.address
        );
    }
    let (sent, received) = std::sync::mpsc::sync_channel(1);
    let slots = args.parallel as usize;
    // The model lives on the thread that computes.
    let scheduler = Scheduler::start(move || {
        let trained = Trained::open(&args.model)?;
        let served = Served {
            name: trained.run.clone(),
            created: crate::units::since_1970().as_secs(),
            tokenizer: trained.tokenizer.clone(),
            context: trained.decoder.context(),
        };
        drop(sent.send((served, trained.step)));
        Ok(Generator::new(trained.decoder, trained.tokenizer, slots)?)
    })?;
    let (served, step) = received.recv().context("the model's thread has ended")?;
    let address = listener.address;
    let name = served.name.clone();
    listener.serve(Server::new(served, scheduler, token.as_deref()).routes())?;
    output::line(format_args!("{name} at step {step}: http://{address}/v1/completions"))?;
    while !interrupts.is_interrupted() {
        std::thread::sleep(SIGNAL_POLL);
    }
    Ok(())
}

/// The access token of a file.
fn access_token(path: &std::path::Path) -> anyhow::Result<String> {
    let text = std::fs::read_to_string(path).with_context(|| format!("--token-file {}", path.display()))?;
    match text.trim() {
        "" => anyhow::bail!("--token-file {}: the file is empty", path.display()),
        token => Ok(token.to_owned()),
    }
}
