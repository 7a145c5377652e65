//! The treatment of a step's gradients, decided once by the supervisor: whether to apply them, clipping, and
//! the optimizer's factors.

use crate::ids::Step;
use crate::options::{Decay, Optimizer, TrainingOptions};
use serde::{Deserialize, Serialize};

/// The optimizer's factors of one step. The supervisor computes them once: powers differ between machines.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Moments {
    /// Adafactor's decay of the second moment (Shazeer and Stern, arXiv 1804.04235, section 7).
    Decay(f64),
    /// AdamW's bias corrections of the first and the second moment, `1 - beta^t` (Loshchilov and Hutter,
    /// arXiv 1711.05101, algorithm 2).
    Corrections(f64, f64),
}

impl Moments {
    /// The factors of `optimizer` at `step`.
    #[must_use]
    pub fn at(optimizer: &Optimizer, step: Step) -> Self {
        let t = step.0.max(1) as f64;
        match *optimizer {
            Optimizer::Adafactor { decay: Decay::General, .. } => Self::Decay(1.0 - t.powf(-0.8)),
            // The bias-corrected form of a constant decay.
            Optimizer::Adafactor { decay: Decay::Constant, beta2: b, .. } => {
                Self::Decay(b * (1.0 - b.powf(t - 1.0)) / (1.0 - b.powf(t)))
            }
            Optimizer::Adamw { beta1, beta2, .. } => {
                Self::Corrections(1.0 - beta1.powf(t), 1.0 - beta2.powf(t))
            }
        }
    }
}

/// The treatment of a step's summed gradients, the same on every replica.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Update {
    /// Whether the update is applied; a step whose gradients hold NaN or Inf is skipped (GLaM, section 6).
    pub apply: bool,
    /// The learning rate.
    pub rate: f64,
    /// The factor of the summed gradient: 1 / lanes, times the clip.
    pub scale: f64,
    /// The optimizer's factors.
    pub moments: Moments,
}

impl Update {
    /// Decides from the squared norm of the *summed* gradient and whether all of it is finite.
    /// Returns the update and the norm of the mean gradient before clipping.
    #[must_use]
    pub fn decide(norm_squared: f64, finite: bool, training: &TrainingOptions, step: Step) -> (Self, f64) {
        let rate = training.schedule.rate(step, training.steps);
        let moments = Moments::at(&training.optimizer, step);
        let mean = 1.0 / f64::from(training.lanes);
        let norm = norm_squared.sqrt() * mean;
        let apply = finite && norm.is_finite();
        let clip = match training.clip_norm {
            Some(limit) if norm > limit => limit / norm,
            _ => 1.0,
        };
        (Self { apply, rate, scale: mean * clip, moments }, norm)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gradient_that_is_not_finite_is_skipped_and_a_long_one_clipped() {
        let training = TrainingOptions { lanes: 4, clip_norm: Some(1.0), ..TrainingOptions::new(10) };
        let (update, norm) = Update::decide(64.0, true, &training, Step(1));
        assert_eq!((update.apply, norm, update.scale), (true, 2.0, 0.125));
        assert!(!Update::decide(f64::NAN, false, &training, Step(1)).0.apply);
        assert!(!Update::decide(f64::INFINITY, true, &training, Step(1)).0.apply);
    }

    #[test]
    fn the_optimizers_factors_are_those_of_the_papers() {
        let near = |ours: f64, theirs: f64| assert!((ours - theirs).abs() < 1e-12, "{ours} {theirs}");
        let adafactor = |decay, step| {
            let optimizer =
                Optimizer::Adafactor { decay, beta2: 0.99, clip_threshold: 1.0, scale_by_parameter: true };
            match Moments::at(&optimizer, Step(step)) {
                Moments::Decay(decay) => decay,
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(adafactor(Decay::Constant, 1), 0.0, "the first step has no past");
        near(adafactor(Decay::Constant, 2), 0.99 * 0.01 / (1.0 - 0.99 * 0.99));
        near(adafactor(Decay::General, 32), 1.0 - 1.0 / 16.0);
        let optimizer = Optimizer::Adamw { beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weight_decay: 0.1 };
        let Moments::Corrections(first, second) = Moments::at(&optimizer, Step(2)) else {
            panic!("AdamW has corrections")
        };
        near(first, 1.0 - 0.81);
        near(second, 1.0 - 0.9025);
    }
}
