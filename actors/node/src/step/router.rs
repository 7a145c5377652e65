//! The router actor: gates the tokens of a lane in one MoE layer and sends them to their experts and back.
//!
//! Supervised by the agent; called through [`crate::handles::Router`]; calls experts through
//! [`super::dispatch`]. Invariant: every expert sees every lane, also one that sends it no token, since an
//! expert's gradient waits for all lanes of a group. When the actor fails, its node reports the epoch as
//! failed.

use crate::error::{Error, Result};
use crate::ids::LaneStep;
use crate::messages::{ReducerMsg, Routed, RouterMsg, ShardMsg, notify, respond};
use crate::step::dispatch::{ExpertPass, TokenDispatch};
use crate::step::shard::{SavedActivations, ShardReplica};
use crate::trace::{Routing, TraceContext, weights_of};
use ractor::{Actor, ActorProcessingErr, ActorRef};
use std::marker::PhantomData;
use std::sync::Arc;
use volary_core::LayerId;
use volary_core::compute::{Compute, Gated};
use volary_core::dispatch::Dispatch;
use volary_protocol::frames::MoeLayerStats;

/// The router's state.
pub(crate) struct RouterState<B: Compute> {
    gate: Arc<Gate<B>>,
}

/// See the module.
pub(crate) struct RouterActor<B>(pub(crate) PhantomData<B>);

impl<B: Compute> Actor for RouterActor<B> {
    type Msg = RouterMsg<B>;
    type State = RouterState<B>;
    type Arguments = ShardReplica<B>;

    async fn pre_start(
        &self,
        _: ActorRef<Self::Msg>,
        replica: Self::Arguments,
    ) -> std::result::Result<Self::State, ActorProcessingErr> {
        let layer = replica.id.layer();
        let gate = Arc::new(Gate { replica, layer, activations: SavedActivations::default() });
        Ok(RouterState { gate })
    }

    async fn handle(
        &self,
        _: ActorRef<Self::Msg>,
        message: Self::Msg,
        state: &mut Self::State,
    ) -> std::result::Result<(), ActorProcessingErr> {
        // Tasks and not handlers: several lanes are in flight in one router at a time.
        match message {
            RouterMsg::Forward { at, x, train, trace, reply } => {
                let gate = Arc::clone(&state.gate);
                tokio::spawn(async move {
                    respond(reply, RouterPass { gate: &gate, at, trace: &trace }.forward(x, train).await);
                });
            }
            RouterMsg::Backward { at, dy, load, trace, reply } => {
                let gate = Arc::clone(&state.gate);
                tokio::spawn(async move {
                    respond(reply, RouterPass { gate: &gate, at, trace: &trace }.backward(dy, load).await);
                });
            }
            RouterMsg::Shard(message) => state.on_shard(message),
        }
        Ok(())
    }
}

impl<B: Compute> RouterState<B> {
    fn on_shard(&self, message: ShardMsg<B>) {
        if let ShardMsg::Discard { epoch } = message {
            self.gate.activations.discard_before(epoch);
        }
        self.gate.replica.on_shard(message);
    }
}

/// The gate of one layer, with what lanes save between their passes.
struct Gate<B: Compute> {
    replica: ShardReplica<B>,
    layer: LayerId,
    activations: SavedActivations<(Arc<Dispatch>, B::Saved)>,
}

impl<B: Compute> Gate<B> {
    /// Runs a computation with the gate's parameters and awaits it.
    async fn compute<T: Send + 'static>(
        &self,
        meter: volary_telemetry::Meter,
        work: impl FnOnce(&B, B::Params) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let (sender, receiver) = tokio::sync::oneshot::channel();
        self.replica.compute(&meter, work, |done| drop(sender.send(done)));
        receiver.await.unwrap_or(Err(Error::ComputationDropped))
    }
}

