//! The parts of the machine's state. State of one phase exists only in that phase.

use super::types::Activity;
use crate::ids::{Lane, NodeId, ShardId, Step};
use crate::limits::REPLAN_ROUNDS_MAX;
use crate::messages::{LaneReport, Norm};
use crate::profile::Profile;
use std::collections::{BTreeMap, BTreeSet};

/// A connected node.
#[derive(Clone, Debug)]
pub(super) struct Node {
    /// Capacity by its own benchmark, in threads of [`Profile::relative`].
    pub(super) declared_capacity: f64,
    /// Input to the planner: the node's own benchmark at first, then measurements of its steps and links.
    pub(super) profile: Profile,
    /// Lanes per second of compute, a moving average.
    pub(super) speed: Option<f64>,
    pub(super) address: String,
    pub(super) draining: bool,
}

/// The phase of a run.
#[derive(Debug)]
pub(super) enum Phase {
    /// Waiting for nodes, new or returning.
    Gathering(Gathering),
    /// Nodes fetch the shards of a new placement; `waiting` are not ready yet.
    Placing { waiting: BTreeSet<NodeId> },
    /// A step is in flight.
    Training(StepReports),
    /// The held-out loss is being measured.
    Validating(ValidationReports),
    /// The last checkpoint is being written.
    Finishing,
    /// The run is over.
    Done,
}

impl Phase {
    pub(super) fn activity(&self) -> Activity {
        match self {
            Self::Gathering(_) => Activity::Gathering,
            Self::Placing { .. } => Activity::Placing,
            Self::Training(_) => Activity::Training,
            Self::Validating(_) => Activity::Validating,
            Self::Finishing => Activity::Finishing,
            Self::Done => Activity::Done,
        }
    }
}

/// Waiting for nodes.
#[derive(Debug)]
pub(super) struct Gathering {
    /// Nodes that the run needs before it starts.
    pub(super) wanted_nodes: usize,
    /// Nodes that may return with their state.
    pub(super) awaited: BTreeSet<NodeId>,
    /// The last attempt to place the model, if it failed for want of memory.
    pub(super) shortage: Option<CapacityShortage>,
}

/// A model that does not fit on the nodes at hand.
#[derive(Debug)]
pub(super) struct CapacityShortage {
    /// The nodes at hand.
    pub(super) nodes: BTreeSet<NodeId>,
    pub(super) reason: String,
}

/// The next move of a run that waits for nodes.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Readiness {
    /// Keep waiting.
    Wait,
    /// Place the model on the nodes at hand.
    Start,
    /// End the run for this reason.
    GiveUp(String),
}

/// The reports of a step in flight.
#[derive(Debug, Default)]
pub(super) struct StepReports {
    /// The norms of each node that has prepared the step.
    pub(super) prepared: BTreeMap<NodeId, Vec<(ShardId, Norm)>>,
    pub(super) lanes: BTreeMap<Lane, LaneReport>,
}

/// The reports of a validation.
#[derive(Debug, Default)]
pub(super) struct ValidationReports {
    pub(super) round: u64,
    /// Nodes that have finished the round.
    pub(super) done: BTreeSet<NodeId>,
    /// Reports by round and lane.
    pub(super) lanes: BTreeMap<(u64, Lane), LaneReport>,
}

/// A checkpoint that is being written.
#[derive(Clone, Copy, Debug)]
pub(super) struct Checkpoint {
    pub(super) step: Step,
    /// Milliseconds since it began.
    pub(super) elapsed_ms: u64,
}

/// Attempts at the step after the last commit.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Retry {
    pub(super) attempts: u32,
    /// Milliseconds since the first failed attempt.
    pub(super) blocked_ms: u64,
}

impl Retry {
    /// Lets time pass.
    pub(super) fn pass(&mut self, ms: u64) {
        if self.attempts > 0 {
            self.blocked_ms = self.blocked_ms.saturating_add(ms);
        }
    }
}

/// Whether the next boundary between steps looks for a better placement.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Replan {
    pub(super) dirty: bool,
    /// Placements made at boundaries since the last change of the cluster.
    pub(super) rounds: u32,
}

impl Replan {
    pub(super) fn is_exhausted(self) -> bool {
        self.rounds >= REPLAN_ROUNDS_MAX
    }
}
