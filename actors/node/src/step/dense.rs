//! The dense actor: owns one dense layer (attention and, in a layer without experts, the gated
//! feed-forward) or the embedding.
//!
//! Supervised by the agent; called through [`crate::handles::Dense`] by the lanes of its node and by stage
//! passes of other nodes' lanes. Invariants: a lane is computed alone; what its forward call saves is taken
//! by its backward call, or dropped with its epoch. When the actor fails, its node reports the epoch as
//! failed.

use crate::error::Result;
use crate::ids::LaneStep;
use crate::messages::{DenseMsg, Loss, ReducerMsg, Reply, ShardMsg, notify, respond};
use crate::step::shard::{SavedActivations, ShardReplica};
use ractor::{Actor, ActorProcessingErr, ActorRef};
use std::marker::PhantomData;
use std::sync::Arc;
use volary_core::LayerId;
use volary_core::compute::Compute;
use volary_telemetry::Meter;

/// The dense actor's state.
pub(crate) struct DenseState<B: Compute> {
    replica: ShardReplica<B>,
    /// Of a layer.
    activations: SavedActivations<B::Saved>,
    /// Of the embedding: the part of its gradient that the loss makes.
    loss_gradients: SavedActivations<B::Gradient>,
}

/// See the module.
pub(crate) struct DenseActor<B>(pub(crate) PhantomData<B>);

impl<B: Compute> Actor for DenseActor<B> {
    type Msg = DenseMsg<B>;
    type State = DenseState<B>;
    type Arguments = ShardReplica<B>;

    async fn pre_start(
        &self,
        _: ActorRef<Self::Msg>,
        replica: Self::Arguments,
    ) -> std::result::Result<Self::State, ActorProcessingErr> {
        let (activations, loss_gradients) = Default::default();
        Ok(DenseState { replica, activations, loss_gradients })
    }

    async fn handle(
        &self,
        _: ActorRef<Self::Msg>,
        message: Self::Msg,
        state: &mut Self::State,
    ) -> std::result::Result<(), ActorProcessingErr> {
        match message {
            DenseMsg::Embed { tokens, meter, reply } => state.on_embed(tokens, &meter, reply),
            DenseMsg::Loss { at, x, tokens, train, meter, reply } => {
                state.on_loss(at, x, tokens, train, &meter, reply);
            }
            DenseMsg::EmbedBackward { at, dx, tokens, meter, reply } => {
                state.on_embed_backward(at, dx, tokens, &meter, reply);
            }
            DenseMsg::Forward { at, x, train, meter, reply } => state.on_forward(at, x, train, &meter, reply),
            DenseMsg::Backward { at, dy, meter, reply } => state.on_backward(at, dy, &meter, reply),
            DenseMsg::Shard(message) => state.on_shard(message),
        }
        Ok(())
    }
}

impl<B: Compute> DenseState<B> {
    /// The layer; the embedding counts as the first.
    fn layer(&self) -> LayerId {
        self.replica.id.layer()
    }

    fn on_embed(&self, tokens: Arc<Vec<u32>>, meter: &Meter, reply: Reply<B::Tensor>) {
        let embed = move |backend: &B, params| Ok(backend.embed(params, &tokens)?);
        self.replica.compute(meter, embed, |x| respond(reply, x));
    }

    fn on_loss(
        &self,
        at: LaneStep,
        x: B::Tensor,
        tokens: Arc<Vec<u32>>,
        train: bool,
        meter: &Meter,
        reply: Reply<Loss<B>>,
    ) {
        let loss_gradients = self.loss_gradients.clone();
        let loss = move |backend: &B, params| {
            let (loss, gradients) = backend.loss(params, x, &tokens, train)?;
            let dx = gradients.map(|(dx, gradient)| {
                loss_gradients.save(at, gradient);
                dx
            });
            Ok((loss, dx))
        };
        self.replica.compute(meter, loss, |loss| respond(reply, loss));
    }

    fn on_embed_backward(
        &self,
        at: LaneStep,
        dx: B::Tensor,
        tokens: Arc<Vec<u32>>,
        meter: &Meter,
        reply: Reply<()>,
    ) {
        let (loss_gradients, shard) = (self.loss_gradients.clone(), self.replica.id);
        let (reducer, leaves) = (self.replica.node.reducer().clone(), self.replica.node.open_leaves.clone());
        let backward = move |backend: &B, _| {
            let gradient = loss_gradients.take(at)?;
            Ok(backend.embed_backward(gradient, dx, &tokens)?)
        };
        // A failed gradient reaches the agent through the reducer.
        self.replica.compute(meter, backward, move |gradient| {
            notify(&reducer, ReducerMsg::lane_leaf(at, shard, gradient, leaves.open()));
            respond(reply, Ok(()));
        });
    }

    fn on_forward(&self, at: LaneStep, x: B::Tensor, train: bool, meter: &Meter, reply: Reply<B::Tensor>) {
        let (activations, layer) = (self.activations.clone(), self.layer());
        let forward = move |backend: &B, params| {
            let (y, saved) = backend.dense(layer, params, x, train)?;
            if train {
                activations.save(at, saved);
            }
            Ok(y)
        };
        self.replica.compute(meter, forward, |y| respond(reply, y));
    }

    fn on_backward(&self, at: LaneStep, dy: B::Tensor, meter: &Meter, reply: Reply<B::Tensor>) {
        let (activations, shard) = (self.activations.clone(), self.replica.id);
        let (reducer, leaves) = (self.replica.node.reducer().clone(), self.replica.node.open_leaves.clone());
        let backward = move |backend: &B, _| {
            let saved = activations.take(at)?;
            Ok(backend.dense_backward(saved, dy)?)
        };
        self.replica.compute(meter, backward, move |done: Result<_>| {
            let dx = done.map(|(dx, gradient)| {
                notify(&reducer, ReducerMsg::lane_leaf(at, shard, Ok(gradient), leaves.open()));
                dx
            });
            respond(reply, dx);
        });
    }

    fn on_shard(&self, message: ShardMsg<B>) {
        if let ShardMsg::Discard { epoch } = message {
            self.activations.discard_before(epoch);
            self.loss_gradients.discard_before(epoch);
        }
        self.replica.on_shard(message);
    }
}
