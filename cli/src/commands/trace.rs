//! `volary trace`: shows the stored traces of a run, without any server.

use crate::limits::{TRACE_STEPS_SHOWN, TRACE_TOKENS_SHOWN};
use crate::output;
use anyhow::{Context, bail};
use clap::ValueEnum;
use std::path::PathBuf;
use volary_storage::RunDir;
use volary_telemetry::store::{self, Trace};
use volary_telemetry::{limits, render};

/// Show the stored traces of a run.
#[derive(clap::Args)]
#[command(after_help = "\
Without --step or --token: a list of the stored traces. telemetry.sample_every determines the sampled steps; \
the step after a cluster change, recoveries, shard transfers and checkpoints are traced too.

Examples:
  volary trace runs/quickstart                                   the list of traces
  volary trace runs/quickstart --step 50                         that step as a tree
  volary trace runs/quickstart --token ' fn'                     the routing of a token
  volary trace runs/quickstart --step 50 --format html > step.html
  volary trace runs/quickstart --format chrome > run.json        for ui.perfetto.dev or chrome://tracing")]
pub struct Args {
    /// The run's directory.
    dir: PathBuf,
    /// Show the traces of this step.
    #[arg(long)]
    step: Option<u64>,
    /// Show the routing of sampled tokens with this text; surrounding white space is ignored.
    #[arg(long, value_name = "TEXT")]
    token: Option<String>,
    /// The output format.
    #[arg(long, value_enum, default_value_t = Format::Text)]
    format: Format,
}

/// The output format of traces.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    /// For the terminal.
    Text,
    /// JSON for Perfetto and chrome://tracing.
    Chrome,
    /// One self-contained page.
    Html,
}

/// Runs the command.
///
/// # Errors
/// When the directory holds no run, or no trace matches.
pub fn run(args: Args) -> anyhow::Result<()> {
    let dir = RunDir::find(&args.dir)?;
    let folder = dir.traces();
    let mut traces = match folder.exists() {
        true => store::read(&folder).with_context(|| folder.display().to_string())?,
        false => Vec::new(),
    };
    if traces.is_empty() {
        bail!(
            "{} has no traces: telemetry.sample_every is 0, or no sampled step was reached",
            dir.root().display()
        );
    }
    if let Some(step) = args.step {
        let steps: Vec<u64> = traces.iter().filter(|t| t.name() == "step").filter_map(Trace::step).collect();
        traces.retain(|trace| trace.step() == Some(step));
        if traces.is_empty() {
            bail!("step {step} was not traced; traced steps: {}", last_steps(&steps));
        }
    }
    if let Some(text) = &args.token {
        retain_token(&mut traces, text)?;
    }
    match args.format {
        Format::Text => output::text(text(&traces, args.step.is_some(), args.token.as_deref()))?,
        Format::Chrome => output::line(render::chrome(&traces))?,
        Format::Html => output::line(render::html(last_step(&traces), args.token.as_deref()))?,
    }
    Ok(())
}

fn last_steps(steps: &[u64]) -> String {
    let last = &steps[steps.len().saturating_sub(TRACE_STEPS_SHOWN)..];
    let list = last.iter().map(u64::to_string).collect::<Vec<_>>().join(", ");
    if steps.len() > last.len() { format!("… {list}") } else { list }
}

fn is_token(path: &render::TokenPath, text: &str) -> bool {
    path.text == text || path.text.trim() == text.trim()
}

/// Keeps the traces with a sampled token of this text.
fn retain_token(traces: &mut Vec<Trace>, text: &str) -> anyhow::Result<()> {
    let mut known: Vec<String> = traces.iter().flat_map(render::token_paths).map(|path| path.text).collect();
    traces.retain(|trace| render::token_paths(trace).iter().any(|path| is_token(path, text)));
    if traces.is_empty() {
        known.sort();
        known.dedup();
        known.truncate(TRACE_TOKENS_SHOWN);
        bail!("no sampled token {text:?}; sampled tokens include {known:?}");
    }
    Ok(())
}

/// The trace of the last step, or the last trace.
fn last_step(traces: &[Trace]) -> &Trace {
    traces.iter().rev().find(|trace| trace.name() == "step").unwrap_or(&traces[traces.len() - 1])
}

fn text(traces: &[Trace], trees: bool, token: Option<&str>) -> String {
    if let Some(token) = token {
        let routing = |trace: &Trace| {
            let paths: Vec<_> =
                render::token_paths(trace).into_iter().filter(|path| is_token(path, token)).collect();
            let step = trace.step().unwrap_or_default();
            format!("step {step}\n{}", render::paths_as_text(&paths))
        };
        return traces.iter().map(routing).collect::<Vec<_>>().join("\n");
    }
    if trees {
        return traces.iter().map(render::tree).collect::<Vec<_>>().join("\n");
    }
    format!(
        "{}\n{} traces, at most {} spans each; --step STEP shows one as a tree, --token TEXT the routing of a token\n",
        render::list(traces),
        traces.len(),
        limits::SPANS_PER_TRACE_MAX
    )
}
