//! `volary supervisor`: holds a run together; nodes join it from anywhere.

use crate::config::Config;
use crate::http;
use crate::rundir::{self, Contact};
use anyhow::{Context, bail};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};
use volary_data::Dataset;
use volary_protocol::RunInfo;
use volary_protocol::operator::{OperatorReply, OperatorRequest};
use volary_storage::{Digest, RunDir, RunLock};
use volary_supervisor::{RunEnd, Supervisor, SupervisorOptions};
use volary_telemetry::metrics::SupervisorMetrics;
use volary_transport::Network;

/// How long the last checkpoint of a supervisor that will be started again may take.
const LAST_CHECKPOINT_MAX: Duration = Duration::from_secs(240);

/// Run the supervisor of a run by hand.
#[derive(clap::Args)]
#[command(after_help = "\
Nodes join with the token in RUN_DIR/identity/node.token. Ctrl-C writes a checkpoint and ends the run. Started again on the same directory, it goes on from the
last checkpoint.

Examples:
  volary supervisor examples/quickstart.toml --listen 127.0.0.1:7100 --dir runs/by-hand
  volary supervisor runs/by-hand/config.toml --listen 10.0.0.5:7100 --dir runs/by-hand")]
pub struct Args {
    /// The configuration file.
    config: PathBuf,
    /// The address to listen on.
    #[arg(long, value_name = "ADDR")]
    listen: String,
    /// The run's directory; made when it is not there.
    #[arg(long)]
    dir: PathBuf,
    /// A TOML value for any key of the configuration.
    #[arg(long, value_name = "KEY.PATH=VALUE")]
    set: Vec<String>,
    /// Where the page and the figures are served; this machine only, port 7680 or another one, when left out.
    #[arg(long, value_name = "ADDR")]
    http: Option<String>,
    /// A folder with an authority and tokens that were made elsewhere (`volary identity create`).
    #[arg(long, value_name = "FOLDER")]
    identity: Option<PathBuf>,
    #[command(flatten)]
    guard: http::GuardArgs,
    /// Serve no page and no figures.
    #[arg(long, conflicts_with = "http")]
    no_http: bool,
    /// End when standard input does: for a parent that starts the supervisor.
    #[arg(long, hide = true)]
    tethered: bool,
    /// Be one that is started again when it ends, as under Kubernetes: SIGTERM writes a checkpoint and ends the process, not the run, and
    /// nodes wait for the next start; when the run is over, the page stays.
    #[arg(long)]
    stay: bool,
    /// No node of an earlier start lives any more: nobody's return is to be waited for.
    #[arg(long, hide = true)]
    pub nodes_are_gone: bool,
}

/// Runs the command.
///
/// # Errors
/// When the configuration, data or directory is bad, the directory is held, or the run fails.
pub fn run(args: Args) -> anyhow::Result<()> {
    if args.tethered {
        crate::local::end_with_parent(|_| {});
    }
    let config = Config::load(&args.config, &args.set)?;
    let listen = rundir::resolve(&args.listen)?;
    let http = args.http.as_deref().map(rundir::resolve).transpose()?;
    let door = if args.no_http { None } else { Some(http::listen(http, http::PAGE_PORT)?) };
    let door = door.map(|door| args.guard.check(&door).map(|()| door)).transpose()?;
    let dir = RunDir::create(&args.dir)?;
    let lock = RunLock::acquire(&dir, std::process::id(), &args.listen)?;
    same_run(&config, &dir)?;
    let text = toml::to_string(&config)?;
    if std::fs::read_to_string(dir.config()).ok().as_deref() != Some(&text) {
        std::fs::write(dir.config(), text).with_context(|| dir.config().display().to_string())?;
    }
    prepare_data(&config, &dir, &mut |_| {})?;
    let end = serve(&config, &dir, listen, door, &args);
    // Nobody may take the directory before the last word is written.
    let _ = std::fs::remove_file(dir.supervisor());
    drop(lock);
    match end? {
        None => {
            tracing::info!("the supervisor ends, and the run goes on when it is started again");
            Ok(())
        }
        Some(RunEnd::Done { step }) => {
            tracing::info!(%step, "the run has ended");
            Ok(())
        }
        Some(RunEnd::Fatal { reason }) => bail!("{reason}"),
    }
}

