//! The router actor: gates the tokens of a lane in one MoE layer and sends them to their experts and back.
//!
//! Supervised by the node's agent; called by the lane actors of its node; calls the expert actors, through a channel
//! where the serving replica is on this node and over QUIC, one batch per node, where it is not. Invariant: every
//! expert hears of every lane, also of one that sends it no token, since its gradient waits for all of them.

use crate::ask::ask;
use crate::expert::ExpertMsg;
use crate::node_context::NodeContext;
use crate::reducer::ReducerMsg;
use crate::shard::{LaneStep, SavedActivations, ShardMsg, ShardReplica};
use crate::stage::MoeLayerStats;
use crate::trace::{TraceContext, token_spans, weights_of};
use crate::wire::{self, Answered, Batch};
use futures::future::try_join_all;
use ractor::{Actor, ActorProcessingErr, ActorRef, RpcReplyPort};
use std::collections::BTreeMap;
use std::marker::PhantomData;
use std::sync::Arc;
use std::time::{Duration, Instant};
use volary_core::compute::{Compute, ComputeError, Computed, Gated, HostTensor};
use volary_core::dispatch::Dispatch;
use volary_core::{Lane, NodeId, ShardId};
use volary_telemetry::{Meter, Scope, Span, SpanKind};
use volary_transport::{Frame, Kind};

/// What came of a lane in one MoE layer.
pub(crate) struct Routed<B: Compute> {
    pub(crate) y: B::Tensor,
    pub(crate) found: MoeLayerStats,
}

/// What a router is asked.
pub(crate) enum RouterMsg<B: Compute> {
    /// Gate, dispatch, combine.
    Forward {
        at: LaneStep,
        x: B::Tensor,
        train: bool,
        trace: TraceContext,
        reply: RpcReplyPort<Computed<Routed<B>>>,
    },
    /// The same in reverse.
    Backward { at: LaneStep, dy: B::Tensor, trace: TraceContext, reply: RpcReplyPort<Computed<B::Tensor>> },
    /// See [`ShardMsg`].
    Shard(ShardMsg<B>),
}

/// The router's state.
pub(crate) struct RouterState<B: Compute> {
    replica: Arc<ShardReplica<B>>,
    layer: u16,
    activations: SavedActivations<(Arc<Dispatch>, B::Saved)>,
}

/// See the module.
pub(crate) struct RouterActor<B>(pub(crate) PhantomData<B>);

impl<B: Compute> Actor for RouterActor<B> {
    type Msg = RouterMsg<B>;
    type State = RouterState<B>;
    type Arguments = (u16, ShardReplica<B>);

    async fn pre_start(
        &self,
        _: ActorRef<Self::Msg>,
        (layer, replica): Self::Arguments,
    ) -> Result<Self::State, ActorProcessingErr> {
        Ok(RouterState { replica: Arc::new(replica), layer, activations: SavedActivations::default() })
    }

    async fn handle(
        &self,
        _: ActorRef<Self::Msg>,
        message: Self::Msg,
        state: &mut Self::State,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            RouterMsg::Forward { at, x, train, trace, reply } => state.on_forward(at, x, train, trace, reply),
            RouterMsg::Backward { at, dy, trace, reply } => state.on_backward(at, dy, trace, reply),
            RouterMsg::Shard(message) => state.on_shard(message),
        }
        Ok(())
    }
}

impl<B: Compute> RouterState<B> {
    // Tasks and not handlers: several lanes are under way in one router at a time.

    fn on_forward(
        &self,
        at: LaneStep,
        x: B::Tensor,
        train: bool,
        trace: TraceContext,
        reply: RpcReplyPort<Computed<Routed<B>>>,
    ) {
        let (replica, layer, activations) = (Arc::clone(&self.replica), self.layer, self.activations.clone());
        tokio::spawn(async move {
            drop(reply.send(forward(&replica, layer, &activations, at, x, train, &trace).await));
        });
    }

