//! The learning rate as a pure function of the step.

use crate::ids::Step;
use crate::invalid::InvalidValue;
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
}
