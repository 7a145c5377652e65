//! The traces that the supervisor starts: one per sampled step, and one for each membership change,
//! recovery, migration and checkpoint, linked to the step in which it happened.

use crate::timings::Cost;
use std::time::{Duration, Instant, SystemTime};
use volary_core::architecture::Architecture;
use volary_core::machine::Notice;
use volary_core::messages::{NodeCommand, Pass};
use volary_core::options::TelemetryOptions;
use volary_core::random::{Purpose, Stream};
use volary_core::{Epoch, Lane, Step};
use volary_protocol::{RunInfo, SampledToken, TraceRequest};
use volary_telemetry::{Scope, Span, SpanIdentity, Tracer};

/// The traces in progress.
pub(super) struct Traces {
    tracer: Tracer,
    options: TelemetryOptions,
    seed: u64,
    lanes: u32,
    tokens_of_lane: usize,
    /// Lanes of a traced step whose spans are all recorded.
    whole_lanes: u32,
    attempt: Option<Attempt>,
    /// The last traced step, for links.
    last_step: SpanIdentity,
    /// Whether the cluster changed, so that the next step is traced.
    changed: bool,
    /// Nodes that came or went, until the next commit.
    membership: Option<Span>,
    /// From a loss until the next commit.
    recovery: Option<Span>,
    /// From the placement that starts copies until the first commit that uses them.
    migration: Option<Span>,
    checkpoint: Option<(Span, Instant)>,
}

/// A step in flight.
struct Attempt {
    epoch: Epoch,
    step: Step,
    began: (SystemTime, Instant),
    /// Ends with the commit.
    span: Span,
    why: &'static str,
    /// The parent of the nodes' spans of the commit.
    committed: Option<TraceRequest>,
}

/// About how many spans a lane makes: its layers forward and back, and in MoE layers the gate, the
/// combination, a dispatch to each of a few nodes with its experts, and the sampled tokens.
fn spans_of_lane(architecture: &Architecture, options: &TelemetryOptions) -> usize {
    let moe = architecture.moe_layers().count();
    5 + 2 * architecture.layers + moe * (2 * (2 + 2 * 3) + options.tokens_per_lane)
}

impl Traces {
    pub(super) fn new(tracer: Tracer, options: TelemetryOptions, run: &RunInfo) -> Self {
        let whole = options.spans_per_step / spans_of_lane(&run.architecture, &options).max(1);
        let whole_lanes = run.training.lanes.min(u32::try_from(whole).unwrap_or(u32::MAX).max(1));
        Self {
            tracer,
            options,
            seed: run.seed,
            lanes: run.training.lanes,
            tokens_of_lane: run.training.tokens_per_lane(),
            whole_lanes,
            attempt: None,
            last_step: SpanIdentity::default(),
            changed: false,
            membership: None,
            recovery: None,
            migration: None,
            checkpoint: None,
        }
    }

    /// The trace that a command belongs to.
    pub(super) fn sent(&mut self, message: &NodeCommand) -> Option<TraceRequest> {
        match message {
            NodeCommand::Begin { epoch, step, pass: Pass::Train, lanes, .. } => {
                self.begin(*epoch, *step);
                let span = &self.attempt.as_ref()?.span;
                let mut traced = TraceRequest::below(span)?;
                traced.lanes =
                    lanes.iter().map(|(lane, _)| *lane).filter(|&l| self.is_whole(*step, l)).collect();
                traced.sampled_tokens = self.sample_tokens(*step, lanes);
                Some(traced)
            }
            NodeCommand::Commit { .. } => self.attempt.as_ref()?.committed.clone(),
            NodeCommand::Assign(_) => [&self.recovery, &self.migration, &self.membership]
                .into_iter()
                .flatten()
                .find_map(TraceRequest::below),
            NodeCommand::Checkpoint { .. } => TraceRequest::below(&self.checkpoint.as_ref()?.0),
            _ => None,
        }
    }

