//! One step of the optimizer on one parameter: Adafactor (Shazeer and Stern, arXiv 1804.04235) or AdamW
//! (Loshchilov and Hutter, arXiv 1711.05101). All state is f32 and changes in place.

use crate::error::{Error, Result};
use crate::exact;
use crate::weights::{Role, Slot};
use tch::Tensor;
use volary_core::options::Optimizer;
use volary_core::update::{Moments, Update};

/// The epsilon of squared gradients (Adafactor's epsilon 1).
const ADAFACTOR_EPSILON: f64 = 1e-30;
/// The smallest scale of a parameter (Adafactor's epsilon 2).
const ADAFACTOR_SCALE_MIN: f64 = 1e-3;

/// Updates `slot` with `gradient`, which has the shape of its weight and is already averaged over lanes and
/// clipped. The bits do not depend on the device.
///
/// # Errors
/// [`Error::Moments`] when the factors in `update` are those of another optimizer.
pub(crate) fn update(
    optimizer: &Optimizer,
    slot: &mut Slot,
    gradient: &Tensor,
    update: &Update,
) -> Result<()> {
    match (*optimizer, update.moments) {
        (Optimizer::Adafactor { clip_threshold, scale_by_parameter, .. }, Moments::Decay(decay)) => {
            let scale = scale_by_parameter && slot.role != Role::Position;
            adafactor(slot, gradient, decay, clip_threshold, scale, update.rate)
        }
        (Optimizer::Adamw { beta1, beta2, epsilon, weight_decay }, Moments::Corrections(first, second)) => {
            let constants = Adamw { betas: (beta1, beta2), epsilon, weight_decay };
            adamw(slot, gradient, (first, second), update.rate, &constants)
        }
        _ => Err(Error::Moments),
    }
}

/// `1 / sqrt(x)`, each operation correctly rounded.
fn inverse_root(x: &Tensor) -> Result<Tensor> {
    let root = exact::root(x)?;
    Ok(root.f_ones_like()?.f_div(&root)?)
}

/// A moving average: `old = decay * old + (1 - decay) * new`.
fn blend(old: &mut Tensor, new: Tensor, decay: f64) -> Result<()> {
    let mut new = new;
    let _ = old.f_mul_scalar_(decay)?.f_add_(&new.f_mul_scalar_(1.0 - decay)?)?;
    Ok(())
}

/// Adafactor without a first moment (Shazeer and Stern, algorithms 4 and 5).
fn adafactor(
    slot: &mut Slot,
    gradient: &Tensor,
    decay: f64,
    clip: f64,
    scale: bool,
    rate: f64,
) -> Result<()> {
    let squared = gradient.f_mul(gradient)?.f_add_scalar_(ADAFACTOR_EPSILON)?;
    let mut update = match slot.state.as_mut_slice() {
        [(_, row), (_, column)] => {
            let (rows, columns) = squared.size2()?;
            blend(row, exact::divide(&exact::sum_rows(&squared)?, columns as f64)?, decay)?;
            blend(column, exact::divide(&exact::sum_columns(&squared)?, rows as f64)?, decay)?;
            // The root of an outer product is the outer product of the roots, which takes two passes over the
            // matrix.
            let row = inverse_root(&row.f_div(&exact::mean(row)?)?)?;
            gradient.f_mul(&row.f_unsqueeze(1)?)?.f_mul_(&inverse_root(column)?.f_unsqueeze(0)?)?
        }
        [(_, second)] => {
            blend(second, squared, decay)?;
            gradient.f_div(&exact::root(second)?)?
        }
        _ => unreachable!("a slot of Adafactor has one or two states"),
    };
    let excess = exact::divide(&exact::root_mean_square(&update)?, clip)?.f_clamp_min(1.0)?;
    let mut factor = excess.f_full_like(-rate)?.f_div(&excess)?;
    if scale {
        factor = factor.f_mul(&exact::root_mean_square(&slot.weight)?.f_clamp_min(ADAFACTOR_SCALE_MIN)?)?;
    }
    let _ = slot.weight.f_add_(&update.f_mul_(&factor)?)?;
    Ok(())
}

/// AdamW's constants.
struct Adamw {
    betas: (f64, f64),
    epsilon: f64,
    weight_decay: f64,
}

/// AdamW with bias correction. Matrices decay; norms and position biases do not.
fn adamw(
    slot: &mut Slot,
    gradient: &Tensor,
    corrections: (f64, f64),
    rate: f64,
    constants: &Adamw,
) -> Result<()> {
    let Adamw { betas, epsilon, weight_decay } = constants;
    let [(_, first), (_, second)] = slot.state.as_mut_slice() else {
        unreachable!("a slot of AdamW has two states");
    };
    blend(first, gradient.f_mul_scalar(1.0)?, betas.0)?;
    blend(second, gradient.f_mul(gradient)?, betas.1)?;
    let root = exact::root(&exact::divide(second, corrections.1)?)?.f_add_scalar_(*epsilon)?;
    let change = exact::divide(first, corrections.0)?.f_div_(&root)?.f_mul_scalar_(-rate)?;
    if slot.role == Role::Matrix {
        let _ = slot.weight.f_mul_scalar_(1.0 - rate * weight_decay)?;
    }
    let _ = slot.weight.f_add_(&change)?;
    Ok(())
}

#[cfg(test)]
#[path = "optimizer_tests.rs"]
mod tests;
