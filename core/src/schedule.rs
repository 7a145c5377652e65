//! Learning rate and the decision to apply a step: pure functions of the step and its norms.

use crate::ids::Step;
use crate::invalid::InvalidValue;
use crate::options::{Decay, Optimizer, TrainingOptions};
use serde::{Deserialize, Serialize};

/// The learning rate as a function of the step.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Schedule {
    /// Constant for `constant_steps`, then falling as 1/sqrt(step): the paper's (0.01, 10,000).
    InverseSquareRoot {
        /// The highest rate.
        rate: f64,
        /// Steps before the decay.
        constant_steps: u64,
        /// Steps of linear rise from 0.
        #[serde(default)]
        warmup_steps: u64,
    },
    /// Linear rise, then half a cosine down to `floor` at the last step.
    Cosine {
        /// The highest rate.
        rate: f64,
        /// Steps of linear rise from 0.
        #[serde(default)]
        warmup_steps: u64,
        /// The rate at the end.
        #[serde(default)]
        floor: f64,
    },
    /// Linear rise, then a straight line down to `floor` at the last step.
    Linear {
        /// The highest rate.
        rate: f64,
        /// Steps of linear rise from 0.
        #[serde(default)]
        warmup_steps: u64,
        /// The rate at the end.
        #[serde(default)]
        floor: f64,
    },
}

impl Default for Schedule {
    fn default() -> Self {
        Self::InverseSquareRoot { rate: 0.01, constant_steps: 10_000, warmup_steps: 0 }
    }
}

impl Schedule {
    /// Checks the bounds of all values, in a run of `steps`. Within them the rate never jumps.
    ///
    /// # Errors
    /// The first value that is out of its bounds.
    pub fn check(&self, steps: u64) -> Result<(), InvalidValue> {
        let wrong = |key: &str, value: &dyn std::fmt::Display, expected: String| {
            Err(InvalidValue::new(format!("training.schedule.{key}"), value, expected))
        };
        let (rate, warmup, floor) = match *self {
            Self::InverseSquareRoot { rate, warmup_steps, constant_steps } => {
                if warmup_steps > constant_steps.max(1) {
                    let expected =
                        format!("at most constant_steps = {constant_steps}: the rate falls from there");
                    return wrong("warmup_steps", &warmup_steps, expected);
                }
                (rate, 0, 0.0)
            }
            Self::Cosine { rate, warmup_steps, floor } | Self::Linear { rate, warmup_steps, floor } => {
                (rate, warmup_steps, floor)
            }
        };
        // Weights are f32.
        if !(rate > 0.0 && rate <= f64::from(f32::MAX)) {
            return wrong("rate", &rate, "a positive number".into());
        }
        if warmup > 0 && warmup >= steps {
            return wrong("warmup_steps", &warmup, format!("fewer than training.steps = {steps}"));
        }
        if !(0.0..=rate).contains(&floor) {
            return wrong("floor", &floor, format!("a number from 0 to rate = {rate}"));
        }
        Ok(())
    }

