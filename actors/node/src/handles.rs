//! A handle for each shard actor: what it can be asked, as typed async calls.
//!
//! A token's path can be followed by "go to definition": [`crate::step::lane`] calls [`Dense::embed`], a
//! stage pass calls [`Dense::forward`] and [`Router::forward`], the router calls [`Expert::forward`], and
//! each call here names the message that the actor's `handle` dispatches. Every call is bounded by
//! [`CALL_MAX`].

use crate::error::{Error, Result};
use crate::ids::LaneStep;
use crate::limits::CALL_MAX;
use crate::messages::{DenseMsg, ExpertMsg, Loss, Reply, Routed, RouterMsg, ShardMsg, notify};
use crate::trace::TraceContext;
use ractor::rpc::CallResult;
use ractor::{ActorRef, Message};
use std::sync::Arc;
use volary_core::compute::Compute;
use volary_core::update::Update;
use volary_core::{Digest, Step};
use volary_telemetry::Meter;

/// Sends the message that `make` builds around a reply port, and awaits the reply.
async fn call<M: Message, T: Send + 'static>(
    name: &'static str,
    actor: &ActorRef<M>,
    make: impl FnOnce(Reply<T>) -> M,
) -> Result<T> {
    match actor.call(make, Some(CALL_MAX)).await {
        Ok(CallResult::Success(answer)) => answer,
        Ok(CallResult::Timeout) => Err(Error::NoReply { actor: name, limit: CALL_MAX }),
        // The computation that held the reply port has panicked or was never queued.
        Ok(CallResult::SenderError) => Err(Error::ComputationDropped),
        Err(_) => Err(Error::ActorGone { actor: name }),
    }
}

/// The actor of the embedding or of a dense layer.
pub(crate) struct Dense<B: Compute>(pub(crate) ActorRef<DenseMsg<B>>);

impl<B: Compute> Dense<B> {
    /// Token ids `[sequences, sequence_length + 1]` to the residual stream `[sequences, sequence_length,
    /// hidden]`.
    pub(crate) async fn embed(&self, tokens: Arc<Vec<u32>>, meter: Meter) -> Result<B::Tensor> {
        call("embedding", &self.0, |reply| DenseMsg::Embed { tokens, meter, reply }).await
    }

    /// The mean cross-entropy of a lane and, in training, the gradient of the residual stream.
    pub(crate) async fn loss(
        &self,
        at: LaneStep,
        x: B::Tensor,
        tokens: Arc<Vec<u32>>,
        train: bool,
        meter: Meter,
    ) -> Result<Loss<B>> {
        call("embedding", &self.0, |reply| DenseMsg::Loss { at, x, tokens, train, meter, reply }).await
    }

    /// Adds the gradient of the embedded input to the lane's gradient of the embedding.
    pub(crate) async fn embed_backward(
        &self,
        at: LaneStep,
        dx: B::Tensor,
        tokens: Arc<Vec<u32>>,
        meter: Meter,
    ) -> Result<()> {
        call("embedding", &self.0, |reply| DenseMsg::EmbedBackward { at, dx, tokens, meter, reply }).await
    }

    /// Attention and, in a layer without experts, the gated feed-forward.
    pub(crate) async fn forward(
        &self,
        at: LaneStep,
        x: B::Tensor,
        train: bool,
        meter: Meter,
    ) -> Result<B::Tensor> {
        call("dense", &self.0, |reply| DenseMsg::Forward { at, x, train, meter, reply }).await
    }

    /// The gradient of the layer's input from that of its output.
    pub(crate) async fn backward(&self, at: LaneStep, dy: B::Tensor, meter: Meter) -> Result<B::Tensor> {
        call("dense", &self.0, |reply| DenseMsg::Backward { at, dy, meter, reply }).await
    }
}

/// The actor of one MoE layer's gate.
pub(crate) struct Router<B: Compute>(pub(crate) ActorRef<RouterMsg<B>>);

impl<B: Compute> Router<B> {
    /// Routes a lane through the layer's experts, wherever they are.
    pub(crate) async fn forward(
        &self,
        at: LaneStep,
        x: B::Tensor,
        train: bool,
        trace: TraceContext,
    ) -> Result<Routed<B>> {
        call("router", &self.0, |reply| RouterMsg::Forward { at, x, train, trace, reply }).await
    }

