//! `volary node`: joins a run as a node.

use crate::arguments::InvalidArgument;
use crate::http::{self, HttpListener};
use crate::limits::COMMANDS_AHEAD;
use crate::memory;
use crate::process;
use crate::rundir;
use crate::signals::Interrupts;
use crate::units::Size;
use anyhow::bail;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use tokio::sync::mpsc;
use volary_core::compute::ComputeError;
use volary_core::profile::ZONE_MAX;
use volary_model::Glam;
use volary_model::device::{self, Device};
use volary_node::{Fault, NodeEnd, NodeOptions};
use volary_protocol::RunInfo;
use volary_telemetry::metrics::NodeMetrics;
use volary_transport::{AccessRole, Interference, Network};

/// Join a run as a node.
#[derive(clap::Args)]
#[command(after_help = "\
On the supervisor's machine the access token is found automatically; elsewhere copy \
RUN_DIR/identity/node.token.

Examples:
  volary node --join 127.0.0.1:7100
  volary node --join 10.0.0.5:7100 --token-file node.token --device cuda:0 --listen 10.0.0.7:0")]
pub struct Args {
    /// The supervisor's address.
    #[arg(long, value_name = "ADDR")]
    join: String,
    /// Device: auto, cpu or cuda:N.
    #[arg(long, default_value = "auto")]
    device: String,
    /// Compute threads; by default all cores, one on a GPU.
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// The node's name; by default the supervisor assigns one.
    #[arg(long)]
    name: Option<String>,
    /// Memory limit, e.g. 8GiB; by default nine tenths of the free memory of the GPU, or of the machine
    /// and its control group.
    #[arg(long, value_name = "SIZE")]
    memory: Option<Size>,
    /// Failure domain of this node: a rack, a data center, a spot pool. Replicas are spread over zones.
    #[arg(long, default_value = "", env = "VOLARY_ZONE", value_parser = zone)]
    zone: String,
    /// The address for peers; by default the local address that reaches the supervisor, and any free
    /// port.
    #[arg(long, value_name = "ADDR")]
    listen: Option<String>,
    /// The address that peers are told, where it differs from --listen: behind a port mapping, for example.
    /// Port 0 is the port on which the node listens.
    #[arg(long, value_name = "ADDR")]
    advertise: Option<String>,
    /// A file with a node's access token (or VOLARY_TOKEN).
    #[arg(long)]
    token_file: Option<PathBuf>,
    /// The address of this node's metrics; by default localhost and any free port.
    #[arg(long, value_name = "ADDR")]
    http: Option<String>,
    /// Serve no metrics.
    #[arg(long, conflicts_with = "http")]
    no_http: bool,
    /// End when standard input does: for a parent process that starts nodes.
    #[arg(long, hide = true)]
    tethered: bool,
    /// Read faults from standard input and inject them: for tests and scripts.
    #[arg(long, hide = true, requires = "tethered")]
    inject_faults: bool,
}

/// A zone's name; empty is no zone.
fn zone(text: &str) -> Result<String, InvalidArgument> {
    if text.len() > ZONE_MAX {
        return Err(InvalidArgument::new(format!("at most {ZONE_MAX} bytes")));
    }
    if text.contains(char::is_control) {
        return Err(InvalidArgument::new("no control characters"));
    }
    Ok(text.to_owned())
}

/// Runs the command.
///
/// # Errors
/// When the device is missing, the supervisor refuses the node, or the run is lost.
pub fn run(args: Args) -> anyhow::Result<()> {
    // Signals make the node leave: the first one after it has handed everything over, the second
    // one at once.
    let (requests, leave) = mpsc::channel(COMMANDS_AHEAD);
    Interrupts::forward(requests)?;
    let (commands, faults) = mpsc::channel(COMMANDS_AHEAD);
    if args.tethered {
        process::end_with_parent(move |line| queue_fault(line, &commands));
    }
    let device = device::parse(&args.device)?;
    let metrics = Arc::new(NodeMetrics::default());
    let interference = args.inject_faults.then(Interference::default);
    let network = match &interference {
        Some(interference) => Network::quic_with_interference(interference.clone()),
        None => Network::quic(),
    };
    let token = rundir::read_token(args.token_file.as_deref())?;
    let target = rundir::target(None, Some(&args.join), token.as_deref(), AccessRole::Node)?;
    let options = NodeOptions {
        network,
        http: serve_metrics(&args, &metrics)?,
        metrics,
        supervisor: target.addresses,
        supervisor_host: Some(args.join),
        token: target.token,
        name: args.name,
        listen: args.listen.as_deref().map(rundir::resolve).transpose()?,
        advertise: args.advertise.as_deref().map(rundir::resolve).transpose()?,
        device: device::name(device),
        threads: threads(args.threads, device),
        memory_bytes: match args.memory {
            Some(memory) => memory.0,
            None => memory::usable_bytes(device)?,
        },
        zone: args.zone,
        prepare_thread: device::single_thread,
        faults: interference.map(|interference| (interference, faults)),
    };
    let make_model = move |run: &RunInfo| {
        Glam::new(&run.architecture, &run.training, run.seed, device).map_err(ComputeError::from)
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let end = runtime.block_on(volary_node::run_node(options, make_model, leave))?;
    match end {
        NodeEnd::Left(reason) => {
            tracing::info!(reason, "left");
            Ok(())
        }
        NodeEnd::SupervisorLost(reason) => bail!("supervisor lost: {reason}"),
        NodeEnd::Unreachable { address, reason } => bail!(
            "the supervisor cannot reach this node at {address} ({reason}): open that UDP port, or name another \
             address with --listen or --advertise"
        ),
    }
}

/// Serves the node's metrics, and returns their address.
fn serve_metrics(args: &Args, metrics: &Arc<NodeMetrics>) -> anyhow::Result<Option<SocketAddr>> {
    if args.no_http {
        return Ok(None);
    }
    let address = args.http.as_deref().map(rundir::resolve).transpose()?;
    let listener = HttpListener::bind(address, 0)?;
    let address = listener.address;
    listener.serve(http::node_routes(Arc::clone(metrics)))?;
    Ok(Some(address))
}

fn threads(threads: Option<u16>, device: Device) -> usize {
    match threads {
        Some(threads) => usize::from(threads),
        None if device.is_cuda() => 1,
        None => std::thread::available_parallelism().map_or(1, usize::from),
    }
}

/// Queues the fault on a line of standard input. An invalid line is only logged, since nothing
/// depends on it.
fn queue_fault(line: &str, commands: &mpsc::Sender<Fault>) {
    match line.parse::<Fault>() {
        Ok(fault) => {
            if let Err(error) = commands.try_send(fault) {
                tracing::warn!(%error, "fault dropped");
            }
        }
        Err(error) => tracing::warn!(%error, "invalid fault on standard input"),
    }
}
