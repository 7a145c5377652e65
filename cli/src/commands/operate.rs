//! `volary status`, `checkpoint` and `stop`: questions and orders to a running supervisor.

use crate::rundir::{self, Role};
use anyhow::Context;
use std::path::{Path, PathBuf};
use std::time::Duration;
use volary_protocol::operator::{OperatorReply, OperatorRequest, Status};

/// How often somebody who waits is told how far it is.
const PROGRESS_EVERY: Duration = Duration::from_millis(500);

/// Which supervisor.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  volary checkpoint                                   the only run that is going on under runs/
  volary stop --dir runs/quickstart
  volary stop --supervisor 10.0.0.5:7100 --token-file operator.token")]
pub struct Args {
    /// The run's directory.
    #[arg(long)]
    pub(super) dir: Option<PathBuf>,
    /// The supervisor's address.
    #[arg(long, value_name = "ADDR")]
    pub(super) supervisor: Option<String>,
    /// A file with an operator's token; RUN_DIR/identity/operator.token when left out.
    #[arg(long)]
    pub(super) token_file: Option<PathBuf>,
}

/// Show how a run is going.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  volary status
  volary status --dir runs/quickstart --json")]
pub struct StatusArgs {
    #[command(flatten)]
    which: Args,
    /// One JSON object.
    #[arg(long)]
    json: bool,
}

/// Which node of which run.
#[derive(clap::Args)]
#[command(after_help = "\
The node hands its shards and lanes over while training goes on, then leaves; no step is lost. SIGTERM to the node's
process does the same.

Examples:
  volary drain node-3
  volary drain node-3 --dir runs/quickstart
  volary drain --pid 4711 --wait 5m
  volary drain node-3 --supervisor 10.0.0.5:7100 --token-file operator.token")]
pub struct DrainArgs {
    /// The node's name, as `volary status` shows it.
    #[arg(conflicts_with = "pid")]
    node: Option<String>,
    /// The node's process on this machine, instead of its name: needs no token.
    #[arg(long, value_parser = clap::value_parser!(i32).range(1..))]
    pid: Option<i32>,
    /// With --pid: how long to wait for it to leave, as 90s or 15m.
    #[arg(long, value_name = "TIME", default_value = "10m", value_parser = crate::units::duration)]
    wait: Duration,
    #[command(flatten)]
    which: Args,
}

/// Asks a supervisor.
pub(super) fn ask(args: &Args, request: &OperatorRequest) -> anyhow::Result<OperatorReply> {
    let token = rundir::read_token(args.token_file.as_deref())?;
    let target =
        rundir::target(args.dir.as_deref(), args.supervisor.as_deref(), token.as_deref(), Role::Operator)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    Ok(runtime.block_on(volary_protocol::operate(target.address, &target.token, request))?)
}

fn done(args: &Args, request: &OperatorRequest, what: &str) -> anyhow::Result<()> {
    match ask(args, request)? {
        OperatorReply::Done { step } => println!("{what} step {step}"),
        other => return unexpected(other),
    }
    Ok(())
}

/// What an answer says that is not the one that was asked for.
pub(super) fn unexpected(answer: OperatorReply) -> anyhow::Result<()> {
    match answer {
        OperatorReply::Failed { reason } => anyhow::bail!("{reason}"),
        _ => anyhow::bail!("the supervisor answered another question"),
    }
}

/// Runs `volary checkpoint`.
///
/// # Errors
/// When there is no supervisor, or the checkpoint cannot be written.
pub fn checkpoint(args: Args) -> anyhow::Result<()> {
    done(&args, &OperatorRequest::Checkpoint, "a durable checkpoint of")
}

/// Runs `volary stop`.
///
/// # Errors
/// When there is no supervisor, or its last checkpoint cannot be written.
pub fn stop(args: Args) -> anyhow::Result<()> {
    done(&args, &OperatorRequest::Stop, "stopped, durable at")
}

/// Asks the supervisor of a run directory to stop, as soon as it listens; what goes wrong shows in the supervisor's end.
pub(crate) fn stop_quietly(dir: &Path) {
    rundir::wait_until_it_listens(dir);
    let args = Args { dir: Some(dir.to_path_buf()), supervisor: None, token_file: None };
    if let Err(error) = ask(&args, &OperatorRequest::Stop) {
        tracing::warn!(%error, "the supervisor was asked to stop");
    }
}

