//! What a node measures.

use super::{LinkBytes, PartLabel, PeerLabel, Scrape, SpanTotals, seconds_histogram, set_total};
use crate::pipeline::SpanCounts;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

/// A part of a node's step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// A lane waits until the node has a place for it.
    Wait,
    /// A lane's way from tokens to the last layer, experts elsewhere included.
    Forward,
    /// A lane's loss and its gradient.
    Loss,
    /// A lane's way back.
    Backward,
    /// From the last lane's end until the sums of all gradients are here.
    Reduce,
    /// From then until the commit.
    Commit,
    /// The optimizer.
    Apply,
}

impl Phase {
    const ALL: [Self; 7] =
        [Self::Wait, Self::Forward, Self::Loss, Self::Backward, Self::Reduce, Self::Commit, Self::Apply];

    /// Its name in figures and traces.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Wait => "wait",
            Self::Forward => "forward",
            Self::Loss => "loss",
            Self::Backward => "backward",
            Self::Reduce => "reduce",
            Self::Commit => "commit",
            Self::Apply => "apply",
        }
    }
}

/// What a node measures.
#[derive(Debug)]
pub struct NodeMetrics {
    scrape: Scrape,
    /// By [`Phase`], in its order: no look-up on the way of a lane.
    phases: [Histogram; 7],
    tokens: Counter,
    rows: Counter,
    /// The step and the placement that were begun last.
    step: Gauge<u64, AtomicU64>,
    epoch: Gauge<u64, AtomicU64>,
    queued: Family<super::PartLabel, Gauge>,
    busy: Counter<f64, AtomicU64>,
    waited: Counter<f64, AtomicU64>,
    jobs: Counter,
    link_bytes: LinkBytes,
    round_trip: Family<PeerLabel, Gauge<f64, AtomicU64>>,
    spans: SpanTotals,
    refusals: super::Refusals,
}

/// What a device executor has done.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ExecutorTotals {
    /// Jobs that wait and that lanes wait for.
    pub urgent: usize,
    /// Jobs that wait and that only the end of the step waits for.
    pub deferred: usize,
    /// Jobs done.
    pub jobs: u64,
    /// Seconds that its threads have computed, added up.
    pub busy_seconds: f64,
    /// Seconds that jobs have waited, added up.
    pub waited_seconds: f64,
}

impl Default for NodeMetrics {
    fn default() -> Self {
        let mut registry = Registry::default();
        let by_phase = Family::<PartLabel, Histogram>::new_with_constructor(seconds_histogram);
        let phases = Phase::ALL.map(|phase| by_phase.get_or_create_owned(&PartLabel { part: phase.name() }));
        let mut metrics = Self {
            phases,
            tokens: Counter::default(),
            rows: Counter::default(),
            step: Gauge::default(),
            epoch: Gauge::default(),
            queued: Family::default(),
            busy: Counter::default(),
            waited: Counter::default(),
            jobs: Counter::default(),
            link_bytes: LinkBytes::default(),
            round_trip: Family::default(),
            spans: SpanTotals::default(),
            refusals: super::Refusals::default(),
            scrape: Scrape::default(),
        };
        registry.register_with_unit(
            "volary_node_phase",
            "Parts of a step on this node",
            Unit::Seconds,
            by_phase,
        );
        registry.register(
            "volary_node_tokens",
            "Tokens that lanes on this node were trained on",
            metrics.tokens.clone(),
        );
        registry.register(
            "volary_node_expert_rows",
            "Rows that experts on this node computed forward",
            metrics.rows.clone(),
        );
        registry.register("volary_node_step", "The step that was begun last", metrics.step.clone());
        registry.register("volary_node_epoch", "The placement that it belongs to", metrics.epoch.clone());
        registry.register(
            "volary_executor_queue_depth",
            "Jobs that wait for the device",
            metrics.queued.clone(),
        );
        registry.register_with_unit(
            "volary_executor_busy",
            "What the device's threads have computed",
            Unit::Seconds,
            metrics.busy.clone(),
        );
        registry.register_with_unit(
            "volary_executor_wait",
            "How long jobs have waited for the device",
            Unit::Seconds,
            metrics.waited.clone(),
        );
        registry.register("volary_executor_jobs", "Jobs done on the device", metrics.jobs.clone());
        registry.register_with_unit(
            "volary_link",
            "UDP bytes of the links to other nodes",
            Unit::Bytes,
            metrics.link_bytes.0.clone(),
        );
        registry.register_with_unit(
            "volary_link_round_trip",
            "Round trips to other nodes",
            Unit::Seconds,
            metrics.round_trip.clone(),
        );
        metrics.spans.register(&mut registry);
        metrics.refusals.register(&mut registry);
        metrics.scrape.registry = registry;
        metrics
    }
}

impl NodeMetrics {
    /// For whoever scrapes.
    #[must_use]
    pub fn scrape(&self) -> &Scrape {
        &self.scrape
    }

    /// A part of a step took so long.
    pub fn phase(&self, phase: Phase, took: Duration) {
        self.phases[phase as usize].observe(took.as_secs_f64());
    }

    /// A lane was trained on so many tokens.
    pub fn tokens(&self, count: usize) {
        self.tokens.inc_by(count as u64);
    }

    /// Experts here computed so many rows forward.
    pub fn rows(&self, count: u64) {
        self.rows.inc_by(count);
    }

    /// A step was begun.
    pub fn begun(&self, epoch: u64, step: u64) {
        self.epoch.set(epoch);
        self.step.set(step);
    }

    /// What the executor has done so far.
    pub fn executor(&self, totals: ExecutorTotals) {
        for (part, depth) in [("urgent", totals.urgent), ("deferred", totals.deferred)] {
            self.queued.get_or_create(&PartLabel { part }).set(depth as i64);
        }
        set_total(&self.jobs, totals.jobs);
        let set = |counter: &Counter<f64, AtomicU64>, seconds: f64| {
            counter.inner().store(seconds.to_bits(), std::sync::atomic::Ordering::Relaxed);
        };
        set(&self.busy, totals.busy_seconds);
        set(&self.waited, totals.waited_seconds);
    }

    /// What a link has carried since it was made.
    pub fn link(&self, node: &str, peer: &str, sent: u64, received: u64, round_trip: Duration) {
        self.link_bytes.set(node, peer, sent, received);
        let label = PeerLabel { node: node.to_owned(), peer: peer.to_owned() };
        self.round_trip.get_or_create(&label).set(round_trip.as_secs_f64());
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_looked_up_when_somebody_asks_and_the_text_is_open_metrics() {
        let metrics = Arc::new(NodeMetrics::default());
        let own = Arc::downgrade(&metrics);
        metrics.scrape().before_scrape(move || {
            if let Some(metrics) = own.upgrade() {
                metrics.executor(ExecutorTotals {
                    urgent: 3,
                    busy_seconds: 1.5,
                    ..ExecutorTotals::default()
                });
            }
        });
        metrics.phase(Phase::Backward, Duration::from_millis(3));
        metrics.link("node-1", "node-2", 10, 20, Duration::from_micros(250));
        let text = metrics.scrape().encode();
        for line in [
            "volary_node_phase_seconds_count{part=\"backward\"} 1",
            "volary_executor_queue_depth{part=\"urgent\"} 3",
            "volary_executor_busy_seconds_total 1.5",
            "volary_link_bytes_total{node=\"node-1\",peer=\"node-2\",direction=\"received\"} 20",
            "volary_link_round_trip_seconds{node=\"node-1\",peer=\"node-2\"} 0.00025",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} in\n{text}");
        }
        assert!(text.ends_with("# EOF\n"));
    }
}
