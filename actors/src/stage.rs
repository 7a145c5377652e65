//! A lane's way through consecutive layers of one stage, on this node or, for the driver of the lane, on another.
//!
//! The node that drives a lane has the first stage, and with it the embedding and the loss. Layers of another stage are a
//! *pass*: the residual stream goes to the stage's runner and comes back, as rows go to experts. What the layers keep between
//! the two passes stays with their actors, wherever they are.

use crate::ask::ask;
use crate::dense::DenseMsg;
use crate::node_context::{Begun, NodeContext};
use crate::router::RouterMsg;
use crate::shard::LaneStep;
use crate::trace::{SampledToken, TraceContext};
use crate::wire::{self, StageReply, StageRequest};
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};
use volary_core::compute::{Compute, Computed};
use volary_core::placement::Stage;
use volary_telemetry::SpanKind;
use volary_transport::{Frame, Kind};

/// What the layers of a pass found, one entry for each that has experts.
pub(crate) type StageStats = Vec<MoeLayerStats>;

/// What one MoE layer found on the way forward.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub(crate) struct MoeLayerStats {
    pub(crate) aux_loss: f64,
    pub(crate) entropy: f64,
    pub(crate) load: Vec<u32>,
    pub(crate) dropped: u32,
}

/// One lane on its way.
pub(crate) struct StagePass<'a, B: Compute> {
    pub(crate) node: &'a NodeContext<B>,
    pub(crate) at: LaneStep,
    pub(crate) train: bool,
    pub(crate) trace: &'a TraceContext,
}

impl<B: Compute> StagePass<'_, B> {
    /// Through a stage, wherever it is.
    pub(crate) async fn forward(&self, stage: &Stage, x: B::Tensor) -> Computed<(B::Tensor, StageStats)> {
        match stage.stage_node(self.at.lane) {
            Some(runner) if *runner != self.node.id => {
                let (x, reply) = self.forward_remote(Kind::StageForward, runner, &stage.layers, x).await?;
                Ok((x, wire::decode::<StageReply>(&reply)?.found))
            }
            _ => self.forward_local(stage.layers.clone(), x).await,
        }
    }

    /// Back through a stage, wherever it is.
    pub(crate) async fn backward(&self, stage: &Stage, dx: B::Tensor) -> Computed<B::Tensor> {
        match stage.stage_node(self.at.lane) {
            Some(runner) if *runner != self.node.id => {
                Ok(self.forward_remote(Kind::StageBackward, runner, &stage.layers, dx).await?.0)
            }
            _ => self.backward_local(stage.layers.clone(), dx).await,
        }
    }

    /// Layer by layer, attention and either the feed-forward or the experts.
    async fn forward_local(&self, layers: Range<u16>, mut x: B::Tensor) -> Computed<(B::Tensor, StageStats)> {
        let Self { node, at, train, trace } = *self;
        let actors = node.shard_actors();
        let mut found = StageStats::new();
        for layer in layers {
            let mut span = trace.span("dense.forward", layer);
            let meter = span.meter();
            x = ask(&actors.dense(layer)?, |reply| DenseMsg::Forward { at, x, train, meter, reply }).await?;
            drop(span);
            if node.architecture.is_moe(layer.into()) {
                let trace = trace.clone();
                let routed =
                    ask(&actors.router(layer)?, |reply| RouterMsg::Forward { at, x, train, trace, reply })
                        .await?;
                x = routed.y;
                found.push(routed.found);
            }
        }
        Ok((x, found))
    }

    /// The way of the gradient, from the last of the layers to the first.
    async fn backward_local(&self, layers: Range<u16>, mut dx: B::Tensor) -> Computed<B::Tensor> {
        let Self { node, at, trace, .. } = *self;
        let actors = node.shard_actors();
        for layer in layers.rev() {
            if node.architecture.is_moe(layer.into()) {
                let trace = trace.clone();
                let router = actors.router(layer)?;
                dx = ask(&router, |reply| RouterMsg::Backward { at, dy: dx, trace, reply }).await?;
            }
            let mut span = trace.span("dense.backward", layer);
            let meter = span.meter();
            dx = ask(&actors.dense(layer)?, |reply| DenseMsg::Backward { at, dy: dx, meter, reply }).await?;
        }
        Ok(dx)
    }

    /// The residual stream, or its gradient, to the runner of a stage and back.
    async fn forward_remote(
        &self,
        kind: Kind,
        runner: &volary_core::NodeId,
        layers: &Range<u16>,
        x: B::Tensor,
    ) -> Computed<(B::Tensor, Frame)> {
        let Self { node, at, train, trace } = *self;
        let name = if kind == Kind::StageBackward { "pass.backward" } else { "pass" };
        let mut span = trace.scope.span_of(name, SpanKind::Producer).with("volary.to", runner.0.clone());
        span.set("volary.layer", i64::from(layers.start));
        let stream = node.executor.run(&span.meter(), move |backend| backend.export(&x)).await?;
        let pass = StageRequest {
            lane: at.lane,
            layers: layers.clone(),
            train,
            sampled_tokens: trace.sampled_tokens.to_vec(),
        };
        let mut frame = wire::frame(kind, at.epoch, at.step, &pass, vec![stream])?;
        frame.trace = wire::trace(span.identity());
        let sent = Instant::now();
        let reply = node.peers.request(runner, frame).await?;
        if span.is_recorded() {
            let there = Duration::from_micros(wire::decode::<StageReply>(&reply)?.here_us);
            span.set("volary.wire_us", sent.elapsed().saturating_sub(there).as_micros() as i64);
            span.set("volary.remote_us", there.as_micros() as i64);
        }
        let words = Frame { parts: Vec::new(), ..reply.clone() };
        let x = node.executor.run(&span.meter(), move |backend| wire::import_one(backend, &reply)).await?;
        Ok((x, words))
    }
}

/// A lane of another node on its way through this one's stage.
pub(crate) async fn serve<B: Compute>(node: &Arc<NodeContext<B>>, frame: Frame) -> Computed<Frame> {
    let arrived = Instant::now();
    let (kind, epoch, step) = (frame.kind, frame.epoch, frame.step);
    let StageRequest { lane, layers, train, sampled_tokens } = wire::decode(&frame)?;
    let name = if kind == Kind::StageBackward { "stage.backward" } else { "stage.forward" };
    let scope = node.tracer.remote(wire::origin(&frame));
    let mut span = scope.span_of(name, SpanKind::Consumer).with("volary.lane", i64::from(lane));
    let sampled_tokens: Arc<[SampledToken]> = sampled_tokens.into();
    let trace = TraceContext { scope: span.scope(), sampled_tokens };
    node.until_begun(Begun { epoch, step, train }).await?;
    // One more lane in flight here: its driver waits for its own place, so that all together stay bounded.
    let x = node.executor.run(&span.meter(), move |backend| wire::import_one(backend, &frame)).await?;
    let pass = StagePass { node, at: LaneStep { epoch, step, lane }, train, trace: &trace };
    let (x, found) = match kind {
        Kind::StageBackward => (pass.backward_local(layers, x).await?, StageStats::new()),
        _ => pass.forward_local(layers, x).await?,
    };
    let stream = node.executor.run(&span.meter(), move |backend| backend.export(&x)).await?;
    let here_us = u64::try_from(arrived.elapsed().as_micros()).unwrap_or(u64::MAX);
    wire::frame(Kind::Reply, epoch, step, &StageReply { lane, here_us, found }, vec![stream])
}
