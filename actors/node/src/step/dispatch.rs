//! One lane's rows on their way to the experts of one MoE layer and back.
//!
//! Rows for experts of this node go through a channel, rows for another node in one frame per node. A lane
//! of 4 tokens and 4 experts, of which node B serves 2 and 3:
//!
//! ```text
//! gate       token 0 → 1,2   token 1 → 2,0   token 2 → 1,3   token 3 → 2,1
//! rows       expert 0: t1    expert 1: t0 t2 t3    expert 2: t0 t1 t3    expert 3: t2
//! cut        local: [0: t1] [1: t0 t2 t3]          node B: one frame, 4 rows in expert order
//! send       run_experts here                      ExpertRequest → ExpertReply
//! join       [0] [1] [2] [3], in expert order again, whatever came back first
//! ```

use crate::context::NodeContext;
use crate::error::{Error, Result};
use crate::ids::LaneStep;
use crate::trace::TraceContext;
use futures::future::try_join_all;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};
use volary_core::compute::{Compute, HostTensor};
use volary_core::dispatch::Dispatch;
use volary_core::{ExpertId, Lane, LayerId, NodeId, ShardId};
use volary_protocol::frames::{self, ExpertReply, ExpertRequest};
use volary_telemetry::{Meter, Scope, Span, SpanKind};
use volary_transport::{Frame, FrameKind};

/// Which node serves each expert of a layer to one lane.
#[derive(Clone)]
pub(crate) struct TokenDispatch {
    layer: LayerId,
    at: LaneStep,
    /// Experts by node, in ascending order.
    experts_by_node: BTreeMap<NodeId, Vec<ExpertId>>,
    local: NodeId,
}

/// A lane's rows for one node: a tensor per expert here, one batch of bytes for another node.
pub(crate) enum Shipment<B: Compute> {
    Local(Vec<(ExpertId, B::Tensor)>),
    Remote(NodeId, HostTensor),
}

/// What the experts of one node return.
pub(crate) enum ExpertOutput<B: Compute> {
    Local(Vec<(ExpertId, B::Tensor)>),
    Remote(NodeId, Frame),
}

impl TokenDispatch {
    pub(crate) fn new<B: Compute>(node: &NodeContext<B>, layer: LayerId, at: LaneStep) -> Result<Self> {
        let placement = node.placement();
        let mut experts_by_node: BTreeMap<NodeId, Vec<ExpertId>> = BTreeMap::new();
        for expert in (0..node.architecture.experts as u16).map(ExpertId) {
            let shard = ShardId::Expert { layer, expert };
            let replica = placement.serving_replica(shard, at.lane).ok_or(Error::NoHolder { shard })?;
            experts_by_node.entry(replica.clone()).or_default().push(expert);
        }
        Ok(Self { layer, at, experts_by_node, local: node.id.clone() })
    }

    /// Cuts rows in expert order, `[assignments, hidden]`, into one shipment per node.
    pub(crate) fn cut<B: Compute>(
        &self,
        backend: &B,
        dispatch: &Dispatch,
        rows: &B::Tensor,
    ) -> Result<Vec<Shipment<B>>> {
        let offsets = dispatch.offsets();
        let rows_of = |expert: ExpertId| {
            let rows = backend.rows(rows, offsets[expert.index()], dispatch.counts[expert.index()])?;
            Ok::<_, Error>((expert, rows))
        };
        let ship = |(node, experts): (&NodeId, &Vec<ExpertId>)| {
            let parts = experts.iter().map(|&expert| rows_of(expert)).collect::<Result<Vec<_>>>()?;
            if *node == self.local {
                return Ok(Shipment::Local(parts));
            }
            let whole = backend.concatenate(parts.into_iter().map(|(_, rows)| rows).collect())?;
            Ok(Shipment::Remote(node.clone(), backend.export(&whole)?))
        };
        self.experts_by_node.iter().map(ship).collect()
    }

    /// Sends all shipments at once and awaits all outputs.
    pub(crate) async fn send<B: Compute>(
        &self,
        node: &Arc<NodeContext<B>>,
        direction: ExpertPass,
        dispatch: &Dispatch,
        shipments: Vec<Shipment<B>>,
        trace: &TraceContext,
    ) -> Result<Vec<ExpertOutput<B>>> {
        let send = |shipment: Shipment<B>| async move {
            match shipment {
                Shipment::Local(parts) => {
                    let span = self.dispatch_span(direction, dispatch, &self.local, trace);
                    let rows = self.rows_for(&self.local, dispatch);
                    let mut experts = expert_span(&span.scope(), direction, self.layer, self.at.lane, &rows);
                    let meter = experts.meter();
                    let outputs = run_experts(node, self.layer, self.at, direction, parts, &meter).await?;
                    Ok(ExpertOutput::Local(outputs))
                }
                Shipment::Remote(to, rows) => {
                    let span = self.dispatch_span(direction, dispatch, &to, trace);
                    let reply = self.send_remote(node, direction, dispatch, &to, rows, span).await?;
                    Ok(ExpertOutput::Remote(to, reply))
                }
            }
        };
        try_join_all(shipments.into_iter().map(send)).await
    }

