//! OpenMetrics of supervisor and node: a registry each, with hooks that run before a scrape.
//!
//! Names follow the Prometheus conventions: `volary_` as namespace, base units as suffix, `_total` for
//! counters (appended by the encoder).

mod model_server;
mod node;
mod supervisor;

pub use model_server::ModelServerMetrics;
pub use node::{ExecutorTotals, NodeMetrics, Phase};
pub use supervisor::SupervisorMetrics;

use crate::limits::{HISTOGRAM_BUCKETS, HISTOGRAM_SECONDS_MIN};
use crate::pipeline::SpanCounts;
use parking_lot::Mutex;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// The content type of [`Scrape::encode`].
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

type Hook = Box<dyn Fn() + Send>;

/// The metrics of one process.
#[derive(Default)]
pub struct Scrape {
    registry: Registry,
    hooks: Mutex<Vec<Hook>>,
}

impl std::fmt::Debug for Scrape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Scrape")
    }
}

impl Scrape {
    /// Runs `update` before each scrape.
    pub fn before_scrape(&self, update: impl Fn() + Send + 'static) {
        self.hooks.lock().push(Box::new(update));
    }

    /// All metrics in the OpenMetrics text format.
    #[must_use]
    pub fn encode(&self) -> String {
        self.hooks.lock().iter().for_each(|update| update());
        let mut text = String::new();
        // Writing to a string cannot fail.
        let _ = prometheus_client::encoding::text::encode(&mut text, &self.registry);
        text
    }
}

/// A phase of a step or of a recovery.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PhaseLabel {
    phase: &'static str,
}

/// A link and a direction.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct LinkLabel {
    node: String,
    peer: String,
    direction: &'static str,
}

/// Bytes of links, by direction.
#[derive(Clone, Debug, Default)]
struct LinkBytes {
    family: Family<LinkLabel, Counter>,
    /// The links with series.
    known: Arc<Mutex<BTreeSet<(String, String)>>>,
}

impl LinkBytes {
    fn set(&self, node: &str, peer: &str, sent: u64, received: u64) {
        for (direction, bytes) in [("sent", sent), ("received", received)] {
            let label = LinkLabel { node: node.to_owned(), peer: peer.to_owned(), direction };
            set_total(&self.family.get_or_create(&label), bytes);
        }
        self.known.lock().insert((node.to_owned(), peer.to_owned()));
    }

    /// Removes the series of the links that `keep` rejects, and returns those links.
    fn retain(&self, keep: impl Fn(&str, &str) -> bool) -> Vec<(String, String)> {
        let gone = |(node, peer): &(String, String)| !keep(node, peer);
        let gone: Vec<_> = self.known.lock().extract_if(.., gone).collect();
        for (node, peer) in &gone {
            for direction in ["sent", "received"] {
                self.family.remove(&LinkLabel { node: node.clone(), peer: peer.clone(), direction });
            }
        }
        gone
    }
}

/// A link between two nodes.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PeerLabel {
    node: String,
    peer: String,
}

/// A histogram of durations from half a millisecond to half a minute.
fn seconds_histogram() -> Histogram {
    Histogram::new(exponential_buckets(HISTOGRAM_SECONDS_MIN, 2.0, HISTOGRAM_BUCKETS))
}

/// Sets a counter to a total that is counted elsewhere.
fn set_total(counter: &Counter, total: u64) {
    counter.inner().store(total, Ordering::Relaxed);
}

/// Refused connections and frames.
#[derive(Debug, Default)]
struct Refusals(Counter);

impl Refusals {
    fn register(&self, registry: &mut Registry) {
        let help =
            "Refused connections and frames: unauthenticated, malformed, or from peers outside the run";
        registry.register("volary_refusals", help, self.0.clone());
    }

    fn set(&self, total: u64) {
        self.0.inc_by(total.saturating_sub(self.0.get()));
    }
}

/// Spans of this process by their outcome.
#[derive(Clone, Debug, Default)]
struct SpanTotals {
    stored: Counter,
    exported: Counter,
    dropped: Counter,
}

impl SpanTotals {
    fn register(&self, registry: &mut Registry) {
        registry.register("volary_spans_stored", "Spans stored with the run", self.stored.clone());
        registry.register("volary_spans_exported", "Spans exported to a collector", self.exported.clone());
        registry.register(
            "volary_spans_dropped",
            "Spans dropped because a queue was full, a bound was exceeded or the collector failed",
            self.dropped.clone(),
        );
    }

    fn set(&self, counts: &Arc<SpanCounts>) {
        let all: [(&Counter, &AtomicU64); 3] = [
            (&self.stored, &counts.stored),
            (&self.exported, &counts.exported),
            (&self.dropped, &counts.dropped),
        ];
        all.into_iter().for_each(|(counter, total)| set_total(counter, total.load(Ordering::Relaxed)));
    }
}
