//! Metrics of a node.

use super::{LinkBytes, PeerLabel, PhaseLabel, Scrape, SpanTotals, seconds_histogram, set_total};
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

/// A phase of a node's step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// A lane waits for a free slot of the node.
    Wait,
    /// The forward pass of a lane, with remote experts.
    Forward,
    /// The loss of a lane and its gradient.
    Loss,
    /// The backward pass of a lane.
    Backward,
    /// From the end of the last lane until all gradient sums have arrived.
    Reduce,
    /// From then until the commit of the step.
    Commit,
    /// The optimizer update.
    Apply,
}

impl Phase {
    const ALL: [Self; 7] =
        [Self::Wait, Self::Forward, Self::Loss, Self::Backward, Self::Reduce, Self::Commit, Self::Apply];

    /// The name in metrics and traces.
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

/// Which queue of the device executor.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct QueueLabel {
    queue: &'static str,
}

/// The metrics of a node.
///
/// ```
/// use std::time::Duration;
/// use volary_telemetry::metrics::{NodeMetrics, Phase};
///
/// let metrics = NodeMetrics::default();
/// metrics.phase(Phase::Forward, Duration::from_millis(3));
/// let text = metrics.scrape().encode();
/// assert!(text.contains("volary_node_phase_seconds_count{phase=\"forward\"} 1"));
/// ```
#[derive(Debug)]
pub struct NodeMetrics {
    scrape: Scrape,
    /// In the order of [`Phase`]: no lookup in a step.
    phases: [Histogram; 7],
    tokens: Counter,
    expert_tokens: Counter,
    step: Gauge<u64, AtomicU64>,
    epoch: Gauge<u64, AtomicU64>,
    queued: Family<QueueLabel, Gauge>,
    busy: Counter<f64, AtomicU64>,
    waited: Counter<f64, AtomicU64>,
    jobs: Counter,
    link_bytes: LinkBytes,
    round_trip: Family<PeerLabel, Gauge<f64, AtomicU64>>,
    spans: SpanTotals,
    refusals: super::Refusals,
}

/// The state and totals of a device executor.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ExecutorTotals {
    /// Queued jobs on which lanes wait.
    pub urgent: usize,
    /// Queued jobs on which only the end of the step waits.
    pub deferred: usize,
    /// Completed jobs.
    pub jobs: u64,
    /// Total compute time of its threads, in seconds.
    pub busy_seconds: f64,
    /// Total queueing time of its jobs, in seconds.
    pub waited_seconds: f64,
}

impl Default for NodeMetrics {
    fn default() -> Self {
        let mut registry = Registry::default();
        let by_phase = Family::<PhaseLabel, Histogram>::new_with_constructor(seconds_histogram);
        let phases =
            Phase::ALL.map(|phase| by_phase.get_or_create_owned(&PhaseLabel { phase: phase.name() }));
        let mut metrics = Self {
            phases,
            tokens: Counter::default(),
            expert_tokens: Counter::default(),
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
        let help = "Duration of the phases of a step on this node";
        registry.register_with_unit("volary_node_phase", help, Unit::Seconds, by_phase);
        metrics.register_step(&mut registry);
        metrics.register_executor(&mut registry);
        metrics.register_links(&mut registry);
        metrics.spans.register(&mut registry);
        metrics.refusals.register(&mut registry);
        metrics.scrape.registry = registry;
        metrics
    }
}

impl NodeMetrics {
    fn register_step(&self, r: &mut Registry) {
        r.register("volary_node_tokens", "Tokens processed by lanes on this node", self.tokens.clone());
        r.register(
            "volary_node_expert_tokens",
            "Tokens processed by experts on this node, in the forward pass",
            self.expert_tokens.clone(),
        );
        r.register("volary_node_step", "The last started step", self.step.clone());
        r.register("volary_node_epoch", "The placement epoch of the last started step", self.epoch.clone());
    }