    fn on_backward(
        &self,
        at: LaneStep,
        dy: B::Tensor,
        trace: TraceContext,
        reply: RpcReplyPort<Computed<B::Tensor>>,
    ) {
        let (replica, layer, activations) = (Arc::clone(&self.replica), self.layer, self.activations.clone());
        tokio::spawn(async move {
            drop(reply.send(backward(&replica, layer, &activations, at, dy, &trace).await));
        });
    }

    fn on_shard(&self, message: ShardMsg<B>) {
        if let ShardMsg::Forget { epoch } = message {
            self.activations.forget_before(epoch);
        }
        self.replica.on_shard(message);
    }
}

async fn forward<B: Compute>(
    replica: &ShardReplica<B>,
    layer: u16,
    activations: &SavedActivations<(Arc<Dispatch>, B::Saved)>,
    at: LaneStep,
    x: B::Tensor,
    train: bool,
    trace: &TraceContext,
) -> Computed<Routed<B>> {
    let node = &replica.node;
    let dispatcher = TokenDispatch::new(node, layer, at)?;
    let mut span = trace.span("router.gate", layer);
    let (sender, receiver) = tokio::sync::oneshot::channel();
    let (cut, sampled_tokens) = (dispatcher.clone(), Arc::clone(&trace.sampled_tokens));
    let gate = move |backend: &B, params| {
        let gated = backend.gate(layer, params, x, (at.step, at.lane), train)?;
        let shipments = cut.cut(backend, &gated.dispatch, &gated.rows)?;
        let weights = weights_of(backend, &gated.saved, &sampled_tokens)?;
        Ok((gated, shipments, weights))
    };
    replica.compute(&span.meter(), gate, |done| drop(sender.send(done)));
    let (gated, shipments, weights) =
        receiver.await.map_err(|_| ComputeError("the gate was dropped".into()))??;
    drop(span);
    let Gated { dispatch, choices, saved, aux_loss, entropy, .. } = gated;
    let tokens = token_spans(trace, layer, &node.placement(), &choices, &dispatch, &weights);
    let dispatch = Arc::new(dispatch);
    let outputs = dispatcher.send(node, Kind::Forward, train, &dispatch, shipments, trace).await?;
    let own = Arc::clone(&dispatch);
    let combine = move |backend: &B| {
        let outputs = dispatcher.join(backend, &own, outputs)?;
        backend.combine(&own, saved, outputs)
    };
    let mut span = trace.span("router.combine", layer);
    let (y, saved) = node.executor.run(&span.meter(), combine).await?;
    drop((span, tokens));
    let load = dispatch.counts.iter().map(|&count| count as u32).collect();
    let dropped = dispatch.dropped as u32;
    if train {
        activations.save(at, (dispatch, saved));
    }
    Ok(Routed { y, found: MoeLayerStats { aux_loss, entropy, load, dropped } })
}

async fn backward<B: Compute>(
    replica: &ShardReplica<B>,
    layer: u16,
    activations: &SavedActivations<(Arc<Dispatch>, B::Saved)>,
    at: LaneStep,
    dy: B::Tensor,
    trace: &TraceContext,
) -> Computed<B::Tensor> {
    let node = &replica.node;
    let dispatcher = TokenDispatch::new(node, layer, at)?;
    let (dispatch, saved) = activations.take(at)?;
    let (cut, own) = (dispatcher.clone(), Arc::clone(&dispatch));
    let split = move |backend: &B| {
        let (rows, saved) = backend.combine_backward(&own, saved, dy)?;
        Ok((cut.cut(backend, &own, &rows)?, saved))
    };
    let mut span = trace.span("router.combine.backward", layer);
    let (shipments, saved) = node.executor.run(&span.meter(), split).await?;
    drop(span);
    let outputs = dispatcher.send(node, Kind::Backward, true, &dispatch, shipments, trace).await?;
    let finish = move |backend: &B| {
        let inputs = dispatcher.join(backend, &dispatch, outputs)?;
        backend.gate_backward(&dispatch, saved, inputs)
    };
    let mut span = trace.span("router.gate.backward", layer);
    let (dx, gradient) = node.executor.run(&span.meter(), finish).await?;
    drop(span);
    drop(node.reducer().cast(ReducerMsg::lane_leaf(at, replica.id, Ok(gradient))));
    Ok(dx)
}

