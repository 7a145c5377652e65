//! The dense actor: owns one dense layer (attention and, without experts, the gated feed-forward) or the embedding.
//!
//! Supervised by the node's agent; called by the lane actors of its node. Invariants: a lane is computed alone; what
//! its forward call leaves here is taken by its backward call, or forgotten with its epoch.

use crate::reducer::ReducerMsg;
use crate::shard::{LaneStep, SavedActivations, ShardMsg, ShardReplica};
use ractor::{Actor, ActorProcessingErr, ActorRef, RpcReplyPort};
use std::marker::PhantomData;
use std::sync::Arc;
use volary_core::ShardId;
use volary_core::compute::{Compute, ComputeError, Computed};
use volary_telemetry::Meter;

/// A lane's loss and, for training, the gradient of the residual stream.
pub(crate) type Loss<B> = (f64, Option<<B as Compute>::Tensor>);

/// What a dense actor is asked. The first three are for the embedding, the others for layers.
pub(crate) enum DenseMsg<B: Compute> {
    /// Token ids to the residual stream.
    Embed { tokens: Arc<Vec<u32>>, meter: Meter, reply: RpcReplyPort<Computed<B::Tensor>> },
    /// The residual stream to the loss and its gradient.
    Loss {
        at: LaneStep,
        x: B::Tensor,
        tokens: Arc<Vec<u32>>,
        train: bool,
        meter: Meter,
        reply: RpcReplyPort<Computed<Loss<B>>>,
    },
    /// The gradient of the embedded input: the last call of a lane.
    EmbedBackward {
        at: LaneStep,
        dx: B::Tensor,
        tokens: Arc<Vec<u32>>,
        meter: Meter,
        reply: RpcReplyPort<Computed<()>>,
    },
    /// A layer forward.
    Forward {
        at: LaneStep,
        x: B::Tensor,
        train: bool,
        meter: Meter,
        reply: RpcReplyPort<Computed<B::Tensor>>,
    },
    /// A layer backward.
    Backward { at: LaneStep, dy: B::Tensor, meter: Meter, reply: RpcReplyPort<Computed<B::Tensor>> },
    /// See [`ShardMsg`].
    Shard(ShardMsg<B>),
}

/// The dense actor's state.
pub(crate) struct DenseState<B: Compute> {
    replica: ShardReplica<B>,
    segments: SavedActivations<B::Saved>,
    heads: SavedActivations<B::Gradient>,
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
    ) -> Result<Self::State, ActorProcessingErr> {
        Ok(DenseState { replica, segments: SavedActivations::default(), heads: SavedActivations::default() })
    }

    async fn handle(
        &self,
        _: ActorRef<Self::Msg>,
        message: Self::Msg,
        state: &mut Self::State,
    ) -> Result<(), ActorProcessingErr> {
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
    fn layer(&self) -> Computed<u16> {
        match self.replica.id {
            ShardId::Dense { layer } => Ok(layer),
            other => Err(ComputeError(format!("{other} is no dense layer"))),
        }
    }

    fn on_embed(&self, tokens: Arc<Vec<u32>>, meter: &Meter, reply: RpcReplyPort<Computed<B::Tensor>>) {
        let embed = move |backend: &B, params| backend.embed(params, &tokens);
        self.replica.compute(meter, embed, |done| drop(reply.send(done)));
    }

    fn on_loss(
        &self,
        at: LaneStep,
        x: B::Tensor,
        tokens: Arc<Vec<u32>>,
        train: bool,
        meter: &Meter,
        reply: RpcReplyPort<Computed<Loss<B>>>,
    ) {
        let heads = self.heads.clone();
        let loss = move |backend: &B, params| {
            let (loss, back) = backend.loss(params, x, &tokens, train)?;
            let dx = back.map(|(dx, gradient)| {
                heads.save(at, gradient);
                dx
            });
            Ok((loss, dx))
        };
        self.replica.compute(meter, loss, |done| drop(reply.send(done)));
    }

    fn on_embed_backward(
        &self,
        at: LaneStep,
        dx: B::Tensor,
        tokens: Arc<Vec<u32>>,
        meter: &Meter,
        reply: RpcReplyPort<Computed<()>>,
    ) {
        let (heads, reducer, shard) = (self.heads.clone(), self.replica.node.reducer(), self.replica.id);
        let backward =
            move |backend: &B, _| heads.take(at).and_then(|head| backend.embed_backward(head, dx, &tokens));
        self.replica.compute(meter, backward, move |gradient| {
            drop(reducer.cast(ReducerMsg::lane_leaf(at, shard, gradient)));
            drop(reply.send(Ok(())));
        });
    }

    fn on_forward(
        &self,
        at: LaneStep,
        x: B::Tensor,
        train: bool,
        meter: &Meter,
        reply: RpcReplyPort<Computed<B::Tensor>>,
    ) {
        let (segments, layer) = (self.segments.clone(), self.layer());
        let forward = move |backend: &B, params| {
            let (y, saved) = backend.dense(layer?, params, x, train)?;
            if train {
                segments.save(at, saved);
            }
            Ok(y)
        };
        self.replica.compute(meter, forward, |done| drop(reply.send(done)));
    }

    fn on_backward(
        &self,
        at: LaneStep,
        dy: B::Tensor,
        meter: &Meter,
        reply: RpcReplyPort<Computed<B::Tensor>>,
    ) {
        let (segments, reducer, shard) =
            (self.segments.clone(), self.replica.node.reducer(), self.replica.id);
        let backward =
            move |backend: &B, _| segments.take(at).and_then(|saved| backend.dense_backward(saved, dy));
        self.replica.compute(meter, backward, move |done: Computed<_>| {
            drop(reply.send(done.map(|(dx, gradient)| {
                drop(reducer.cast(ReducerMsg::lane_leaf(at, shard, Ok(gradient))));
                dx
            })));
        });
    }

    fn on_shard(&self, message: ShardMsg<B>) {
        if let ShardMsg::Forget { epoch } = message {
            self.segments.forget_before(epoch);
            self.heads.forget_before(epoch);
        }
        self.replica.on_shard(message);
    }
}
