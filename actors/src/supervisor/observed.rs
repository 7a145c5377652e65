//! What the supervisor shows of a run: traces, figures, news for watchers, TensorBoard files. Nothing here can hold up or fail a run.

use super::traces::Traces;
use crate::durations::Cost;
use crate::event_stream::EventStream;
use crate::run_files::{MetricsLine, ValidationLine};
use std::sync::Arc;
use std::time::Duration;
use volary_core::machine::{Committed, Notice};
use volary_telemetry::metrics::SupervisorMetrics;
use volary_telemetry::tensorboard::{EventFile, Figure};

/// What the supervisor shows of a run.
pub(crate) struct Observed {
    pub(crate) traces: Traces,
    pub(crate) metrics: Arc<SupervisorMetrics>,
    pub(crate) events: EventStream,
    /// None once it could not be written.
    pub(crate) board: Option<EventFile>,
    /// Every so many steps the expert load goes to TensorBoard; 0 never.
    pub(crate) sample_every: u64,
}

impl Observed {
    /// A step is durable.
    pub(crate) fn committed(&mut self, committed: &Committed, line: &MetricsLine, costs: &[Cost]) {
        self.traces.committed(committed.loss, costs);
        self.metrics.committed(committed, line.seconds.unwrap_or_default());
        for cost in costs {
            if let Cost::Recovered { steps_lost, .. } = cost {
                let seconds: Vec<_> = cost
                    .parts()
                    .into_iter()
                    .map(|(part, ms)| (part.trim_end_matches("_ms"), ms / 1e3))
                    .collect();
                self.metrics.recovered(&seconds, *steps_lost);
            }
        }
        self.events.publish("step", line);
        self.write_figures(committed, line);
    }

    fn write_figures(&mut self, committed: &Committed, line: &MetricsLine) {
        let scalars = [
            ("loss", Some(committed.loss)),
            ("aux_loss", Some(committed.aux_loss)),
            ("gate_entropy", Some(committed.gate_entropy)),
            ("grad_norm", Some(committed.grad_norm)),
            ("learning_rate", Some(committed.update.rate)),
            ("tokens_per_second", line.tokens_per_second),
            ("nodes", Some(committed.nodes.into())),
            ("dropped", Some(committed.dropped as f64)),
        ];
        let scalar =
            |(tag, value): (&str, Option<f64>)| Some((format!("train/{tag}"), Figure::Scalar(value?)));
        let mut figures: Vec<(String, Figure<'_>)> = scalars.into_iter().filter_map(scalar).collect();
        if self.sample_every > 0 && committed.step.is_multiple_of(self.sample_every) {
            let load = committed.load.iter().enumerate();
            figures.extend(
                load.map(|(layer, counts)| {
                    (format!("expert_load/moe_layer_{layer}"), Figure::Counts(counts))
                }),
            );
        }
        self.write(committed.step, &figures);
    }

    fn write(&mut self, step: u64, figures: &[(String, Figure<'_>)]) {
        if let Some(board) = &mut self.board
            && let Err(error) = board.write(step, figures)
        {
            tracing::warn!(%error, "TensorBoard's file cannot be written; the run goes on without it");
            self.board = None;
        }
    }

    /// The held-out loss was measured.
    pub(crate) fn validated(&mut self, line: &ValidationLine) {
        self.metrics.validated(line.loss);
        self.events.publish("validation", line);
        self.write(line.step, &[("validation/loss".to_owned(), Figure::Scalar(line.loss))]);
    }

    /// Something happened; a checkpoint that became durable shows how long it took.
    pub(crate) fn noticed(&mut self, notice: &Notice) {
        if let Notice::Checkpoint { step } = notice {
            let took: Option<Duration> = self.traces.checkpoint_took();
            self.metrics.checkpointed(*step, took);
        }
        self.traces.noticed(notice);
    }
}