    fn register_executor(&self, r: &mut Registry) {
        r.register("volary_executor_queue_depth", "Queued jobs of the device executor", self.queued.clone());
        r.register_with_unit(
            "volary_executor_busy",
            "Total compute time of the device executor's threads",
            Unit::Seconds,
            self.busy.clone(),
        );
        r.register_with_unit(
            "volary_executor_wait",
            "Total queueing time of the device executor's jobs",
            Unit::Seconds,
            self.waited.clone(),
        );
        r.register("volary_executor_jobs", "Completed jobs of the device executor", self.jobs.clone());
    }

    fn register_links(&self, r: &mut Registry) {
        r.register_with_unit(
            "volary_link",
            "UDP bytes exchanged with other nodes",
            Unit::Bytes,
            self.link_bytes.family.clone(),
        );
        r.register_with_unit(
            "volary_link_round_trip",
            "Estimated round-trip time to other nodes",
            Unit::Seconds,
            self.round_trip.clone(),
        );
    }

    /// The metrics for a scrape.
    #[must_use]
    pub fn scrape(&self) -> &Scrape {
        &self.scrape
    }

    /// Records the duration of a phase.
    pub fn phase(&self, phase: Phase, duration: Duration) {
        self.phases[phase as usize].observe(duration.as_secs_f64());
    }

    /// Counts the tokens of a lane.
    pub fn tokens(&self, count: usize) {
        self.tokens.inc_by(count as u64);
    }

    /// Counts the tokens that experts on this node have processed.
    pub fn expert_tokens(&self, count: u64) {
        self.expert_tokens.inc_by(count);
    }

    /// Records the start of a step.
    pub fn step_started(&self, epoch: u64, step: u64) {
        self.epoch.set(epoch);
        self.step.set(step);
    }

    /// Sets the state and totals of the executor.
    pub fn executor(&self, totals: ExecutorTotals) {
        for (queue, depth) in [("urgent", totals.urgent), ("deferred", totals.deferred)] {
            self.queued.get_or_create(&QueueLabel { queue }).set(depth as i64);
        }
        set_total(&self.jobs, totals.jobs);
        let set = |counter: &Counter<f64, AtomicU64>, seconds: f64| {
            counter.inner().store(seconds.to_bits(), std::sync::atomic::Ordering::Relaxed);
        };
        set(&self.busy, totals.busy_seconds);
        set(&self.waited, totals.waited_seconds);
    }

    /// Sets the totals of a link since its start.
    pub fn link(&self, node: &str, peer: &str, sent: u64, received: u64, round_trip: Duration) {
        self.link_bytes.set(node, peer, sent, received);
        let label = PeerLabel { node: node.to_owned(), peer: peer.to_owned() };
        self.round_trip.get_or_create(&label).set(round_trip.as_secs_f64());
    }

    /// Removes the links to peers that are not linked any more.
    pub fn retain_peers(&self, is_linked: impl Fn(&str) -> bool) {
        for (node, peer) in self.link_bytes.retain(|_, peer| is_linked(peer)) {
            self.round_trip.remove(&PeerLabel { node, peer });
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scrape_runs_its_hooks_and_is_open_metrics_text() {
        let metrics = Arc::new(NodeMetrics::default());
        let weak = Arc::downgrade(&metrics);
        metrics.scrape().before_scrape(move || {
            if let Some(metrics) = weak.upgrade() {
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
            "volary_node_phase_seconds_count{phase=\"backward\"} 1",
            "volary_executor_queue_depth{queue=\"urgent\"} 3",
            "volary_executor_busy_seconds_total 1.5",
            "volary_link_bytes_total{node=\"node-1\",peer=\"node-2\",direction=\"received\"} 20",
            "volary_link_round_trip_seconds{node=\"node-1\",peer=\"node-2\"} 0.00025",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} in\n{text}");
        }
        assert!(text.ends_with("# EOF\n"));
    }
}
