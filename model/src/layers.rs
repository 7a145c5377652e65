//! The layers of a GLaM model as functions on tensors, for the engine and the reference model.
//!
//! Shapes: `[tokens, hidden]` is a lane's residual stream, sequence after sequence. Activations are f32 or
//! bf16. Parameters are f32 and are cast to the kind of the activations.

use crate::error::Result;
use tch::{Device, Kind, Reduction, Tensor};
use volary_core::architecture::{Activation, Architecture};

/// The epsilon of a norm.
const NORM_EPSILON: f64 = 1e-6;

/// RMSNorm (Zhang and Sennrich, arXiv 1910.07467), computed in f32: `x / sqrt(mean(x^2) + epsilon) * gain`,
/// with `x` as `[tokens, hidden]` and `gain` as `[hidden]`.
pub(crate) fn rms_norm(x: &Tensor, gain: &Tensor) -> Result<Tensor> {
    let kind = x.f_kind()?;
    let wide = x.f_to_kind(Kind::Float)?;
    let mean = wide.f_square()?.f_mean_dim([-1i64].as_slice(), true, Kind::Float)?;
    let scale = mean.f_add_scalar(NORM_EPSILON)?.f_rsqrt()?;
    Ok(wide.f_mul(&scale)?.f_mul(gain)?.f_to_kind(kind)?)
}

/// `x`, `[tokens, rows]`, times a matrix, `[rows, columns]`, in the kind of `x`.
pub(crate) fn project(x: &Tensor, matrix: &Tensor) -> Result<Tensor> {
    Ok(x.f_matmul(&matrix.f_to_kind(x.f_kind()?)?)?)
}

/// The T5 bucket of a causal distance (Raffel et al., arXiv 1910.10683, section 2.1): the first half of the
/// buckets are single distances, the rest grow logarithmically up to `longest`.
pub(crate) fn position_bucket(distance: usize, buckets: usize, longest: usize) -> usize {
    let exact = buckets / 2;
    if distance < exact {
        return distance;
    }
    let ratio = (distance as f64 / exact as f64).ln() / (longest as f64 / exact as f64).ln();
    (exact + (ratio * (buckets - exact) as f64) as usize).min(buckets - 1)
}

/// The position tables of attention for one sequence length.
#[derive(Debug)]
pub(crate) struct Positions {
    /// The bucket of the distance `length - 1 - i` at index `i`: `[length]`, i64.
    buckets: Tensor,
    /// Minus infinity for later positions: `[length - 1, heads]`, f32.
    future: Tensor,
    length: i64,
}

impl Positions {
    pub(crate) fn new(a: &Architecture, length: usize, device: Device) -> Result<Self> {
        let bucket = |d: usize| position_bucket(d, a.position_buckets, a.position_distance) as i64;
        let buckets: Vec<i64> = (0..length).rev().map(bucket).collect();
        let shape = [length as i64 - 1, a.heads as i64];
        Ok(Self {
            buckets: Tensor::f_from_slice(&buckets)?.f_to_device(device)?,
            future: Tensor::f_full(shape, f64::NEG_INFINITY, (Kind::Float, device))?,
            length: length as i64,
        })
    }

    pub(crate) fn shallow_clone(&self) -> Self {
        let (buckets, future) = (self.buckets.shallow_clone(), self.future.shallow_clone());
        Self { buckets, future, length: self.length }
    }

    /// The relative position bias with the causal mask: `[heads, length, length]`, f32.
    ///
    /// Row `i`, column `j` depends on `i - j` only, so the matrix is a sliding window over one vector of
    /// distances.
    fn bias(&self, table: &Tensor) -> Result<Tensor> {
        let past = table.f_index_select(0, &self.buckets)?;
        let line = Tensor::f_cat(&[&past, &self.future], 0)?.f_transpose(0, 1)?;
        Ok(line.f_unfold(1, self.length, 1)?.f_flip([1i64].as_slice())?)
    }
}

/// The parameters of attention, in the order of [`crate::weights::parameters`].
pub(crate) struct Attention<'a> {
    pub(crate) norm: &'a Tensor,
    pub(crate) qkv: &'a Tensor,
    pub(crate) output: &'a Tensor,
    pub(crate) position: &'a Tensor,
}

