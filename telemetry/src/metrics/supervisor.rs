//! What the supervisor measures.

use super::{LinkBytes, PartLabel, Scrape, SpanTotals, seconds_histogram};
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
type Whole = Gauge<u64, AtomicU64>;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ExpertLabel {
    layer: u32,
    expert: u32,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct EventLabel {
    event: String,
}

/// What the supervisor measures.
#[derive(Debug, Default)]
pub struct SupervisorMetrics {
    scrape: Scrape,
    step: Whole,
    epoch: Whole,
    nodes: Whole,
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
    checkpoint_step: Whole,
    checkpoint_bytes: Whole,
    store_bytes: Whole,
    spans: SpanTotals,
    refusals: super::Refusals,
    timed: Option<Timed>,
}

#[derive(Debug)]
struct Timed {
    step: Histogram,
    prepare: Histogram,
    journal: Histogram,
    checkpoint: Histogram,
    recovery: Family<PartLabel, Histogram>,
}

impl SupervisorMetrics {
    /// All figures, at nothing.
    #[must_use]
    pub fn new() -> Self {
        let mut metrics = Self::default();
        let mut registry = Registry::default();
        metrics.register_training(&mut registry);
        metrics.register_cluster(&mut registry);
        metrics.timed = Some(Timed::register(&mut registry));
        metrics.spans.register(&mut registry);
        metrics.refusals.register(&mut registry);
        metrics.scrape.registry = registry;
        metrics
    }

    fn register_training(&self, r: &mut Registry) {
        r.register("volary_step", "The last committed step", self.step.clone());
        r.register("volary_loss", "Mean cross-entropy of the last step, nats per token", self.loss.clone());
        r.register(
            "volary_validation_loss",
            "Mean cross-entropy on held-out text, nats per token",
            self.validation_loss.clone(),
        );
        r.register(
            "volary_aux_loss",
            "Load-balancing loss of the last step; 1 when even",
            self.aux_loss.clone(),
        );
        r.register(
            "volary_gate_entropy",
            "Mean entropy of the gates' choices, nats; ln(experts) when undecided",
            self.gate_entropy.clone(),
        );
        r.register("volary_grad_norm", "Norm of the mean gradient before clipping", self.grad_norm.clone());
        r.register("volary_learning_rate", "Learning rate of the last step", self.learning_rate.clone());
        r.register(
            "volary_tokens_per_second",
            "Tokens per second of the last step",
            self.tokens_per_second.clone(),
        );
        r.register("volary_tokens", "Tokens trained on", self.tokens.clone());
        r.register(
            "volary_dropped_assignments",
            "Assignments dropped for want of capacity",
            self.dropped.clone(),
        );
        r.register(
            "volary_skipped_updates",
            "Updates skipped since a gradient was not finite",
            self.skipped.clone(),
        );
        r.register(
            "volary_expert_tokens",
            "Assignments by MoE layer (counted from 0 among them) and expert",
            self.expert_tokens.clone(),
        );
    }

    fn register_cluster(&self, r: &mut Registry) {
        r.register("volary_epoch", "The number of the placement", self.epoch.clone());
        r.register("volary_nodes", "Nodes in the placement", self.nodes.clone());
        r.register("volary_events", "What happened to the cluster, by kind", self.events.clone());
        r.register("volary_steps_lost", "Committed steps that had to be done again", self.steps_lost.clone());
        r.register_with_unit(
            "volary_cluster_link",
            "UDP bytes between nodes, as they report them",
            Unit::Bytes,
            self.link_bytes.0.clone(),
        );
        r.register(
            "volary_checkpoint_step",
            "The step of the last durable checkpoint",
            self.checkpoint_step.clone(),
        );
        r.register_with_unit(
            "volary_checkpoint",
            "Bytes of the blobs of all checkpoints that are kept",
            Unit::Bytes,
            self.checkpoint_bytes.clone(),
        );
        r.register_with_unit(
            "volary_store",
            "Bytes of the run's sled database on disk",
            Unit::Bytes,
            self.store_bytes.clone(),
        );
    }

    /// For whoever scrapes.
    #[must_use]
    pub fn scrape(&self) -> &Scrape {
        &self.scrape
    }

    /// A step was committed, so long after the one before.
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
        self.observe(|timed| &timed.step, seconds);
    }

    fn observe(&self, which: impl Fn(&Timed) -> &Histogram, seconds: f64) {
        if let Some(timed) = &self.timed {
            which(timed).observe(seconds);
        }
    }

    /// The lanes of a step took so long, sums included.
    pub fn prepared(&self, took: Duration) {
        self.observe(|timed| &timed.prepare, took.as_secs_f64());
    }

    /// The journal took so long for a step.
    pub fn journalled(&self, took: Duration) {
        self.observe(|timed| &timed.journal, took.as_secs_f64());
    }

    /// The held-out loss was measured.
    pub fn validated(&self, loss: f64) {
        self.validation_loss.set(loss);
    }

    /// Something happened to the cluster.
    pub fn event(&self, name: &str) {
        self.events.get_or_create(&EventLabel { event: name.to_owned() }).inc();
    }

    /// The run went on after a loss; the parts of the time that it took.
    pub fn recovered(&self, parts: &[(&'static str, f64)], steps_lost: u64) {
        self.steps_lost.inc_by(steps_lost);
        for &(part, seconds) in parts {
            if let Some(timed) = &self.timed {
                timed.recovery.get_or_create(&PartLabel { part }).observe(seconds);
            }
        }
    }

    /// A checkpoint became durable.
    pub fn checkpointed(&self, step: u64, took: Option<Duration>) {
        self.checkpoint_step.set(step);
        if let Some(took) = took {
            self.observe(|timed| &timed.checkpoint, took.as_secs_f64());
        }
    }

    /// What lies on the disk.
    pub fn disk(&self, store_bytes: u64, checkpoint_bytes: u64) {
        self.store_bytes.set(store_bytes);
        self.checkpoint_bytes.set(checkpoint_bytes);
    }

    /// What a node's link to another one has carried.
    pub fn link(&self, node: &str, peer: &str, sent: u64, received: u64) {
        self.link_bytes.set(node, peer, sent, received);
    }

    /// So many connections and frames were turned away so far.
    pub fn refused(&self, total: u64) {
        self.refusals.look(total);
    }

    /// What became of the spans.
    pub fn spans(&self, counts: &Arc<SpanCounts>) {
        self.spans.look(counts);
    }
}

impl Timed {
    fn register(r: &mut Registry) -> Self {
        let timed = Self {
            step: seconds_histogram(),
            prepare: seconds_histogram(),
            journal: seconds_histogram(),
            checkpoint: seconds_histogram(),
            recovery: Family::new_with_constructor(seconds_histogram),
        };
        let mut one =
            |name, help, of: &Histogram| r.register_with_unit(name, help, Unit::Seconds, of.clone());
        one("volary_step_time", "From one commit to the next", &timed.step);
        one(
            "volary_step_prepare",
            "From a step's beginning until all nodes have its whole gradient",
            &timed.prepare,
        );
        one("volary_step_journal", "Until a commit is in sled, flushed and synced", &timed.journal);
        one(
            "volary_checkpoint_write",
            "From a checkpoint's beginning until it is durable",
            &timed.checkpoint,
        );
        let help = "Parts of the time from a loss until the next commit";
        r.register_with_unit("volary_recovery", help, Unit::Seconds, timed.recovery.clone());
        timed
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use volary_core::schedule::Update;

    #[test]
    fn a_commit_shows_in_the_figures() {
        let metrics = SupervisorMetrics::new();
        let update = Update { rate: 0.01, scale: 1.0, apply: false };
        let committed = Committed {
            step: 7,
            epoch: 3,
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
            "volary_recovery_seconds_sum{part=\"resumed\"} 0.2",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} in\n{text}");
        }
    }
}
