//! `volary status`, `drain`, `checkpoint` and `stop`: query and control a running supervisor.

pub(crate) mod status;

use crate::limits::{DRAIN_POLL, LEAVE_POLL};
use crate::output;
use crate::rundir;
use crate::units::{self, counted};
use anyhow::Context;
use status::StatusText;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use volary_protocol::operator::{OperatorReply, OperatorRequest};
use volary_transport::AccessRole;

/// The supervisor that a command addresses.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  volary checkpoint                                   the only active run under runs/
  volary stop --dir runs/quickstart
  volary stop --supervisor 10.0.0.5:7100 --token-file operator.token")]
pub struct Args {
    /// The run's directory.
    #[arg(long)]
    dir: Option<PathBuf>,
    /// The supervisor's address.
    #[arg(long, value_name = "ADDR")]
    supervisor: Option<String>,
    /// A file with an operator's access token; by default RUN_DIR/identity/operator.token.
    #[arg(long)]
    token_file: Option<PathBuf>,
}

/// Show the status of a run.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  volary status
  volary status --dir runs/quickstart --json")]
pub struct StatusArgs {
    #[command(flatten)]
    supervisor: Args,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// The node to drain.
#[derive(clap::Args)]
#[command(after_help = "\
The node hands its shards and lanes over while training continues, then leaves; no step is lost. SIGTERM to \
the node's process does the same.

Examples:
  volary drain node-3
  volary drain node-3 --dir runs/quickstart
  volary drain --pid 4711 --wait 5m
  volary drain node-3 --supervisor 10.0.0.5:7100 --token-file operator.token")]
pub struct DrainArgs {
    /// The node's name, as `volary status` shows it.
    #[arg(conflicts_with = "pid")]
    node: Option<String>,
    /// The node's process on this machine, instead of its name; needs no access token.
    #[arg(long, value_parser = clap::value_parser!(i32).range(1..))]
    pid: Option<i32>,
    /// With --pid: the longest wait for the node to leave, e.g. 90s or 15m.
    #[arg(long, value_name = "TIME", default_value = "10m", value_parser = units::duration)]
    wait: Duration,
    #[command(flatten)]
    supervisor: Args,
}

impl Args {
    /// The supervisor's address and an operator's access token.
    ///
    /// # Errors
    /// As [`rundir::target`].
    pub(super) fn target(&self) -> anyhow::Result<rundir::Target> {
        let token = rundir::read_token(self.token_file.as_deref())?;
        let (dir, supervisor) = (self.dir.as_deref(), self.supervisor.as_deref());
        rundir::target(dir, supervisor, token.as_deref(), AccessRole::Operator)
    }
}

/// Sends a request to a supervisor and awaits the reply.
pub(super) fn ask(args: &Args, request: &OperatorRequest) -> anyhow::Result<OperatorReply> {
    let target = args.target()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    Ok(runtime.block_on(volary_protocol::operate(&target.addresses, &target.token, request))?)
}

/// The error of a reply other than the expected one.
pub(super) fn unexpected(reply: OperatorReply) -> anyhow::Result<()> {
    match reply {
        OperatorReply::Failed { reason } => anyhow::bail!("{reason}"),
        _ => anyhow::bail!("unexpected reply of the supervisor"),
    }
}

/// Sends a command, and prints a line that ends with the step at which it is done.
fn command(args: &Args, request: &OperatorRequest, done: &str) -> anyhow::Result<()> {
    match ask(args, request)? {
        OperatorReply::Done { step } => output::line(format_args!("{done} step {step}"))?,
        other => return unexpected(other),
    }
    Ok(())
}

/// Runs `volary checkpoint`.
///
/// # Errors
/// When there is no supervisor, or the checkpoint cannot be written.
pub fn checkpoint(args: Args) -> anyhow::Result<()> {
    command(&args, &OperatorRequest::Checkpoint, "durable checkpoint of")
}

/// Runs `volary stop`.
///
/// # Errors
/// When there is no supervisor, or its last checkpoint cannot be written.
pub fn stop(args: Args) -> anyhow::Result<()> {
    command(&args, &OperatorRequest::Stop, "stopped, durable at")
}

/// Asks the supervisor of a run directory to stop as soon as it listens. A failure shows in the supervisor's
/// end.
pub(crate) fn request_stop(dir: &Path) {
    rundir::wait_until_listening(dir);
    let args = Args { dir: Some(dir.to_path_buf()), supervisor: None, token_file: None };
    if let Err(error) = ask(&args, &OperatorRequest::Stop) {
        tracing::warn!(%error, "the supervisor did not confirm the stop");
    }
}

/// Runs `volary drain`: shows the progress until the node has left.
///
/// # Errors
/// When there is no supervisor or no such node, or the node dies before it has left.
pub fn drain(args: DrainArgs) -> anyhow::Result<()> {
    if let Some(pid) = args.pid {
        return drain_process(pid, args.wait);
    }
    let Some(name) = args.node else { anyhow::bail!("no node: give its name, or --pid of its process") };
    let target = args.supervisor.target()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let request = OperatorRequest::Drain { node: name.clone() };
    let reply = runtime.block_on(async {
        tokio::select! {
            reply = volary_protocol::operate(&target.addresses, &target.token, &request) => reply,
            () = show_progress(&target, &name) => unreachable!("the progress has no end"),
        }
    })?;
    match reply {
        OperatorReply::Done { step } => output::line(format_args!("{name} left after step {step}"))?,
        other => return unexpected(other),
    }
    Ok(())
}

/// Asks a node's process on this machine to leave, and waits until it has left.
fn drain_process(pid: i32, wait: Duration) -> anyhow::Result<()> {
    let process =
        rustix::process::Pid::from_raw(pid).with_context(|| format!("--pid {pid}: expected a process"))?;
    rustix::process::kill_process(process, rustix::process::Signal::TERM)
        .with_context(|| format!("process {pid}"))?;
    let start = Instant::now();
    while rundir::is_alive(pid.unsigned_abs()) {
        if start.elapsed() >= wait {
            anyhow::bail!("process {pid} did not leave within {wait:?}");
        }
        std::thread::sleep(LEAVE_POLL);
    }
    output::line(format_args!("process {pid} left"))?;
    Ok(())
}

/// Shows a line on standard error for each change of a node.
async fn show_progress(target: &rundir::Target, name: &str) {
    let mut last = String::new();
    loop {
        tokio::time::sleep(DRAIN_POLL).await;
        let reply =
            volary_protocol::operate(&target.addresses, &target.token, &OperatorRequest::Status).await;
        let Ok(OperatorReply::Status(status)) = reply else { continue };
        let Some(node) = status.nodes.iter().find(|node| node.name == name) else { continue };
        let shards = counted(node.shards as u64, "shard");
        let line = format!("{name}: {}, {shards}, {}", node.state, counted(node.lanes.len() as u64, "lane"));
        if line != last {
            output::note(format_args!("step {}: {line}", status.step));
            last = line;
        }
    }
}

/// Runs `volary status`.
///
/// # Errors
/// When there is no supervisor.
pub fn status(args: StatusArgs) -> anyhow::Result<()> {
    let status = match ask(&args.supervisor, &OperatorRequest::Status)? {
        OperatorReply::Status(status) => status,
        other => return unexpected(other),
    };
    if args.json {
        output::line(serde_json::to_string_pretty(&status::to_json(&status)?)?)?;
    } else {
        output::text(StatusText(&status))?;
    }
    Ok(())
}
