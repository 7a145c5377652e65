//! The layers of a model as functions on tensors, for the engine, the decoder and the reference model.
//!
//! Shapes: `[tokens, hidden]` is a lane's residual stream, sequence after sequence. Activations are f32 or
//! bf16. Parameters are f32 and are cast to the kind of the activations.
//!
//! | file | content |
//! | --- | --- |
//! | `attention` | causal self-attention |
//! | [`expert`] | one expert, forward and backward |
//! | `gate` | the gate of an MoE layer and its auxiliary losses |
//! | `positions` | position biases and rotary positions |

mod attention;
pub(crate) mod expert;
mod gate;
mod positions;

pub(crate) use attention::{Attention, ByPosition, shared};
pub(crate) use gate::{Gate, pooled_aux_loss};
pub(crate) use positions::{Positions, Rotation, position_bucket};

use crate::error::{Error, Result};
use tch::{Device, Kind, Reduction, Tensor};
use volary_core::architecture::{Architecture, Family};

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

/// The gated feed-forward and the residual: `[tokens, hidden]` to `[tokens, hidden]`. GEGLU in GLaM, SwiGLU
/// in Qwen3 (Shazeer, arXiv 2002.05202). `p` is norm, gate, up and down.
pub(crate) fn feed_forward(family: Family, p: &[Tensor], x: &Tensor) -> Result<Tensor> {
    let [norm, gate, up, down] = p else { return Err(Error::OutOfTurn("feed_forward")) };
    let normed = rms_norm(x, norm)?;
    let gate = project(&normed, gate)?;
    let gate = match family {
        Family::Glam => gate.f_gelu("none")?,
        Family::Qwen3Moe => gate.f_silu()?,
    };
    let inner = gate.f_mul(&project(&normed, up)?)?;
    Ok(x.f_add(&project(&inner, down)?)?)
}

/// The factor of embedded tokens: GLaM's table is shared with the output, and scaled by sqrt(hidden).
pub(crate) fn embedding_scale(a: &Architecture) -> Option<f64> {
    (a.family == Family::Glam).then(|| (a.hidden as f64).sqrt())
}

/// The residual stream, `[tokens, hidden]`, of token ids, `[tokens]`.
pub(crate) fn embed(a: &Architecture, table: &Tensor, ids: &Tensor, kind: Kind) -> Result<Tensor> {
    let rows = table.f_index_select(0, ids)?;
    let rows = match embedding_scale(a) {
        Some(scale) => rows.f_mul_scalar(scale)?,
        None => rows,
    };
    Ok(rows.f_to_kind(kind)?)
}

/// The place of the output's table among the parameters of the embedding shard, `tokens`, `norm` and maybe
/// `output`.
pub(crate) fn output_place(a: &Architecture) -> usize {
    if a.is_tied() { 0 } else { 2 }
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
