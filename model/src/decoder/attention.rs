//! Attention of new tokens to those in the cache.
//!
//! Sequences with one new token each, as in generation, are computed together: their keys are gathered into
//! one tensor and masked to their lengths. A sequence with several new tokens, as a prompt, is computed by
//! itself.

use super::cache::{Cache, CachedLayer};
use crate::error::{Error, Result};
use crate::layers::{ByPosition, Rotation, position_bucket, project, rms_norm, shared};
use std::ops::Range;
use tch::{Device, Kind, Tensor};
use volary_core::architecture::{Architecture, Family};

/// The parameters of attention.
#[derive(Debug)]
pub(super) struct Attention {
    norm: Tensor,
    qkv: Tensor,
    output: Tensor,
    /// The position bias of each distance, `[context, heads]`, f32, or the norms before the rotation.
    by_position: ByPosition<Tensor>,
}

/// The rows of a pass and what they attend to, the same in all layers.
pub(super) struct Queries {
    rows: i64,
    /// By the positions of the rows, where the family turns queries and keys.
    rotation: Option<Rotation>,
    together: Option<Together>,
    runs: Vec<Run>,
}

/// Sequences with one new token each.
struct Together {
    /// Their rows in the pass, `[sequences]`; `None` where they are all rows in order.
    rows: Option<Tensor>,
    /// Their slots: `[sequences]`, i64.
    slots: Tensor,
    /// The number of sequences, if they are in the first slots in order: their keys need no copy then.
    first: Option<i64>,
    /// The rows of their new tokens in their slots: `[sequences]`, i64.
    places: Tensor,
    /// The keys that any of them attends to.
    keys: i64,
    distances: Distances,
}

/// A sequence with several new tokens.
struct Run {
    rows: Range<i64>,
    slot: i64,
    /// The position of its first new token.
    start: i64,
    distances: Distances,
}

/// How far back each key is from each query.
struct Distances {
    /// `[queries * keys]`, i64, 0 where the key is masked.
    flat: Tensor,
    /// 0, or minus infinity for keys that a query must not see: `[queries, keys]`, f32.
    mask: Tensor,
    queries: i64,
    keys: i64,
}

impl Distances {
    /// `distance(query, key)` is `None` for a key that the query must not see.
    fn new(
        (queries, keys): (usize, usize),
        device: Device,
        distance: impl Fn(usize, usize) -> Option<usize>,
    ) -> Result<Self> {
        let pairs = (0..queries).flat_map(|query| (0..keys).map(move |key| (query, key)));
        let found: Vec<Option<usize>> = pairs.map(|(query, key)| distance(query, key)).collect();
        let flat: Vec<i64> = found.iter().map(|found| found.unwrap_or(0) as i64).collect();
        let mask: Vec<f32> =
            found.iter().map(|found| if found.is_some() { 0.0 } else { f32::NEG_INFINITY }).collect();
        let (queries, keys) = (queries as i64, keys as i64);
        Ok(Self {
            flat: Tensor::f_from_slice(&flat)?.f_to_device(device)?,
            mask: Tensor::f_from_slice(&mask)?.f_view([queries, keys])?.f_to_device(device)?,
            queries,
            keys,
        })
    }

    /// The biases with the mask: `[queries, heads, keys]`, f32, or `[queries, 1, keys]` without biases.
    fn bias(&self, by_position: &ByPosition<Tensor>) -> Result<Tensor> {
        let ByPosition::Bias(by_distance) = by_position else { return Ok(self.mask.f_unsqueeze(1)?) };
        let heads = by_distance.size()[1];
        let bias = by_distance.f_index_select(0, &self.flat)?.f_view([self.queries, self.keys, heads])?;
        Ok(bias.f_transpose(1, 2)?.f_add(&self.mask.f_unsqueeze(1)?)?)
    }
}

impl Queries {
    /// `parts` are the slots with their numbers of new tokens, in the order of the rows.
    pub(super) fn new(
        a: &Architecture,
        cache: &Cache,
        parts: &[(usize, usize)],
        device: Device,
    ) -> Result<Self> {
        let (mut singles, mut runs, mut positions) = (Vec::new(), Vec::new(), Vec::new());
        let mut rows = 0;
        for &(slot, count) in parts {
            let start = cache.length(slot);
            if count == 1 {
                singles.push((rows, slot, start));
            } else {
                let distances = Distances::new((count, start + count), device, |query, key| {
                    (start + query).checked_sub(key)
                })?;
                let rows = rows as i64..(rows + count) as i64;
                runs.push(Run { rows, slot: slot as i64, start: start as i64, distances });
            }
            rows += count;
            positions.extend(start..start + count);
        }
        let rotation = match a.family {
            Family::Glam => None,
            Family::Qwen3Moe => Some(Rotation::new(a, &positions, device)?),
        };
        let together = match singles.is_empty() {
            true => None,
            false => Some(Together::new(cache.context(), &singles, runs.is_empty(), device)?),
        };
        Ok(Self { rows: rows as i64, rotation, together, runs })
    }
}