/// One lane's pass through the layer.
struct RouterPass<'a, B: Compute> {
    gate: &'a Gate<B>,
    at: LaneStep,
    trace: &'a TraceContext,
}

impl<B: Compute> RouterPass<'_, B> {
    /// Gate, dispatch, combine.
    async fn forward(self, x: B::Tensor, train: bool) -> Result<Routed<B>> {
        let Self { gate, at, trace } = self;
        let (node, layer) = (&gate.replica.node, gate.layer);
        let dispatcher = TokenDispatch::new(node, layer, at)?;

        let (cutter, sampled) = (dispatcher.clone(), Arc::clone(&trace.sampled_tokens));
        let choose = move |backend: &B, params| {
            let gated = backend.gate(layer, params, x, (at.step, at.lane), train)?;
            let shipments = cutter.cut(backend, &gated.dispatch, &gated.rows)?;
            let weights = weights_of(backend, &gated.saved, &sampled)?;
            Ok((gated, shipments, weights))
        };
        let (gated, shipments, weights) =
            trace.in_layer("router.gate", layer, |meter| gate.compute(meter, choose)).await?;
        let Gated { dispatch, choices, saved, aux_loss, entropy, .. } = gated;
        let placement = node.placement();
        let routing = Routing { layer, placement: &placement, choices: &choices, dispatch: &dispatch };
        let token_spans = routing.token_spans(trace, &weights);
        let load = dispatch.counts.iter().map(|&count| count as u32).collect();
        let dropped = dispatch.dropped as u32;

        let dispatch = Arc::new(dispatch);
        let direction = ExpertPass::Forward { train };
        let outputs = dispatcher.send(node, direction, &dispatch, shipments, trace).await?;

        let dispatch_to_combine = Arc::clone(&dispatch);
        let combine = move |backend: &B| {
            let outputs = dispatcher.join(backend, &dispatch_to_combine, outputs)?;
            Ok(backend.combine(&dispatch_to_combine, saved, outputs)?)
        };
        let run = |meter| async move { node.executor.run(&meter, combine).await };
        let (y, saved) = trace.in_layer("router.combine", layer, run).await?;
        drop(token_spans);
        if train {
            gate.activations.save(at, (dispatch, saved));
        }
        Ok(Routed { y, stats: MoeLayerStats { aux_loss, entropy, load, dropped } })
    }

    /// The same in reverse: gradients of the experts' outputs out, gradients of their inputs in.
    async fn backward(self, dy: B::Tensor, load: Arc<[u32]>) -> Result<B::Tensor> {
        let Self { gate, at, trace } = self;
        let (node, layer) = (&gate.replica.node, gate.layer);
        let dispatcher = TokenDispatch::new(node, layer, at)?;
        let (dispatch, saved) = gate.activations.take(at)?;

        let (cutter, dispatch_to_split) = (dispatcher.clone(), Arc::clone(&dispatch));
        let split = move |backend: &B| {
            let (rows, saved) = backend.combine_backward(&dispatch_to_split, saved, dy)?;
            Ok((cutter.cut(backend, &dispatch_to_split, &rows)?, saved))
        };
        let run = |meter| async move { node.executor.run(&meter, split).await };
        let (shipments, saved) = trace.in_layer("router.combine.backward", layer, run).await?;

        let outputs = dispatcher.send(node, ExpertPass::Backward, &dispatch, shipments, trace).await?;

        let finish = move |backend: &B| {
            let inputs = dispatcher.join(backend, &dispatch, outputs)?;
            Ok(backend.gate_backward(&dispatch, saved, inputs, &load)?)
        };
        let run = |meter| async move { node.executor.run(&meter, finish).await };
        let (dx, gradient) = trace.in_layer("router.gate.backward", layer, run).await?;
        let credit = node.open_leaves.open();
        notify(node.reducer(), ReducerMsg::lane_leaf(at, gate.replica.id, Ok(gradient), credit));
        Ok(dx)
    }
}
