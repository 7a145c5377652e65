//! `volary supervisor`: coordinates a run; nodes join it from any machine.

use crate::config::Config;
use crate::http::{self, HttpListener};
use crate::limits::LAST_CHECKPOINT_MAX;
use crate::output;
use crate::process;
use crate::rundir::{self, Contact};
use anyhow::{Context, bail};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};
use volary_core::machine::Settings;
use volary_data::Dataset;
use volary_protocol::RunInfo;
use volary_protocol::operator::{OperatorReply, OperatorRequest};
use volary_storage::{Digest, RunDir, RunLock};
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
    if args.tethered {
        process::end_with_parent(|_| {});
    }
    let config = Config::load(&args.config, &args.set)?;
    let listen = rundir::resolve(&args.listen)?;
    let http = bind_http(&args)?;
    let dir = RunDir::create(&args.dir)?;
    let lock = RunLock::acquire(&dir, std::process::id(), &args.listen)?;
    check_same_run(&config, &dir)?;
    let text = toml::to_string(&config)?;
    if std::fs::read_to_string(dir.config()).ok().as_deref() != Some(&text) {
        volary_storage::write_file(&dir.config(), text.as_bytes())?;
    }
    let end = serve(&config, &dir, listen, http, &args);
    // No other process may take the directory before the last write.
    let _ = std::fs::remove_file(dir.supervisor());
    drop(lock);
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

fn check_same_run(config: &Config, dir: &RunDir) -> anyhow::Result<()> {
    if !dir.config().exists() {
        return Ok(());
    }
    let before = Config::load(&dir.config(), &[])?;
    if before.identity() != config.identity() {
        bail!("{} holds another run: its seed, model, data or training differ", dir.root().display());
    }
    Ok(())
}

/// Runs the supervisor until the run ends. Returns `None` when the run continues after a restart.
fn serve(
    config: &Config,
    dir: &RunDir,
    listen: SocketAddr,
    http: Option<HttpListener>,
    args: &Args,
) -> anyhow::Result<Option<RunEnd>> {
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
    runtime.block_on(async {
        // Nodes that hold the run's state are answered from the first moment, however long the rest takes.
        let door = Door::open(options)?;
        let (prepared, data) = (config.clone(), dir.clone());
        let dataset = tokio::task::spawn_blocking(move || open_dataset(&prepared, &data)).await??;
        let supervisor = door.start(dataset).await?;
        output::note(format_args!("listening on {}", supervisor.address()));
        let http_address = http.as_ref().map(|listener| reachable(listener.address).to_string());
        if let (Some(listener), Some(address)) = (http, &http_address) {
            output::note(format_args!("dashboard at {}", http::dashboard_url(dir, address)));
            listener.serve(http::supervisor_routes(
                supervisor.handle(),
                dir.clone(),
                metrics,
                &args.guard,
            ))?;
        }
        let contact = Contact {
            run: config.run.name.clone(),
            pid: std::process::id(),
            address: reachable(supervisor.address()).to_string(),
            http: http_address,
        };
        rundir::write_contact(dir, &contact)?;
        let interrupted = std::pin::pin!(interrupt()?);
        if args.stay {
            stay(supervisor, interrupted).await
        } else {
            Ok(Some(supervisor.ended(interrupted).await))
        }
    })
}

/// The run's tokens, prepared if they are not.
fn open_dataset(config: &Config, dir: &RunDir) -> anyhow::Result<Dataset> {
    prepare_data(config, dir, &mut |_| {})?;
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

/// Resolves at the first SIGINT or SIGTERM.
fn interrupt() -> std::io::Result<impl Future<Output = ()>> {
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    Ok(async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
    })
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

/// Prepares the run's tokens, unless they are prepared already, and checks that the tokenizer fits the model.
pub(crate) fn prepare_data(
    config: &Config,
    dir: &RunDir,
    progress: &mut dyn FnMut(volary_data::Progress),
) -> anyhow::Result<()> {
    let length = config.training.sequence_length;
    volary_data::prepare(&config.data, length, &dir.data(), progress)?;
    let source = dir.data().join("tokenizer.json");
    if !dir.tokenizer().exists() {
        let tokenizer = std::fs::read(&source).with_context(|| source.display().to_string())?;
        volary_storage::write_file(&dir.tokenizer(), &tokenizer)?;
    }
    let tokenizer = volary_data::Tokenizer::load(&dir.tokenizer())?;
    if tokenizer.vocabulary() > config.model.vocabulary {
        bail!(
            "model.vocabulary = {}: expected at least the {} tokens of the tokenizer",
            config.model.vocabulary,
            tokenizer.vocabulary()
        );
    }
    Ok(())
}
