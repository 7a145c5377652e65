//! `volary train`: a complete run on this machine, from the text to a sample.

use crate::cluster::{Cluster, LaunchOptions, Starting};
use crate::config::Config;
use crate::corpus_summary;
use crate::follow::{RunOutcome, follow};
use crate::limits::SPOT_REPLAY_MAX;
use crate::output;
use crate::preparation::{self, ClaimedDir, PREPARING};
use crate::progress::{ProgressDisplay, Validation, validations};
use crate::rundir;
use crate::script::Script;
use crate::signals::Interrupts;
use crate::spot::{Replay, SpotOptions, Trace, Unit};
use crate::trained::Trained;
use crate::units::Size;
use anyhow::{Context, bail};
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;
use volary_core::{Lane, Step};
use volary_data::Prepared;
use volary_model::sampling::Sampling;
use volary_storage::RunDir;

/// The length of the sample's prompt where the configuration has none, in characters.
const PROMPT_CHARS: usize = 40;
/// The length of the sample, in tokens.
const SAMPLE_TOKENS: usize = 60;

/// What others are told of a directory that is locked before its supervisor listens.
const ADDRESS: &str = "no address yet";

/// Train on this machine: a supervisor and N node processes.
#[derive(clap::Args)]
#[command(after_help = "\
Ctrl-C writes a checkpoint and ends the run; --resume continues from the last checkpoint. A supervisor that \
dies restarts; a node that dies restarts only with --respawn. With --resume, events of completed steps happen \
at the start.

Examples:
  volary train examples/quickstart.toml --nodes 3
  volary train examples/quickstart.toml --set training.steps=100 --set run.seed=7
  volary train examples/quickstart.toml --dir runs/quickstart --resume
  volary train examples/quickstart.toml --nodes 3 --events examples/events.toml --respawn")]
pub struct Args {
    /// The configuration file.
    config: PathBuf,
    /// Number of node processes; by default cluster.nodes of the configuration.
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=256))]
    nodes: Option<u16>,
    /// Threads per node; by default the machine's cores divided by the nodes, and one on a GPU.
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// Device of each node: auto, cpu or cuda:N; a list is assigned round-robin.
    #[arg(long, value_delimiter = ',', default_value = "cpu")]
    device: Vec<String>,
    /// Memory limit per node, e.g. 8GiB; a list is assigned round-robin.
    #[arg(long, value_name = "SIZE", value_delimiter = ',')]
    memory: Vec<Size>,
    /// Zones of the nodes, assigned round-robin; replicas are spread over zones.
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    zones: Vec<String>,
    /// A TOML value for any key of the configuration.
    #[arg(long, value_name = "KEY.PATH=VALUE")]
    set: Vec<String>,
    /// The run's directory; by default runs/NAME, or runs/NAME-2 and so on if that exists.
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Continue from the last checkpoint of the directory.
    #[arg(long)]
    resume: bool,
    /// With --resume: fetch the newest checkpoint from a checkpoint.store into a new directory.
    #[arg(long, value_name = "ADDRESS", requires = "resume")]
    from: Option<String>,
    /// With --resume: set a damaged checkpoint aside, and go back to the one before it.
    #[arg(long, requires = "resume")]
    go_back: bool,
    /// A script of faults and membership changes at chosen steps (examples/events.toml).
    #[arg(long, value_name = "FILE")]
    events: Option<PathBuf>,
    /// Play a recorded trace of spot instances, `time,instances` lines: nodes come and go as they did, scaled
    /// to at most --nodes; the goodput is reported.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["events", "respawn", "resume"])]
    spot_trace: Option<PathBuf>,
    /// The unit of the trace's times.
    #[arg(long, value_enum, default_value_t, requires = "spot_trace")]
    spot_unit: Unit,
    /// How many times as fast the trace is played.
    #[arg(long, value_name = "N", default_value_t = 1.0, requires = "spot_trace")]
    speedup: f64,
    /// The notice that a node gets before its instance ends, in seconds of this machine; without it nodes are
    /// killed.
    #[arg(long, value_name = "SECONDS", requires = "spot_trace")]
    notice: Option<f64>,
    /// Restart a node that ends unexpectedly, under its name.
    #[arg(long)]
    respawn: bool,
    /// The address of the dashboard; by default localhost and port 7680, or a free one.
    #[arg(long, value_name = "ADDR")]
    http: Option<String>,
    /// Serve no dashboard and no metrics.
    #[arg(long, conflicts_with = "http")]
    no_http: bool,
    /// Refuse text that is not UTF-8 and records that cannot be read, instead of replacing and skipping them.
    #[arg(long)]
    strict: bool,
    /// Show no progress and no summary.
    #[arg(long, short)]
    quiet: bool,
}

