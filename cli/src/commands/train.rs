//! `volary train`: a whole run on this machine, from the text to the sample.

use crate::commands::{generate, operate};
use crate::config::Config;
use crate::local::Process;
use crate::progress::{Display, Seen, Tail, validations};
use crate::rundir;
use anyhow::{Context, bail};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};
use volary_data::Stage;
use volary_storage::RunDir;

/// How often the run is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// How long the supervisor may take to listen.
const LISTEN_MAX: Duration = Duration::from_secs(60);

/// Train on this machine: a supervisor and N node processes.
#[derive(clap::Args)]
#[command(after_help = "\
Ctrl-C writes a checkpoint and ends the run; --resume goes on from the last checkpoint.

Examples:
  volary train examples/quickstart.toml --nodes 3
  volary train examples/quickstart.toml --set training.steps=100 --set run.seed=7
  volary train examples/quickstart.toml --dir runs/quickstart --resume")]
pub struct Args {
    /// The configuration file.
    config: PathBuf,
    /// Node processes; cluster.nodes of the configuration when left out.
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=256))]
    nodes: Option<u16>,
    /// Threads of each node; the machine's cores shared out when left out.
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// Device of each node: auto, cpu or cuda:N.
    #[arg(long, default_value = "cpu")]
    device: String,
    /// A TOML value for any key of the configuration.
    #[arg(long, value_name = "KEY.PATH=VALUE")]
    set: Vec<String>,
    /// The run's directory; runs/NAME when left out, with a number when that is taken.
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Go on from the last checkpoint of the directory.
    #[arg(long)]
    resume: bool,
    /// Refuse text that is not UTF-8 instead of replacing it.
    #[arg(long)]
    strict: bool,
    /// No progress bar and no summary.
    #[arg(long, short)]
    quiet: bool,
}

/// Runs the command.
///
/// # Errors
/// When the configuration, the data or the directory is bad, or the run fails.
pub fn run(args: Args) -> anyhow::Result<()> {
    let (config, dir) = prepare(&args)?;
    let display = Display::new(config.training.steps, args.quiet);
    // Here and not in the supervisor, where nobody would see how far it is.
    prepare_data(&config, &dir, &display)?;
    display.say(&format!("run {} in {}", config.run.name, dir.root().display()));
    let mut cluster = Cluster::start(&args, &config, &dir)?;
    let outcome = follow(&mut cluster, &dir, display);
    cluster.end();
    let (finished, display) = outcome?;
    display.finish();
    if !args.quiet {
        summary(&config, &dir, finished, display.last())?;
    }
    Ok(())
}

/// The configuration as this run uses it, and the directory that holds it from now on.
fn prepare(args: &Args) -> anyhow::Result<(Config, RunDir)> {
    let mut config = Config::load(&args.config, &args.set)?;
    config.cluster.nodes = args.nodes.map_or_else(|| config.cluster.nodes.max(1), usize::from);
    config.data.strict |= args.strict;
    let dir = match &args.dir {
        _ if args.resume => {
            let path = args.dir.clone().unwrap_or_else(|| PathBuf::from(rundir::RUNS).join(&config.run.name));
            let dir = RunDir::find(&path)?;
            if let Some(contact) = rundir::contact(&dir) {
                bail!("{} is held by a living supervisor, process {}", dir.root().display(), contact.pid);
            }
            dir
        }
        Some(path) if path.join("config.toml").exists() => {
            bail!(
                "{} holds a run already: add --resume to go on with it, or choose another --dir",
                path.display()
            );
        }
        Some(path) => RunDir::create(path)?,
        None => rundir::fresh(&config.run.name)?,
    };
    if args.resume {
        let before = Config::load(&dir.config(), &[])?;
        if before.identity() != config.identity() {
            bail!(
                "{} was another run: its seed, model, data or training differ from {}, so it would not go on as the same mathematics",
                dir.root().display(),
                args.config.display()
            );
        }
    }
    std::fs::write(dir.config(), toml::to_string(&config)?)
        .with_context(|| dir.config().display().to_string())?;
    Ok((config, dir))
}

fn prepare_data(config: &Config, dir: &RunDir, display: &Display) -> anyhow::Result<()> {
    let mut shown = None;
    let mut progress = |progress: volary_data::Progress| {
        let what = match progress.stage {
            Stage::Reading => "reading text",
            Stage::TrainingTokenizer => "training the tokenizer",
            Stage::Tokenizing => "tokenizing",
        };
        if shown != Some(what) {
            shown = Some(what);
            display.waiting(what);
        }
    };
    crate::commands::supervisor::prepare_data(config, dir, &mut progress)
}

/// The processes of the run.
struct Cluster {
    supervisor: Process,
    nodes: Vec<Process>,
}

impl Cluster {
    fn start(args: &Args, config: &Config, dir: &RunDir) -> anyhow::Result<Self> {
        let logs = dir.root().join("logs");
        std::fs::create_dir_all(&logs).with_context(|| logs.display().to_string())?;
        let path = |path: PathBuf| path.display().to_string();
        let list = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
        let mut words = list(&["-v", "supervisor"]);
        words.extend([path(dir.config())]);
        words.extend(list(&["--listen", "127.0.0.1:0", "--tethered", "--dir"]));
        words.push(path(dir.root().to_path_buf()));
        // A contact from before would be taken for the new one's.
        let _ = std::fs::remove_file(dir.supervisor());
        let mut supervisor = Process::start("supervisor", &logs, &words)?;
        let address = wait_for_address(&mut supervisor, dir)?;
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = args.threads.map_or_else(|| (cores / config.cluster.nodes).max(1), usize::from);
        let node = |number: usize| {
            let name = format!("node-{number}");
            let mut words = list(&["-v", "node", "--tethered", "--join", &address, "--name", &name]);
            words.extend(list(&[
                "--device",
                &args.device,
                "--threads",
                &threads.to_string(),
                "--token-file",
            ]));
            words.push(path(rundir::node_token(dir)));
            Process::start(&name, &logs, &words)
        };
        let nodes = (1..=config.cluster.nodes).map(node).collect::<anyhow::Result<_>>()?;
        Ok(Self { supervisor, nodes })
    }

