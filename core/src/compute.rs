//! The seam between the actors and the tensor library: everything that an actor does to numbers.
//!
//! Tensors, shards and gradients are opaque handles, so that what is on a GPU stays there and the actors build and
//! test without libtorch. Every method may take milliseconds and is called on a device executor's thread.
//! Gradients are *sums over a lane's tokens' mean loss*: each lane's loss is a mean, and lanes are added, so
//! the whole is `lanes` times the gradient of the mean.

use crate::dispatch::{Dispatch, TOP_K};
use crate::ids::{Lane, LayerId, ShardId, Step};
use crate::messages::Norm;
use crate::schedule::Update;

/// What a computation could not do.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{0}")]
pub struct ComputeError(pub String);

/// The result of a computation.
pub type Computed<T> = Result<T, ComputeError>;

/// A tensor's bytes as they go over the wire.
#[derive(Debug, Clone, PartialEq)]
pub struct HostTensor {
    /// The number type.
    pub dtype: HostDtype,
    /// The shape, outermost first.
    pub shape: Vec<usize>,
    /// Row-major, little-endian.
    pub data: Vec<u8>,
}

/// The number types that cross the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HostDtype {
    /// 32-bit float.
    F32,
    /// bfloat16.
    Bf16,
}

/// What the gate of one MoE layer found for one lane.
#[derive(Debug)]
pub struct Gated<B: Compute> {
    /// Where each token goes.
    pub dispatch: Dispatch,
    /// What each token asked for, also where it was dropped: first and second expert, `-1` for no choice.
    pub choices: [Vec<i64>; TOP_K],
    /// The tokens' rows in the order of `dispatch.tokens`: `[assignments, hidden]`.
    pub rows: B::Tensor,
    /// What the way back needs.
    pub saved: B::Saved,
    /// The load-balancing loss of this lane and layer.
    pub aux_loss: f64,
    /// Mean over tokens of the entropy of the gate's probabilities, in nats: 0 when sure, ln(experts) when undecided.
    pub entropy: f64,
}

/// A lane's loss and, for training, the gradients of the residual stream and of the embedding shard.
pub type LossAndGradients<B> = (f64, Option<(<B as Compute>::Tensor, <B as Compute>::Gradient)>);