impl Together {
    /// `singles` are row, slot and position of each.
    fn new(context: usize, singles: &[(usize, usize, usize)], are_all: bool, device: Device) -> Result<Self> {
        let numbers = |pick: &dyn Fn(&(usize, usize, usize)) -> usize| -> Result<Tensor> {
            let numbers: Vec<i64> = singles.iter().map(|single| pick(single) as i64).collect();
            Ok(Tensor::f_from_slice(&numbers)?.f_to_device(device)?)
        };
        let seen = |position: usize| (position + 1).min(context);
        let keys = singles.iter().map(|single| seen(single.2)).max().unwrap_or(0);
        let distances = Distances::new((singles.len(), keys), device, |query, key| {
            let position = singles[query].2;
            // The last position in this row of the slot.
            let distance = (position + context - key) % context;
            (distance < seen(position)).then_some(distance)
        })?;
        Ok(Self {
            rows: if are_all { None } else { Some(numbers(&|single| single.0)?) },
            slots: numbers(&|single| single.1)?,
            first: singles
                .iter()
                .enumerate()
                .all(|(at, single)| at == single.1)
                .then_some(singles.len() as i64),
            places: numbers(&|single| single.2 % context)?,
            keys: keys as i64,
            distances,
        })
    }

    /// The mixed values of the sequences' new tokens, `[sequences, heads, head_dim]`, of their queries of the
    /// same shape, and their keys and values, `[sequences, kv_heads, head_dim]`.
    fn attend(
        &self,
        layer: &CachedLayer,
        by_position: &ByPosition<Tensor>,
        [q, k, v]: [&Tensor; 3],
    ) -> Result<Tensor> {
        let place = [Some(&self.slots), None, Some(&self.places)];
        let [mut keys, mut values] = [layer.keys.shallow_clone(), layer.values.shallow_clone()];
        let _ = keys.f_index_put_(&place, k, false)?;
        let _ = values.f_index_put_(&place, v, false)?;
        let gather = |all: &Tensor| match self.first {
            Some(count) => all.f_narrow(0, 0, count)?.f_narrow(2, 0, self.keys),
            None => all.f_narrow(2, 0, self.keys)?.f_index_select(0, &self.slots),
        };
        let bias = self.distances.bias(by_position)?.f_unsqueeze(2)?;
        mix(&q.f_unsqueeze(2)?, &gather(&keys)?, &gather(&values)?, &bias)?
            .f_squeeze_dim(2)
            .map_err(Into::into)
    }
}

impl Run {
    /// As [`Together::attend`], of the new tokens of one sequence.
    fn attend(
        &self,
        layer: &CachedLayer,
        by_position: &ByPosition<Tensor>,
        [q, k, v]: [&Tensor; 3],
    ) -> Result<Tensor> {
        let count = self.rows.end - self.rows.start;
        let by_head = |rows: &Tensor| rows.f_transpose(0, 1);
        let all = |cached: &Tensor, new: &Tensor| -> Result<Tensor> {
            let slot = cached.f_select(0, self.slot)?;
            slot.f_narrow(1, self.start, count)?.f_copy_(&by_head(new)?)?;
            Ok(slot.f_narrow(1, 0, self.start + count)?)
        };
        let (keys, values) = (all(&layer.keys, k)?, all(&layer.values, v)?);
        let bias = self.distances.bias(by_position)?.f_transpose(0, 1)?;
        by_head(&mix(&by_head(q)?, &keys, &values, &bias)?).map_err(Into::into)
    }
}

/// The values mixed by the softmax of the scores: queries `[.., heads, queries, head_dim]`, keys and values
/// `[.., kv_heads, keys, head_dim]`, bias `[.., heads, queries, keys]`.
fn mix(q: &Tensor, keys: &Tensor, values: &Tensor, bias: &Tensor) -> Result<Tensor> {
    let shape = q.size();
    let (heads, dim) = (shape[shape.len() - 3], shape[shape.len() - 1] as f64);
    let (keys, values) = (shared(keys, heads)?, shared(values, heads)?);
    let scores = q.f_mul_scalar(dim.powf(-0.5))?.f_matmul(&keys.f_transpose(-2, -1)?)?;
    Ok(scores.f_add(bias)?.f_softmax(-1, Kind::Float)?.f_matmul(&values)?)
}

