//! The seam between the actors and the tensor library: every computation on tensors.
//!
//! Tensors, shards and gradients are opaque handles, so that GPU memory stays on the GPU, and the actors
//! build without libtorch. Methods may take milliseconds; the actors call them on a device executor's
//! threads.
//!
//! Shapes use these names: `tokens` = sequences × sequence_length of one lane, `hidden` is the width of the
//! residual stream, `rows` the assignments of a lane to one expert, `assignments` those to all experts.
//! *Activations* are f32 or bf16, as the implementation chooses for its device; parameters, optimizer state
//! and gradients are f32.
//!
//! A lane's loss is the mean over its tokens. Gradients of lanes are added, so that a step's sum is `lanes`
//! times the gradient of the mean loss over the batch; [`Update::scale`] divides by `lanes`.

use crate::digest::Digest;
use crate::dispatch::{Dispatch, TOP_K};
use crate::ids::{Lane, LayerId, ShardId, Step};
use crate::messages::Norm;
use crate::update::Update;

/// A failed computation, as the tensor library describes it.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{0}")]
pub struct ComputeError(pub String);

/// The result of a computation.
pub type Computed<T> = Result<T, ComputeError>;

/// A tensor on the host, as it crosses the wire.
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

/// The output of one MoE layer's gate for one lane.
#[derive(Debug)]
pub struct Gated<B: Compute> {
    /// The destination of each token.
    pub dispatch: Dispatch,
    /// The choices of each token, dropped ones included: first and second expert, `-1` for no choice.
    pub choices: [Vec<i64>; TOP_K],
    /// The normalized tokens in the order of `dispatch.tokens`: `[assignments, hidden]`, activations.
    pub rows: B::Tensor,
    /// State for [`Compute::combine`].
    pub saved: B::Saved,
    /// The load-balancing loss of this lane and layer.
    pub aux_loss: f64,
    /// Mean over tokens of the entropy of the gate's probabilities, in nats: from 0 (certain) to ln(experts)
    /// (even).
    pub entropy: f64,
}

/// The cross-entropy of a lane, in nats per token.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LaneLoss {
    /// The mean over all tokens.
    pub mean: f64,
    /// In validation, the mean over the tokens of each sequence: `[sequences]`.
    pub sequences: Vec<f32>,
}

/// A lane's loss and, for training, the gradients of the residual stream and of the embedding shard.
pub type LossAndGradients<B> = (LaneLoss, Option<(<B as Compute>::Tensor, <B as Compute>::Gradient)>);