/// Which node serves each expert of a layer to a lane.
#[derive(Clone)]
struct TokenDispatch {
    layer: u16,
    at: LaneStep,
    /// Experts by node, in the order of their numbers.
    servers: BTreeMap<NodeId, Vec<u16>>,
    local: NodeId,
}

/// A lane's rows on their way: tensors for experts here, one batch of bytes for each other node.
enum Shipment<B: Compute> {
    Local(Vec<(u16, B::Tensor)>),
    Remote(NodeId, HostTensor),
}

/// What came back.
enum ExpertOutput<B: Compute> {
    Local(Vec<(u16, B::Tensor)>),
    Remote(NodeId, Frame),
}

impl TokenDispatch {
    fn new<B: Compute>(node: &NodeContext<B>, layer: u16, at: LaneStep) -> Computed<Self> {
        let placement = node.placement();
        let mut servers: BTreeMap<NodeId, Vec<u16>> = BTreeMap::new();
        for expert in 0..node.architecture.experts as u16 {
            let shard = ShardId::Expert { layer, expert };
            let server = placement.serving_replica(shard, at.lane);
            let server = server.ok_or_else(|| ComputeError(format!("{shard} has no holder")))?;
            servers.entry(server.clone()).or_default().push(expert);
        }
        Ok(Self { layer, at, servers, local: node.id.clone() })
    }

    /// Cuts rows in expert order into what each node gets.
    fn cut<B: Compute>(
        &self,
        backend: &B,
        dispatch: &Dispatch,
        rows: &B::Tensor,
    ) -> Computed<Vec<Shipment<B>>> {
        let offsets = dispatch.offsets();
        let rows_of = |expert: u16| {
            backend.rows(rows, offsets[usize::from(expert)], dispatch.counts[usize::from(expert)])
        };
        let batch = |(server, experts): (&NodeId, &Vec<u16>)| {
            let parts =
                experts.iter().map(|&expert| Ok((expert, rows_of(expert)?))).collect::<Computed<Vec<_>>>()?;
            if *server == self.local {
                return Ok(Shipment::Local(parts));
            }
            let whole = backend.concatenate(parts.into_iter().map(|(_, rows)| rows).collect())?;
            Ok(Shipment::Remote(server.clone(), backend.export(&whole)?))
        };
        self.servers.iter().map(batch).collect()
    }

    /// Sends everything out at once and waits for all of it to come back.
    async fn send<B: Compute>(
        &self,
        node: &Arc<NodeContext<B>>,
        kind: Kind,
        train: bool,
        dispatch: &Dispatch,
        shipments: Vec<Shipment<B>>,
        trace: &TraceContext,
    ) -> Computed<Vec<ExpertOutput<B>>> {
        let send = |out: Shipment<B>| async move {
            let server = match &out {
                Shipment::Local(_) => self.local.clone(),
                Shipment::Remote(server, _) => server.clone(),
            };
            let mut span = self.dispatch_span(kind, dispatch, &server, trace);
            match out {
                Shipment::Local(parts) => {
                    let batch = self.batch(&server, dispatch);
                    let mut experts = expert_span(&span.scope(), kind, self.layer, self.at.lane, &batch);
                    let meter = experts.meter();
                    let outputs = run_experts(node, self.layer, self.at, kind, train, parts, &meter).await?;
                    Ok(ExpertOutput::Local(outputs))
                }
                Shipment::Remote(_, rows) => {
                    let experts = self.batch(&server, dispatch);
                    let batch = Batch { layer: self.layer, lane: self.at.lane, train, experts };
                    let mut frame = wire::frame(kind, self.at.epoch, self.at.step, &batch, vec![rows])?;
                    frame.trace = wire::trace(span.identity());
                    let sent = Instant::now();
                    let reply = node.peers.request(&server, frame).await?;
                    if span.is_recorded() {
                        let there = Duration::from_micros(wire::decode::<Answered>(&reply)?.here_us);
                        let wire = sent.elapsed().saturating_sub(there);
                        span.set("volary.wire_us", wire.as_micros() as i64);
                        span.set("volary.remote_us", there.as_micros() as i64);
                    }
                    Ok(ExpertOutput::Remote(server, reply))
                }
            }
        };
        try_join_all(shipments.into_iter().map(send)).await
    }

