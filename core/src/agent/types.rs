//! What a node's machine is told, and what it answers.

use crate::ids::{Epoch, Lane, NodeId, ShardId, Step};
use crate::messages::{Assignment, NodeCommand, NodeReport, Pass, Source};
use crate::schedule::Update;

/// Why something was not done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// In words.
    pub reason: String,
    /// Whether trying again cannot help.
    pub fatal: bool,
    /// The node that could not be reached, if that is why.
    pub suspect: Option<NodeId>,
}

/// What happens to a node.
#[derive(Clone, Debug)]
pub enum Event {
    /// The supervisor said something.
    Command(NodeCommand),
    /// The shards that an assignment wanted before its first step are here, or not.
    Fetched {
        /// The placement's number.
        epoch: Epoch,
        /// Whether all came.
        outcome: Result<(), Failure>,
    },
    /// A shard that is copied beside the training came, at this version, or not.
    Copied {
        /// The placement's number.
        epoch: Epoch,
        /// The shard.
        shard: ShardId,
        /// Its version.
        outcome: Result<Step, Failure>,
    },
    /// This node's part of a step is done: every lane and, in training, the whole gradient of every shard.
    Done(NodeReport),
    /// Something else failed.
    Failed {
        /// The placement's number.
        epoch: Epoch,
        /// Why.
        failure: Failure,
    },
    /// The supervisor is gone; it may come back.
    SupervisorLost,
}

/// What a node does next, in order.
#[derive(Clone, Debug, PartialEq)]
pub enum Effect {
    /// Say something to the supervisor.
    Report(NodeReport),
    /// Apply a prepared step to these shards, and keep the gradients of those that are on their way.
    Apply {
        /// The placement under which it was prepared.
        epoch: Epoch,
        /// The step.
        step: Step,
        /// What to do with the gradients.
        update: Update,
        /// Shards at the version before it.
        shards: Vec<ShardId>,
        /// Shards whose gradients wait for their state.
        stash: Vec<ShardId>,
    },
    /// Drop all work under way; of what is prepared only when `all`.
    Discard {
        /// The placement that the work belonged to, at most.
        epoch: Epoch,
        /// Whether the gradients of a prepared step go too.
        all: bool,
    },
    /// From now on this placement and these addresses count.
    Enter(Box<Assignment>),
    /// Get these shards before the first step, then say [`Event::Fetched`].
    Fetch {
        /// The placement's number.
        epoch: Epoch,
        /// Their version.
        version: Step,
        /// The shards.
        shards: Vec<(ShardId, Source)>,
    },
    /// Ask one of these nodes for a shard at whatever version it has, then say [`Event::Copied`].
    Copy {
        /// The placement's number.
        epoch: Epoch,
        /// The shard.
        shard: ShardId,
        /// Whom to ask.
        from: Vec<NodeId>,
    },
    /// Use a copied shard, after applying to it the stashed gradients of these steps.
    Install {
        /// The shard.
        shard: ShardId,
        /// The version at which it came.
        version: Step,
        /// Steps to apply.
        replay: Vec<Step>,
    },
    /// Let these shards go.
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
    },
    /// Store these shards as they are now, and send them to the checkpoint.
    Store {
        /// The placement's number.
        epoch: Epoch,
        /// The version.
        step: Step,
        /// The shards.
        shards: Vec<ShardId>,
    },
    /// The supervisor lets this node go.
    Leave {
        /// Why.
        reason: String,
    },
}
