//! One expert, forward and backward by hand: two matrices around an activation (GLaM, section 4), or SwiGLU
//! (Shazeer, arXiv 2002.05202; Qwen3).

use super::project;
use crate::error::{Error, Result};
use tch::{Kind, Tensor};
use volary_core::architecture::{Activation, Architecture, Family};

/// The function between an expert's matrices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Inner {
    Plain(Activation),
    /// SiLU of the gate, times up.
    SwiGlu,
}

fn inner(a: &Architecture) -> Inner {
    match a.family {
        Family::Glam => Inner::Plain(a.activation),
        Family::Qwen3Moe => Inner::SwiGlu,
    }
}

/// What a forward call computes.
#[derive(Debug)]
pub(crate) struct Passed {
    /// The products with all matrices but the last, `[rows, expert_hidden]` each.
    pub(crate) h: Vec<Tensor>,
    /// What the last matrix is applied to, `[rows, expert_hidden]`.
    pub(crate) a: Tensor,
    /// The output, `[rows, hidden]`.
    pub(crate) y: Tensor,
}

/// An expert on its rows, `[rows, hidden]`. `p` has its parameters, in the order of
/// [`crate::weights::parameters`].
pub(crate) fn forward(architecture: &Architecture, p: &[Tensor], x: &Tensor) -> Result<Passed> {
    let (down, first) = p.split_last().ok_or(Error::OutOfTurn("expert"))?;
    let h = first.iter().map(|matrix| project(x, matrix)).collect::<Result<Vec<_>>>()?;
    let a = match (inner(architecture), h.as_slice()) {
        (Inner::Plain(Activation::Gelu), [h]) => h.f_gelu("none")?,
        (Inner::Plain(Activation::Relu), [h]) => h.f_relu()?,
        (Inner::SwiGlu, [gate, up]) => gate.f_silu()?.f_mul(up)?,
        _ => return Err(Error::OutOfTurn("expert")),
    };
    let y = project(&a, down)?;
    Ok(Passed { h, a, y })
}

/// The gradients of `h` of [`forward`], and of its input, `[rows, hidden]`, from that of its output.
pub(crate) fn backward(
    architecture: &Architecture,
    p: &[Tensor],
    h: &[Tensor],
    dy: &Tensor,
) -> Result<(Vec<Tensor>, Tensor)> {
    let (down, first) = p.split_last().ok_or(Error::OutOfTurn("expert_backward"))?;
    let transposed = |m: &Tensor| -> Result<Tensor> { Ok(m.f_to_kind(dy.f_kind()?)?.f_transpose(0, 1)?) };
    let da = dy.f_matmul(&transposed(down)?)?;
    let dh = match (inner(architecture), h) {
        (Inner::Plain(Activation::Gelu), [h]) => vec![h.f_gelu_backward(&da, "none")?],
        (Inner::Plain(Activation::Relu), [h]) => vec![da.f_mul(&h.f_gt(0.0)?.f_to_kind(da.f_kind()?)?)?],
        (Inner::SwiGlu, [gate, up]) => {
            vec![gate.f_silu_backward(&da.f_mul(up)?)?, da.f_mul(&gate.f_silu()?)?]
        }
        _ => return Err(Error::OutOfTurn("expert_backward")),
    };
    let mut parts =
        dh.iter().zip(first).map(|(dh, m)| -> Result<Tensor> { Ok(dh.f_matmul(&transposed(m)?)?) });
    let first = parts.next().ok_or(Error::OutOfTurn("expert_backward"))??;
    let dx = parts.try_fold(first, |sum, part| -> Result<Tensor> { Ok(sum.f_add(&part?)?) })?;
    Ok((dh, dx))
}

/// The gradients of the parameters, f32, over the rows of several calls together.
pub(crate) fn weight_gradients(calls: &[Gradients<'_>]) -> Result<Vec<Tensor>> {
    let product = |left: Vec<&Tensor>, right: Vec<&Tensor>| -> Result<Tensor> {
        let left = Tensor::f_cat(&left, 0)?.f_transpose(0, 1)?;
        Ok(left.f_matmul(&Tensor::f_cat(&right, 0)?)?.f_to_kind(Kind::Float)?)
    };
    let matrices = calls.first().map_or(0, |call| call.dh.len());
    let of =
        |at: usize| product(calls.iter().map(|c| c.x).collect(), calls.iter().map(|c| &c.dh[at]).collect());
    let mut all = (0..matrices).map(of).collect::<Result<Vec<_>>>()?;
    all.push(product(calls.iter().map(|c| c.a).collect(), calls.iter().map(|c| c.dy).collect())?);
    Ok(all)
}

/// What the gradients of the parameters are made of, for one call.
pub(crate) struct Gradients<'a> {
    /// The input, `[rows, hidden]`.
    pub(crate) x: &'a Tensor,
    /// The gradients of the products with all matrices but the last, `[rows, expert_hidden]`.
    pub(crate) dh: &'a [Tensor],
    /// What the last matrix was applied to, `[rows, expert_hidden]`.
    pub(crate) a: &'a Tensor,
    /// The gradient of the output, `[rows, hidden]`.
    pub(crate) dy: &'a Tensor,
}
