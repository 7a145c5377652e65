//! Training data that a run leaves out after it went back from numbers that are not finite.
//!
//! A step trains on the data of the step of the same number, until a run that broke goes back to its newest
//! checkpoint and past the data that broke it: from then on, each step takes the data of a later one (as in
//! Chowdhery et al., "PaLM", arXiv 2204.02311, section 5.1). The list is part of the run's state, so that
//! every replay of a step takes the same data.

use crate::ids::Step;
use serde::{Deserialize, Serialize};

/// The data that a run leaves out.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataSkips(Vec<DataSkip>);

/// The steps after `after` leave out the data of `steps` steps more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct DataSkip {
    after: Step,
    steps: u64,
}

impl DataSkips {
    /// The step whose data `step` trains on.
    ///
    /// ```
    /// use volary_core::Step;
    /// use volary_core::data_skips::DataSkips;
    ///
    /// let mut skips = DataSkips::default();
    /// // Steps 11 to 15 broke the run, which went back to step 10.
    /// skips.add(Step(10), 5);
    /// assert_eq!(skips.data_step(Step(10)), Step(10));
    /// assert_eq!(skips.data_step(Step(11)), Step(16));
    /// ```
    #[must_use]
    pub fn data_step(&self, step: Step) -> Step {
        let before = self.0.iter().filter(|skip| skip.after < step);
        Step(before.fold(step.0, |data, skip| data.saturating_add(skip.steps)))
    }

    /// The steps after `after` leave out the data of `steps` steps more.
    pub fn add(&mut self, after: Step, steps: u64) {
        self.0.push(DataSkip { after, steps });
    }

    /// The number of times that the run went back to `step`.
    #[must_use]
    pub fn returns_to(&self, step: Step) -> usize {
        self.0.iter().filter(|skip| skip.after == step).count()
    }
}