    /// The learning rate of `step` (from 1) in a run of `steps`.
    #[must_use]
    pub fn rate(&self, step: Step, steps: u64) -> f64 {
        let step = step.0;
        let (&rate, &warmup) = match self {
            Self::InverseSquareRoot { rate, warmup_steps, .. }
            | Self::Cosine { rate, warmup_steps, .. }
            | Self::Linear { rate, warmup_steps, .. } => (rate, warmup_steps),
        };
        if step < warmup {
            return rate * step as f64 / warmup as f64;
        }
        let progress = || (step - warmup) as f64 / steps.saturating_sub(warmup).max(1) as f64;
        match *self {
            Self::InverseSquareRoot { constant_steps, .. } => {
                rate * (constant_steps.max(1) as f64 / step.max(constant_steps).max(1) as f64).sqrt()
            }
            Self::Cosine { floor, .. } => {
                floor + (rate - floor) * 0.5 * (1.0 + (std::f64::consts::PI * progress().min(1.0)).cos())
            }
            Self::Linear { floor, .. } => floor + (rate - floor) * (1.0 - progress().min(1.0)),
        }
    }
}

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

    /// GLaM, section 5.1: 0.01 for the first 10,000 steps, then decaying as 1/sqrt(step).
    #[test]
    fn the_papers_schedule_is_flat_then_falls_as_inverse_square_root() {
        let schedule = Schedule::default();
        assert_eq!(schedule.rate(Step(1), 0), 0.01);
        assert_eq!(schedule.rate(Step(10_000), 0), 0.01);
        assert_eq!(schedule.rate(Step(40_000), 0), 0.005);
    }

    #[test]
    fn cosine_and_linear_schedules_rise_peak_and_end_at_their_floor() {
        for schedule in [
            Schedule::Cosine { rate: 1.0, warmup_steps: 10, floor: 0.1 },
            Schedule::Linear { rate: 1.0, warmup_steps: 10, floor: 0.1 },
        ] {
            assert_eq!(schedule.rate(Step(5), 110), 0.5);
            assert_eq!(schedule.rate(Step(10), 110), 1.0);
            assert!((schedule.rate(Step(60), 110) - 0.55).abs() < 1e-12);
            assert!((schedule.rate(Step(110), 110) - 0.1).abs() < 1e-12);
            assert!((schedule.rate(Step(500), 110) - 0.1).abs() < 1e-12);
        }
    }

    #[test]
    fn values_that_would_freeze_or_break_a_run_are_named() {
        let isr = |rate, constant_steps, warmup_steps| Schedule::InverseSquareRoot {
            rate,
            constant_steps,
            warmup_steps,
        };
        let cosine = |rate, warmup_steps, floor| Schedule::Cosine { rate, warmup_steps, floor };
        let linear = |rate, warmup_steps, floor| Schedule::Linear { rate, warmup_steps, floor };
        let bad = [
            ("rate", isr(0.0, 10, 0)),
            ("rate", cosine(-1.0, 0, 0.0)),
            ("rate", linear(f64::NAN, 0, 0.0)),
            ("rate", linear(f64::INFINITY, 0, 0.0)),
            ("warmup_steps", isr(0.03, 10, 11)),
            ("warmup_steps", cosine(0.03, 1_000, 0.0)),
            ("warmup_steps", linear(0.03, 40, 0.0)),
            ("floor", cosine(0.03, 0, 0.04)),
            ("floor", linear(0.03, 0, -0.01)),
            ("floor", linear(0.03, 0, f64::NAN)),
        ];
        for (key, schedule) in bad {
            let error = schedule.check(40).expect_err("a bad value").to_string();
            assert!(error.starts_with(&format!("training.schedule.{key} = ")), "{key}: {error}");
        }
        for good in [
            Schedule::default(),
            isr(0.01, 0, 1),
            isr(0.01, 10, 10),
            cosine(0.1, 39, 0.1),
            linear(0.1, 0, 0.0),
        ] {
            assert_eq!(good.check(40), Ok(()));
        }
    }

    proptest::proptest! {
        /// From one step to the next the rate rises or falls by a step of the warm-up, or by what the curve
        /// itself does.
        #[test]
        fn the_rate_is_continuous(kind in 0..3, warmup in 0u64..60, constant in 0u64..80, floor in 0.0f64..1.0) {
            let steps = 100;
            let schedule = match kind {
                0 => Schedule::InverseSquareRoot { rate: 1.0, constant_steps: constant, warmup_steps: warmup },
                1 => Schedule::Cosine { rate: 1.0, warmup_steps: warmup, floor },
                _ => Schedule::Linear { rate: 1.0, warmup_steps: warmup, floor },
            };
            if schedule.check(steps).is_ok() {
                for step in 1..2 * steps {
                    let (now, next) = (schedule.rate(Step(step), steps), schedule.rate(Step(step + 1), steps));
                    // A warm-up of w steps rises by 1 / w; 1/sqrt falls by at most 0.3, from step 1 to 2; the
                    // others by less than 2 / (steps - w).
                    let most = (1.0 / warmup.max(1) as f64).max(if kind == 0 { 0.3 } else { 2.0 / (steps - warmup) as f64 });
                    proptest::prop_assert!((next - now).abs() <= most + 1e-12, "{schedule:?} at {step}: {now}, {next}");
                }
            }
        }
    }

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