/// Runs the command.
///
/// # Errors
/// When the configuration, the data or the directory is invalid, or the run fails.
pub fn run(args: Args) -> anyhow::Result<()> {
    let interrupts = Interrupts::listen()?;
    let (config, claimed, script, spot) = prepare(&args)?;
    let display = ProgressDisplay::new(config.training.steps, args.quiet);
    let prepared = prepare_data(&config, &claimed.dir, &display, &interrupts);
    let prepared = prepared.inspect_err(|_| display.finish())?;
    let dir = claimed.release();
    if !prepared.resumed {
        corpus_summary::lines(&prepared.manifest).iter().for_each(|line| display.note(line));
    }
    display.note(&corpus_summary::epochs(&prepared.manifest, &config));
    display.note(&format!("run {} in {}", config.run.name, dir.root().display()));
    let options = LaunchOptions {
        nodes: config.cluster.nodes,
        devices: args.device.clone(),
        threads: args.threads.map(usize::from),
        memory: args.memory.clone(),
        zones: args.zones.clone(),
        respawn: args.respawn,
        http: args.http.clone(),
        serves_http: !args.no_http,
        injects_faults: script.has_faults_inside(),
        // Nodes end with the process that started them.
        starting: Starting { nodes_are_gone: args.resume, may_go_back: args.go_back },
    };
    let mut cluster = Cluster::start(options, &dir, &interrupts)?;
    if let Some(address) = cluster.dashboard() {
        display.note(&format!("dashboard at {}", crate::http::dashboard_url(&dir, address)));
    }
    let outcome = follow(&mut cluster, &dir, display, (script, spot), &interrupts)?;
    cluster.end();
    if !args.quiet {
        print_summary(&config, &dir, &outcome)?;
    }
    Ok(())
}

/// The configuration of this run, its directory, into which the configuration is written, its script and its
/// spot market.
fn prepare(args: &Args) -> anyhow::Result<(Config, ClaimedDir, Script, Option<Replay>)> {
    let mut config = Config::load(&args.config, &args.set)?;
    // The supervisor uses it; an invalid one must fail before anything starts.
    args.http.as_deref().map(rundir::resolve).transpose()?;
    config.cluster.nodes = args.nodes.map_or_else(|| config.cluster.nodes.max(1), usize::from);
    config.data.strict |= args.strict;
    let script = args.events.as_deref().map(|path| Script::load(path, config.cluster.nodes)).transpose()?;
    let spot = args.spot_trace.as_deref().map(|path| spot(args, path, &mut config)).transpose()?;
    let claimed = claim(args, &config)?;
    claimed.configure(&config)?;
    Ok((config, claimed, script.unwrap_or_default(), spot))
}

/// The replay of a trace. The run waits for nodes for as long as the trace has none.
fn spot(args: &Args, path: &Path, config: &mut Config) -> anyhow::Result<Replay> {
    if !(args.speedup.is_finite() && args.speedup > 0.0) {
        bail!("--speedup {}: expected a positive number", args.speedup);
    }
    let notice = args.notice.map(|notice| {
        let valid = Duration::try_from_secs_f64(notice).ok().filter(|notice| *notice <= SPOT_REPLAY_MAX);
        valid.with_context(|| format!("--notice {notice}: expected a number of seconds"))
    });
    let nodes_max = config.cluster.nodes;
    let trace = Trace::load(path, args.spot_unit, args.speedup, nodes_max)?;
    if trace.end() > SPOT_REPLAY_MAX {
        let (seconds, most) = (trace.end().as_secs(), SPOT_REPLAY_MAX.as_secs());
        bail!("trace {}: it takes {seconds} s: expected at most {most}; raise --speedup", path.display());
    }
    let wait_ms = trace.end().as_millis() as u64;
    config.cluster.gather_timeout_ms = config.cluster.gather_timeout_ms.saturating_add(wait_ms);
    let options = SpotOptions {
        nodes_max,
        lanes: config.training.lanes,
        notice: notice.transpose()?,
        seed: config.run.seed,
    };
    Ok(Replay::new(trace, options))
}

/// The directory of the run, which is this command's alone until its supervisor starts.
fn claim(args: &Args, config: &Config) -> anyhow::Result<ClaimedDir> {
    let named = || PathBuf::from(rundir::RUNS).join(&config.run.name);
    if let Some(address) = &args.from {
        let path = args.dir.clone().unwrap_or_else(named);
        let mut claimed = ClaimedDir::take(&path, ADDRESS)?;
        if claimed.holds_run {
            bail!("{} already holds a run: leave --from out, or choose another --dir", path.display());
        }
        claimed.restore(address, config)?;
        return Ok(claimed);
    }
    if args.resume {
        let path = args.dir.clone().unwrap_or_else(named);
        let dir = RunDir::find(&path)?;
        if let Some(contact) = rundir::contact(&dir) {
            bail!("{} is in use by a live supervisor, process {}", dir.root().display(), contact.pid);
        }
        return ClaimedDir::take(&path, ADDRESS);
    }
    let Some(path) = &args.dir else { return rundir::claim_new(&config.run.name, ADDRESS) };
    let claimed = ClaimedDir::take(path, ADDRESS)?;
    if claimed.holds_run {
        bail!("{} already holds a run: add --resume to continue it, or choose another --dir", path.display());
    }
    Ok(claimed)
}

