//! `volary supervisor`: coordinates a run; nodes join it from any machine.

use crate::alerts;
use crate::config::Config;
use crate::corpus_summary;
use crate::http::{self, HttpListener};
use crate::limits::LAST_CHECKPOINT_MAX;
use crate::output;
use crate::preparation::{self, ClaimedDir, PREPARING};
use crate::process;
use crate::registry;
use crate::rundir::{self, Contact};
use crate::signals::{Interrupted, Interrupts};
use anyhow::bail;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;
use volary_core::machine::Settings;
use volary_data::Dataset;
use volary_protocol::RunInfo;
use volary_protocol::operator::{OperatorReply, OperatorRequest};
use volary_storage::{Digest, RunDir};
use volary_supervisor::{Door, RunEnd, Supervisor, SupervisorOptions};
use volary_telemetry::metrics::SupervisorMetrics;
use volary_transport::Network;

/// Run the supervisor of a run.
#[derive(clap::Args)]
#[command(after_help = "\
Nodes join with the access token in RUN_DIR/identity/node.token. Ctrl-C writes a checkpoint and ends the run. \
A restart with the same directory continues from the last checkpoint.

Examples:
  volary supervisor examples/quickstart.toml --listen 127.0.0.1:7100 --dir runs/by-hand
  volary supervisor runs/by-hand/config.toml --listen 10.0.0.5:7100 --dir runs/by-hand")]
pub struct Args {
    /// The configuration file.
    config: PathBuf,
    /// The address to listen on.
    #[arg(long, value_name = "ADDR")]
    listen: String,
    /// The run's directory; created if it does not exist.
    #[arg(long)]
    dir: PathBuf,
    /// A TOML value for any key of the configuration.
    #[arg(long, value_name = "KEY.PATH=VALUE")]
    set: Vec<String>,
    /// The address of the dashboard and the metrics; by default localhost and port 7680, or a free one.
    #[arg(long, value_name = "ADDR")]
    http: Option<String>,
    /// A folder with an authority and access tokens (see `volary identity create`).
    #[arg(long, value_name = "FOLDER")]
    identity: Option<PathBuf>,
    #[command(flatten)]
    guard: http::GuardArgs,
    /// Serve no dashboard and no metrics.
    #[arg(long, conflicts_with = "http")]
    no_http: bool,
    /// End when standard input does: for a parent process that starts the supervisor.
    #[arg(long, hide = true)]
    tethered: bool,
    /// For process managers that restart the supervisor, such as Kubernetes: SIGTERM writes a checkpoint and
    /// ends the process, not the run, and nodes wait for the restart; when the run is over, the dashboard
    /// stays.
    #[arg(long)]
    stay: bool,
    /// If the directory holds no run: fetch the newest checkpoint from a checkpoint.store.
    #[arg(long, value_name = "ADDRESS")]
    from: Option<String>,
    /// Set a damaged checkpoint aside, and go back to the one before it.
    #[arg(long)]
    go_back: bool,
    /// No node of an earlier start is alive: wait for none to return.
    #[arg(long, hide = true)]
    nodes_are_gone: bool,
}

/// Runs the command.
///
/// # Errors
/// When the configuration, data or directory is invalid, the directory is in use, or the run fails.
pub fn run(args: Args) -> anyhow::Result<()> {
    let interrupts = Interrupts::listen()?;
    if args.tethered {
        process::end_with_parent(|_| {});
    }
    let config = Config::load(&args.config, &args.set)?;
    let listen = rundir::resolve(&args.listen)?;
    let http = bind_http(&args)?;
    let mut claimed = ClaimedDir::take(&args.dir, &args.listen)?;
    if let Some(address) = args.from.as_deref().filter(|_| !claimed.holds_run) {
        claimed.restore(address, &config)?;
    }
    claimed.configure(&config)?;
    let end = serve(&config, &mut claimed, (listen, http), &args, &interrupts);
    // No other process may take the directory before the last write.
    let _ = std::fs::remove_file(claimed.dir.supervisor());
    registry::remove();
    drop(claimed);
    match end? {
        None => {
            tracing::info!("the supervisor ends; the run continues when it restarts");
            Ok(())
        }
        Some(RunEnd::Done { step }) => {
            tracing::info!(%step, "the run has ended");
            Ok(())
        }
        Some(RunEnd::Halted { reason, may_pass: true }) => Err(process::Halted(reason).into()),
        Some(RunEnd::Halted { reason, .. } | RunEnd::Fatal { reason }) => bail!("{reason}"),
    }
}

fn bind_http(args: &Args) -> anyhow::Result<Option<HttpListener>> {
    let address = args.http.as_deref().map(rundir::resolve).transpose()?;
    if args.no_http {
        return Ok(None);
    }
    let listener = HttpListener::bind(address, http::DASHBOARD_PORT)?;
    args.guard.check(&listener)?;
    Ok(Some(listener))
}

/// The address at which this machine reaches a listener, which may listen on all addresses.
fn reachable(address: SocketAddr) -> SocketAddr {
    let ip: IpAddr = match address.ip() {
        ip if !ip.is_unspecified() => ip,
        IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
    };
    SocketAddr::new(ip, address.port())
}