/// How this machine reaches what listens on all of its addresses.
fn from_here(address: SocketAddr) -> SocketAddr {
    let ip: IpAddr = match address.ip() {
        ip if !ip.is_unspecified() => ip,
        IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
    };
    SocketAddr::new(ip, address.port())
}

fn same_run(config: &Config, dir: &RunDir) -> anyhow::Result<()> {
    if !dir.config().exists() {
        return Ok(());
    }
    let before = Config::load(&dir.config(), &[])?;
    if before.identity() != config.identity() {
        bail!("{} holds another run: its seed, model, data or training differ", dir.root().display());
    }
    Ok(())
}

fn serve(
    config: &Config,
    dir: &RunDir,
    listen: SocketAddr,
    door: Option<http::Door>,
    args: &Args,
) -> anyhow::Result<Option<RunEnd>> {
    let training = &config.training;
    let dataset = Dataset::open(
        &dir.data(),
        training.sequence_length,
        training.sequences_per_lane,
        training.lanes,
        config.run.seed,
    )?;
    let run = RunInfo {
        run: config.run.name.clone(),
        seed: config.run.seed,
        architecture: config.model.clone(),
        node_timeout_ms: config.cluster.node_timeout_ms,
        measure: config.cluster.measure,
        supervisor_timeout_ms: config.cluster.supervisor_timeout_ms,
        training: training.clone(),
        telemetry: config.telemetry.clone(),
    };
    let metrics = Arc::new(SupervisorMetrics::new());
    let options = SupervisorOptions {
        network: Network::quic(),
        run,
        settings: config.settings(),
        dir: dir.clone(),
        config_hash: Digest::of(config.identity().as_bytes()),
        listen,
        metrics: Arc::clone(&metrics),
        nodes_are_gone: args.nodes_are_gone,
        identity: args.identity.clone(),
        certificate_lifetime: std::time::Duration::from_millis(config.cluster.certificate_lifetime_ms),
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let supervisor = Supervisor::start(options, dataset).await?;
        eprintln!("listening on {}", supervisor.address());
        let address = from_here(supervisor.address()).to_string();
        let http = door.as_ref().map(|door| from_here(door.address).to_string());
        if let Some(door) = door {
            eprintln!("page at {}", http::page_url(dir, &from_here(door.address).to_string()));
            door.serve(http::supervisor_routes(supervisor.handle(), dir.clone(), metrics, &args.guard))?;
        }
        rundir::write_contact(
            dir,
            &Contact { run: config.run.name.clone(), pid: std::process::id(), address, http },
        )?;
        let mut interrupts = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
        let mut interrupted = std::pin::pin!(async move {
            tokio::select! {
                _ = interrupts.0.recv() => {}
                _ = interrupts.1.recv() => {}
            }
        });
        if !args.stay {
            return Ok(Some(supervisor.ended(interrupted).await));
        }
        let handle = supervisor.handle();
        tokio::select! {
            end = supervisor.ended(std::future::pending()) => {
                if let RunEnd::Done { step } = &end {
                    tracing::info!(%step, "the run has ended; the dashboard stays until this process is told to end");
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
    })
}

/// Makes the run's tokens, or finds them made, and checks that its tokenizer fits its model.
pub(crate) fn prepare_data(
    config: &Config,
    dir: &RunDir,
    progress: &mut dyn FnMut(volary_data::Progress),
) -> anyhow::Result<()> {
    let length = config.training.sequence_length;
    volary_data::prepare(&config.data, length, &dir.data(), progress)?;
    let source = dir.data().join("tokenizer.json");
    if !dir.tokenizer().exists() {
        std::fs::copy(&source, dir.tokenizer()).with_context(|| source.display().to_string())?;
    }
    let tokenizer = volary_data::Tokenizer::load(&dir.tokenizer())?;
    if tokenizer.vocabulary() > config.model.vocabulary {
        bail!(
            "the tokenizer has {} tokens, and model.vocabulary = {}: expected at least as many",
            tokenizer.vocabulary(),
            config.model.vocabulary
        );
    }
    Ok(())
}
