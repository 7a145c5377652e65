//! `volary eval`: scores a trained model on tasks, in this process.

use crate::output;
use crate::trained::{ModelArgs, Trained};
use indicatif::{ProgressBar, ProgressStyle};
use std::path::PathBuf;
use std::rc::Rc;
use volary_inference::evaluation::{Evaluator, Report, Settings, Task, find_tasks};
use volary_inference::limits::SHOTS;

/// Score a trained model on tasks.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  volary eval --run runs/quickstart --tasks examples/eval
  volary eval --run runs/quickstart --tasks examples/eval/rust_keywords.jsonl --shots 5 --json")]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// A task file, or a folder of them: JSON lines with `prompt`, `choices` and `answer` (multiple choice),
    /// `prompt` and `answers` (completion), or `text` (perplexity); may be given several times.
    #[arg(long, required = true)]
    tasks: Vec<PathBuf>,
    /// Examples with their answers before each question.
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u64).range(0..=SHOTS as u64))]
    shots: u64,
    /// The seed of the choice of examples.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// The maximum number of tokens of a completion.
    #[arg(long, default_value_t = 32)]
    max_tokens: usize,
    /// Print JSON instead of a table.
    #[arg(long)]
    json: bool,
}

/// Runs the command. All task files are read before the model is.
///
/// # Errors
/// When a task file is bad, there is no such run or checkpoint, or libtorch fails.
pub fn run(args: Args) -> anyhow::Result<()> {
    let mut tasks = Vec::new();
    for path in &args.tasks {
        for file in find_tasks(path)? {
            tasks.push(Task::read(&file)?);
        }
    }
    let trained = Trained::open(&args.model)?;
    let step = trained.step;
    let settings = Settings { shots: args.shots as usize, seed: args.seed, max_tokens: args.max_tokens };
    let evaluator = Evaluator::new(Rc::new(trained.decoder), trained.tokenizer, settings);
    let mut reports = Vec::new();
    for task in &tasks {
        let bar = bar(task);
        reports.push(evaluator.evaluate(task, |done| bar.set_position(done as u64))?);
        bar.finish_and_clear();
    }
    if args.json {
        let document = serde_json::json!({ "step": step, "tasks": reports });
        output::line(format_args!("{}", serde_json::to_string_pretty(&document)?))?;
    } else {
        output::line(format_args!("checkpoint: step {step}"))?;
        print_table(&reports)?;
    }
    Ok(())
}

/// A bar on a terminal; nothing elsewhere.
fn bar(task: &Task) -> ProgressBar {
    let style = ProgressStyle::with_template("{msg} {wide_bar} {pos}/{len}, {eta} left");
    let bar = ProgressBar::new(task.len() as u64).with_message(task.name.clone());
    style.map(|style| bar.clone().with_style(style)).unwrap_or(bar)
}

fn print_table(reports: &[Report]) -> anyhow::Result<()> {
    let width = reports.iter().map(|report| report.task.len()).max().unwrap_or(0).max("task".len());
    output::line(format_args!(
        "\n{:width$}  {:>7}  {:>5}  {:<24}  {:>10}  {:>10}",
        "task", "records", "shots", "metric", "value", "std. error"
    ))?;
    for report in reports {
        for (metric, estimate) in &report.metrics {
            let error = estimate.standard_error.map_or_else(|| "-".into(), |error| format!("{error:.4}"));
            output::line(format_args!(
                "{:width$}  {:>7}  {:>5}  {:<24}  {:>10.4}  {error:>10}",
                report.task,
                report.records,
                report.shots,
                metric.name(),
                estimate.value
            ))?;
        }
        if report.truncated > 0 {
            let count = report.truncated;
            output::note(format_args!(
                "{}: of {count} prompts with their answers the model saw the end only: they are longer than its context",
                report.task
            ));
        }
    }
    Ok(())
}