    fn end(&mut self) {
        for process in std::iter::once(&mut self.supervisor).chain(&mut self.nodes) {
            process.wait_or_kill();
        }
    }
}

fn wait_for_address(supervisor: &mut Process, dir: &RunDir) -> anyhow::Result<String> {
    let start = Instant::now();
    while start.elapsed() < LISTEN_MAX {
        if let Some(contact) = rundir::contact(dir).filter(|contact| contact.pid == supervisor.pid()) {
            return Ok(contact.address);
        }
        if supervisor.ended().is_some() {
            bail!("{}", reason(supervisor));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    bail!(
        "the supervisor did not listen within {} s; its log is {}",
        LISTEN_MAX.as_secs(),
        supervisor.log.display()
    )
}

/// What a process said last, without the program's name in front.
fn reason(process: &Process) -> String {
    let words = process.last_words();
    words.strip_prefix("volary: ").unwrap_or(&words).to_owned()
}

/// Shows the run until its supervisor ends. Returns whether it reached its last step, or was interrupted.
fn follow(cluster: &mut Cluster, dir: &RunDir, mut display: Display) -> anyhow::Result<(bool, Display)> {
    let interrupts = count_interrupts()?;
    let mut metrics = Tail::new(dir.metrics());
    let mut asked = false;
    display.waiting("waiting for nodes");
    let mut dead = vec![false; cluster.nodes.len()];
    loop {
        let ended = cluster.supervisor.ended();
        for seen in metrics.lines().iter().filter_map(|line| serde_json::from_str::<Seen>(line).ok()) {
            display.step(seen);
        }
        if let Some(status) = ended {
            if !status.success() {
                display.finish();
                bail!("{}", reason(&cluster.supervisor));
            }
            return Ok((!asked, display));
        }
        match interrupts.load(Ordering::Relaxed) {
            0 => {}
            1 if !asked => {
                asked = true;
                display.say("interrupted: writing a checkpoint (Ctrl-C again ends at once)");
                let dir = dir.root().to_path_buf();
                // It waits for the checkpoint; the bar goes on meanwhile.
                std::thread::spawn(move || operate::stop_quietly(&dir));
            }
            1 => {}
            _ => bail!("interrupted twice: ended without a checkpoint"),
        }
        for (node, dead) in cluster.nodes.iter_mut().zip(&mut dead) {
            if !*dead && let Some(status) = node.ended() {
                *dead = true;
                if !status.success() {
                    display.say(&format!("{} ended ({status}): {}", node.name, reason(node)));
                }
            }
        }
        if dead.iter().all(|dead| *dead) && cluster.supervisor.ended().is_none() {
            std::thread::sleep(Duration::from_secs(1));
            if cluster.supervisor.ended().is_none() {
                bail!(
                    "all nodes are gone; the run can go on with --resume. The last words: {}",
                    reason(&cluster.nodes[0])
                );
            }
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

fn count_interrupts() -> anyhow::Result<Arc<AtomicU32>> {
    let count = Arc::new(AtomicU32::new(0));
    let counter = Arc::clone(&count);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (ready, listening) = std::sync::mpsc::channel();
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        runtime.block_on(async {
            use tokio::signal::unix::{SignalKind, signal};
            let (Ok(mut interrupt), Ok(mut terminate)) =
                (signal(SignalKind::interrupt()), signal(SignalKind::terminate()))
            else {
                return;
            };
            let _ = ready.send(());
            loop {
                tokio::select! {
                    _ = interrupt.recv() => {}
                    _ = terminate.recv() => {}
                }
                counter.fetch_add(1, Ordering::Relaxed);
            }
        });
    })?;
    listening.recv().context("signals cannot be caught")?;
    Ok(count)
}

/// What the run came to, a sample, and what to try next.
fn summary(config: &Config, dir: &RunDir, finished: bool, last: Option<Seen>) -> anyhow::Result<()> {
    let run = dir.root().display();
    match last {
        Some(seen) if finished => println!("done: step {}, loss {:.4}", seen.step, seen.loss),
        Some(seen) => println!("stopped: step {}, loss {:.4}", seen.step, seen.loss),
        None => println!("nothing was left to do"),
    }
    let measured = validations(&dir.validation());
    if let (Some(first), Some(last)) = (measured.first(), measured.last()) {
        println!(
            "validation loss {:.4} after step {}, {:.4} at the start (nats per token)",
            last.loss, last.step, first.loss
        );
    }
    let reader = volary_storage::CheckpointReader::open(dir)?;
    let Some(checkpoint) = reader.latest()? else { return Ok(()) };
    println!("checkpoint: step {} in {run}", checkpoint.step);
    let prompt = &config.run.sample_prompt;
    let text = generate::continue_prompt(dir.root(), None, prompt, 60, 0.7, config.run.seed, "cpu")?;
    println!("\na sample:\n  {}\n", format!("{prompt}{text}").trim_end().replace('\n', "\n  "));
    println!("try next:");
    println!("  volary generate --run {run} --prompt '{prompt}'");
    println!("  volary digest {run}");
    if !finished {
        println!("  volary train {run}/config.toml --dir {run} --resume");
    }
    Ok(())
}
