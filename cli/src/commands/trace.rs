//! `volary trace`: shows what was traced of a run, without any server.

use anyhow::{Context, bail};
use clap::ValueEnum;
use std::path::PathBuf;
use volary_storage::RunDir;
use volary_telemetry::store::{self, Trace};
use volary_telemetry::{limits, render};

/// Show the traces that are kept with a run.
#[derive(clap::Args)]
#[command(after_help = "\
Without --step or --token: a list of the traces that are kept. telemetry.sample_every decides which steps are traced; steps that
follow a change of the cluster, recoveries, moves of shards and checkpoints are traced beside them.

Examples:
  volary trace runs/quickstart                                   what was traced
  volary trace runs/quickstart --step 50                         that step as a tree
  volary trace runs/quickstart --token ' fn'                     the ways of a token through the experts
  volary trace runs/quickstart --step 50 --format html > step.html
  volary trace runs/quickstart --format chrome > run.json        for ui.perfetto.dev or chrome://tracing")]
pub struct Args {
    /// The run's directory.
    dir: PathBuf,
    /// The traces of this step.
    #[arg(long)]
    step: Option<u64>,
    /// The ways of the followed tokens with this text, white space at its ends aside.
    #[arg(long, value_name = "TEXT")]
    token: Option<String>,
    /// As what.
    #[arg(long, value_enum, default_value_t = Format::Text)]
    format: Format,
}

/// As what traces are shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    /// For the terminal.
    Text,
    /// JSON for Perfetto and chrome://tracing.
    Chrome,
    /// One page that needs nothing else.
    Html,
}

/// Runs the command.
///
/// # Errors
/// When the directory holds no run, or nothing that was asked for was traced.
pub fn run(args: Args) -> anyhow::Result<()> {
    let dir = RunDir::find(&args.dir)?;
    let folder = dir.traces();
    let mut traces = match folder.exists() {
        true => store::read(&folder).with_context(|| folder.display().to_string())?,
        false => Vec::new(),
    };
    if traces.is_empty() {
        bail!(
            "no step of {} was traced: telemetry.sample_every was 0, or none was reached",
            dir.root().display()
        );
    }
    if let Some(step) = args.step {
        let steps: Vec<u64> = traces.iter().filter(|t| t.name() == "step").filter_map(Trace::step).collect();
        traces.retain(|trace| trace.step() == Some(step));
        if traces.is_empty() {
            bail!("step {step} was not traced; these were: {}", shortened(&steps));
        }
    }
    if let Some(text) = &args.token {
        retain_token(&mut traces, text)?;
    }
    match args.format {
        Format::Text => print!("{}", text(&traces, args.step.is_some(), args.token.as_deref())),
        Format::Chrome => println!("{}", render::chrome(&traces)),
        Format::Html => println!("{}", render::html(best(&traces), args.token.as_deref())),
    }
    Ok(())
}

fn shortened(steps: &[u64]) -> String {
    let words: Vec<String> = steps.iter().rev().take(10).rev().map(u64::to_string).collect();
    if steps.len() > words.len() { format!("… {}", words.join(", ")) } else { words.join(", ") }
}

fn is_token(way: &render::TokenPath, text: &str) -> bool {
    way.text == text || way.text.trim() == text.trim()
}

fn retain_token(traces: &mut Vec<Trace>, text: &str) -> anyhow::Result<()> {
    let mut known: Vec<String> = traces.iter().flat_map(render::token_paths).map(|way| way.text).collect();
    traces.retain(|trace| render::token_paths(trace).iter().any(|way| is_token(way, text)));
    if traces.is_empty() {
        known.sort();
        known.dedup();
        known.truncate(20);
        bail!("no token {text:?} was followed; among those that were: {known:?}");
    }
    Ok(())
}

/// Of several traces the one that a page shows: the last step.
fn best(traces: &[Trace]) -> &Trace {
    traces.iter().rev().find(|trace| trace.name() == "step").unwrap_or(&traces[traces.len() - 1])
}

fn text(traces: &[Trace], trees: bool, token: Option<&str>) -> String {
    if let Some(token) = token {
        let ways = |trace: &Trace| {
            let ways: Vec<_> =
                render::token_paths(trace).into_iter().filter(|way| is_token(way, token)).collect();
            let step = trace.step().unwrap_or_default();
            format!("step {step}\n{}", render::paths_as_text(&ways))
        };
        return traces.iter().map(ways).collect::<Vec<_>>().join("\n");
    }
    if trees {
        return traces.iter().map(render::tree).collect::<Vec<_>>().join("\n");
    }
    format!(
        "{}\n{} traces, at most {} spans each; --step STEP shows one as a tree, --token TEXT the way of a token\n",
        render::list(traces),
        traces.len(),
        limits::SPANS_PER_TRACE_MAX
    )
}
