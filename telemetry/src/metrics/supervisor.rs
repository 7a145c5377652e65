//! Metrics of the supervisor.

use super::{LinkBytes, PhaseLabel, Scrape, SpanTotals, seconds_histogram};
use crate::pipeline::SpanCounts;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;
use volary_core::machine::Committed;

type Float = Gauge<f64, AtomicU64>;
type Integer = Gauge<u64, AtomicU64>;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ExpertLabel {
    layer: u32,
    expert: u32,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct EventLabel {
    event: String,
}

/// The metrics of the supervisor.
#[derive(Debug, Default)]
pub struct SupervisorMetrics {
    scrape: Scrape,
    step: Integer,
    epoch: Integer,
    nodes: Integer,
    loss: Float,
    validation_loss: Float,
    aux_loss: Float,
    gate_entropy: Float,
    grad_norm: Float,
    learning_rate: Float,
    tokens_per_second: Float,
    tokens: Counter,
    dropped: Counter,
    skipped: Counter,
    expert_tokens: Family<ExpertLabel, Counter>,
    events: Family<EventLabel, Counter>,
    link_bytes: LinkBytes,
    steps_lost: Counter,
    checkpoint_step: Integer,
    checkpoint_bytes: Integer,
    store_bytes: Integer,
    spans: SpanTotals,
    refusals: super::Refusals,
    durations: Option<Durations>,
}

#[derive(Debug)]
struct Durations {
    step: Histogram,
    prepare: Histogram,
    journal: Histogram,
    checkpoint: Histogram,
    recovery: Family<PhaseLabel, Histogram>,
}

impl SupervisorMetrics {
    /// All metrics at zero.
    #[must_use]
    pub fn new() -> Self {
        let mut metrics = Self::default();
        let mut registry = Registry::default();
        metrics.register_training(&mut registry);
        metrics.register_cluster(&mut registry);
        metrics.durations = Some(Durations::register(&mut registry));
        metrics.spans.register(&mut registry);
        metrics.refusals.register(&mut registry);
        metrics.scrape.registry = registry;
        metrics
    }

    fn register_training(&self, r: &mut Registry) {
        r.register("volary_step", "The last committed step", self.step.clone());
        r.register(
            "volary_loss",
            "Mean cross-entropy loss of the last step, in nats per token",
            self.loss.clone(),
        );
        r.register(
            "volary_validation_loss",
            "Mean cross-entropy loss on held-out text, in nats per token",
            self.validation_loss.clone(),
        );
        r.register(
            "volary_aux_loss",
            "Load-balancing loss of the last step; 1 for a uniform load",
            self.aux_loss.clone(),
        );
        r.register(
            "volary_gate_entropy",
            "Mean entropy of the gates' probabilities, in nats; ln(experts) for a uniform gate",
            self.gate_entropy.clone(),
        );
        r.register(
            "volary_grad_norm",
            "L2 norm of the mean gradient before clipping",
            self.grad_norm.clone(),
        );
        r.register("volary_learning_rate", "Learning rate of the last step", self.learning_rate.clone());
        r.register(
            "volary_tokens_per_second",
            "Throughput of the last step, in tokens per second",
            self.tokens_per_second.clone(),
        );
        r.register("volary_tokens", "Tokens of all committed steps", self.tokens.clone());
        r.register(
            "volary_dropped_assignments",
            "Assignments dropped because an expert was at capacity",
            self.dropped.clone(),
        );
        r.register(
            "volary_skipped_updates",
            "Optimizer updates skipped because a gradient was not finite",
            self.skipped.clone(),
        );
        r.register(
            "volary_expert_tokens",
            "Tokens assigned to each expert; MoE layers are counted from 0",
            self.expert_tokens.clone(),
        );
    }

    fn register_cluster(&self, r: &mut Registry) {
        r.register("volary_epoch", "The placement epoch", self.epoch.clone());
        r.register("volary_nodes", "Nodes in the placement", self.nodes.clone());
        r.register("volary_events", "Cluster events by kind", self.events.clone());
        r.register(
            "volary_steps_lost",
            "Committed steps that were lost and repeated",
            self.steps_lost.clone(),
        );
        r.register_with_unit(
            "volary_cluster_link",
            "UDP bytes between nodes, as reported by the nodes",
            Unit::Bytes,
            self.link_bytes.family.clone(),
        );
        r.register(
            "volary_checkpoint_step",
            "The step of the last durable checkpoint",
            self.checkpoint_step.clone(),
        );
        r.register_with_unit(
            "volary_checkpoint",
            "Size of the blobs of all stored checkpoints",
            Unit::Bytes,
            self.checkpoint_bytes.clone(),
        );
        r.register_with_unit(
            "volary_store",
            "Size of the run's sled database on disk",
            Unit::Bytes,
            self.store_bytes.clone(),
        );
    }

    /// The metrics for a scrape.
    #[must_use]
    pub fn scrape(&self) -> &Scrape {
        &self.scrape
    }

    /// Records a committed step and the seconds since the previous one.
    pub fn committed(&self, committed: &Committed, seconds: f64) {
        self.step.set(committed.step.0);
        self.epoch.set(committed.epoch.0);
        self.nodes.set(committed.nodes.into());
        self.loss.set(committed.loss);
        self.aux_loss.set(committed.aux_loss);
        self.gate_entropy.set(committed.gate_entropy);
        self.grad_norm.set(committed.grad_norm);
        self.learning_rate.set(committed.update.rate);
        self.tokens_per_second.set(committed.tokens as f64 / seconds.max(1e-9));
        self.tokens.inc_by(committed.tokens);
        self.dropped.inc_by(committed.dropped);
        self.skipped.inc_by(u64::from(!committed.update.apply));
        for (layer, counts) in committed.load.iter().enumerate() {
            for (expert, &count) in counts.iter().enumerate() {
                let label = ExpertLabel { layer: layer as u32, expert: expert as u32 };
                self.expert_tokens.get_or_create(&label).inc_by(count);
            }
        }
        self.observe(|durations| &durations.step, seconds);
    }

    fn observe(&self, which: impl Fn(&Durations) -> &Histogram, seconds: f64) {
        if let Some(durations) = &self.durations {
            which(durations).observe(seconds);
        }
    }

    /// Records the duration from a step's start until all nodes had its gradient.
    pub fn prepared(&self, duration: Duration) {
        self.observe(|durations| &durations.prepare, duration.as_secs_f64());
    }

    /// Records the duration of a journal write.
    pub fn journal_written(&self, duration: Duration) {
        self.observe(|durations| &durations.journal, duration.as_secs_f64());
    }

    /// Records the validation loss.
    pub fn validated(&self, loss: f64) {
        self.validation_loss.set(loss);
    }

    /// Counts an event of the cluster.
    pub fn event(&self, name: &str) {
        self.events.get_or_create(&EventLabel { event: name.to_owned() }).inc();
    }

    /// Records a recovery: the seconds of its phases, and the number of repeated steps.
    pub fn recovered(&self, phases: &[(&'static str, f64)], steps_lost: u64) {
        self.steps_lost.inc_by(steps_lost);
        for &(phase, seconds) in phases {
            if let Some(durations) = &self.durations {
                durations.recovery.get_or_create(&PhaseLabel { phase }).observe(seconds);
            }
        }
    }

    /// Records a durable checkpoint, with the duration of its write where it is known.
    pub fn checkpointed(&self, step: u64, duration: Option<Duration>) {
        self.checkpoint_step.set(step);
        if let Some(duration) = duration {
            self.observe(|durations| &durations.checkpoint, duration.as_secs_f64());
        }
    }

    /// Sets the disk usage.
    pub fn disk(&self, store_bytes: u64, checkpoint_bytes: u64) {
        self.store_bytes.set(store_bytes);
        self.checkpoint_bytes.set(checkpoint_bytes);
    }

    /// Sets the totals of a link between two nodes.
    pub fn link(&self, node: &str, peer: &str, sent: u64, received: u64) {
        self.link_bytes.set(node, peer, sent, received);
    }

    /// Removes the links of nodes that are not connected.
    pub fn retain_nodes(&self, is_connected: impl Fn(&str) -> bool) {
        self.link_bytes.retain(|node, peer| is_connected(node) && is_connected(peer));
    }

    /// Sets the total of refused connections and frames.
    pub fn refused(&self, total: u64) {
        self.refusals.set(total);
    }

    /// Sets the totals of spans by their outcome.
    pub fn spans(&self, counts: &Arc<SpanCounts>) {
        self.spans.set(counts);
    }
}

impl Durations {
    fn register(r: &mut Registry) -> Self {
        let durations = Self {
            step: seconds_histogram(),
            prepare: seconds_histogram(),
            journal: seconds_histogram(),
            checkpoint: seconds_histogram(),
            recovery: Family::new_with_constructor(seconds_histogram),
        };
        let mut one =
            |name, help, of: &Histogram| r.register_with_unit(name, help, Unit::Seconds, of.clone());
        one("volary_step_duration", "Duration from one commit to the next", &durations.step);
        one(
            "volary_step_prepare",
            "Duration from a step's start until all nodes have its gradient",
            &durations.prepare,
        );
        one(
            "volary_journal_write",
            "Duration of a journal write, with its flush to disk",
            &durations.journal,
        );
        one(
            "volary_checkpoint_write",
            "Duration from a checkpoint's start until it is durable",
            &durations.checkpoint,
        );
        let help = "Duration of the phases from the loss of a node until the next commit";
        r.register_with_unit("volary_recovery", help, Unit::Seconds, durations.recovery.clone());
        durations
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use volary_core::update::{Moments, Update};
    use volary_core::{Epoch, Step};

    #[test]
    fn nodes_that_are_gone_have_no_series() {
        let metrics = SupervisorMetrics::new();
        for (node, peer) in [("a", "b"), ("b", "a"), ("a", "c"), ("c", "b")] {
            metrics.link(node, peer, 1, 2);
        }
        metrics.retain_nodes(|node| node != "c");
        let text = metrics.scrape().encode();
        assert!(text.contains("node=\"a\",peer=\"b\"") && text.contains("node=\"b\",peer=\"a\""), "{text}");
        assert!(!text.contains("\"c\""), "{text}");
        assert!(text.ends_with("# EOF\n"), "not OpenMetrics");
    }

    #[test]
    fn a_commit_updates_the_metrics() {
        let metrics = SupervisorMetrics::new();
        let update = Update { rate: 0.01, scale: 1.0, apply: false, moments: Moments::Decay(0.0) };
        let committed = Committed {
            step: Step(7),
            epoch: Epoch(3),
            loss: 2.5,
            aux_loss: 1.1,
            gate_entropy: 1.3,
            grad_norm: 0.5,
            update,
            tokens: 100,
            nodes: 3,
            load: vec![vec![1, 2], vec![3, 4]],
            dropped: 5,
        };
        metrics.committed(&committed, 0.5);
        metrics.recovered(&[("detected", 0.1), ("resumed", 0.2)], 0);
        let text = metrics.scrape().encode();
        for line in [
            "volary_step 7",
            "volary_loss 2.5",
            "volary_gate_entropy 1.3",
            "volary_tokens_per_second 200.0",
            "volary_expert_tokens_total{layer=\"1\",expert=\"0\"} 3",
            "volary_skipped_updates_total 1",
            "volary_recovery_seconds_sum{phase=\"resumed\"} 0.2",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} in\n{text}");
        }
    }
}