/// Runs `volary drain`: orders it, and says how far it is until the node has left.
///
/// # Errors
/// When there is no supervisor or no such node, or it dies before it has left.
pub fn drain(args: DrainArgs) -> anyhow::Result<()> {
    if let Some(pid) = args.pid {
        return drain_process(pid, args.wait);
    }
    let Some(name) = args.node else { anyhow::bail!("which node? Give its name, or --pid of its process") };
    let token = rundir::read_token(args.which.token_file.as_deref())?;
    let which = &args.which;
    let target =
        rundir::target(which.dir.as_deref(), which.supervisor.as_deref(), token.as_deref(), Role::Operator)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let order = OperatorRequest::Drain { node: name.clone() };
    let answer = runtime.block_on(async {
        let order = volary_protocol::operate(target.address, &target.token, &order);
        tokio::select! {
            answer = order => answer,
            () = say_progress(&target, &name) => unreachable!("progress is said for ever"),
        }
    })?;
    match answer {
        OperatorReply::Done { step } => println!("{name} left after step {step}"),
        other => return unexpected(other),
    }
    Ok(())
}

/// Asks a node's process on this machine to leave, and waits until it has.
fn drain_process(pid: i32, wait: Duration) -> anyhow::Result<()> {
    let process =
        rustix::process::Pid::from_raw(pid).with_context(|| format!("--pid {pid}: expected a process"))?;
    rustix::process::kill_process(process, rustix::process::Signal::TERM)
        .with_context(|| format!("process {pid}"))?;
    let start = std::time::Instant::now();
    while rundir::is_alive(pid.unsigned_abs()) {
        if start.elapsed() >= wait {
            anyhow::bail!("process {pid} has not left within {wait:?}");
        }
        std::thread::sleep(PROGRESS_EVERY / 5);
    }
    println!("process {pid} has left");
    Ok(())
}

/// One line whenever something about the node has changed.
async fn say_progress(target: &rundir::Target, name: &str) {
    let mut said = String::new();
    loop {
        tokio::time::sleep(PROGRESS_EVERY).await;
        let asked = volary_protocol::operate(target.address, &target.token, &OperatorRequest::Status).await;
        let Ok(OperatorReply::Status(status)) = asked else { continue };
        let Some(node) = status.nodes.iter().find(|node| node.name == name) else { continue };
        let line = format!("{name}: {}, {} shards, {} lanes", node.state, node.shards, node.lanes.len());
        if line != said {
            eprintln!("step {}: {line}", status.step);
            said = line;
        }
    }
}

/// Runs `volary status`.
///
/// # Errors
/// When there is no supervisor.
pub fn status(args: StatusArgs) -> anyhow::Result<()> {
    let status = match ask(&args.which, &OperatorRequest::Status)? {
        OperatorReply::Status(status) => status,
        other => return unexpected(other),
    };
    if args.json {
        println!("{}", json(&status)?);
    } else {
        print(&status);
    }
    Ok(())
}

/// The status as JSON text.
fn json(status: &Status) -> anyhow::Result<String> {
    Ok(serde_json::to_string_pretty(&to_json(status)?)?)
}

/// The status as a JSON object, with events as objects.
pub(crate) fn to_json(status: &Status) -> serde_json::Result<serde_json::Value> {
    let mut value = serde_json::to_value(status)?;
    let events: Vec<serde_json::Value> =
        status.events.iter().filter_map(|e| serde_json::from_str(e).ok()).collect();
    value["events"] = events.into();
    Ok(value)
}

fn print(status: &Status) {
    let activity = serde_json::to_value(status.activity).map(|v| v.as_str().unwrap_or_default().to_owned());
    println!(
        "{}: {}, step {} of {}, epoch {}",
        status.run,
        activity.unwrap_or_default(),
        status.step,
        status.steps,
        status.epoch
    );
    if let (Some(loss), Some(speed)) = (status.loss, status.tokens_per_second) {
        println!("  loss {loss:.4}, {speed:.0} tokens/s");
    }
    println!("  supervisor: process {} at {}", status.supervisor.pid, status.supervisor.address);
    match status.checkpoint {
        Some(step) => println!("  checkpoint: step {step}"),
        None => println!("  checkpoint: none yet"),
    }
    for node in &status.nodes {
        let lanes: Vec<String> = node.lanes.iter().map(ToString::to_string).collect();
        println!(
            "  {}: {} on {}, process {}, capacity {:.2}, {} shards, lanes {}",
            node.name,
            node.state,
            node.device,
            node.pid,
            node.capacity,
            node.shards,
            if lanes.is_empty() { "none".into() } else { lanes.join(" ") }
        );
    }
}