impl Attention<'_> {
    /// Causal self-attention with a relative position bias (T5, section 2.1), and the residual:
    /// `[tokens, hidden]` to `[tokens, hidden]`.
    pub(crate) fn forward(&self, a: &Architecture, positions: &Positions, x: &Tensor) -> Result<Tensor> {
        let (length, heads, dim) = (positions.length, a.heads as i64, a.head_dim as i64);
        let sequences = x.size()[0] / length;
        let qkv = project(&rms_norm(x, self.norm)?, self.qkv)?
            .f_view([sequences, length, 3, heads, dim])?
            .f_permute([2i64, 0, 3, 1, 4].as_slice())?;
        let (q, k, v) = (qkv.f_select(0, 0)?, qkv.f_select(0, 1)?, qkv.f_select(0, 2)?);
        let q = q.f_mul_scalar((dim as f64).powf(-0.5))?;
        let scores = q.f_matmul(&k.f_transpose(-2, -1)?)?.f_to_kind(Kind::Float)?;
        let weights =
            scores.f_add(&self.bias(positions)?)?.f_softmax(-1, Kind::Float)?.f_to_kind(x.f_kind()?)?;
        let mixed = weights.f_matmul(&v)?.f_transpose(1, 2)?.f_reshape([sequences * length, heads * dim])?;
        Ok(x.f_add(&project(&mixed, self.output)?)?)
    }

    fn bias(&self, positions: &Positions) -> Result<Tensor> {
        positions.bias(self.position)
    }
}

/// The parameters of the gated feed-forward.
pub(crate) struct FeedForward<'a> {
    pub(crate) norm: &'a Tensor,
    pub(crate) gate: &'a Tensor,
    pub(crate) up: &'a Tensor,
    pub(crate) down: &'a Tensor,
}

impl FeedForward<'_> {
    /// GEGLU (Shazeer, arXiv 2002.05202) and the residual: `[tokens, hidden]` to `[tokens, hidden]`.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let normed = rms_norm(x, self.norm)?;
        let inner = project(&normed, self.gate)?.f_gelu("none")?.f_mul(&project(&normed, self.up)?)?;
        Ok(x.f_add(&project(&inner, self.down)?)?)
    }
}

/// The activation function of an expert: `[rows, expert_hidden]` to the same shape.
pub(crate) fn activate(kind: Activation, h: &Tensor) -> Result<Tensor> {
    Ok(match kind {
        Activation::Gelu => h.f_gelu("none")?,
        Activation::Relu => h.f_relu()?,
    })
}

/// The gradient of the input of [`activate`].
pub(crate) fn activate_backward(kind: Activation, h: &Tensor, da: &Tensor) -> Result<Tensor> {
    Ok(match kind {
        Activation::Gelu => h.f_gelu_backward(da, "none")?,
        Activation::Relu => da.f_mul(&h.f_gt(0.0)?.f_to_kind(da.f_kind()?)?)?,
    })
}

/// The output of the gate for one lane and layer.
pub(crate) struct Gate {
    /// The normalized input: `[tokens, hidden]`, activations.
    pub(crate) normed: Tensor,
    /// The two chosen experts: `[tokens, 2]`, i64.
    pub(crate) experts: Tensor,
    /// Their gate weights, which sum to 1: `[tokens, 2]`, f32.
    pub(crate) weights: Tensor,
    /// The load-balancing loss, E * sum of f_e * P_e (GShard, section 2.2): a scalar, f32.
    pub(crate) aux_loss: Tensor,
    /// The mean squared logsumexp of the logits (ST-MoE, arXiv 2202.08906, equation 5): a scalar, f32.
    pub(crate) z_loss: Tensor,
    /// The probabilities of all experts: `[tokens, experts]`, f32.
    probabilities: Tensor,
}

