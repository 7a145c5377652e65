//! The progress of a run: a bar on a terminal, plain lines elsewhere, nothing with `--quiet`.

use crate::limits::{PROGRESS_INTERVAL, SPINNER_INTERVAL};
use crate::output;
use crate::units::counted;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::{Deserialize, Deserializer};
use std::fmt;
use std::fs::File;
use std::io::{IsTerminal, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// The part of a line of `metrics.jsonl` that the progress shows.
#[derive(Clone, Copy, Debug, Deserialize)]
pub struct StepMetrics {
    /// The step.
    pub step: u64,
    /// Mean cross-entropy, in nats per token; NaN, which JSON writes as null, where it is not finite.
    #[serde(deserialize_with = "number_or_null")]
    pub loss: f64,
    /// Whether the update was skipped because a gradient was not finite.
    #[serde(default)]
    pub skipped: bool,
    /// Tokens per second.
    #[serde(default)]
    pub tokens_per_second: Option<f64>,
    /// Nodes of the placement.
    pub nodes: u32,
}

fn number_or_null<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or(f64::NAN))
}

/// A line of `validation.jsonl`.
#[derive(Clone, Copy, Debug, Deserialize)]
pub struct Validation {
    /// The step after which it was measured.
    pub step: u64,
    /// Mean cross-entropy on held-out text, in nats per token; NaN where it is not finite.
    #[serde(deserialize_with = "number_or_null")]
    pub loss: f64,
    /// The standard error of the loss, by document.
    #[serde(default)]
    pub standard_error: Option<f64>,
}

impl fmt::Display for Validation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.4}", self.loss)?;
        self.standard_error.map_or(Ok(()), |error| write!(f, " ± {error:.4}"))
    }
}

/// Follows a file that grows line by line.
#[derive(Debug)]
pub struct Tail {
    path: PathBuf,
    offset: u64,
    partial: String,
}

impl Tail {
    /// From the beginning of the file.
    #[must_use]
    pub fn new(path: PathBuf) -> Self {
        Self { path, offset: 0, partial: String::new() }
    }

    /// The complete lines since the last call. A file that shrank, of a run that rolled back, is followed
    /// from its new end.
    pub fn lines(&mut self) -> Vec<String> {
        let Ok(mut file) = File::open(&self.path) else { return Vec::new() };
        let length = file.metadata().map_or(0, |m| m.len());
        if length < self.offset {
            self.offset = length;
            self.partial.clear();
        }
        let mut text = String::new();
        if file.seek(SeekFrom::Start(self.offset)).is_err() || file.read_to_string(&mut text).is_err() {
            return Vec::new();
        }
        self.offset += text.len() as u64;
        self.partial.push_str(&text);
        let Some(end) = self.partial.rfind('\n') else { return Vec::new() };
        let rest = self.partial.split_off(end + 1);
        std::mem::replace(&mut self.partial, rest).lines().map(str::to_owned).collect()
    }
}

/// The held-out losses of a run.
#[must_use]
pub fn validations(path: &Path) -> Vec<Validation> {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

/// Shows what a run does before its first step.
#[derive(Debug)]
pub struct PhaseDisplay {
    bar: Option<ProgressBar>,
    quiet: bool,
    phase: String,
    last_line: Instant,
}

impl PhaseDisplay {
    /// Shows a phase and the part of it that is done, from 0 to 1, where that is known.
    pub fn show(&mut self, phase: &str, done: Option<f64>) {
        let text = match done {
            Some(done) => format!("{phase}: {:.0} %", 100.0 * done),
            None => phase.to_owned(),
        };
        let is_new = self.phase != phase;
        if let Some(bar) = &self.bar {
            bar.set_message(text);
        } else if !self.quiet && (is_new || self.last_line.elapsed() >= PROGRESS_INTERVAL) {
            self.last_line = Instant::now();
            output::note(if is_new { phase } else { &text });
        }
        phase.clone_into(&mut self.phase);
    }
}

/// The progress display of a run, on standard error.
#[derive(Debug)]
pub struct ProgressDisplay {
    bar: Option<ProgressBar>,
    steps: u64,
    quiet: bool,
    last_line: Instant,
    /// The first step of this process, and its time.
    first: Option<(u64, Instant)>,
    last: Option<StepMetrics>,
    /// Skipped steps of this process.
    skipped: u64,
}

impl ProgressDisplay {
    /// A display of a run of `steps` steps.
    #[must_use]
    pub fn new(steps: u64, quiet: bool) -> Self {
        let bar = (!quiet && std::io::stderr().is_terminal()).then(|| {
            let bar = ProgressBar::with_draw_target(Some(steps), ProgressDrawTarget::stderr());
            // Before the first step there is no speed, and no time left to tell.
            bar.set_style(style("{spinner} {msg}  {elapsed}"));
            bar.enable_steady_tick(SPINNER_INTERVAL);
            bar
        });
        Self { bar, steps, quiet, last_line: Instant::now(), first: None, last: None, skipped: 0 }
    }

    /// Shows a line above the bar.
    pub fn note(&self, line: &str) {
        match &self.bar {
            Some(bar) => bar.println(line),
            None if !self.quiet => output::note(line),
            None => {}
        }
    }

    /// Shows what the run does before its first step.
    pub fn phase(&self, phase: &str) {
        self.phases().show(phase, None);
    }

    /// The display of phases before the first step, for another thread.
    #[must_use]
    pub fn phases(&self) -> PhaseDisplay {
        PhaseDisplay {
            bar: self.bar.clone(),
            quiet: self.quiet,
            phase: String::new(),
            last_line: Instant::now(),
        }
    }

    /// Shows a committed step.
    pub fn step(&mut self, metrics: StepMetrics) {
        let is_first = self.last.is_none();
        self.last = Some(metrics);
        let StepMetrics { step, loss, skipped, tokens_per_second, nodes } = metrics;
        self.skipped += u64::from(skipped);
        self.first.get_or_insert_with(|| (step, Instant::now()));
        let speed = tokens_per_second.unwrap_or_default();
        let skipped = match self.skipped {
            0 => String::new(),
            count => format!("  {count} skipped"),
        };
        let message =
            format!("loss {loss:.4}  {speed:.0} tokens/s  {}{skipped}", counted(nodes.into(), "node"));
        if let Some(bar) = &self.bar {
            if is_first {
                bar.disable_steady_tick();
                bar.set_style(style("{bar:28} step {pos}/{len}  {msg}  {eta} left"));
                // The remaining time is estimated from the steps of this process only.
                bar.set_position(step);
                bar.reset_eta();
            }
            bar.set_position(step);
            bar.set_message(message);
            return;
        }
        let is_due = is_first || step == self.steps || self.last_line.elapsed() >= PROGRESS_INTERVAL;
        if !self.quiet && is_due {
            self.last_line = Instant::now();
            output::note(format_args!("step {step}/{}  {message}{}", self.steps, self.time_left(step)));
        }
    }

    /// The remaining time, estimated from the steps of this process.
    fn time_left(&self, step: u64) -> String {
        let Some((first, since)) = self.first.filter(|(first, _)| step > *first && step < self.steps) else {
            return String::new();
        };
        let seconds = since.elapsed().as_secs_f64() / (step - first) as f64 * (self.steps - step) as f64;
        format!("  {} left", indicatif::HumanDuration(Duration::from_secs_f64(seconds)))
    }

    /// The last committed step.
    #[must_use]
    pub fn last(&self) -> Option<StepMetrics> {
        self.last
    }

    /// Removes the bar.
    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
