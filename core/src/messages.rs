//! What the supervisor and the nodes say to each other on the control stream.

use crate::ids::{Epoch, Lane, NodeId, ShardId, Step, Timeline};
use crate::placement::Placement;
use crate::schedule::Update;
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// Where a node gets a shard's state from when a placement begins.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Source {
    /// From the run's seed: the state before the first step.
    Initial,
    /// The node holds it already, at the placement's version.
    Held,
    /// From a node that holds it.
    Peer(NodeId),
    /// From a durable checkpoint, through the supervisor.
    Checkpoint(Step),
}

/// A journalled commit, as a node that missed it needs it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LastCommit {
    /// The placement under which the step ran.
    pub epoch: Epoch,
    /// The step.
    pub step: Step,
    /// What to do with the gradients.
    pub update: Update,
}

/// Everything that a node needs to take part in an epoch.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Assignment {
    /// The placement, the same for everybody.
    pub placement: Arc<Placement>,
    /// How often the run has gone back to a checkpoint: state from another timeline is no state of this run.
    pub timeline: Timeline,
    /// The last committed step: the version of every shard.
    pub version: Step,
    /// The commit that made this version: a node that prepared it and did not hear of it applies it first.
    pub last: Option<LastCommit>,
    /// The shards that this node holds, and where each comes from.
    pub shards: Vec<(ShardId, Source)>,
    /// The shards that this node copies while training goes on, each with the nodes to ask.
    pub learn: Vec<(ShardId, Vec<NodeId>)>,
    /// The QUIC address of every member.
    pub addresses: Arc<Vec<(NodeId, String)>>,
}

/// What a node has in memory when it comes back to a supervisor.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResidentState {
    /// The timeline that its state belongs to.
    pub timeline: Timeline,
    /// The last step that it applied.
    pub version: Step,
    /// The shards that it holds at that version.
    pub shards: Vec<ShardId>,
    /// The step whose whole gradient it has, under which placement.
    pub prepared: Option<(Epoch, Step)>,
}

/// What the lanes do with their tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Pass {
    /// Forward and backward.
    Train,
    /// Forward only, on held-out text.
    Validate {
        /// Which part of the held-out text.
        round: u64,
    },
}

/// Supervisor to node.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum NodeCommand {
    /// Take part in a new epoch; answered by [`NodeReport::Ready`].
    Assign(Box<Assignment>),
    /// Run these lanes; answered by [`NodeReport::Prepared`] or [`NodeReport::Validated`].
    Begin {
        /// The placement's number.
        epoch: Epoch,
        /// The step.
        step: Step,
        /// Training or validation.
        pass: Pass,
        /// This node's lanes with their tokens, `[sequences, sequence_length + 1]` row by row.
        lanes: Vec<(Lane, Vec<u32>)>,
    },
    /// The step is part of the run: apply it.
    Commit {
        /// The placement's number.
        epoch: Epoch,
        /// The step.
        step: Step,
        /// What to do with the gradients.
        update: Update,
    },
    /// Drop all work of this epoch; another assignment follows.
    Abort {
        /// The epoch that ends.
        epoch: Epoch,
    },
    /// Send these shards, as they are after `step`, to the checkpoint.
    Checkpoint {
        /// The placement's number.
        epoch: Epoch,
        /// The step just committed.
        step: Step,
        /// The shards that this node sends.
        shards: Vec<ShardId>,
    },
    /// The run is over for this node.
    Leave {
        /// Why, for its log.
        reason: String,
    },
}

/// What a shard's summed gradient looks like to one of its holders.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Norm {
    /// The squared norm of the sum over lanes.
    pub squared: f64,
    /// Whether every number in it is finite.
    pub finite: bool,
}

/// What one lane found.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LaneReport {
    /// Mean cross-entropy, in nats per token.
    pub loss: f64,
    /// Mean over MoE layers of the load-balancing loss; 1 when the load is even.
    pub aux_loss: f64,
    /// Mean over MoE layers of the entropy of the gate's probabilities, in nats.
    pub gate_entropy: f64,
    /// Kept assignments per MoE layer and expert: `[layers][experts]`.
    pub load: Vec<Vec<u32>>,
    /// Assignments dropped for want of capacity.
    pub dropped: u32,
}

/// Node to supervisor.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum NodeReport {
    /// Every shard of the assignment is here.
    Ready {
        /// The placement's number.
        epoch: Epoch,
    },
    /// All lanes are done, and the summed gradient of every held shard is in memory: the step can be committed.
    Prepared {
        /// The placement's number.
        epoch: Epoch,
        /// The step.
        step: Step,
        /// The norm of every held shard's gradient.
        norms: Vec<(ShardId, Norm)>,
        /// What the lanes found.
        lanes: Vec<(Lane, LaneReport)>,
        /// Lanes that its device would do in a second of computing, as measured in this step; `None` without lanes.
        speed: Option<f64>,
    },
    /// The lanes of a validation round are done.
    Validated {
        /// The placement's number.
        epoch: Epoch,
        /// The round.
        round: u64,
        /// What the lanes found.
        lanes: Vec<(Lane, LaneReport)>,
    },
    /// Shards that it was to copy are here, and keep up with the commits.
    Learned {
        /// The placement's number.
        epoch: Epoch,
        /// The shards.
        shards: Vec<ShardId>,
    },
    /// The shards that it was to copy do not come.
    CannotLearn {
        /// The placement's number.
        epoch: Epoch,
        /// Why.
        reason: String,
    },
    /// It is not at the version that the others are at, and cannot get there by itself.
    Behind {
        /// The placement's number.
        epoch: Epoch,
        /// The last step that it applied.
        version: Step,
    },
    /// Somebody wants this node to leave: it waits until it is let go.
    LeaveRequested,
    /// A shard for a checkpoint cannot be stored or sent.
    CheckpointFailed {
        /// The checkpoint's step.
        step: Step,
        /// Why.
        reason: String,
    },
    /// The node could not do its part of an epoch.
    Failed {
        /// The placement's number.
        epoch: Epoch,
        /// Why.
        reason: String,
        /// Whether trying again cannot help: a checkpoint that does not fit, memory that is not there.
        fatal: bool,
        /// The node that it could not reach, if that is why.
        suspect: Option<NodeId>,
    },
}