impl Gate {
    /// Norm, logits and softmax in f32, and the top two (GLaM, section 4). `x` is `[tokens, hidden]`, `norm`
    /// `[hidden]` and `gate` `[hidden, experts]`.
    pub(crate) fn forward(x: &Tensor, norm: &Tensor, gate: &Tensor) -> Result<Self> {
        let experts_count = gate.size()[1];
        let normed = rms_norm(x, norm)?;
        let logits = normed.f_to_kind(Kind::Float)?.f_matmul(gate)?;
        let probabilities = logits.f_softmax(-1, Kind::Float)?;
        let (top, experts) = probabilities.f_topk(2, -1, true, true)?;
        let total = top.f_sum_dim_intlist([-1i64].as_slice(), true, Kind::Float)?.f_add_scalar(1e-9)?;
        let first = experts.f_select(1, 0)?;
        let tokens = x.size()[0].max(1) as f64;
        let share =
            first.f_bincount::<Tensor>(None, experts_count)?.f_to_kind(Kind::Float)?.f_div_scalar(tokens)?;
        let mean = probabilities.f_mean_dim([0i64].as_slice(), false, Kind::Float)?;
        let aux_loss = share.f_mul(&mean)?.f_sum(Kind::Float)?.f_mul_scalar(experts_count as f64)?;
        let z_loss = logits.f_logsumexp([-1i64].as_slice(), false)?.f_square()?.f_mean(Kind::Float)?;
        Ok(Self { normed, experts, weights: top.f_div(&total)?, aux_loss, z_loss, probabilities })
    }

    /// On the host: each token's first and second expert, the load-balancing loss, and the mean over tokens of
    /// the entropy of the probabilities, in nats. One copy, since a GPU is waited for at each; f64 holds all
    /// of it exactly.
    pub(crate) fn on_host(&self) -> Result<(Vec<i64>, Vec<i64>, f64, f64)> {
        let tokens = self.experts.size()[0] as usize;
        let entropy = self.probabilities.f_detach()?.f_special_entr()?.f_sum(Kind::Double)?;
        let parts = [
            self.experts.f_tr()?.f_reshape([-1i64].as_slice())?.f_to_kind(Kind::Double)?,
            self.aux_loss.f_detach()?.f_to_kind(Kind::Double)?.f_view([1i64].as_slice())?,
            entropy.f_view([1i64].as_slice())?,
        ];
        let mut first: Vec<f64> = Vec::try_from(Tensor::f_cat(&parts, 0)?.f_to_device(Device::Cpu)?)?;
        let entropy = first.pop().unwrap_or_default() / tokens.max(1) as f64;
        let aux_loss = first.pop().unwrap_or_default();
        let second = first.split_off(tokens);
        let experts = |choices: Vec<f64>| choices.into_iter().map(|expert| expert as i64).collect();
        Ok((experts(first), experts(second), aux_loss, entropy))
    }
}

/// The residual stream, `[tokens, hidden]`, of token ids, `[tokens]`. It is scaled by sqrt(hidden), since the
/// table is shared with the output.
pub(crate) fn embed(table: &Tensor, ids: &Tensor, kind: Kind) -> Result<Tensor> {
    let scale = (table.size()[1] as f64).sqrt();
    Ok(table.f_index_select(0, ids)?.f_mul_scalar(scale)?.f_to_kind(kind)?)
}

/// The logits of the next token, `[tokens, vocabulary]`, f32, from the residual stream `x`,
/// `[tokens, hidden]`.
pub(crate) fn logits(x: &Tensor, table: &Tensor, norm: &Tensor) -> Result<Tensor> {
    let transposed = table.f_to_kind(x.f_kind()?)?.f_transpose(0, 1)?;
    Ok(rms_norm(x, norm)?.f_matmul(&transposed)?.f_to_kind(Kind::Float)?)
}

/// Mean cross-entropy in nats per token, a scalar, of `logits`, `[tokens, vocabulary]`, and `targets`,
/// `[tokens]`, i64.
pub(crate) fn cross_entropy(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    Ok(logits.f_cross_entropy_loss::<Tensor>(targets, None, Reduction::Mean, -100, 0.0)?)
}

/// The mean cross-entropy of each sequence of `length` tokens, `[sequences]`, f32 on the host; see
/// [`cross_entropy`].
pub(crate) fn sequence_cross_entropy(logits: &Tensor, targets: &Tensor, length: i64) -> Result<Tensor> {
    let tokens = logits.f_cross_entropy_loss::<Tensor>(targets, None, Reduction::None, -100, 0.0)?;
    Ok(tokens.f_view([-1, length])?.f_mean_dim(1, false, Kind::Float)?.f_to_device(Device::Cpu)?)
}
