//! What a lane carries through a traced step: where its spans go, and which of its tokens are sampled_tokens.

use serde::{Deserialize, Serialize};
use std::sync::Arc;
use volary_core::Lane;
use volary_core::compute::Compute;
use volary_core::dispatch::{Dispatch, TOP_K};
use volary_core::placement::Placement;
use volary_telemetry::{Scope, Span, SpanIdentity};

/// A token that is sampled_tokens through a step.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SampledToken {
    pub(crate) lane: Lane,
    /// Its place among the lane's tokens, row by row.
    pub(crate) position: u32,
    /// Its number in the vocabulary.
    pub(crate) id: u32,
    /// What it says: nodes have no tokenizer.
    pub(crate) text: String,
}

/// What goes with a message of the supervisor that belongs to a trace.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct TraceRequest {
    pub(crate) trace_id: [u8; 16],
    pub(crate) span_id: [u8; 8],
    pub(crate) flags: u8,
    /// Lanes with all their spans; the others have one each.
    pub(crate) lanes: Vec<Lane>,
    pub(crate) sampled_tokens: Vec<SampledToken>,
}

impl TraceRequest {
    pub(crate) fn below(span: &Span) -> Option<Self> {
        let SpanIdentity { trace_id, span_id, flags } = span.identity();
        span.is_recorded().then(|| Self { trace_id, span_id, flags, ..Self::default() })
    }

    pub(crate) fn identity(&self) -> SpanIdentity {
        SpanIdentity { trace_id: self.trace_id, span_id: self.span_id, flags: self.flags }
    }

    /// Whether a lane is to have all its spans, and which of its tokens are sampled_tokens.
    pub(crate) fn of_lane(&self, lane: Lane) -> (bool, Arc<[SampledToken]>) {
        let own = self.sampled_tokens.iter().filter(|token| token.lane == lane).cloned();
        (self.lanes.contains(&lane), own.collect())
    }
}

/// What a lane carries; empty in a step that is not traced.
#[derive(Clone, Debug, Default)]
pub(crate) struct TraceContext {
    pub(crate) scope: Scope,
    pub(crate) sampled_tokens: Arc<[SampledToken]>,
}

impl TraceContext {
    /// A span of one layer.
    pub(crate) fn span(&self, name: &'static str, layer: u16) -> Span {
        self.scope.span(name).with("volary.layer", i64::from(layer))
    }
}

/// The gate weights of the sampled_tokens tokens, looked up on the device; none where none is sampled_tokens.
pub(crate) fn weights_of<B: Compute>(
    backend: &B,
    saved: &B::Saved,
    sampled_tokens: &[SampledToken],
) -> volary_core::compute::Computed<Vec<[f64; TOP_K]>> {
    if sampled_tokens.is_empty() {
        return Ok(Vec::new());
    }
    let positions: Vec<usize> = sampled_tokens.iter().map(|token| token.position as usize).collect();
    backend.gate_weights(saved, &positions)
}

/// A span for each sampled_tokens token of a lane in one layer: it lasts from the gate until what its experts made of it is combined.
pub(crate) fn token_spans(
    trace: &TraceContext,
    layer: u16,
    placement: &Placement,
    choices: &[Vec<i64>; TOP_K],
    dispatch: &Dispatch,
    weights: &[[f64; TOP_K]],
) -> Vec<Span> {
    let span = |(token, weights): (&SampledToken, &[f64; TOP_K])| {
        let mut span = trace
            .span("token", layer)
            .with("volary.lane", i64::from(token.lane))
            .with("volary.token.position", i64::from(token.position))
            .with("volary.token.id", i64::from(token.id))
            .with("volary.token.text", token.text.clone());
        let names = [
            ("first", "volary.expert.first", "volary.expert.first.node", "volary.gate.first"),
            ("second", "volary.expert.second", "volary.expert.second.node", "volary.gate.second"),
        ];
        let mut dropped = Vec::new();
        for (k, (which, expert_key, node_key, gate_key)) in names.into_iter().enumerate() {
            let position = token.position as usize;
            let Some(expert) = choices[k].get(position).and_then(|&e| u16::try_from(e).ok()) else {
                continue;
            };
            span.set(expert_key, i64::from(expert));
            span.set(gate_key, weights[k]);
            let shard = volary_core::ShardId::Expert { layer, expert };
            if let Some(node) = placement.serving_replica(shard, token.lane) {
                span.set(node_key, node.0.clone());
            }
            if dispatch.rows[k].get(position).is_some_and(|&row| row < 0) {
                dropped.push(which.to_owned());
            }
        }
        if !dropped.is_empty() {
            span.set_list("volary.token.dropped", dropped);
        }
        span
    };
    trace.sampled_tokens.iter().zip(weights).map(span).collect()
}
