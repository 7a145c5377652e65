//! `volary node`: joins a run and does its share of it.

use crate::http;
use crate::rundir::{self, Role};
use crate::units::Size;
use anyhow::{Context, bail};
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use volary_core::compute::ComputeError;
use volary_model::{Glam, device};
use volary_node::{NetworkFault, NodeEnd, NodeOptions};
use volary_protocol::RunInfo;
use volary_telemetry::metrics::NodeMetrics;
use volary_transport::{Interference, Network};

/// Orders and signals that wait to be looked at.
const ORDERS_AHEAD: usize = 16;

/// Join a run as a node.
#[derive(clap::Args)]
#[command(after_help = "\
On the supervisor's machine the token is found by itself; elsewhere copy RUN_DIR/identity/node.token.

Examples:
  volary node --join 127.0.0.1:7100
  volary node --join 10.0.0.5:7100 --token-file node.token --device cuda:0 --listen 10.0.0.7:0")]
pub struct Args {
    /// The supervisor's address.
    #[arg(long, value_name = "ADDR")]
    join: String,
    /// auto, cpu or cuda:N.
    #[arg(long, default_value = "auto")]
    device: String,
    /// Threads that compute; all cores when left out, one on a GPU.
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// The node's name; the supervisor gives one when left out.
    #[arg(long)]
    name: Option<String>,
    /// Memory that the run may use, as 8GiB; nine tenths of what the GPU, or the machine and its control group, have free when left
    /// out.
    #[arg(long, value_name = "SIZE")]
    memory: Option<Size>,
    /// What fails together with this node: a rack, a data centre, a spot pool. Replicas keep to different zones.
    #[arg(long, default_value = "", env = "VOLARY_ZONE", value_parser = zone)]
    zone: String,
    /// Where peers reach this node; the address that the supervisor is reached from, and any port, when left out.
    #[arg(long, value_name = "ADDR")]
    listen: Option<String>,
    /// A file with a node's token (or VOLARY_TOKEN).
    #[arg(long)]
    token_file: Option<PathBuf>,
    /// Where this node's figures are served; this machine only, any port, when left out.
    #[arg(long, value_name = "ADDR")]
    http: Option<String>,
    /// Serve no figures.
    #[arg(long, conflicts_with = "http")]
    no_http: bool,
    /// End when standard input does: for a parent that starts nodes.
    #[arg(long, hide = true)]
    tethered: bool,
    /// Take orders on standard input that disturb the network: for tests of faults.
    #[arg(long, hide = true, requires = "tethered")]
    disturbed: bool,
}

/// A zone's name; empty is none.
fn zone(text: &str) -> Result<String, String> {
    let most = volary_core::profile::ZONE_MAX;
    if text.len() > most {
        return Err(format!("expected at most {most} bytes"));
    }
    if text.contains(char::is_control) {
        return Err("expected no control characters".into());
    }
    Ok(text.to_owned())
}

/// Runs the command.
///
/// # Errors
/// When the device is not there, the supervisor refuses, or the run is lost.
pub fn run(args: Args) -> anyhow::Result<()> {
    let (orders, faults) = mpsc::channel(ORDERS_AHEAD);
    if args.tethered {
        crate::local::end_with_parent(move |line| take_order(line, &orders));
    }
    let device = device::parse(&args.device)?;
    let token = rundir::read_token(args.token_file.as_deref())?;
    let target = rundir::target(None, Some(&args.join), token.as_deref(), Role::Node)?;
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = match (args.threads, device.is_cuda()) {
        (Some(threads), _) => usize::from(threads),
        (None, true) => 1,
        (None, false) => cores,
    };
    let metrics = Arc::new(NodeMetrics::default());
    let http = args.http.as_deref().map(rundir::resolve).transpose()?;
    let door = if args.no_http { None } else { Some(http::listen(http, 0)?) };
    let http = door.as_ref().map(|door| door.address);
    if let Some(door) = door {
        door.serve(http::node_routes(Arc::clone(&metrics)))?;
    }
    let interference = args.disturbed.then(Interference::default);
    let network = match &interference {
        Some(interference) => Network::quic_with_interference(interference.clone()),
        None => Network::quic(),
    };
    let options = NodeOptions {
        network,
        metrics,
        http,
        supervisor: target.address,
        supervisor_host: Some(args.join),
        token: target.token,
        name: args.name,
        listen: args.listen.as_deref().map(rundir::resolve).transpose()?,
        device: device::name(device),
        threads,
        memory_bytes: match args.memory {
            Some(memory) => memory.0,
            None => memory_bytes(device)?,
        },
        zone: args.zone,
        prepare_thread: device::single_thread,
        faults: interference.map(|interference| (interference, faults)),
    };
    let make = move |run: &RunInfo| {
        Glam::new(&run.architecture, &run.training, run.seed, device).map_err(ComputeError::from)
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let end = runtime.block_on(async {
        let leave = ask_to_leave()?;
        anyhow::Ok(volary_node::run_node(options, make, leave).await?)
    })?;
    match end {
        NodeEnd::Left(reason) => {
            tracing::info!(reason, "left");
            Ok(())
        }
        NodeEnd::SupervisorLost(reason) => bail!("supervisor lost: {reason}"),
    }
}

/// SIGTERM and SIGINT ask to leave: the first after everything is handed over, the second at once.
fn ask_to_leave() -> std::io::Result<mpsc::Receiver<()>> {
    let (asked, leave) = mpsc::channel(ORDERS_AHEAD);
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    tokio::spawn(async move {
        loop {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            if asked.send(()).await.is_err() {
                return;
            }
        }
    });
    Ok(leave)
}

/// A line of standard input; one that is no order is only logged, since nothing depends on it.
fn take_order(line: &str, orders: &mpsc::Sender<NetworkFault>) {
    match line.parse::<NetworkFault>() {
        Ok(order) => {
            if let Err(error) = orders.try_send(order) {
                tracing::warn!(%error, "this node does not disturb its network");
            }
        }
        Err(error) => tracing::warn!(%error, "a line on standard input is no network fault"),
    }
}

/// Of the memory that is found, so much is left to the process itself and to what the plan does not count.
const SPARE_MEMORY: f64 = 0.1;

/// Memory that this node may use: its GPU's, or what the machine has available and its control group allows.
fn memory_bytes(device: device::Device) -> anyhow::Result<u64> {
    let found = match device {
        device::Device::Cuda(index) => {
            gpu_memory_bytes(index).context("the GPU's memory is not known: give --memory")?
        }
        _ => host_memory_bytes(),
    };
    Ok((found as f64 * (1.0 - SPARE_MEMORY)) as u64)
}

/// What a GPU has free, as its driver's own tool says.
fn gpu_memory_bytes(index: usize) -> anyhow::Result<u64> {
    let query = ["--query-gpu=memory.free", "--format=csv,noheader,nounits", "--id"];
    let output = Command::new("nvidia-smi").args(query).arg(index.to_string()).output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let mib: u64 = text.trim().parse().with_context(|| format!("nvidia-smi said {text:?}"))?;
    Ok(mib << 20)
}

fn host_memory_bytes() -> u64 {
    let available = std::fs::read_to_string("/proc/meminfo").ok().and_then(|text| {
        let line = text.lines().find(|line| line.starts_with("MemAvailable:"))?.to_owned();
        line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kib| kib * 1024)
    });
    // Control groups of version 2, and of version 1.
    let limits = ["/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"];
    let limit = |path: &&str| std::fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    let limit = limits.iter().filter_map(limit).min();
    available.unwrap_or(u64::MAX).min(limit.unwrap_or(u64::MAX))
}