impl Attention {
    /// The same layer for another thread.
    pub(super) fn share(&self) -> Self {
        let by_position = match &self.by_position {
            ByPosition::Bias(bias) => ByPosition::Bias(bias.shallow_clone()),
            ByPosition::Turned { query_norm, key_norm } => ByPosition::Turned {
                query_norm: query_norm.shallow_clone(),
                key_norm: key_norm.shallow_clone(),
            },
        };
        let (norm, qkv) = (self.norm.shallow_clone(), self.qkv.shallow_clone());
        Self { norm, qkv, output: self.output.shallow_clone(), by_position }
    }

    /// The number of its tensors, the first ones of a dense shard.
    pub(super) fn tensors(a: &Architecture) -> usize {
        3 + ByPosition::<Tensor>::count(a)
    }

    pub(super) fn new(
        a: &Architecture,
        tensors: Vec<Tensor>,
        context: usize,
        device: Device,
    ) -> Result<Self> {
        let mut tensors = tensors.into_iter();
        let mut next = || tensors.next().ok_or(Error::OutOfTurn("Attention::new"));
        let (norm, qkv, output) = (next()?, next()?, next()?);
        let by_position = match ByPosition::split(a, tensors).ok_or(Error::OutOfTurn("Attention::new"))? {
            ByPosition::Bias(table) => {
                let bucket = |d: usize| position_bucket(d, a.position_buckets, a.position_distance) as i64;
                let buckets: Vec<i64> = (0..context).map(bucket).collect();
                let buckets = Tensor::f_from_slice(&buckets)?.f_to_device(device)?;
                ByPosition::Bias(table.f_index_select(0, &buckets)?)
            }
            turned => turned,
        };
        Ok(Self { norm, qkv, output, by_position })
    }

    /// Queries, `[rows, heads, head_dim]`, and keys and values, `[rows, kv_heads, head_dim]`, of rows.
    fn project(&self, a: &Architecture, queries: &Queries, x: &Tensor) -> Result<[Tensor; 3]> {
        let (heads, kv_heads) = (a.heads as i64, a.kv_heads() as i64);
        let qkv = project(&rms_norm(x, &self.norm)?, &self.qkv)?;
        let qkv = qkv.f_view([queries.rows, heads + 2 * kv_heads, a.head_dim as i64])?;
        let of = |start, count| qkv.f_narrow(1, start, count);
        let (q, k, v) = (of(0, heads)?, of(heads, kv_heads)?, of(heads + kv_heads, kv_heads)?);
        let (ByPosition::Turned { query_norm, key_norm }, Some(rotation)) =
            (&self.by_position, &queries.rotation)
        else {
            return Ok([q, k, v]);
        };
        let q = rotation.apply(&rms_norm(&q, query_norm)?, true)?;
        Ok([q, rotation.apply(&rms_norm(&k, key_norm)?, true)?, v])
    }

    /// Attention of the new rows, `[rows, hidden]`, to themselves and to the cache, into which their keys and
    /// values are written; with the residual, to the same shape.
    pub(super) fn forward(
        &self,
        a: &Architecture,
        layer: &CachedLayer,
        queries: &Queries,
        x: &Tensor,
    ) -> Result<Tensor> {
        let (heads, dim) = (a.heads as i64, a.head_dim as i64);
        let qkv = self.project(a, queries, x)?;
        let by_position = &self.by_position;
        let mixed = Tensor::f_empty([queries.rows, heads, dim], (Kind::Float, x.device()))?;
        for run in &queries.runs {
            let count = run.rows.end - run.rows.start;
            let rows = |x: &Tensor| x.f_narrow(0, run.rows.start, count);
            let [q, k, v] = &qkv;
            let out = run.attend(layer, by_position, [&rows(q)?, &rows(k)?, &rows(v)?])?;
            mixed.f_narrow(0, run.rows.start, count)?.f_copy_(&out)?;
        }
        let mixed = match &queries.together {
            None => mixed,
            Some(together) => {
                let rows = |x: &Tensor| -> Result<Tensor> {
                    let all = || x.shallow_clone();
                    Ok(together.rows.as_ref().map_or_else(|| Ok(all()), |rows| x.f_index_select(0, rows))?)
                };
                let [q, k, v] = &qkv;
                let out = together.attend(layer, by_position, [&rows(q)?, &rows(k)?, &rows(v)?])?;
                match &together.rows {
                    Some(rows) => mixed.f_index_copy(0, rows, &out)?,
                    None => out,
                }
            }
        };
        Ok(x.f_add(&project(&mixed.f_reshape([queries.rows, heads * dim])?, &self.output)?)?)
    }
}
