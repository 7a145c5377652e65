//! What the supervisor shows of a run: traces, metrics, live events, TensorBoard files. Nothing here holds
//! up or fails a run.

use super::SupervisorArgs;
use super::traces::Traces;
use crate::error::{Error, Result};
use crate::events::EventStream;
use crate::run_files::{MetricsLine, ValidationLine};
use crate::timings::Cost;
use std::sync::Arc;
use volary_core::Step;
use volary_core::machine::{Committed, Notice};
use volary_telemetry::metrics::SupervisorMetrics;
use volary_telemetry::tensorboard::{EventFile, Value};

/// What the supervisor shows of a run.
pub(super) struct Telemetry {
    pub(super) traces: Traces,
    pub(super) metrics: Arc<SupervisorMetrics>,
    pub(super) events: EventStream,
    /// Nothing once it could not be written.
    tensorboard: Option<EventFile>,
    /// The expert load goes to the log and to TensorBoard every so many steps; 0 is never.
    sample_every: u64,
}

impl Telemetry {
    pub(super) fn new(args: &SupervisorArgs) -> Self {
        let options = args.run.telemetry.clone();
        let mut telemetry = Self {
            sample_every: options.sample_every,
            traces: Traces::new(args.pipeline.tracer(), options, &args.run),
            metrics: Arc::clone(&args.metrics),
            events: args.events.clone(),
            tensorboard: None,
        };
        if let Err(error) = telemetry.open_tensorboard(args) {
            tracing::warn!(%error, "no TensorBoard file");
        }
        telemetry
    }

    /// Opens TensorBoard's files. Steps that were committed and not written follow from the journal.
    fn open_tensorboard(&mut self, args: &SupervisorArgs) -> Result<()> {
        let committed = args.store.last_committed()?.unwrap_or_default();
        let folder = args.dir.tensorboard();
        let opened = EventFile::open(&folder, committed.0)
            .map_err(|error| Error::File { path: folder, reason: error.to_string() })?;
        let (file, last) = opened;
        self.tensorboard = Some(file);
        for missing in args.store.committed_range::<Committed>(Step(last.unwrap_or_default()).next()) {
            let (_, committed) = missing?;
            self.write_step(&committed, &MetricsLine::new(&committed, None));
        }
        Ok(())
    }

    /// The run went back to `step`.
    pub(super) fn go_back(&mut self, step: Step) {
        if let Some(file) = &mut self.tensorboard
            && let Err(error) = file.go_back(step.0)
        {
            tracing::warn!(%error, "TensorBoard's file cannot be written; the run continues without it");
            self.tensorboard = None;
        }
    }

    /// Whether a step is one of those that are shown in full.
    pub(super) fn is_sampled(&self, step: Step) -> bool {
        self.sample_every > 0 && step.is_multiple_of(self.sample_every)
    }

    /// A step is durable.
    pub(super) fn committed(&mut self, committed: &Committed, line: &MetricsLine, costs: &[Cost]) {
        self.traces.committed(committed.loss, costs);
        self.metrics.committed(committed, line.seconds.unwrap_or_default());
        for cost in costs {
            if let Cost::Recovered { steps_lost, .. } = cost {
                let parts = cost.parts().into_iter();
                let seconds: Vec<_> =
                    parts.map(|(part, ms)| (part.trim_end_matches("_ms"), ms / 1e3)).collect();
                self.metrics.recovered(&seconds, *steps_lost);
            }
        }
        self.events.publish("step", line);
        self.write_step(committed, line);
    }

    fn write_step(&mut self, committed: &Committed, line: &MetricsLine) {
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
            |(tag, value): (&str, Option<f64>)| Some((format!("train/{tag}"), Value::Scalar(value?)));
        let mut values: Vec<(String, Value<'_>)> = scalars.into_iter().filter_map(scalar).collect();
        if self.is_sampled(committed.step) {
            for (layer, counts) in committed.load.iter().enumerate() {
                values.push((format!("expert_load/moe_layer_{layer}"), Value::Counts(counts)));
            }
        }
        self.write(committed.step, &values);
    }

    fn write(&mut self, step: Step, values: &[(String, Value<'_>)]) {
        if let Some(file) = &mut self.tensorboard
            && let Err(error) = file.write(step.0, values)
        {
            tracing::warn!(%error, "TensorBoard's file cannot be written; the run continues without it");
            self.tensorboard = None;
        }
    }

    /// The validation loss was measured; `is_first` tells it from a repetition after a restart.
    pub(super) fn validated(&mut self, line: &ValidationLine, is_first: bool) {
        self.metrics.validated(line.loss);
        if !is_first {
            return;
        }
        self.events.publish("validation", line);
        self.write(line.step, &[("validation/loss".to_owned(), Value::Scalar(line.loss))]);
    }

    /// Something happened; a checkpoint that became durable shows how long it took.
    pub(super) fn on_notice(&mut self, notice: &Notice) {
        if let Notice::Checkpoint { step } = notice {
            let took = self.traces.checkpoint_took();
            self.metrics.checkpointed(step.0, took);
        }
        self.traces.on_notice(notice);
    }
}
