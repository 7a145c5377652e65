//! What a message belongs to: one lane of one attempt at a step, or one pass of all lanes.

use std::fmt;
use volary_core::{Epoch, Lane, Step};

/// One lane in one attempt at a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct LaneStep {
    pub(crate) epoch: Epoch,
    pub(crate) step: Step,
    pub(crate) lane: Lane,
}

impl fmt::Display for LaneStep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "lane {} of step {} in epoch {}", self.lane, self.step, self.epoch)
    }
}

/// One pass of all lanes. The order is the order in which a node begins them: validation of a step before its
/// training, whose frames need a reducer that has begun.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct PassId {
    pub(crate) epoch: Epoch,
    pub(crate) step: Step,
    pub(crate) train: bool,
}

impl fmt::Display for PassId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pass = if self.train { "training" } else { "validation" };
        write!(f, "{pass} of step {} in epoch {}", self.step, self.epoch)
    }
}
