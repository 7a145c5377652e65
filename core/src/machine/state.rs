//! The parts of the machine's state. State of one phase exists only in that phase.

use super::types::Activity;
use crate::digest::Digest;
use crate::ids::{Lane, NodeId, ShardId, Step};
use crate::limits::{ATTEMPTS_MAX, PROMPT_ATTEMPTS_MAX, RETRY_MAX_MS, RETRY_MS};
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
    /// Whether its drain waits until the others have room for its shards.
    pub(super) deferred: bool,
}

impl Node {
    /// Whether others take over what it has: it is being drained, and there is room.
    pub(super) fn is_leaving(&self) -> bool {
        self.draining && !self.deferred
    }
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
    /// All nodes leave, or the run ends: a checkpoint of the last committed step is being written.
    Finishing(Finish),
    /// The run is over.
    Done,
}

/// What follows the last checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Finish {
    /// The run is complete, or stopped by an operator.
    Complete,
    /// All nodes leave, and the run waits for others.
    Empty,
    /// The run cannot go on, for this reason.
    GiveUp(String),
}

impl Phase {
    pub(super) fn activity(&self) -> Activity {
        match self {
            Self::Gathering(_) => Activity::Gathering,
            Self::Placing { .. } => Activity::Placing,
            Self::Training(_) => Activity::Training,
            Self::Validating(_) => Activity::Validating,
            Self::Finishing(_) => Activity::Finishing,
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
    /// Milliseconds before which nothing starts.
    pub(super) pause_ms: u64,
    /// Whether a checkpoint is being read, to be loaded if it is intact.
    pub(super) verifying: bool,
}

/// A learner that has missed gradients in the present placement.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct LateLearner {
    /// Commits that did not wait for it.
    pub(super) count: u32,
    /// Whether it has not reported a copy since: commits do not wait for it.
    pub(super) is_behind: bool,
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

/// What a member's reports must have under a placement.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Part {
    /// The number of shards that it holds.
    pub(super) shards: usize,
    /// The number of lanes that it drives.
    pub(super) lanes: usize,
}

/// The reports of a step in flight.
#[derive(Debug, Default)]
pub(super) struct StepReports {
    /// What each node that has prepared the step reports of its shards.
    pub(super) prepared: BTreeMap<NodeId, Prepared>,
    /// The shards whose replicas are compared.
    pub(super) compare: Vec<ShardId>,
    pub(super) lanes: BTreeMap<Lane, LaneReport>,
    /// Milliseconds since all members were prepared: the commit waits for learners only.
    pub(super) grace_ms: u64,
}

/// The report of one node on its shards.
#[derive(Debug, Default)]
pub(super) struct Prepared {
    /// The norms of its gradients.
    pub(super) norms: Vec<(ShardId, Norm)>,
    /// The content of the shards to compare.
    pub(super) digests: Vec<(ShardId, Digest)>,
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
#[derive(Clone, Debug)]
pub(super) struct Checkpoint {
    /// Tells it from other attempts at the same step.
    pub(super) attempt: u64,
    pub(super) step: Step,
    /// The nodes that store its shards.
    pub(super) senders: BTreeSet<NodeId>,
    /// Milliseconds since it began.
    pub(super) elapsed_ms: u64,
}

/// Attempts at the step after the last commit, or at the last checkpoint.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Retry {
    pub(super) attempts: u32,
    /// Milliseconds since the first failed attempt.
    pub(super) blocked_ms: u64,
    /// Milliseconds until the next attempt at the last checkpoint.
    pub(super) wait_ms: u64,
}

impl Retry {
    /// Lets time pass.
    pub(super) fn pass(&mut self, ms: u64) {
        self.wait_ms = self.wait_ms.saturating_sub(ms);
        if self.attempts > 0 {
            self.blocked_ms = self.blocked_ms.saturating_add(ms);
        }
    }

    /// Counts a failed attempt. Returns the wait before the next one in milliseconds, or `None` after too
    /// many.
    pub(super) fn after_failure(&mut self) -> Option<u64> {
        self.attempts += 1;
        let doublings = self.attempts.saturating_sub(PROMPT_ATTEMPTS_MAX + 1).min(u64::BITS - 1);
        let wait = match self.attempts > PROMPT_ATTEMPTS_MAX {
            true => RETRY_MS.checked_shl(doublings).map_or(RETRY_MAX_MS, |ms| ms.min(RETRY_MAX_MS)),
            false => 0,
        };
        (self.attempts <= ATTEMPTS_MAX).then_some(wait)
    }
}
