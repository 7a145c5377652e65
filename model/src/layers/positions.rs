//! What attention knows of positions: T5's bias by distance (GLaM), or rotary positions (Qwen3).

use crate::error::Result;
use tch::{Device, Kind, Tensor};
use volary_core::architecture::{Architecture, Family};

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
    pub(super) length: i64,
    pub(super) table: Table,
}

#[derive(Debug)]
pub(super) enum Table {
    Distances {
        /// The bucket of the distance `length - 1 - i` at index `i`: `[length]`, i64.
        buckets: Tensor,
        /// Minus infinity for later positions: `[length - 1, heads]`, f32.
        future: Tensor,
    },
    Rotary {
        rotation: Rotation,
        /// Minus infinity where the key is later than the query: `[length, length]`, f32.
        mask: Tensor,
    },
}

impl Positions {
    pub(crate) fn new(a: &Architecture, length: usize, device: Device) -> Result<Self> {
        let table = match a.family {
            Family::Glam => {
                let bucket = |d: usize| position_bucket(d, a.position_buckets, a.position_distance) as i64;
                let buckets: Vec<i64> = (0..length).rev().map(bucket).collect();
                let shape = [length as i64 - 1, a.heads as i64];
                Table::Distances {
                    buckets: Tensor::f_from_slice(&buckets)?.f_to_device(device)?,
                    future: Tensor::f_full(shape, f64::NEG_INFINITY, (Kind::Float, device))?,
                }
            }
            Family::Qwen3Moe => {
                let shape = [length as i64; 2];
                let closed = Tensor::f_full(shape, f64::NEG_INFINITY, (Kind::Float, device))?;
                let positions: Vec<usize> = (0..length).collect();
                Table::Rotary { rotation: Rotation::new(a, &positions, device)?, mask: closed.f_triu(1)? }
            }
        };
        Ok(Self { length: length as i64, table })
    }

    pub(crate) fn shallow_clone(&self) -> Self {
        let table = match &self.table {
            Table::Distances { buckets, future } => {
                Table::Distances { buckets: buckets.shallow_clone(), future: future.shallow_clone() }
            }
            Table::Rotary { rotation, mask } => {
                Table::Rotary { rotation: rotation.shallow_clone(), mask: mask.shallow_clone() }
            }
        };
        Self { length: self.length, table }
    }

    /// The relative position bias with the causal mask: `[heads, length, length]`, f32.
    ///
    /// Row `i`, column `j` depends on `i - j` only, so the matrix is a sliding window over one vector of
    /// distances.
    pub(super) fn bias(&self, table: &Tensor, buckets: &Tensor, future: &Tensor) -> Result<Tensor> {
        let past = table.f_index_select(0, buckets)?;
        let line = Tensor::f_cat(&[&past, future], 0)?.f_transpose(0, 1)?;
        Ok(line.f_unfold(1, self.length, 1)?.f_flip([1i64].as_slice())?)
    }
}

/// Rotations by position (RoFormer, arXiv 2104.09864, section 3.2) of halves of a head: number `i` turns with
/// number `i + head_dim / 2`, as in Hugging Face's models.
#[derive(Debug)]
pub(crate) struct Rotation {
    /// `[positions, head_dim]`, f32.
    cosines: Tensor,
    /// The same shape.
    sines: Tensor,
}

impl Rotation {
    /// The rotations at some positions.
    pub(crate) fn new(a: &Architecture, positions: &[usize], device: Device) -> Result<Self> {
        let half = a.head_dim / 2;
        // Frequencies and angles are rounded to f32, as there.
        let frequency = |i: usize| (a.rope_theta.powf((2 * i) as f64 / a.head_dim as f64) as f32).recip();
        let frequencies: Vec<f32> = (0..half).map(frequency).collect();
        let angles: Vec<f32> = positions
            .iter()
            .flat_map(|&position| frequencies.iter().chain(&frequencies).map(move |f| position as f32 * f))
            .collect();
        let table = |of: fn(f64) -> f64| -> Result<Tensor> {
            let values: Vec<f32> = angles.iter().map(|&angle| of(f64::from(angle)) as f32).collect();
            let shape = [positions.len() as i64, a.head_dim as i64];
            Ok(Tensor::f_from_slice(&values)?.f_view(shape)?.f_to_device(device)?)
        };
        Ok(Self { cosines: table(f64::cos)?, sines: table(f64::sin)? })
    }

    pub(crate) fn shallow_clone(&self) -> Self {
        Self { cosines: self.cosines.shallow_clone(), sines: self.sines.shallow_clone() }
    }

    /// Turns heads, `[.., positions, head_dim]`, or with `by_row` `[positions, heads, head_dim]`.
    pub(crate) fn apply(&self, x: &Tensor, by_row: bool) -> Result<Tensor> {
        let table = |table: &Tensor| -> Result<Tensor> {
            let table = table.f_to_kind(x.f_kind()?)?;
            if by_row { Ok(table.f_unsqueeze(1)?) } else { Ok(table) }
        };
        let half = x.size().last().copied().unwrap_or(0) / 2;
        let turned = [x.f_narrow(-1, half, half)?.f_neg()?, x.f_narrow(-1, 0, half)?];
        let turned = Tensor::f_cat(&turned, -1)?;
        Ok(x.f_mul(&table(&self.cosines)?)?.f_add(&turned.f_mul(&table(&self.sines)?)?)?)
    }
}
