//! The agent's events and effects.

use crate::ids::{Epoch, Lane, NodeId, ShardId, Step};
use crate::messages::{Assignment, NodeCommand, NodeReport, Pass, Source};
use crate::update::Update;
use std::collections::VecDeque;

/// A shard that is being copied.
#[derive(Clone, Debug, Default)]
pub(super) struct PendingCopy {
    /// The holders to ask, the next one first.
    pub(super) from: Vec<NodeId>,
    pub(super) requested: bool,
    pub(super) attempts: u32,
    /// Steps whose gradients are stashed, in order.
    pub(super) stash: VecDeque<Step>,
}

impl PendingCopy {
    pub(super) fn new(from: Vec<NodeId>) -> Self {
        Self { from, ..Self::default() }
    }
}

/// A failure on a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// The reason.
    pub reason: String,
    /// Whether a retry cannot help.
    pub fatal: bool,
    /// The unreachable node, if that is the reason.
    pub suspect: Option<NodeId>,
}

/// An input of the agent.
#[derive(Clone, Debug)]
pub enum Event {
    /// The supervisor sent a command.
    Command(NodeCommand),
    /// The fetch of an assignment's shards before its first step ended.
    Fetched {
        /// The placement's number.
        epoch: Epoch,
        /// Whether all shards arrived.
        outcome: Result<(), Failure>,
    },
    /// The background copy of a shard ended.
    Copied {
        /// The placement's number.
        epoch: Epoch,
        /// The shard.
        shard: ShardId,
        /// The version of the copy.
        outcome: Result<Step, Failure>,
    },
    /// This node's part of a step is complete: every lane and, in training, the whole gradient of every
    /// shard.
    Done(NodeReport),
    /// [`Effect::Install`] failed; the effects after it were not carried out.
    NotInstalled {
        /// The shard.
        shard: ShardId,
        /// Why.
        failure: Failure,
    },
    /// [`Effect::Apply`] failed, maybe for some shards only; the effects after it were not carried out.
    NotApplied {
        /// Why.
        failure: Failure,
    },
    /// Another operation failed.
    Failed {
        /// The placement's number.
        epoch: Epoch,
        /// The reason.
        failure: Failure,
    },
    /// The link to the supervisor is lost; the supervisor may return.
    SupervisorLost,
}

/// An output of the agent. The shell carries effects out in order.
#[derive(Clone, Debug, PartialEq)]
pub enum Effect {
    /// Send a message to the supervisor.
    Report(NodeReport),
    /// Apply a prepared step to `shards`, and keep the gradients of `stash`.
    Apply {
        /// The placement under which it was prepared.
        epoch: Epoch,
        /// The step.
        step: Step,
        /// The treatment of the gradients.
        update: Update,
        /// Shards at the version before the step.
        shards: Vec<ShardId>,
        /// Shards that are being copied, each with the number of steps to keep.
        stash: Vec<(ShardId, usize)>,
    },
    /// Drop all work in progress; prepared gradients only when `all`.
    Discard {
        /// The last placement to which the dropped work belongs.
        epoch: Epoch,
        /// Whether the gradients of a prepared step are dropped, too.
        all: bool,
    },
    /// Use the placement and the addresses of this assignment.
    Enter(Box<Assignment>),
    /// Load these shards before the first step, then report [`Event::Fetched`].
    Fetch {
        /// The placement's number.
        epoch: Epoch,
        /// Their version.
        version: Step,
        /// The shards.
        shards: Vec<(ShardId, Source)>,
    },
    /// Request a shard at its present version from one of these nodes, then report [`Event::Copied`].
    Copy {
        /// The placement's number.
        epoch: Epoch,
        /// The shard.
        shard: ShardId,
        /// Holders of the shard.
        from: Vec<NodeId>,
    },
    /// Apply the stashed gradients of these steps to a copied shard, then use it.
    Install {
        /// The shard.
        shard: ShardId,
        /// The version of the copy.
        version: Step,
        /// Steps to apply.
        replay: Vec<Step>,
    },
    /// Release these shards.
    Release(Vec<ShardId>),
    /// Run a step.
    Run {
        /// The placement's number.
        epoch: Epoch,
        /// The step.
        step: Step,
        /// Training or validation.
        pass: Pass,
        /// The lanes and their tokens.
        lanes: Vec<(Lane, Vec<u32>)>,
        /// Shards in memory whose content is reported, at the version before the step.
        compare: Vec<ShardId>,
    },
    /// Store these shards at their present version, and send them to the checkpoint.
    Store {
        /// The placement's number.
        epoch: Epoch,
        /// The version.
        step: Step,
        /// The shards.
        shards: Vec<ShardId>,
    },
    /// The supervisor releases this node.
    Leave {
        /// The reason.
        reason: String,
    },
}