    fn begin(&mut self, epoch: Epoch, step: Step) {
        if self.attempt.as_ref().is_some_and(|attempt| (attempt.epoch, attempt.step) == (epoch, step)) {
            return;
        }
        let every = self.options.sample_every;
        let why = match () {
            () if every == 0 => "",
            () if std::mem::take(&mut self.changed) => "the cluster changed",
            () if step.is_multiple_of(every) => "sampled",
            () => "",
        };
        let began = (SystemTime::now(), Instant::now());
        let span = if why.is_empty() { Span::none() } else { self.step_span(epoch, step, began.0, why) };
        self.attempt = Some(Attempt { epoch, step, began, span, why, committed: None });
    }

    fn step_span(&mut self, epoch: Epoch, step: Step, began: SystemTime, why: &'static str) -> Span {
        let span = self.tracer.root("step", Some(began)).with("volary.step", step.0 as i64);
        let span = span.with("volary.epoch", epoch.0 as i64).with("volary.sampling_reason", why);
        self.last_step = span.identity();
        span
    }

    /// Which lanes are recorded in full rotates with the steps.
    fn is_whole(&self, step: Step, lane: Lane) -> bool {
        let first = (step.0 / self.options.sample_every.max(1) % u64::from(self.lanes.max(1))) as u32;
        (lane.0 + self.lanes - first) % self.lanes.max(1) < self.whole_lanes
    }

    /// Samples positions, the same ones whenever the step runs again. Who reads the lanes names their tokens.
    fn sample_tokens(&self, step: Step, lanes: &[(Lane, Vec<u32>)]) -> Vec<SampledToken> {
        let mut sampled_tokens = Vec::new();
        for (lane, _) in lanes.iter().filter(|(lane, _)| self.is_whole(step, *lane)) {
            let mut stream = Stream::new(self.seed, Purpose::Telemetry, &[step.0, lane.0.into()]);
            let count = self.tokens_of_lane;
            for _ in 0..self.options.tokens_per_lane.min(count) {
                let position = ((stream.next_f64() * count as f64) as usize).min(count.saturating_sub(1));
                let (position, text) = (position as u32, String::new());
                sampled_tokens.push(SampledToken { lane: *lane, position, id: 0, text });
            }
        }
        sampled_tokens.sort_by_key(|token| (token.lane, token.position));
        sampled_tokens.dedup();
        sampled_tokens
    }

    /// A node is prepared to commit the step.
    pub(super) fn prepared(&mut self, node: &str) {
        if let Some(attempt) = &mut self.attempt
            && attempt.span.is_recorded()
        {
            attempt.span.event("prepared", "volary.node", node.to_owned());
        }
    }

    /// The step's time so far, and the span of its commit.
    pub(super) fn committing(&self) -> (Option<Duration>, Span) {
        match &self.attempt {
            Some(attempt) => (Some(attempt.began.1.elapsed()), attempt.span.scope().span("commit")),
            None => (None, Span::none()),
        }
    }

    /// A step is journaled: its span ends, and those of the changes that it completes.
    pub(super) fn committed(&mut self, loss: f64, costs: &[Cost]) {
        let this = self.attempt.as_mut().map(|attempt| {
            attempt.span.set("volary.loss", loss);
            attempt.committed = TraceRequest::below(&attempt.span);
            std::mem::replace(&mut attempt.span, Span::none()).identity()
        });
        for cost in costs {
            let span = match cost {
                Cost::Recovered { .. } => self.recovery.take(),
                Cost::Resized { .. } => self.migration.take(),
            };
            let Some(mut span) = span else { continue };
            span.link(this.unwrap_or_default());
            cost.parts().into_iter().for_each(|(part, ms)| span.set(part, ms));
        }
        self.membership = None;
    }