/// Prepares the tokens here and not in the supervisor, which shows no progress.
fn prepare_data(
    config: &Config,
    dir: &RunDir,
    display: &ProgressDisplay,
    interrupts: &Interrupts,
) -> anyhow::Result<Prepared> {
    let mut progress = preparation::progress(display.phases());
    let (config, dir) = (config.clone(), dir.clone());
    let work = move || preparation::prepare_data(&config, &dir, &mut progress);
    interrupts.unless_interrupted(PREPARING, work, volary_data::remove_partial_folders)
}

/// Prints the result of the run, then a sample, which takes a moment.
fn print_summary(config: &Config, dir: &RunDir, outcome: &RunOutcome) -> anyhow::Result<()> {
    let record = volary_storage::CheckpointReader::open(dir)?.latest()?;
    let checkpoint = record.map(|record| record.step);
    if let Some(report) = &outcome.spot {
        output::text(report)?;
    }
    output::text(Summary { dir, outcome, validations: validations(&dir.validation()), checkpoint })?;
    let Some(step) = checkpoint else { return Ok(()) };
    let sampling = Sampling { temperature: 0.7, seed: config.run.seed, ..Sampling::default() };
    let sample = || {
        let prompt = match &config.run.sample_prompt {
            Some(prompt) => prompt.clone(),
            None => held_out_prompt(config, dir)?,
        };
        let trained = Trained::load(dir.root(), Some(step.0), "cpu", 1)?;
        let text = trained.continuation(&prompt, SAMPLE_TOKENS, sampling)?;
        anyhow::Ok((prompt, text))
    };
    // The run is complete, with or without its sample.
    let sample = sample()
        .inspect_err(|error| output::note(format_args!("no sample: {}", output::with_causes(error))))
        .ok();
    output::text(Sample { dir, sample, finished: outcome.finished })?;
    Ok(())
}

/// The first words of the held-out text: a good model continues text like its own.
fn held_out_prompt(config: &Config, dir: &RunDir) -> anyhow::Result<String> {
    let length = config.training.sequence_length;
    let data = volary_data::Dataset::open(&dir.data(), length, 1, 1, config.run.seed)?;
    let tokens = data.validation(0, Lane(0))?;
    let document = tokens.split(|id| *id == data.tokenizer().end_of_text()).max_by_key(|part| part.len());
    let text = data.tokenizer().decode(document.unwrap_or_default())?;
    let words: String = text.trim_start().chars().take(PROMPT_CHARS).collect();
    // Not in the middle of a word, and on one line.
    let words = words.lines().next().unwrap_or_default();
    Ok(words.rsplit_once(' ').map_or(words, |(whole, _)| whole).to_owned())
}

/// The result of a run: its losses and its checkpoint.
struct Summary<'a> {
    dir: &'a RunDir,
    outcome: &'a RunOutcome,
    validations: Vec<Validation>,
    checkpoint: Option<Step>,
}

impl fmt::Display for Summary<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let RunOutcome { finished, last, .. } = *self.outcome;
        match last {
            Some(last) if finished => writeln!(f, "done: step {}, loss {:.4}", last.step, last.loss)?,
            Some(last) => writeln!(f, "stopped: step {}, loss {:.4}", last.step, last.loss)?,
            None => writeln!(f, "nothing left to do")?,
        }
        if let (Some(first), Some(last)) = (self.validations.first(), self.validations.last()) {
            let (step, first) = (last.step, first.loss);
            writeln!(
                f,
                "validation loss {last} after step {step}, {first:.4} at the start (nats per token)"
            )?;
        }
        match self.checkpoint {
            Some(step) => writeln!(f, "checkpoint: step {step} in {}", self.dir.root().display()),
            None => Ok(()),
        }
    }
}

/// A continuation of the run's sample prompt by its newest checkpoint, and commands to try next.
struct Sample<'a> {
    dir: &'a RunDir,
    /// A prompt and its continuation.
    sample: Option<(String, String)>,
    /// Whether the run reached its last step.
    finished: bool,
}

impl fmt::Display for Sample<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let root = self.dir.root().display().to_string();
        let run = quoted(&root);
        let prompt = self.sample.as_ref().map_or("Once", |(prompt, _)| prompt);
        if let Some((prompt, text)) = &self.sample {
            let text = format!("{prompt}{text}").trim_end().replace('\n', "\n  ");
            writeln!(f, "\na sample:\n  {text}\n")?;
        }
        writeln!(f, "try next:")?;
        writeln!(f, "  volary generate --run {run} --prompt {}", quoted(prompt))?;
        writeln!(f, "  volary digest {run}")?;
        if !self.finished {
            let config = quoted(&format!("{root}/config.toml"));
            writeln!(f, "  volary train {config} --dir {run} --resume")?;
        }
        Ok(())
    }
}

/// A word of a shell's command line: quoted unless it is plain.
fn quoted(word: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "/-_.".contains(c);
    if !word.is_empty() && word.chars().all(is_plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', "'\\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_with_spaces_or_quotes_stays_one_word_of_a_shell() {
        assert_eq!(quoted("runs/quickstart-2"), "runs/quickstart-2");
        assert_eq!(quoted("my runs/a"), "'my runs/a'");
        assert_eq!(quoted("it's $HOME"), r"'it'\''s $HOME'");
        assert_eq!(quoted(""), "''");
    }
}