/// Runs the supervisor until the run ends. Returns `None` when the run continues after a restart.
fn serve(
    config: &Config,
    claimed: &mut ClaimedDir,
    (listen, http): (SocketAddr, Option<HttpListener>),
    args: &Args,
    interrupts: &Interrupts,
) -> anyhow::Result<Option<RunEnd>> {
    let dir = &claimed.dir.clone();
    let metrics = Arc::new(SupervisorMetrics::new());
    let options = SupervisorOptions {
        network: Network::quic(),
        run: run_info(config),
        settings: Settings { stay: args.stay, ..config.settings() },
        dir: dir.clone(),
        config_hash: Digest::of(config.identity().as_bytes()),
        listen,
        metrics: Arc::clone(&metrics),
        nodes_are_gone: args.nodes_are_gone,
        may_go_back: args.go_back,
        identity: args.identity.clone(),
        certificate_lifetime: Duration::from_millis(config.cluster.certificate_lifetime_ms),
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let end = runtime.block_on(async {
        let http_address = http.as_ref().map(|listener| reachable(listener.address).to_string());
        // Probes are answered from the first moment too.
        let http = http.map(HttpListener::serve_probes).transpose()?;
        // Nodes that hold the run's state are answered from the first moment, however long the rest takes.
        let door = Door::open(options)?;
        let (prepared, data) = (config.clone(), dir.clone());
        let dataset = tokio::task::spawn_blocking(move || open_dataset(&prepared, &data));
        let dataset = tokio::select! {
            dataset = dataset => dataset??,
            () = interrupts.first() => return Err(Interrupted(PREPARING).into()),
        };
        let supervisor = door.start(dataset).await?;
        if args.tethered {
            tokio::spawn(alerts::write(supervisor.handle().events().subscribe()));
        }
        claimed.keep();
        output::note(format_args!("listening on {}", supervisor.address()));
        if let (Some(http), Some(address)) = (http, &http_address) {
            output::note(format_args!("dashboard at {}", http::dashboard_url(dir, address)));
            http.open(http::supervisor_routes(supervisor.handle(), dir.clone(), metrics, &args.guard));
        }
        let contact = Contact {
            run: config.run.name.clone(),
            pid: std::process::id(),
            address: reachable(supervisor.address()).to_string(),
            http: http_address,
        };
        rundir::write_contact(dir, &contact)?;
        let interrupted = std::pin::pin!(interrupts.first());
        if args.stay {
            stay(supervisor, interrupted).await
        } else {
            Ok(Some(supervisor.ended(interrupted).await))
        }
    });
    if end.as_ref().is_err_and(|error| error.is::<Interrupted>()) {
        // The preparation goes on, on a thread that ends with the process.
        runtime.shutdown_background();
        volary_data::remove_partial_folders();
    }
    end
}

/// The run's tokens, prepared if they are not.
fn open_dataset(config: &Config, dir: &RunDir) -> anyhow::Result<Dataset> {
    let prepared = preparation::prepare_data(config, dir, &mut |_| {})?;
    if !prepared.resumed {
        corpus_summary::lines(&prepared.manifest).iter().for_each(output::note);
    }
    let training = &config.training;
    let (length, sequences) = (training.sequence_length, training.sequences_per_lane);
    Ok(Dataset::open(&dir.data(), length, sequences, training.lanes, config.run.seed)?)
}

/// The part of the configuration that nodes need.
fn run_info(config: &Config) -> RunInfo {
    RunInfo {
        run: config.run.name.clone(),
        seed: config.run.seed,
        architecture: config.model.clone(),
        node_timeout_ms: config.cluster.node_timeout_ms,
        measure: config.cluster.measure,
        supervisor_timeout_ms: config.cluster.supervisor_timeout_ms,
        training: config.training.clone(),
        telemetry: config.telemetry.clone(),
    }
}

/// With `--stay`: an interrupt ends the process with a checkpoint, and the run continues when it restarts.
/// When the run is over, the dashboard stays until an interrupt.
async fn stay(
    supervisor: Supervisor,
    mut interrupted: Pin<&mut impl Future<Output = ()>>,
) -> anyhow::Result<Option<RunEnd>> {
    let handle = supervisor.handle();
    tokio::select! {
        end = supervisor.ended(std::future::pending()) => {
            if let RunEnd::Done { step } = &end {
                tracing::info!(%step, "the run has ended; the dashboard stays until this process is interrupted");
                interrupted.await;
            }
            Ok(Some(end))
        }
        () = &mut interrupted => {
            let checkpoint = handle.ask(OperatorRequest::Checkpoint);
            match tokio::time::timeout(LAST_CHECKPOINT_MAX, checkpoint).await {
                Ok(OperatorReply::Failed { reason }) => tracing::warn!(reason, "no last checkpoint"),
                Ok(_) => {}
                Err(_) => tracing::warn!("the last checkpoint was not durable within {LAST_CHECKPOINT_MAX:?}"),
            }
            Ok(None)
        }
    }
}