    /// The experts of a node and the rows that each gets.
    fn batch(&self, server: &NodeId, dispatch: &Dispatch) -> Vec<(u16, u32)> {
        let rows = |&expert: &u16| (expert, dispatch.counts[usize::from(expert)] as u32);
        self.servers[server].iter().map(rows).collect()
    }

    /// A batch of rows on its way to the experts of one node and back.
    fn dispatch_span(&self, kind: Kind, dispatch: &Dispatch, server: &NodeId, trace: &TraceContext) -> Span {
        let name = if kind == Kind::Backward { "router.dispatch.backward" } else { "router.dispatch" };
        let mut span = trace.scope.span_of(name, SpanKind::Producer);
        if span.is_recorded() {
            let rows: u32 = self.batch(server, dispatch).into_iter().map(|(_, rows)| rows).sum();
            span.set("volary.layer", i64::from(self.layer));
            span.set("messaging.system", "volary");
            span.set("messaging.batch.message_count", i64::from(rows));
            span.set("volary.to", server.0.clone());
            span.set("volary.local", *server == self.local);
        }
        span
    }

    /// What came back, one tensor per expert in the order of their numbers.
    fn join<B: Compute>(
        &self,
        backend: &B,
        dispatch: &Dispatch,
        outputs: Vec<ExpertOutput<B>>,
    ) -> Computed<Vec<B::Tensor>> {
        let mut by_expert: BTreeMap<u16, B::Tensor> = BTreeMap::new();
        for part in outputs {
            match part {
                ExpertOutput::Local(parts) => by_expert.extend(parts),
                ExpertOutput::Remote(server, frame) => {
                    let whole = wire::import_one(backend, &frame)?;
                    let mut start = 0;
                    for &expert in &self.servers[&server] {
                        let count = dispatch.counts[usize::from(expert)];
                        by_expert.insert(expert, backend.rows(&whole, start, count)?);
                        start += count;
                    }
                }
            }
        }
        Ok(by_expert.into_values().collect())
    }
}

/// The experts of one node at work on a batch of rows.
pub(crate) fn expert_span(scope: &Scope, kind: Kind, layer: u16, lane: Lane, experts: &[(u16, u32)]) -> Span {
    let name = if kind == Kind::Backward { "expert.backward" } else { "expert.forward" };
    let mut span = scope.span_of(name, SpanKind::Consumer);
    if span.is_recorded() {
        let rows: u32 = experts.iter().map(|(_, rows)| rows).sum();
        span.set("volary.layer", i64::from(layer));
        span.set("volary.lane", i64::from(lane));
        span.set("messaging.system", "volary");
        span.set("messaging.batch.message_count", i64::from(rows));
        span.set_list("volary.experts", experts.iter().map(|(expert, rows)| format!("{expert}:{rows}")));
    }
    span
}

/// Calls experts on this node, all at once; for this node's routers and for those of others.
pub(crate) async fn run_experts<B: Compute>(
    node: &NodeContext<B>,
    layer: u16,
    at: LaneStep,
    kind: Kind,
    train: bool,
    parts: Vec<(u16, B::Tensor)>,
    meter: &Meter,
) -> Computed<Vec<(u16, B::Tensor)>> {
    let actors = node.shard_actors();
    let call = |(expert, x): (u16, B::Tensor)| {
        let (actor, meter) = (actors.expert(layer, expert), meter.clone());
        async move {
            let actor = actor?;
            let y = match kind {
                Kind::Backward => {
                    ask(&actor, |reply| ExpertMsg::Backward { at, dy: x, meter, reply }).await?
                }
                _ => ask(&actor, |reply| ExpertMsg::Forward { at, x, train, meter, reply }).await?,
            };
            Ok((expert, y))
        }
    };
    try_join_all(parts.into_iter().map(call)).await
}
