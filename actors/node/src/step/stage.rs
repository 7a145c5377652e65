//! A lane's path through the layers of one pipeline stage, on this node or on another.
//!
//! The node that drives a lane has the first stage, and with it the embedding and the loss. For every other
//! stage the residual stream goes to the stage's node for that lane and comes back, as rows go to experts.
//! What the layers save for the backward pass stays with their actors.

use crate::context::NodeContext;
use crate::error::Result;
use crate::ids::{LaneStep, PassId};
use crate::net::permission::check;
use crate::trace::TraceContext;
use std::sync::Arc;
use std::time::{Duration, Instant};
use volary_core::compute::Compute;
use volary_core::placement::Stage;
use volary_core::placement::Traffic;
use volary_core::{LayerRange, NodeId};
use volary_protocol::SampledToken;
use volary_protocol::frames::{self, StageReply, StageRequest, StageStats};
use volary_telemetry::SpanKind;
use volary_transport::{Frame, FrameKind};

/// One lane in one pass through stages.
pub(crate) struct StagePass<'a, B: Compute> {
    pub(crate) node: &'a NodeContext<B>,
    pub(crate) at: LaneStep,
    pub(crate) train: bool,
    pub(crate) trace: &'a TraceContext,
}

impl<B: Compute> StagePass<'_, B> {
    /// Forward through a stage, wherever it is: the residual stream after it, and the statistics of its MoE
    /// layers.
    pub(crate) async fn forward(&self, stage: &Stage, x: B::Tensor) -> Result<(B::Tensor, StageStats)> {
        match stage.stage_node(self.at.lane) {
            Some(node) if *node != self.node.id => {
                let (x, reply) = self.remote(FrameKind::StageForward, node, stage.layers, x, &[]).await?;
                Ok((x, reply.stats))
            }
            _ => self.forward_local(stage.layers, x).await,
        }
    }

    /// Backward through a stage, wherever it is: the gradient of its input. `load` has the lane's assignments
    /// to each expert over all MoE layers.
    pub(crate) async fn backward(
        &self,
        stage: &Stage,
        dx: B::Tensor,
        load: &Arc<[u32]>,
    ) -> Result<B::Tensor> {
        match stage.stage_node(self.at.lane) {
            Some(node) if *node != self.node.id => {
                Ok(self.remote(FrameKind::StageBackward, node, stage.layers, dx, load).await?.0)
            }
            _ => self.backward_local(stage.layers, dx, load).await,
        }
    }

    /// Layer by layer: attention, then the feed-forward or the experts.
    async fn forward_local(&self, layers: LayerRange, mut x: B::Tensor) -> Result<(B::Tensor, StageStats)> {
        let Self { node, at, train, trace } = *self;
        let actors = node.shard_actors();
        let mut stats = StageStats::new();
        for layer in layers.iter() {
            let dense = actors.dense(layer)?;
            x = trace.in_layer("dense.forward", layer, |meter| dense.forward(at, x, train, meter)).await?;
            if node.architecture.is_moe(layer) {
                let routed = actors.router(layer)?.forward(at, x, train, trace.clone()).await?;
                x = routed.y;
                stats.push(routed.stats);
            }
        }
        Ok((x, stats))
    }

    /// The same from the last layer to the first.
    async fn backward_local(
        &self,
        layers: LayerRange,
        mut dx: B::Tensor,
        load: &Arc<[u32]>,
    ) -> Result<B::Tensor> {
        let Self { node, at, trace, .. } = *self;
        let actors = node.shard_actors();
        for layer in layers.iter().rev() {
            if node.architecture.is_moe(layer) {
                dx = actors.router(layer)?.backward(at, dx, Arc::clone(load), trace.clone()).await?;
            }
            let dense = actors.dense(layer)?;
            dx = trace.in_layer("dense.backward", layer, |meter| dense.backward(at, dx, meter)).await?;
        }
        Ok(dx)
    }

    /// Sends the residual stream, or its gradient, to the stage's node and awaits the result.
    async fn remote(
        &self,
        kind: FrameKind,
        to: &NodeId,
        layers: LayerRange,
        x: B::Tensor,
        load: &[u32],
    ) -> Result<(B::Tensor, StageReply)> {
        let Self { node, at, train, trace } = *self;
        let backward = kind == FrameKind::StageBackward;
        let name = if backward { "stage.dispatch.backward" } else { "stage.dispatch" };
        let mut span = trace.scope.span_of(name, SpanKind::Producer).with("volary.target_node", to.0.clone());
        span.set("volary.layer", i64::from(layers.start.0));
        let stream = node.executor.run(&span.meter(), move |backend| Ok(backend.export(&x)?)).await?;
        let sampled_tokens = trace.sampled_tokens.to_vec();
        let request = StageRequest { lane: at.lane, layers, train, sampled_tokens, load: load.to_vec() };
        let mut frame = frames::frame(kind, at.epoch, at.step, &request, vec![stream])?;
        frame.trace = frames::trace_header(span.identity());
        let sent = Instant::now();
        let answer = node.peers.request(to, frame).await?;
        let reply: StageReply = frames::decode(&answer)?;
        if span.is_recorded() {
            let remote = Duration::from_micros(reply.remote_us);
            span.set("volary.wire_us", sent.elapsed().saturating_sub(remote).as_micros() as i64);
            span.set("volary.remote_us", remote.as_micros() as i64);
        }
        let import = move |backend: &B| Ok(frames::import_one(backend, &answer)?);
        Ok((node.executor.run(&span.meter(), import).await?, reply))
    }
}

/// Takes another node's lane through this node's stage, and returns the answer.
pub(crate) async fn serve<B: Compute>(
    node: &Arc<NodeContext<B>>,
    peer: &NodeId,
    frame: Frame,
) -> Result<Frame> {
    let arrived = Instant::now();
    let (kind, epoch, step) = (frame.kind, frame.epoch, frame.step);
    let StageRequest { lane, layers, train, sampled_tokens, load } = frames::decode(&frame)?;
    let backward = kind == FrameKind::StageBackward;
    let name = if backward { "stage.backward" } else { "stage.forward" };
    let scope = node.tracer.remote(frames::origin(&frame));
    let mut span = scope.span_of(name, SpanKind::Consumer).with("volary.lane", i64::from(lane.0));
    let sampled_tokens: Arc<[SampledToken]> = sampled_tokens.into();
    let trace = TraceContext { scope: span.scope(), sampled_tokens };
    node.until_begun(PassId { epoch, step, train }).await?;
    check(node, epoch, peer, Traffic::Stage { layers, lane })?;
    // No permit here: the driver holds one for the lane, so that all nodes together stay bounded. But this
    // node's own leaves may pile up, with many drivers before it.
    if train && !backward {
        node.until_lane_may_begin().await;
    }
    let import = move |backend: &B| Ok(frames::import_one(backend, &frame)?);
    let x = node.executor.run(&span.meter(), import).await?;
    let pass = StagePass { node, at: LaneStep { epoch, step, lane }, train, trace: &trace };
    let (x, stats) = if backward {
        (pass.backward_local(layers, x, &load.into()).await?, StageStats::new())
    } else {
        pass.forward_local(layers, x).await?
    };
    let stream = node.executor.run(&span.meter(), move |backend| Ok(backend.export(&x)?)).await?;
    let remote_us = u64::try_from(arrived.elapsed().as_micros()).unwrap_or(u64::MAX);
    Ok(frames::frame(FrameKind::Reply, epoch, step, &StageReply { lane, remote_us, stats }, vec![stream])?)
}
