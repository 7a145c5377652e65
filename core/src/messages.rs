//! The messages between the supervisor and the nodes on the control stream.

use crate::digest::Digest;
use crate::ids::{Epoch, Lane, NodeId, ShardId, Step, Timeline};
use crate::layout::Layout;
use crate::shared::Shared;
use crate::update::Update;
use serde::{Deserialize, Serialize};

/// The source of a shard's state when a placement begins.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Source {
    /// The run's seed: the state before the first step.
    Initial,
    /// The node itself holds it at the placement's version.
    Held,
    /// A node that holds it.
    Peer(NodeId),
    /// A durable checkpoint, through the supervisor.
    Checkpoint(Step),
}

/// A journaled commit, for a node that missed it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LastCommit {
    /// The placement under which the step ran.
    pub epoch: Epoch,
    /// The step.
    pub step: Step,
    /// The treatment of the gradients.
    pub update: Update,
}

/// A node's part in an epoch.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Assignment {
    /// The placement and the addresses. They travel ahead of the assignment, as the difference from those of
    /// the one before.
    #[serde(skip)]
    pub layout: Shared<Layout>,
    /// The run's timeline: state of another one is invalid.
    pub timeline: Timeline,
    /// The last committed step: the version of every shard.
    pub version: Step,
    /// The commit that made this version: a node that prepared it and missed the commit applies it first.
    pub last: Option<LastCommit>,
    /// The shards that this node holds, each with its source.
    pub shards: Vec<(ShardId, Source)>,
    /// The shards that this node copies while training continues, each with its holders.
    pub learn: Vec<(ShardId, Vec<NodeId>)>,
}

/// The state in a node's memory when it returns to a restarted supervisor.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResidentState {
    /// The timeline of the state.
    pub timeline: Timeline,
    /// The last step that the node applied.
    pub version: Step,
    /// The shards that it holds at that version.
    pub shards: Vec<ShardId>,
    /// The step whose whole gradient it holds, with its placement.
    pub prepared: Option<(Epoch, Step)>,
}

/// The kind of pass that lanes take.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Pass {
    /// Forward and backward.
    Train,
    /// Forward only, on held-out text.
    Validate {
        /// The part of the held-out text, from 0.
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
        /// The step whose data a training pass takes; see [`DataSkips`](crate::data_skips::DataSkips).
        data: Step,
        /// Training or validation.
        pass: Pass,
        /// This node's lanes with their tokens, `[sequences, sequence_length + 1]` row by row.
        lanes: Vec<(Lane, Vec<u32>)>,
        /// In training, the shards whose replicas are compared at the version before the step.
        compare: Vec<ShardId>,
    },
    /// The step is committed: apply it.
    Commit {
        /// The placement's number.
        epoch: Epoch,
        /// The step.
        step: Step,
        /// The treatment of the gradients.
        update: Update,
    },
    /// Drop all work of this epoch; another assignment follows.
    Abort {
        /// The epoch that ends.
        epoch: Epoch,
    },
    /// Send these shards at version `step` to the checkpoint.
    Checkpoint {
        /// The placement's number.
        epoch: Epoch,
        /// The step that was just committed.
        step: Step,
        /// The shards that this node sends.
        shards: Vec<ShardId>,
    },
    /// The node cannot leave yet; it does as soon as others can take over.
    LeaveDeferred {
        /// The reason, for the node's log.
        reason: String,
    },
    /// Leave the run.
    Leave {
        /// The reason, for the node's log.
        reason: String,
    },
}

impl NodeCommand {
    /// Puts lanes that were sent ahead before those of a `Begin`; any other command leaves them.
    pub fn prepend_lanes(&mut self, ahead: &mut Vec<(Lane, Vec<u32>)>) {
        if let Self::Begin { lanes, .. } = self {
            ahead.append(lanes);
            *lanes = std::mem::take(ahead);
        }
    }
}

/// The norm of a shard's summed gradient, as one of its holders computed it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Norm {
    /// The squared norm of the sum over lanes.
    pub squared: f64,
    /// Whether all numbers of the gradient are finite.
    pub finite: bool,
}

/// The measurements of one lane.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LaneReport {
    /// Mean cross-entropy, in nats per token.
    pub loss: f64,
    /// Mean over MoE layers of the load-balancing loss; 1 when the load is even.
    pub aux_loss: f64,
    /// Mean over MoE layers of the entropy of the gate's probabilities, in nats.
    pub gate_entropy: f64,
    /// Kept assignments, `[MoE layers][experts]`.
    pub load: Vec<Vec<u32>>,
    /// Assignments dropped by the experts' capacity.
    pub dropped: u32,
    /// In validation, the mean cross-entropy of each sequence: `[sequences]`, in nats per token.
    pub sequence_losses: Vec<f32>,
}

/// Node to supervisor.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum NodeReport {
    /// All shards of the assignment are in memory.
    Ready {
        /// The placement's number.
        epoch: Epoch,
    },
    /// All lanes are done, and the summed gradient of every held shard is in memory: the step can be
    /// committed.
    Prepared {
        /// The placement's number.
        epoch: Epoch,
        /// The step.
        step: Step,
        /// The norm of every held shard's gradient.
        norms: Vec<(ShardId, Norm)>,
        /// The content of the shards to compare that are here, at the version before the step.
        digests: Vec<(ShardId, Digest)>,
        /// The measurements of the lanes.
        lanes: Vec<(Lane, LaneReport)>,
        /// Lanes per second of compute on its device, measured in this step; `None` without lanes.
        speed: Option<f64>,
    },
    /// The lanes of a validation round are done.
    Validated {
        /// The placement's number.
        epoch: Epoch,
        /// The round.
        round: u64,
        /// The measurements of the lanes.
        lanes: Vec<(Lane, LaneReport)>,
    },
    /// Copied shards are in memory. Repeated after every commit that the node applies as a learner.
    Learned {
        /// The placement's number.
        epoch: Epoch,
        /// Their version.
        version: Step,
        /// The shards.
        shards: Vec<ShardId>,
    },
    /// Shards could not be copied.
    CannotLearn {
        /// The placement's number.
        epoch: Epoch,
        /// The reason.
        reason: String,
    },
    /// The node is not at the version of the assignment, and cannot reach it by itself.
    Behind {
        /// The placement's number.
        epoch: Epoch,
        /// The last step that the node applied.
        version: Step,
        /// The reason.
        reason: String,
    },
    /// An operator drains this node: it waits until it is released.
    LeaveRequested,
    /// A shard for a checkpoint is not stored: its weights are not finite.
    WeightsNotFinite {
        /// The checkpoint's step.
        step: Step,
        /// The shard.
        shard: ShardId,
    },
    /// A shard for a checkpoint cannot be stored or sent.
    CheckpointFailed {
        /// The checkpoint's step.
        step: Step,
        /// The reason.
        reason: String,
    },
    /// The node failed in an epoch.
    Failed {
        /// The placement's number.
        epoch: Epoch,
        /// The reason.
        reason: String,
        /// Whether a retry cannot help: a checkpoint of another model, missing memory.
        fatal: bool,
        /// The unreachable node, if that is the reason.
        suspect: Option<NodeId>,
    },
    /// A gradient did not reach a learner.
    LearnerUnreached {
        /// The placement's number.
        epoch: Epoch,
        /// The learner.
        node: NodeId,
        /// The reason.
        reason: String,
    },
}
