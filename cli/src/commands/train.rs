//! `volary train`: a whole run on this machine, from the text to the sample.

use crate::cluster::{Cluster, ClusterOptions};
use crate::commands::generate;
use crate::config::Config;
use crate::follow::follow;
use crate::progress::{Display, Seen, validations};
use crate::rundir;
use crate::script::Script;
use crate::units::Size;
use anyhow::{Context, bail};
use std::path::PathBuf;
use volary_data::Stage;
use volary_storage::RunDir;

/// Train on this machine: a supervisor and N node processes.
#[derive(clap::Args)]
#[command(after_help = "\
Ctrl-C writes a checkpoint and ends the run; --resume goes on from the last checkpoint. A supervisor that dies is started
again; a node that dies only with --respawn. With --resume, events of steps that are done already happen at the start.

Examples:
  volary train examples/quickstart.toml --nodes 3
  volary train examples/quickstart.toml --set training.steps=100 --set run.seed=7
  volary train examples/quickstart.toml --dir runs/quickstart --resume
  volary train examples/quickstart.toml --nodes 3 --events examples/events.toml --respawn")]
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
    /// Memory that each node may use, as 8GiB; several for several nodes, by turns.
    #[arg(long, value_name = "SIZE", value_delimiter = ',')]
    memory: Vec<Size>,
    /// Zone of each node, by turns: replicas keep to different ones.
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    zones: Vec<String>,
    /// A TOML value for any key of the configuration.
    #[arg(long, value_name = "KEY.PATH=VALUE")]
    set: Vec<String>,
    /// The run's directory; runs/NAME when left out, with a number when that is taken.
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Go on from the last checkpoint of the directory.
    #[arg(long)]
    resume: bool,
    /// A script of what happens to the run: nodes that die, stop, leave or join at chosen steps (examples/events.toml).
    #[arg(long, value_name = "FILE")]
    events: Option<PathBuf>,
    /// Start a node that ends unexpectedly again, under its name.
    #[arg(long)]
    respawn: bool,
    /// Where the run's page is served; this machine only, port 7680 or another one, when left out.
    #[arg(long, value_name = "ADDR")]
    http: Option<String>,
    /// Serve no page and no figures.
    #[arg(long, conflicts_with = "http")]
    no_http: bool,
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
    let (config, dir, script) = prepare(&args)?;
    let display = Display::new(config.training.steps, args.quiet);
    // Here and not in the supervisor, where nobody would see how far it is.
    prepare_data(&config, &dir, &display)?;
    display.say(&format!("run {} in {}", config.run.name, dir.root().display()));
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let options = ClusterOptions {
        nodes: config.cluster.nodes,
        device: args.device.clone(),
        threads: args.threads.map_or_else(|| (cores / config.cluster.nodes).max(1), usize::from),
        memory: args.memory.clone(),
        zones: args.zones.clone(),
        respawn: args.respawn,
        http: args.http.clone(),
        serves_http: !args.no_http,
        disturbed: script.disturbs(),
        // Nodes end with the train that started them.
        nodes_are_gone: args.resume,
    };
    let mut cluster = Cluster::start(options, &dir)?;
    if let Some(page) = cluster.page() {
        display.say(&format!("page at {}", crate::http::page_url(&dir, page)));
    }
    let (finished, last) = follow(&mut cluster, &dir, display, script)?;
    cluster.end();
    if !args.quiet {
        summary(&config, &dir, finished, last)?;
    }
    Ok(())
}

/// The configuration as this run uses it, the directory that holds it from now on, and what is to happen to it.
fn prepare(args: &Args) -> anyhow::Result<(Config, RunDir, Script)> {
    let mut config = Config::load(&args.config, &args.set)?;
    // The supervisor takes it; what is wrong with it is said before anything starts.
    args.http.as_deref().map(rundir::resolve).transpose()?;
    config.cluster.nodes = args.nodes.map_or_else(|| config.cluster.nodes.max(1), usize::from);
    config.data.strict |= args.strict;
    let script = args.events.as_deref().map(|path| Script::load(path, config.cluster.nodes)).transpose()?;
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
    Ok((config, dir, script.unwrap_or_default()))
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
