//! What a lane carries through a traced step: where its spans go, and which of its tokens are sampled.

use crate::ids::LaneStep;
use std::sync::Arc;
use volary_core::compute::{Compute, Computed};
use volary_core::dispatch::{Dispatch, TOP_K};
use volary_core::placement::Placement;
use volary_core::{ExpertId, LayerId, ShardId};
use volary_protocol::SampledToken;
use volary_telemetry::{Meter, Scope, Span};

/// What a lane carries; empty in a step that is not traced.
#[derive(Clone, Debug, Default)]
pub(crate) struct TraceContext {
    pub(crate) scope: Scope,
    pub(crate) sampled_tokens: Arc<[SampledToken]>,
}

impl TraceContext {
    /// A span of one layer.
    pub(crate) fn layer_span(&self, name: &'static str, layer: LayerId) -> Span {
        self.scope.span(name).with("volary.layer", i64::from(layer.0))
    }

    /// Awaits `work` within a span; its meter takes the device time of the work.
    pub(crate) async fn span<F: Future>(
        &self,
        name: &'static str,
        work: impl FnOnce(Meter) -> F,
    ) -> F::Output {
        let mut span = self.scope.span(name);
        work(span.meter()).await
    }

    /// The same within a span of one layer.
    pub(crate) async fn in_layer<F: Future>(
        &self,
        name: &'static str,
        layer: LayerId,
        work: impl FnOnce(Meter) -> F,
    ) -> F::Output {
        let mut span = self.layer_span(name, layer);
        work(span.meter()).await
    }
}

/// What the agent gives a lane in a traced step; empty in a step that is not traced.
#[derive(Default)]
pub(crate) struct LaneTrace {
    /// Where the lane's span goes.
    pub(crate) step: Scope,
    /// Whether spans below the lane's are recorded.
    pub(crate) whole: bool,
    pub(crate) sampled_tokens: Arc<[SampledToken]>,
}

impl LaneTrace {
    /// The lane's span, and the context that follows the lane through the layers.
    pub(crate) fn begin(self, at: LaneStep) -> (Span, TraceContext) {
        let span = self.step.span("lane").with("volary.lane", i64::from(at.lane.0));
        let span = span.with("volary.step", at.step.0 as i64).with("volary.epoch", at.epoch.0 as i64);
        let scope = if self.whole { span.scope() } else { Scope::default() };
        (span, TraceContext { scope, sampled_tokens: self.sampled_tokens })
    }
}

/// The gate weights of the sampled tokens, read from the device; empty when no token is sampled.
pub(crate) fn weights_of<B: Compute>(
    backend: &B,
    saved: &B::Saved,
    sampled_tokens: &[SampledToken],
) -> Computed<Vec<[f64; TOP_K]>> {
    if sampled_tokens.is_empty() {
        return Ok(Vec::new());
    }
    let positions: Vec<usize> = sampled_tokens.iter().map(|token| token.position as usize).collect();
    backend.gate_weights(saved, &positions)
}

/// Span attributes of a token's first and second choice: its rank, the expert, the expert's node, the gate
/// weight.
const CHOICE_KEYS: [(&str, &str, &str, &str); TOP_K] = [
    ("first", "volary.expert.first", "volary.expert.first_node", "volary.gate.first"),
    ("second", "volary.expert.second", "volary.expert.second_node", "volary.gate.second"),
];

/// The gate's decision for the tokens of one lane in one layer.
pub(crate) struct Routing<'a> {
    pub(crate) layer: LayerId,
    pub(crate) placement: &'a Placement,
    /// Experts that each token chose, by rank; negative where there is none.
    pub(crate) choices: &'a [Vec<i64>; TOP_K],
    pub(crate) dispatch: &'a Dispatch,
}

impl Routing<'_> {
    /// A span for each sampled token: from the gate until the outputs of its experts are combined.
    pub(crate) fn token_spans(&self, trace: &TraceContext, weights: &[[f64; TOP_K]]) -> Vec<Span> {
        let tokens = trace.sampled_tokens.iter().zip(weights);
        tokens.map(|(token, weights)| self.token_span(trace, token, weights)).collect()
    }

    fn token_span(&self, trace: &TraceContext, token: &SampledToken, weights: &[f64; TOP_K]) -> Span {
        let mut span = trace
            .layer_span("token", self.layer)
            .with("volary.lane", i64::from(token.lane.0))
            .with("volary.token.position", i64::from(token.position))
            .with("volary.token.id", i64::from(token.id))
            .with("volary.token.text", token.text.clone());
        let position = token.position as usize;
        let mut dropped = Vec::new();
        for (k, (rank, expert_key, node_key, gate_key)) in CHOICE_KEYS.into_iter().enumerate() {
            let choice = self.choices[k].get(position).and_then(|&expert| u16::try_from(expert).ok());
            let Some(expert) = choice.map(ExpertId) else { continue };
            span.set(expert_key, i64::from(expert.0));
            span.set(gate_key, weights[k]);
            let shard = ShardId::Expert { layer: self.layer, expert };
            if let Some(node) = self.placement.serving_replica(shard, token.lane) {
                span.set(node_key, node.0.clone());
            }
            if self.dispatch.rows[k].get(position).is_some_and(|&row| row < 0) {
                dropped.push(rank.to_owned());
            }
        }
        if !dropped.is_empty() {
            span.set_list("volary.token.dropped", dropped);
        }
        span
    }
}
