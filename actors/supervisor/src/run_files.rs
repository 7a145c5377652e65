//! The files of a run for people and tools: one JSON object per line, in order, each step once.

use crate::messages::CopyOutcome;
use parking_lot::Mutex;
use serde::Serialize;
use std::path::Path;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};
use volary_core::machine::Committed;
use volary_core::{Epoch, Step};
use volary_storage::mirror::Copied;
use volary_storage::{JsonLines, Result, RunDir, Store};

/// One line of `metrics.jsonl`.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct MetricsLine {
    /// The step.
    pub step: Step,
    /// The placement under which it ran.
    pub epoch: Epoch,
    /// Mean cross-entropy, nats per token.
    pub loss: f64,
    /// Mean load-balancing loss; 1 when even.
    pub aux_loss: f64,
    /// Mean entropy of the gates' probabilities, nats.
    pub gate_entropy: f64,
    /// Norm of the mean gradient before clipping.
    pub grad_norm: f64,
    /// Learning rate.
    pub lr: f64,
    /// Tokens in the step.
    pub tokens: u64,
    /// Seconds since the previous commit; unknown for a step whose line is restored from the journal after
    /// a crash.
    pub seconds: Option<f64>,
    /// Tokens per second.
    pub tokens_per_second: Option<f64>,
    /// Members of the placement.
    pub nodes: u32,
    /// Whether the update was skipped because a gradient was not finite.
    pub skipped: bool,
    /// Assignments dropped for lack of capacity.
    pub dropped: u64,
    /// The largest share of one expert in its layer's assignments, over all layers; 1 / experts under an
    /// even load.
    pub busiest_expert: f64,
}

impl MetricsLine {
    pub(crate) fn new(committed: &Committed, seconds: Option<f64>) -> Self {
        let share = |counts: &Vec<u64>| {
            let total: u64 = counts.iter().sum();
            counts.iter().max().map_or(0.0, |&most| most as f64 / total.max(1) as f64)
        };
        Self {
            step: committed.step,
            epoch: committed.epoch,
            loss: committed.loss,
            aux_loss: committed.aux_loss,
            gate_entropy: committed.gate_entropy,
            grad_norm: committed.grad_norm,
            lr: committed.update.rate,
            tokens: committed.tokens,
            seconds,
            tokens_per_second: seconds.map(|seconds| committed.tokens as f64 / seconds.max(1e-9)),
            nodes: committed.nodes,
            skipped: !committed.update.apply,
            dropped: committed.dropped,
            busiest_expert: committed.load.iter().map(share).fold(0.0, f64::max),
        }
    }
}

/// One line of `validation.jsonl`.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct ValidationLine {
    /// The step after which it was measured; 0 is before the first step.
    pub step: Step,
    /// Mean cross-entropy on held-out text, nats per token.
    pub loss: f64,
    /// The standard error of the loss, by document; null with fewer than two documents.
    pub standard_error: Option<f64>,
    /// The number of documents of which tokens were measured.
    pub documents: u64,
    /// The number of measured tokens.
    pub tokens: u64,
}

/// One line of `events.jsonl`.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct EventLine<'a, T> {
    /// The time, in milliseconds since 1970.
    pub unix_ms: u64,
    /// The last committed step at that time.
    pub at_step: Step,
    /// The event.
    #[serde(flatten)]
    pub event: &'a T,
}

/// The files of a run.
pub(crate) struct RunFiles {
    metrics: JsonLines,
    validation: JsonLines,
    events: JsonLines,
    /// The last step with a line of metrics.
    written: Step,
    /// The last step whose validation loss is written: a resumed run measures it again, and writes it once.
    validated: Option<Step>,
    /// Whether the last line could not be written.
    failing: bool,
}

impl RunFiles {
    /// Opens the files. Lines after the last committed step are removed, since those steps run again, and
    /// missing lines of committed steps are restored from the journal.
    pub(crate) fn open(dir: &RunDir, store: &Store) -> Result<Self> {
        let step = store.last_committed()?.unwrap_or_default();
        let mut files = Self {
            metrics: JsonLines::open(dir.metrics())?,
            validation: JsonLines::open(dir.validation())?,
            events: JsonLines::open(dir.events())?,
            written: Step::default(),
            validated: None,
            failing: false,
        };
        files.truncate_after(step)?;
        files.restore_metrics(store, step.next())?;
        Ok(files)
    }

    /// Removes the lines of the steps after `step`.
    pub(crate) fn go_back(&mut self, step: Step) {
        let truncated = self.truncate_after(step);
        self.note(truncated);
    }

    fn truncate_after(&mut self, step: Step) -> Result<()> {
        self.metrics.truncate_after(step)?;
        self.validation.truncate_after(step)?;
        self.written = last_step(self.metrics.path()).unwrap_or_default();
        // Read from the file: the line of `step` itself may be there, and is measured again.
        self.validated = last_step(self.validation.path());
        Ok(())
    }

    /// Writes a line, after those before it that could not be written in their time.
    pub(crate) fn metrics(&mut self, line: &MetricsLine, store: &Store) {
        let written = self.restore_metrics(store, line.step).and_then(|()| self.write_metrics(line));
        self.note(written);
    }

