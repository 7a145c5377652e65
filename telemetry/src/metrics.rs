//! OpenMetrics of a process: a registry with what supervisor and node measure, and what is looked up when somebody asks.

mod node;
mod supervisor;

pub use node::{ExecutorTotals, NodeMetrics, Phase};
pub use supervisor::SupervisorMetrics;

use crate::pipeline::SpanCounts;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The content type of [`Scrape::encode`].
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

type Look = Box<dyn Fn() + Send>;

/// What one process has measured, for whoever scrapes it.
#[derive(Default)]
pub struct Scrape {
    registry: Registry,
    /// What is looked up only when somebody asks.
    looks: Mutex<Vec<Look>>,
}

impl std::fmt::Debug for Scrape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Scrape")
    }
}

impl Scrape {
    fn looks(&self) -> MutexGuard<'_, Vec<Look>> {
        self.looks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Before each scrape, `look` brings figures up to date.
    pub fn before_scrape(&self, look: impl Fn() + Send + 'static) {
        self.looks().push(Box::new(look));
    }

    /// All figures in the OpenMetrics text format.
    #[must_use]
    pub fn encode(&self) -> String {
        self.looks().iter().for_each(|look| look());
        let mut text = String::new();
        // Writing to a string cannot fail.
        let _ = prometheus_client::encoding::text::encode(&mut text, &self.registry);
        text
    }
}

/// A part of a step.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PartLabel {
    part: &'static str,
}

/// A link and a direction.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct LinkLabel {
    node: String,
    peer: String,
    direction: &'static str,
}

/// What links have carried, in both directions.
#[derive(Clone, Debug, Default)]
struct LinkBytes(Family<LinkLabel, Counter>);

impl LinkBytes {
    fn set(&self, node: &str, peer: &str, sent: u64, received: u64) {
        for (direction, bytes) in [("sent", sent), ("received", received)] {
            let label = LinkLabel { node: node.to_owned(), peer: peer.to_owned(), direction };
            set_total(&self.0.get_or_create(&label), bytes);
        }
    }
}

/// A link.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PeerLabel {
    node: String,
    peer: String,
}

/// From half a millisecond to about half a minute.
fn seconds_histogram() -> Histogram {
    Histogram::new(exponential_buckets(0.0005, 2.0, 17))
}

/// Sets a counter to a total that somebody else counts.
fn set_total(counter: &Counter, total: u64) {
    counter.inner().store(total, Ordering::Relaxed);
}

/// Connections and frames that were turned away.
#[derive(Debug, Default)]
struct Refusals(Counter);

impl Refusals {
    fn register(&self, registry: &mut Registry) {
        let what =
            "Connections and frames that were turned away: strangers, rubbish, peers with no part in the run";
        registry.register("volary_refused", what, self.0.clone());
    }

    /// There were so many so far.
    fn look(&self, total: u64) {
        self.0.inc_by(total.saturating_sub(self.0.get()));
    }
}

/// What became of this process's spans.
#[derive(Clone, Debug, Default)]
struct SpanTotals {
    kept: Counter,
    exported: Counter,
    dropped: Counter,
}

impl SpanTotals {
    fn register(&self, registry: &mut Registry) {
        registry.register("volary_spans_kept", "Spans kept with the run", self.kept.clone());
        registry.register("volary_spans_exported", "Spans that a collector took", self.exported.clone());
        registry.register(
            "volary_spans_dropped",
            "Spans dropped for want of room or of a collector",
            self.dropped.clone(),
        );
    }

    fn look(&self, counts: &Arc<SpanCounts>) {
        let all: [(&Counter, &AtomicU64); 3] = [
            (&self.kept, &counts.kept),
            (&self.exported, &counts.exported),
            (&self.dropped, &counts.dropped),
        ];
        all.into_iter().for_each(|(counter, total)| set_total(counter, total.load(Ordering::Relaxed)));
    }
}