    /// One frame to another node, and its answer.
    async fn send_remote<B: Compute>(
        &self,
        node: &NodeContext<B>,
        direction: ExpertPass,
        dispatch: &Dispatch,
        to: &NodeId,
        rows: HostTensor,
        mut span: Span,
    ) -> Result<Frame> {
        let Self { layer, at, .. } = *self;
        let experts = self.rows_for(to, dispatch);
        let request = ExpertRequest { layer, lane: at.lane, train: direction.train(), experts };
        let mut frame = frames::frame(direction.frame_kind(), at.epoch, at.step, &request, vec![rows])?;
        frame.trace = frames::trace_header(span.identity());
        let sent = Instant::now();
        let reply = node.peers.request(to, frame).await?;
        if span.is_recorded() {
            let remote = Duration::from_micros(frames::decode::<ExpertReply>(&reply)?.remote_us);
            span.set("volary.wire_us", sent.elapsed().saturating_sub(remote).as_micros() as i64);
            span.set("volary.remote_us", remote.as_micros() as i64);
        }
        Ok(reply)
    }

    /// The experts of a node and the rows that each gets.
    fn rows_for(&self, node: &NodeId, dispatch: &Dispatch) -> Vec<(ExpertId, u32)> {
        let rows = |&expert: &ExpertId| (expert, dispatch.counts[expert.index()] as u32);
        self.experts_by_node[node].iter().map(rows).collect()
    }

    fn dispatch_span(
        &self,
        direction: ExpertPass,
        dispatch: &Dispatch,
        to: &NodeId,
        trace: &TraceContext,
    ) -> Span {
        let backward = direction == ExpertPass::Backward;
        let name = if backward { "router.dispatch.backward" } else { "router.dispatch" };
        let mut span = trace.scope.span_of(name, SpanKind::Producer);
        if span.is_recorded() {
            let rows: u32 = self.rows_for(to, dispatch).into_iter().map(|(_, rows)| rows).sum();
            span.set("volary.layer", i64::from(self.layer.0));
            span.set("messaging.system", "volary");
            span.set("messaging.batch.message_count", i64::from(rows));
            span.set("volary.target_node", to.0.clone());
            span.set("volary.local", *to == self.local);
        }
        span
    }

    /// One tensor per expert, in ascending order of the experts.
    pub(crate) fn join<B: Compute>(
        &self,
        backend: &B,
        dispatch: &Dispatch,
        outputs: Vec<ExpertOutput<B>>,
    ) -> Result<Vec<B::Tensor>> {
        let mut by_expert: BTreeMap<ExpertId, B::Tensor> = BTreeMap::new();
        for output in outputs {
            match output {
                ExpertOutput::Local(parts) => by_expert.extend(parts),
                ExpertOutput::Remote(node, frame) => {
                    let whole = frames::import_one(backend, &frame)?;
                    let mut start = 0;
                    for &expert in &self.experts_by_node[&node] {
                        let count = dispatch.counts[expert.index()];
                        by_expert.insert(expert, backend.rows(&whole, start, count)?);
                        start += count;
                    }
                }
            }
        }
        Ok(by_expert.into_values().collect())
    }
}

/// What the experts do with the rows that they get.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ExpertPass {
    /// Forward, with or without a backward pass to follow.
    Forward { train: bool },
    /// Backward: the rows are gradients of the outputs.
    Backward,
}

impl ExpertPass {
    fn train(self) -> bool {
        matches!(self, Self::Backward | Self::Forward { train: true })
    }

    fn frame_kind(self) -> FrameKind {
        match self {
            Self::Forward { .. } => FrameKind::Forward,
            Self::Backward => FrameKind::Backward,
        }
    }
}

/// The work of one node's experts on a batch of rows.
pub(crate) fn expert_span(
    scope: &Scope,
    direction: ExpertPass,
    layer: LayerId,
    lane: Lane,
    experts: &[(ExpertId, u32)],
) -> Span {
    let backward = direction == ExpertPass::Backward;
    let name = if backward { "expert.backward" } else { "expert.forward" };
    let mut span = scope.span_of(name, SpanKind::Consumer);
    if span.is_recorded() {
        let rows: u32 = experts.iter().map(|(_, rows)| rows).sum();
        span.set("volary.layer", i64::from(layer.0));
        span.set("volary.lane", i64::from(lane.0));
        span.set("messaging.system", "volary");
        span.set("messaging.batch.message_count", i64::from(rows));
        span.set_list("volary.experts", experts.iter().map(|(expert, rows)| format!("{expert}:{rows}")));
    }
    span
}

/// Calls experts of this node, all at once, for its own lanes and for those of other nodes.
pub(crate) async fn run_experts<B: Compute>(
    node: &NodeContext<B>,
    layer: LayerId,
    at: LaneStep,
    direction: ExpertPass,
    parts: Vec<(ExpertId, B::Tensor)>,
    meter: &Meter,
) -> Result<Vec<(ExpertId, B::Tensor)>> {
    let actors = node.shard_actors();
    let run = |(id, x): (ExpertId, B::Tensor)| {
        let (expert, meter) = (actors.expert(layer, id), meter.clone());
        async move {
            let expert = expert?;
            let y = match direction {
                ExpertPass::Backward => expert.backward(at, x, meter).await?,
                ExpertPass::Forward { train } => expert.forward(at, x, train, meter).await?,
            };
            Ok((id, y))
        }
    };
    try_join_all(parts.into_iter().map(run)).await
}