/// The computations of one model on one device.
pub trait Compute: Send + Sync + Sized + 'static {
    /// An activation or its gradient, on the device.
    type Tensor: Send + 'static;
    /// Parameters and optimizer state of one shard.
    type Shard: Send + 'static;
    /// A cheap view of a shard's parameters for one call.
    type Params: Send + 'static;
    /// What a forward call keeps for its backward call.
    type Saved: Send + 'static;
    /// A gradient of one shard.
    type Gradient: Send + 'static;

    /// The state of a shard before the first step.
    ///
    /// # Errors
    /// As every method here: what the tensor library could not do.
    fn initial(&self, shard: ShardId) -> Computed<Self::Shard>;
    /// A shard from its stored bytes, which must be of the right model and shard.
    fn load(&self, shard: ShardId, bytes: &[u8]) -> Computed<Self::Shard>;
    /// The stored form of a shard: the same bytes for the same bits, whoever stores it.
    fn store(&self, shard: ShardId, version: Step, state: &Self::Shard) -> Computed<Vec<u8>>;
    /// A view of the parameters.
    fn params(&self, state: &Self::Shard) -> Self::Params;

    /// Token ids to the residual stream: `[sequences, sequence_length, hidden]`.
    fn embed(&self, params: Self::Params, tokens: &[u32]) -> Computed<Self::Tensor>;
    /// The mean cross-entropy of a lane and, for training, its gradients for `x` and the embedding shard.
    fn loss(
        &self,
        params: Self::Params,
        x: Self::Tensor,
        tokens: &[u32],
        train: bool,
    ) -> Computed<LossAndGradients<Self>>;
    /// Adds the gradient of the embedded input to that of the output.
    fn embed_backward(
        &self,
        gradient: Self::Gradient,
        dx: Self::Tensor,
        tokens: &[u32],
    ) -> Computed<Self::Gradient>;

    /// Attention and, in a layer without experts, the gated feed-forward.
    fn dense(
        &self,
        layer: LayerId,
        params: Self::Params,
        x: Self::Tensor,
        train: bool,
    ) -> Computed<(Self::Tensor, Self::Saved)>;
    /// The way back through [`Compute::dense`].
    fn dense_backward(
        &self,
        saved: Self::Saved,
        dy: Self::Tensor,
    ) -> Computed<(Self::Tensor, Self::Gradient)>;

    /// Norm and gate: chooses each token's experts. `step` and `lane` key the random second-expert policy.
    fn gate(
        &self,
        layer: LayerId,
        params: Self::Params,
        x: Self::Tensor,
        at: (Step, Lane),
        train: bool,
    ) -> Computed<Gated<Self>>;
    /// The gate weights of some tokens: what their first and second expert's outputs are multiplied by.
    fn gate_weights(&self, saved: &Self::Saved, tokens: &[usize]) -> Computed<Vec<[f64; TOP_K]>>;
    /// The residual plus the experts' outputs by gate weight; `outputs` are the experts' rows in expert order.
    fn combine(
        &self,
        dispatch: &Dispatch,
        saved: Self::Saved,
        outputs: Vec<Self::Tensor>,
    ) -> Computed<(Self::Tensor, Self::Saved)>;
    /// The gradient of the experts' outputs: rows in expert order.
    fn combine_backward(
        &self,
        dispatch: &Dispatch,
        saved: Self::Saved,
        dy: Self::Tensor,
    ) -> Computed<(Self::Tensor, Self::Saved)>;
    /// The way back through the gate; `inputs` are the gradients of the experts' inputs in expert order.
    fn gate_backward(
        &self,
        dispatch: &Dispatch,
        saved: Self::Saved,
        inputs: Vec<Self::Tensor>,
    ) -> Computed<(Self::Tensor, Self::Gradient)>;

    /// One expert on its rows `[tokens, hidden]`, which may be none.
    fn expert(
        &self,
        params: Self::Params,
        x: Self::Tensor,
        train: bool,
    ) -> Computed<(Self::Tensor, Self::Saved)>;
    /// The gradient of an expert's input; the weights' comes later.
    fn expert_backward(
        &self,
        params: Self::Params,
        saved: Self::Saved,
        dy: Self::Tensor,
    ) -> Computed<(Self::Tensor, Self::Saved)>;
    /// The weight gradient of a group of lanes in the order of their numbers, or `None` when none had a token.
    fn expert_gradient(&self, lanes: Vec<Self::Saved>) -> Computed<Option<Self::Gradient>>;

    /// `left + right`.
    fn add(&self, left: Self::Gradient, right: Self::Gradient) -> Computed<Self::Gradient>;
    /// The squared norm and whether all is finite.
    fn norm(&self, gradient: &Self::Gradient) -> Computed<Norm>;
    /// One step of the optimizer.
    fn apply(
        &self,
        shard: ShardId,
        state: &mut Self::Shard,
        gradient: Option<Self::Gradient>,
        step: Step,
        update: Update,
    ) -> Computed<()>;

    /// Rows `start..start + length` of a tensor, without copying.
    fn rows(&self, x: &Self::Tensor, start: usize, length: usize) -> Computed<Self::Tensor>;
    /// Several tensors' rows one after the other.
    fn concatenate(&self, parts: Vec<Self::Tensor>) -> Computed<Self::Tensor>;
    /// To the host, for the wire.
    fn export(&self, x: &Self::Tensor) -> Computed<HostTensor>;
    /// From the wire.
    fn import(&self, dtype: HostDtype, shape: &[usize], data: &[u8]) -> Computed<Self::Tensor>;
    /// A gradient's tensors, for the wire.
    fn export_gradient(&self, gradient: &Self::Gradient) -> Computed<Vec<HostTensor>>;
    /// A gradient from the wire.
    fn import_gradient(
        &self,
        shard: ShardId,
        parts: &[(HostDtype, Vec<usize>, &[u8])],
    ) -> Computed<Self::Gradient>;
}
