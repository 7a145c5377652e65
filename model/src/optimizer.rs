//! One step of the optimizer on one parameter: Adafactor (Shazeer and Stern, arXiv 1804.04235) or AdamW
//! (Loshchilov and Hutter, arXiv 1711.05101). All state is f32 and changes in place.

use crate::error::Result;
use crate::weights::{Role, Slot};
use tch::{Kind, Tensor};
use volary_core::Step;
use volary_core::options::{Decay, Optimizer};

/// The epsilon of squared gradients (Adafactor's epsilon 1).
const ADAFACTOR_EPSILON: f64 = 1e-30;
/// The smallest scale of a parameter (Adafactor's epsilon 2).
const ADAFACTOR_SCALE_MIN: f64 = 1e-3;

/// Updates `slot` with `gradient`, which has the shape of its weight and is already averaged over lanes and
/// clipped.
pub(crate) fn update(
    optimizer: &Optimizer,
    slot: &mut Slot,
    gradient: Tensor,
    step: Step,
    rate: f64,
) -> Result<()> {
    match *optimizer {
        Optimizer::Adafactor { decay, beta2, clip_threshold, scale_by_parameter } => {
            let scale = scale_by_parameter && slot.role != Role::Position;
            adafactor(slot, &gradient, decay_at(decay, beta2, step), clip_threshold, scale, rate)
        }
        Optimizer::Adamw { beta1, beta2, epsilon, weight_decay } => {
            adamw(slot, &gradient, step, rate, (beta1, beta2, epsilon, weight_decay))
        }
    }
}

/// The decay of the second moment at `step` (Adafactor, section 7): the bias-corrected form of a constant
/// `b`, `b (1 - b^(t-1)) / (1 - b^t)`, or `1 - t^-0.8`.
pub(crate) fn decay_at(decay: Decay, b: f64, step: Step) -> f64 {
    let t = step.0.max(1) as f64;
    match decay {
        Decay::Constant => b * (1.0 - b.powf(t - 1.0)) / (1.0 - b.powf(t)),
        Decay::General => 1.0 - t.powf(-0.8),
    }
}

fn root_mean_square(x: &Tensor) -> Result<Tensor> {
    Ok(x.f_square()?.f_mean(Kind::Float)?.f_sqrt()?)
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
    let squared = gradient.f_square()?.f_add_scalar(ADAFACTOR_EPSILON)?;
    let blend = |old: &mut Tensor, new: Tensor| -> Result<()> {
        let _ = old.f_mul_scalar_(decay)?.f_add_(&new.f_mul_scalar(1.0 - decay)?)?;
        Ok(())
    };
    let mut update = match slot.state.as_mut_slice() {
        [(_, row), (_, column)] => {
            blend(row, squared.f_mean_dim([1i64].as_slice(), false, Kind::Float)?)?;
            blend(column, squared.f_mean_dim([0i64].as_slice(), false, Kind::Float)?)?;
            // The root of an outer product is the outer product of the roots, which takes two passes over the
            // matrix.
            let row = row.f_div(&row.f_mean(Kind::Float)?)?.f_rsqrt()?;
            gradient.f_mul(&row.f_unsqueeze(1)?)?.f_mul_(&column.f_rsqrt()?.f_unsqueeze(0)?)?
        }
        [(_, second)] => {
            blend(second, squared)?;
            gradient.f_mul(&second.f_rsqrt()?)?
        }
        _ => unreachable!("a slot of Adafactor has one or two states"),
    };
    let excess = root_mean_square(&update)?.f_div_scalar(clip)?.f_clamp_min(1.0)?;
    let mut factor = excess.f_reciprocal()?.f_mul_scalar(-rate)?;
    if scale {
        factor = factor.f_mul(&root_mean_square(&slot.weight)?.f_clamp_min(ADAFACTOR_SCALE_MIN)?)?;
    }
    let _ = slot.weight.f_add_(&update.f_mul_(&factor)?)?;
    Ok(())
}

/// AdamW with bias correction. Matrices decay; norms and position biases do not.
fn adamw(
    slot: &mut Slot,
    gradient: &Tensor,
    step: Step,
    rate: f64,
    constants: (f64, f64, f64, f64),
) -> Result<()> {
    let (beta1, beta2, epsilon, weight_decay) = constants;
    let [(_, first), (_, second)] = slot.state.as_mut_slice() else {
        unreachable!("a slot of AdamW has two states");
    };
    let _ = first.f_mul_scalar_(beta1)?.f_add_(&gradient.f_mul_scalar(1.0 - beta1)?)?;
    let _ = second.f_mul_scalar_(beta2)?.f_add_(&gradient.f_square()?.f_mul_scalar(1.0 - beta2)?)?;
    let t = step.0.max(1) as f64;
    let root = second.f_div_scalar(1.0 - beta2.powf(t))?.f_sqrt()?.f_add_scalar(epsilon)?;
    let change = first.f_div_scalar(1.0 - beta1.powf(t))?.f_div(&root)?.f_mul_scalar(-rate)?;
    if slot.role == Role::Matrix {
        let _ = slot.weight.f_mul_scalar_(1.0 - rate * weight_decay)?;
    }
    let _ = slot.weight.f_add_(&change)?;
    Ok(())
}

#[cfg(test)]
#[path = "optimizer_tests.rs"]
mod tests;