    /// The gradient of the layer's input from that of its output; `load` as in [`Compute::gate_backward`].
    pub(crate) async fn backward(
        &self,
        at: LaneStep,
        dy: B::Tensor,
        load: Arc<[u32]>,
        trace: TraceContext,
    ) -> Result<B::Tensor> {
        call("router", &self.0, |reply| RouterMsg::Backward { at, dy, load, trace, reply }).await
    }
}

/// The actor of one expert.
pub(crate) struct Expert<B: Compute>(pub(crate) ActorRef<ExpertMsg<B>>);

impl<B: Compute> Expert<B> {
    /// A lane's rows, `[rows, hidden]`.
    pub(crate) async fn forward(
        &self,
        at: LaneStep,
        x: B::Tensor,
        train: bool,
        meter: Meter,
    ) -> Result<B::Tensor> {
        call("expert", &self.0, |reply| ExpertMsg::Forward { at, x, train, meter, reply }).await
    }

    /// The gradient of the rows; the weight gradient follows once every lane of the group is back.
    pub(crate) async fn backward(&self, at: LaneStep, dy: B::Tensor, meter: Meter) -> Result<B::Tensor> {
        call("expert", &self.0, |reply| ExpertMsg::Backward { at, dy, meter, reply }).await
    }
}

/// The actor that owns a shard, whatever its kind.
pub(crate) enum ShardActor<B: Compute> {
    /// The embedding or a dense layer.
    Dense(Dense<B>),
    /// A gate.
    Router(Router<B>),
    /// An expert.
    Expert(Expert<B>),
}

impl<B: Compute> ShardActor<B> {
    /// One step of the optimizer.
    pub(crate) async fn apply(
        &self,
        gradient: Option<B::Gradient>,
        step: Step,
        update: Update,
    ) -> Result<()> {
        self.call(|reply| ShardMsg::Apply { gradient, step, update, reply }).await
    }

    /// The version and the stored form of the shard, at `version` where one is wanted. With `finite`, weights
    /// that are not finite are an error.
    pub(crate) async fn store(&self, version: Option<Step>, finite: bool) -> Result<(Step, Vec<u8>)> {
        self.call(|reply| ShardMsg::Store { version, finite, reply }).await
    }

    /// A digest of the state, which must be at `version`.
    pub(crate) async fn digest(&self, version: Step) -> Result<Digest> {
        self.call(|reply| ShardMsg::Digest { version, reply }).await
    }

    /// Flips a bit of the state: a fault of a scripted run.
    pub(crate) async fn flip_bit(&self) -> Result<()> {
        self.call(|reply| ShardMsg::FlipBit { reply }).await
    }

    /// Drops everything that belongs to epochs before `epoch`.
    pub(crate) fn discard(&self, epoch: volary_core::Epoch) {
        let message = ShardMsg::Discard { epoch };
        match self {
            Self::Dense(dense) => notify(&dense.0, DenseMsg::Shard(message)),
            Self::Router(router) => notify(&router.0, RouterMsg::Shard(message)),
            Self::Expert(expert) => notify(&expert.0, ExpertMsg::Shard(message)),
        }
    }

    /// Ends the actor, and with it the shard's memory.
    pub(crate) fn stop(&self) {
        match self {
            Self::Dense(dense) => dense.0.stop(None),
            Self::Router(router) => router.0.stop(None),
            Self::Expert(expert) => expert.0.stop(None),
        }
    }

    async fn call<T: Send + 'static>(&self, make: impl FnOnce(Reply<T>) -> ShardMsg<B>) -> Result<T> {
        match self {
            Self::Dense(dense) => call("dense", &dense.0, |reply| DenseMsg::Shard(make(reply))).await,
            Self::Router(router) => call("router", &router.0, |reply| RouterMsg::Shard(make(reply))).await,
            Self::Expert(expert) => call("expert", &expert.0, |reply| ExpertMsg::Shard(make(reply))).await,
        }
    }
}

// Derived implementations would ask for `B: Clone`.
impl<B: Compute> Clone for Dense<B> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<B: Compute> Clone for Router<B> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<B: Compute> Clone for Expert<B> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<B: Compute> Clone for ShardActor<B> {
    fn clone(&self) -> Self {
        match self {
            Self::Dense(dense) => Self::Dense(dense.clone()),
            Self::Router(router) => Self::Router(router.clone()),
            Self::Expert(expert) => Self::Expert(expert.clone()),
        }
    }
}
