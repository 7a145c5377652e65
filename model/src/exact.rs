//! Arithmetic with the same bits on every device.
//!
//! Replicas of one shard are updated each by itself, maybe on unlike devices. An operation gives the same
//! bits everywhere only if each of its results is one correctly rounded operation (IEEE 754: add, subtract,
//! multiply, divide, square root). The library's sums and means add in an order that depends on the device,
//! its reciprocal square root is an approximation on a GPU, and a division by a scalar is a multiplication by
//! its reciprocal there. So sums here are trees of elementwise additions, and divisors are tensors.
//!
//! A tree's shape depends on the length only: the second half is added to the first, and the middle number of
//! an odd length stays as it is, until one number is left.

use crate::error::Result;
use crate::limits::{BLOCK, CHUNK, NARROW};
use tch::{Kind, Tensor};

/// The sums of the rows of a matrix, `[rows, columns]` to `[rows]`.
pub(crate) fn sum_rows(x: &Tensor) -> Result<Tensor> {
    sum_rows_of(x, |part| Ok(part.shallow_clone()))
}

/// The sums of the rows of `of(x)`, which is elementwise. What is added stays in the cache, and each row is
/// summed alone in any case.
fn sum_rows_of(x: &Tensor, of: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
    let (rows, columns) = x.size2()?;
    // A GPU has no cache to stay in, and each call costs it microseconds.
    let count = if x.device().is_cuda() { rows } else { (CHUNK / columns).max(1) };
    let sums = (0..rows)
        .step_by(count as usize)
        .map(|start| halve_to(of(&x.f_narrow(0, start, count.min(rows - start))?)?, 1, NARROW));
    let sums = Tensor::f_cat(&sums.collect::<Result<Vec<_>>>()?, 0)?;
    // Short rows are slow to add; as columns they are not.
    Ok(halve(sums.f_tr()?.f_contiguous()?, 0)?.f_squeeze_dim(0)?)
}

/// The sums of the columns of a matrix, `[rows, columns]` to `[columns]`: of each block of [`BLOCK`] rows,
/// then of the blocks.
pub(crate) fn sum_columns(x: &Tensor) -> Result<Tensor> {
    let (rows, columns) = x.size2()?;
    if rows <= BLOCK {
        return Ok(halve(x.shallow_clone(), 0)?.f_squeeze_dim(0)?);
    }
    let blocks = in_parts(x, BLOCK, |parts| halve(parts, 1))?;
    sum_columns(&blocks.f_view([-1, columns].as_slice())?)
}

/// The sums of each part of `length` rows of `x`, and of the shorter rest: `[rows, ...]` to `[parts, 1,
/// ...]`. `sum` gets `[parts, length, ...]`. A GPU sums all parts at once, a CPU one after the other, in its
/// cache.
fn in_parts(x: &Tensor, length: i64, sum: impl Fn(Tensor) -> Result<Tensor>) -> Result<Tensor> {
    let rows = x.size()[0];
    let at_once = if x.device().is_cuda() { rows / length } else { 1 };
    let (mut start, mut sums) = (0, Vec::new());
    while start < rows {
        let parts = at_once.min((rows - start) / length);
        let (parts, length) = if parts > 0 { (parts, length) } else { (1, rows - start) };
        let mut shape = x.size();
        shape.splice(0..1, [parts, length]);
        sums.push(sum(x.f_narrow(0, start, parts * length)?.f_reshape(shape.as_slice())?)?);
        start += parts * length;
    }
    Ok(Tensor::f_cat(&sums, 0)?)
}

/// The mean of a vector, a scalar.
pub(crate) fn mean(x: &Tensor) -> Result<Tensor> {
    divide(&halve(x.shallow_clone(), 0)?.f_squeeze_dim(0)?, x.numel() as f64)
}

/// `x` divided by a number.
pub(crate) fn divide(x: &Tensor, by: f64) -> Result<Tensor> {
    Ok(x.f_div(&Tensor::f_full([1i64; 0], by, (x.f_kind()?, x.device()))?)?)
}

/// The square root, correctly rounded: the library's is not, on a CPU. That of f64 is off by less than the
/// distance of the root of any f32 from the middle between two of them.
pub(crate) fn root(x: &Tensor) -> Result<Tensor> {
    Ok(x.f_to_kind(Kind::Double)?.f_sqrt_()?.f_to_kind(Kind::Float)?)
}

/// The root of the mean square of all numbers of a matrix or vector, a scalar: the sum over each row, then
/// over the rows.
pub(crate) fn root_mean_square(x: &Tensor) -> Result<Tensor> {
    let square = |part: &Tensor| -> Result<Tensor> { Ok(part.f_mul(part)?) };
    let rows = match x.dim() {
        2 => sum_rows_of(x, square)?,
        _ => square(x)?,
    };
    let sum = halve(rows, 0)?.f_squeeze_dim(0)?;
    root(&divide(&sum, x.numel() as f64)?)
}

/// The squared norm, in f64, of numbers whose squares are rounded to f32: a tensor of one number.
pub(crate) fn squared_norm(x: &Tensor) -> Result<Tensor> {
    let numbers = x.f_reshape([-1i64].as_slice())?;
    let parts = in_parts(&numbers, CHUNK, |part| halve(part.f_mul(&part)?.f_to_kind(Kind::Double)?, 1))?;
    halve(parts.f_view([-1i64].as_slice())?, 0)
}

/// The sum over one dimension, which has length 1 then.
fn halve(x: Tensor, dim: i64) -> Result<Tensor> {
    halve_to(x, dim, 1)
}

/// The first halvings of a sum over one dimension, until its length is at most `most`.
fn halve_to(x: Tensor, dim: i64, most: i64) -> Result<Tensor> {
    let mut sums = x;
    // The first sum is a new tensor; the others are made in its place.
    let mut is_new = false;
    loop {
        let length = sums.size()[dim as usize];
        if length <= most {
            return Ok(sums);
        }
        let half = length / 2;
        let high = sums.f_narrow(dim, length - half, half)?;
        let mut low = sums.f_narrow(dim, 0, half)?;
        sums = match (is_new, length % 2) {
            (true, _) => {
                let _ = low.f_add_(&high)?;
                sums.f_narrow(dim, 0, length - half)?
            }
            (false, 0) => low.f_add(&high)?,
            (false, _) => Tensor::f_cat(&[low.f_add(&high)?, sums.f_narrow(dim, half, 1)?], dim)?,
        };
        is_new = true;
    }
}

#[cfg(test)]
#[path = "exact_tests.rs"]
mod tests;