    fn write_metrics(&mut self, line: &MetricsLine) -> Result<()> {
        self.metrics.append(line)?;
        self.written = line.step;
        Ok(())
    }

    /// Writes missing lines of the steps before `end` from the journal.
    fn restore_metrics(&mut self, store: &Store, end: Step) -> Result<()> {
        if self.written.next() >= end {
            return Ok(());
        }
        for missing in store.committed_range::<Committed>(self.written.next()) {
            let (step, committed) = missing?;
            if step >= end {
                break;
            }
            self.write_metrics(&MetricsLine::new(&committed, None))?;
        }
        Ok(())
    }

    /// Writes a validation loss once. Returns whether it is the first of its step.
    pub(crate) fn validation(&mut self, line: &ValidationLine) -> bool {
        let is_first = self.validated < Some(line.step);
        if is_first {
            self.validated = Some(line.step);
            let written = self.validation.append(line);
            self.note(written);
        }
        is_first
    }

    pub(crate) fn event(&mut self, line: &impl Serialize) {
        let written = self.events.append(line);
        self.note(written);
    }

    /// These files are for people: a line that finds no space ends no run. It is said once.
    fn note(&mut self, written: Result<()>) {
        match written {
            Ok(()) => self.failing = false,
            Err(error) if !std::mem::replace(&mut self.failing, true) => {
                tracing::error!(%error, "a line for people cannot be written; the run continues, and lines of metrics follow later");
            }
            Err(error) => tracing::debug!(%error, "a line cannot be written"),
        }
    }
}

fn last_step(path: &Path) -> Option<Step> {
    let text = std::fs::read_to_string(path).ok()?;
    let line: serde_json::Value = serde_json::from_str(text.lines().last()?).ok()?;
    line["step"].as_u64().map(Step)
}

/// Now, in milliseconds since 1970.
#[must_use]
pub(crate) fn unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64)
}

/// The end of a copy in the object store, as a line of `events.jsonl`.
#[derive(Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub(crate) enum CopyEvent {
    CheckpointCopied { step: Step, blobs: usize, bytes: u64, seconds: f64 },
    CheckpointNotCopied { step: Step, reason: String },
}

impl CopyEvent {
    /// The event of an outcome, which is logged; `None` if there is nothing to say or `reported` says that it
    /// was said.
    pub(crate) fn of(CopyOutcome { step, result }: CopyOutcome, reported: &ReportedCopy) -> Option<Self> {
        let result = result?;
        if reported.0.lock().replace(step) == Some(step) {
            return None;
        }
        Some(match result {
            Ok((Copied { blobs, bytes }, seconds)) => {
                tracing::info!(%step, blobs, bytes, seconds, "the checkpoint is in the store");
                Self::CheckpointCopied { step, blobs, bytes, seconds }
            }
            Err(reason) => {
                tracing::warn!(%step, reason, "the checkpoint is not in the store");
                Self::CheckpointNotCopied { step, reason }
            }
        })
    }
}

/// The last step whose copy was reported, by the actor or after its end.
#[derive(Clone, Debug, Default)]
pub(crate) struct ReportedCopy(Arc<Mutex<Option<Step>>>);

#[cfg(test)]
mod tests {
    use super::*;
    use volary_core::update::{Moments, Update};

    fn committed(step: u64) -> Committed {
        Committed {
            step: Step(step),
            epoch: Epoch(1),
            loss: 1.0 / step as f64,
            aux_loss: 1.0,
            gate_entropy: 0.5,
            grad_norm: 2.0,
            update: Update { apply: true, rate: 0.1, scale: 1.0, moments: Moments::Decay(0.0) },
            tokens: 8,
            nodes: 1,
            load: Vec::new(),
            dropped: 0,
        }
    }

    /// The steps are in the journal; their lines follow when there is space again.
    #[test]
    fn lines_that_find_no_space_end_nothing_and_are_restored() {
        let folder = tempfile::tempdir().expect("a folder");
        let dir = RunDir::create(folder.path().join("run")).expect("a run");
        let store = Store::open(&dir).expect("a store");
        let mut files = RunFiles::open(&dir, &store).expect("files");
        let commit = |files: &mut RunFiles, step: u64| {
            store.commit(Step(step), &committed(step)).expect("a commit");
            files.metrics(&MetricsLine::new(&committed(step), Some(0.5)), &store);
        };
        commit(&mut files, 1);
        let writable = std::mem::replace(&mut files.metrics, JsonLines::open("/dev/full").expect("Linux"));
        commit(&mut files, 2);
        commit(&mut files, 3);
        assert!(files.failing);
        files.metrics = writable;
        commit(&mut files, 4);
        let text = std::fs::read_to_string(dir.metrics()).expect("lines");
        let step =
            |line: &str| serde_json::from_str::<serde_json::Value>(line).expect("JSON")["step"].as_u64();
        let steps: Vec<Option<u64>> = text.lines().map(step).collect();
        assert_eq!(steps, [1, 2, 3, 4].map(Some));
    }
}
