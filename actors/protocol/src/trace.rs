//! Which spans and tokens of a step are recorded. The supervisor decides; nodes carry it out.

use serde::{Deserialize, Serialize};
use std::sync::Arc;
use volary_core::Lane;
use volary_telemetry::{Span, SpanIdentity};

/// A token whose routing is recorded in a traced step.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SampledToken {
    /// Its lane.
    pub lane: Lane,
    /// Its position among the lane's tokens, row by row.
    pub position: u32,
    /// Its id in the vocabulary.
    pub id: u32,
    /// Its text: nodes have no tokenizer.
    pub text: String,
}

/// The trace that a command of the supervisor belongs to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TraceRequest {
    /// The trace.
    pub trace_id: [u8; 16],
    /// The supervisor's span, parent of the node's.
    pub span_id: [u8; 8],
    /// W3C trace flags.
    pub flags: u8,
    /// Lanes whose spans are all recorded; every other lane has one span.
    pub lanes: Vec<Lane>,
    /// The sampled tokens of these lanes.
    pub sampled_tokens: Vec<SampledToken>,
}

impl TraceRequest {
    /// A request below `span`, or nothing when the span is not recorded.
    #[must_use]
    pub fn below(span: &Span) -> Option<Self> {
        let SpanIdentity { trace_id, span_id, flags } = span.identity();
        span.is_recorded().then(|| Self { trace_id, span_id, flags, ..Self::default() })
    }

    /// The span that the request's spans have as their parent.
    #[must_use]
    pub fn identity(&self) -> SpanIdentity {
        SpanIdentity { trace_id: self.trace_id, span_id: self.span_id, flags: self.flags }
    }

    /// Whether all spans of a lane are recorded, and which of its tokens are sampled.
    #[must_use]
    pub fn of_lane(&self, lane: Lane) -> (bool, Arc<[SampledToken]>) {
        let sampled = self.sampled_tokens.iter().filter(|token| token.lane == lane).cloned();
        (self.lanes.contains(&lane), sampled.collect())
    }
}