/// The computations of one model on one device.
///
/// A lane calls `embed`, then `dense` for each layer, followed in an MoE layer by `gate`, `expert` for each
/// expert and `combine`, then `loss`, and the backward methods in reverse. With `train` false nothing is
/// saved.
///
/// # Errors
/// Every method returns [`ComputeError`] when the tensor library fails (memory, device) or an argument has
/// another shape or dtype than documented.
pub trait Compute: Send + Sync + Sized + 'static {
    /// An activation or its gradient, on the device.
    type Tensor: Send + 'static;
    /// Parameters and optimizer state of one shard, f32.
    type Shard: Send + 'static;
    /// A cheap view of a shard's parameters for one call.
    type Params: Send + 'static;
    /// State that a forward call keeps for its backward call.
    type Saved: Send + 'static;
    /// A gradient of one shard: a tensor per parameter, f32, in the order of the parameters.
    type Gradient: Send + 'static;

    /// A digest of the results of one fixed lane on this device: where it is equal, so are the bits of all
    /// forward and backward passes.
    fn arithmetic(&self) -> Computed<Digest>;
    /// The state of a shard before the first step, from the run's seed.
    ///
    /// # Errors
    /// When the device has no memory for it.
    fn initial(&self, shard: ShardId) -> Computed<Self::Shard>;
    /// A shard from its stored bytes.
    ///
    /// # Errors
    /// When the bytes are not of this model and shard, or the device has no memory for them.
    fn load(&self, shard: ShardId, bytes: &[u8]) -> Computed<Self::Shard>;
    /// The stored form of a shard at a version: equal bytes for equal bits, on every node.
    fn store(&self, shard: ShardId, version: Step, state: &Self::Shard) -> Computed<Vec<u8>>;
    /// A digest of all parameters and optimizer state: equal for equal bits, on every node.
    fn digest(&self, state: &Self::Shard) -> Computed<Digest>;
    /// Whether all parameters of a shard are finite.
    fn is_finite(&self, state: &Self::Shard) -> Computed<bool>;
    /// A view of a shard's parameters. It shares their memory.
    fn params(&self, state: &Self::Shard) -> Self::Params;

    /// The residual stream of a lane, `[tokens, hidden]`, activations.
    ///
    /// `tokens` are a lane's token ids, `[sequences, sequence_length + 1]` row by row; the last of each row
    /// is a target only. `params` are those of the embedding shard.
    fn embed(&self, params: Self::Params, tokens: &[u32]) -> Computed<Self::Tensor>;
    /// The cross-entropy of a lane in nats per token and, for training, its gradients: of `x`, `[tokens,
    /// hidden]`, and of the embedding shard as the output matrix, `[vocabulary, hidden]` with the final norm
    /// `[hidden]`.
    ///
    /// `x` is the residual stream after the last layer, `[tokens, hidden]`; `tokens` as in
    /// [`Compute::embed`].
    fn loss(
        &self,
        params: Self::Params,
        x: Self::Tensor,
        tokens: &[u32],
        train: bool,
    ) -> Computed<LossAndGradients<Self>>;
    /// Adds the gradient of the embedding as the input matrix to `gradient`, which [`Compute::loss`]
    /// returned.
    ///
    /// `dx` is the gradient of the output of [`Compute::embed`], `[tokens, hidden]`.
    fn embed_backward(
        &self,
        gradient: Self::Gradient,
        dx: Self::Tensor,
        tokens: &[u32],
    ) -> Computed<Self::Gradient>;

    /// Attention and, in a layer without experts, the gated feed-forward, residuals included (GLaM, section
    /// 4).
    ///
    /// `x` and the result are residual streams, `[tokens, hidden]`, activations.
    fn dense(
        &self,
        layer: LayerId,
        params: Self::Params,
        x: Self::Tensor,
        train: bool,
    ) -> Computed<(Self::Tensor, Self::Saved)>;
    /// The gradients of the input of [`Compute::dense`], `[tokens, hidden]`, and of its shard, from that of
    /// its output, `dy`, `[tokens, hidden]`.
    fn dense_backward(
        &self,
        saved: Self::Saved,
        dy: Self::Tensor,
    ) -> Computed<(Self::Tensor, Self::Gradient)>;

    /// Norm and gate: the two experts of each token (GLaM, section 4; GShard, arXiv 2006.16668, algorithm 1).
    ///
    /// `x` is the residual stream, `[tokens, hidden]`. `at` keys the random second-expert policy.
    fn gate(
        &self,
        layer: LayerId,
        params: Self::Params,
        x: Self::Tensor,
        at: (Step, Lane),
        train: bool,
    ) -> Computed<Gated<Self>>;
    /// The gate weights of some tokens of a lane: the factors of their first and second expert's outputs.
    fn gate_weights(&self, saved: &Self::Saved, tokens: &[usize]) -> Computed<Vec<[f64; TOP_K]>>;
    /// The residual stream plus the experts' outputs times their gate weights, `[tokens, hidden]`.
    ///
    /// `outputs` together have the experts' rows in expert order, `[assignments, hidden]`; `saved` is the
    /// gate's.
    fn combine(
        &self,
        dispatch: &Dispatch,
        saved: Self::Saved,
        outputs: Vec<Self::Tensor>,
    ) -> Computed<(Self::Tensor, Self::Saved)>;
    /// The gradients of the experts' outputs in expert order, `[assignments, hidden]`, from that of the
    /// residual stream, `dy`, `[tokens, hidden]`.
    fn combine_backward(
        &self,
        dispatch: &Dispatch,
        saved: Self::Saved,
        dy: Self::Tensor,
    ) -> Computed<(Self::Tensor, Self::Saved)>;
    /// The gradients of the input of [`Compute::gate`], `[tokens, hidden]`, and of the router shard, those of
    /// the load-balancing loss and the z-loss included.
    ///
    /// `load` is how often the lane's tokens chose each expert, over all MoE layers: `[experts]`. Some
    /// families balance the load of all layers together.
    ///
    /// `inputs` together have the gradients of the experts' inputs in expert order, `[assignments, hidden]`.
    fn gate_backward(
        &self,
        dispatch: &Dispatch,
        saved: Self::Saved,
        inputs: Vec<Self::Tensor>,
        load: &[u32],
    ) -> Computed<(Self::Tensor, Self::Gradient)>;

    /// One expert on its rows, `[rows, hidden]` to `[rows, hidden]`; `rows` may be 0.
    fn expert(
        &self,
        params: Self::Params,
        x: Self::Tensor,
        train: bool,
    ) -> Computed<(Self::Tensor, Self::Saved)>;
    /// The gradient of the input of [`Compute::expert`] from that of its output, `dy`, both `[rows, hidden]`.
    /// [`Compute::expert_gradient`] computes that of the weights later.
    fn expert_backward(
        &self,
        params: Self::Params,
        saved: Self::Saved,
        dy: Self::Tensor,
    ) -> Computed<(Self::Tensor, Self::Saved)>;
    /// The gradient of an expert's shard over a group of lanes, as one product over all of their rows in the
    /// order of `lanes`; `None` when there are no rows. `lanes` is the state that
    /// [`Compute::expert_backward`] returned for each.
    fn expert_gradient(&self, lanes: Vec<Self::Saved>) -> Computed<Option<Self::Gradient>>;

    /// `left + right`, element by element, of one shard. The order of the operands is part of the mathematics
    /// of a run.
    fn add(&self, left: Self::Gradient, right: Self::Gradient) -> Computed<Self::Gradient>;
    /// The squared norm of a gradient, summed in f64, and whether it is finite.
    fn norm(&self, gradient: &Self::Gradient) -> Computed<Norm>;
    /// One step of the optimizer on a shard, with the same bits on every device. `gradient` is the sum over
    /// lanes; `None` is a gradient of zeros.
    fn apply(
        &self,
        shard: ShardId,
        state: &mut Self::Shard,
        gradient: Option<Self::Gradient>,
        update: Update,
    ) -> Computed<()>;

    /// Rows `start..start + length` of a tensor, `[length, hidden]`, without copying.
    fn rows(&self, x: &Self::Tensor, start: usize, length: usize) -> Computed<Self::Tensor>;
    /// The rows of several tensors `[_, hidden]` one after the other.
    fn concatenate(&self, parts: Vec<Self::Tensor>) -> Computed<Self::Tensor>;
    /// A tensor on the host, with its dtype and shape.
    fn export(&self, x: &Self::Tensor) -> Computed<HostTensor>;
    /// A tensor on the device from its little-endian bytes on the host.
    fn import(&self, dtype: HostDtype, shape: &[usize], data: &[u8]) -> Computed<Self::Tensor>;
    /// The tensors of a gradient on the host, f32, in the order of the parameters.
    fn export_gradient(&self, gradient: &Self::Gradient) -> Computed<Vec<HostTensor>>;
    /// A gradient of `shard` from its tensors on the host.
    ///
    /// # Errors
    /// When their number, shapes or dtypes are not those of the shard's parameters.
    fn import_gradient(
        &self,
        shard: ShardId,
        parts: &[(HostDtype, Vec<usize>, &[u8])],
    ) -> Computed<Self::Gradient>;
}
