//! Causal self-attention, with the residual.

use super::positions::{Positions, Table};
use super::{project, rms_norm};
use crate::error::{Error, Result};
use tch::{Kind, Tensor};
use volary_core::architecture::{Architecture, Family};

/// The parameters of attention, in the order of [`crate::weights::parameters`].
pub(crate) struct Attention<'a> {
    norm: &'a Tensor,
    qkv: &'a Tensor,
    output: &'a Tensor,
    by_position: ByPosition<&'a Tensor>,
}

/// What a family has for positions, with its parameters.
#[derive(Debug)]
pub(crate) enum ByPosition<T> {
    /// A table of biases, `[position_buckets, heads]` (T5, section 2.1).
    Bias(T),
    /// The gains of the norms of queries and keys before they turn, `[head_dim]` each.
    Turned {
        /// Of queries.
        query_norm: T,
        /// Of keys.
        key_norm: T,
    },
}

impl<T> ByPosition<T> {
    /// The parameters that follow the output matrix in a dense shard, from all that follow.
    pub(crate) fn split(a: &Architecture, mut rest: impl Iterator<Item = T>) -> Option<Self> {
        Some(match a.family {
            Family::Glam => Self::Bias(rest.next()?),
            Family::Qwen3Moe => Self::Turned { query_norm: rest.next()?, key_norm: rest.next()? },
        })
    }

    /// The number of parameters.
    pub(crate) fn count(a: &Architecture) -> usize {
        match a.family {
            Family::Glam => 1,
            Family::Qwen3Moe => 2,
        }
    }
}

impl<'a> Attention<'a> {
    /// Attention of a dense shard's parameters, and the parameters after it.
    pub(crate) fn of(a: &Architecture, p: &'a [Tensor]) -> Result<(Self, &'a [Tensor])> {
        let [norm, qkv, output, rest @ ..] = p else { return Err(Error::OutOfTurn("attention")) };
        let by_position = ByPosition::split(a, rest.iter()).ok_or(Error::OutOfTurn("attention"))?;
        Ok((Self { norm, qkv, output, by_position }, &rest[ByPosition::<&Tensor>::count(a)..]))
    }

    /// `[tokens, hidden]` to `[tokens, hidden]`.
    pub(crate) fn forward(&self, a: &Architecture, positions: &Positions, x: &Tensor) -> Result<Tensor> {
        let (length, heads, dim) = (positions.length, a.heads as i64, a.head_dim as i64);
        let kv_heads = a.kv_heads() as i64;
        let sequences = x.size()[0] / length;
        let qkv = project(&rms_norm(x, self.norm)?, self.qkv)?.f_view([sequences, length, -1, dim])?;
        let of = |start: i64, count: i64| qkv.f_narrow(2, start, count)?.f_transpose(1, 2);
        let (mut q, mut k, v) = (of(0, heads)?, of(heads, kv_heads)?, of(heads + kv_heads, kv_heads)?);
        let mask = match (&self.by_position, &positions.table) {
            (ByPosition::Bias(table), Table::Distances { buckets, future }) => {
                positions.bias(table, buckets, future)?
            }
            (ByPosition::Turned { query_norm, key_norm }, Table::Rotary { rotation, mask }) => {
                q = rotation.apply(&rms_norm(&q, query_norm)?, false)?;
                k = rotation.apply(&rms_norm(&k, key_norm)?, false)?;
                mask.shallow_clone()
            }
            _ => return Err(Error::OutOfTurn("attention")),
        };
        let (k, v) = (shared(&k, heads)?, shared(&v, heads)?);
        let q = q.f_mul_scalar((dim as f64).powf(-0.5))?;
        let scores = q.f_matmul(&k.f_transpose(-2, -1)?)?.f_to_kind(Kind::Float)?;
        let weights = scores.f_add(&mask)?.f_softmax(-1, Kind::Float)?.f_to_kind(x.f_kind()?)?;
        let mixed = weights.f_matmul(&v)?.f_transpose(1, 2)?.f_reshape([sequences * length, heads * dim])?;
        Ok(x.f_add(&project(&mixed, self.output)?)?)
    }
}

/// Keys or values, `[.., kv_heads, rows, head_dim]`, as each of `heads` query heads sees them: consecutive
/// ones share one (Ainslie et al., arXiv 2305.13245).
pub(crate) fn shared(x: &Tensor, heads: i64) -> Result<Tensor> {
    let shape = x.size();
    let place = shape.len() - 3;
    let each = heads / shape[place];
    if each == 1 {
        return Ok(x.shallow_clone());
    }
    let (mut wide, mut whole) = (shape.clone(), shape);
    wide.insert(place + 1, each);
    whole[place] = heads;
    let wide = x.f_unsqueeze(place as i64 + 1)?.f_expand(wide.as_slice(), false)?;
    Ok(wide.f_reshape(whole.as_slice())?)
}