    /// Something happened.
    pub(super) fn on_notice(&mut self, notice: &Notice) {
        match notice {
            Notice::Joined { node, .. } => self.changed_by("joined", &node.0),
            Notice::Returned { node, .. } => self.changed_by("returned", &node.0),
            Notice::Lost { node, .. } => self.changed_by("lost", &node.0),
            Notice::Fenced { node, .. } => self.changed_by("fenced", &node.0),
            Notice::Draining { node, .. } => self.changed_by("draining", &node.0),
            Notice::Left { node } => self.changed_by("left", &node.0),
            Notice::Aborted { epoch, step, reason } => self.aborted(*epoch, *step, reason),
            Notice::WentBack { from, to, .. }
            | Notice::WentBackFromNan { from, to, .. }
            | Notice::WentBackFromDifference { from, to, .. } => {
                let span = self.recovery.get_or_insert_with(|| self.tracer.root("recovery", None));
                span.set("volary.rollback.from_step", from.0 as i64);
                span.set("volary.rollback.to_step", to.0 as i64);
            }
            Notice::Placed { epoch, step, cause, learning, .. } => {
                self.changed = true;
                if *learning > 0 && self.migration.is_none() {
                    let mut span = self.tracer.root("migration", None).with("volary.cause", cause.clone());
                    span.set("volary.step", step.0 as i64);
                    span.set("volary.epoch", epoch.0 as i64);
                    span.set("volary.shards", *learning as i64);
                    span.link(self.last_step);
                    self.migration = Some(span);
                }
            }
            Notice::MigrationFailed { reason, .. } => {
                if let Some(mut span) = self.migration.take() {
                    span.fail(reason);
                }
            }
            Notice::Checkpoint { .. } => self.checkpoint = None,
            Notice::CheckpointFailed { reason, .. } => {
                if let Some((mut span, _)) = self.checkpoint.take() {
                    span.fail(reason);
                }
            }
            Notice::Migrated { .. }
            | Notice::NoRoom { .. }
            | Notice::ArithmeticMixed { .. }
            | Notice::DrainDeferred { .. }
            | Notice::Emptying { .. }
            | Notice::LearnerLate { .. }
            | Notice::CheckpointPassed { .. }
            | Notice::GivingUp { .. }
            | Notice::Rebalancing { .. }
            | Notice::ReplicasDiffer { .. } => {}
        }
    }

    /// The trace of a change lasts until the first commit after it.
    fn changed_by(&mut self, what: &'static str, node: &str) {
        let last_step = self.last_step;
        let span = self.membership.get_or_insert_with(|| {
            let mut span = self.tracer.root("membership", None);
            span.link(last_step);
            span
        });
        span.event(what, "volary.node", node.to_owned());
        span.set("volary.membership_change", what);
        span.set("volary.node", node.to_owned());
    }

    /// A step that is not sampled is recorded too when it is aborted.
    fn aborted(&mut self, epoch: Epoch, step: Step, reason: &str) {
        if let Some(Attempt { began, mut span, why, .. }) =
            self.attempt.take_if(|attempt| (attempt.epoch, attempt.step) == (epoch, step))
        {
            if why.is_empty() && self.options.sample_every > 0 {
                span = self.step_span(epoch, step, began.0, "aborted");
            }
            span.fail(reason);
        }
        let last_step = self.last_step;
        let span = self.recovery.get_or_insert_with(|| self.tracer.root("recovery", None));
        span.set("volary.cause", reason.to_owned());
        span.set("volary.step", step.0 as i64);
        span.link(last_step);
    }

    /// A checkpoint starts: the scope of its spans.
    pub(super) fn checkpoint(&mut self, step: Step, shards: usize) -> Scope {
        let mut span = self.tracer.root("checkpoint", None).with("volary.step", step.0 as i64);
        span.set("volary.shards", shards as i64);
        span.link(self.last_step);
        let scope = span.scope();
        self.checkpoint = Some((span, Instant::now()));
        scope
    }

    /// The time of the checkpoint in progress so far.
    pub(super) fn checkpoint_took(&self) -> Option<Duration> {
        self.checkpoint.as_ref().map(|(_, began)| began.elapsed())
    }
}
