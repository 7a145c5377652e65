//! What the machine is told, what it answers, and what it remembers of a step.

use crate::architecture::Architecture;
use crate::ids::{Epoch, NodeId, ShardId, Step, Timeline};
use crate::messages::{LastCommit, NodeCommand, NodeReport, ResidentState};
use crate::options::{CheckpointOptions, ClusterOptions, TrainingOptions, ValidationOptions};
use crate::profile::Profile;
use crate::schedule::Update;
use serde::{Deserialize, Serialize};

/// What a run is told.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The model's shape.
    pub architecture: Architecture,
    /// How it trains.
    pub training: TrainingOptions,
    /// How it uses its cluster.
    pub cluster: ClusterOptions,
    /// When it writes checkpoints.
    pub checkpoint: CheckpointOptions,
    /// When it measures the held-out loss.
    pub validation: ValidationOptions,
}

/// What a supervisor finds when it starts: nothing in a new run, and the persistent state in one that resumes.
#[derive(Clone, Debug, Default)]
pub struct Restored {
    /// The last durable checkpoint.
    pub durable: Option<Step>,
    /// The last journalled commit.
    pub last: Option<LastCommit>,
    /// What [`Effect::Persist`] said last.
    pub persistent: PersistentState,
}

/// What a supervisor must not forget about its cluster.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PersistentState {
    /// The number of the last placement: it is never used twice.
    pub epoch: Epoch,
    /// How often the run went back.
    pub timeline: Timeline,
    /// The members of the last placement, who may still hold their state when the supervisor comes back.
    pub members: Vec<NodeId>,
}

/// What happens to the supervisor.
#[derive(Clone, Debug)]
pub enum Event {
    /// A node joined, or came back with what it holds.
    Joined {
        /// The node.
        node: NodeId,
        /// What it can do, as it measured itself.
        profile: Box<Profile>,
        /// Where its peers reach it.
        address: String,
        /// What it has in memory; nothing, when it is new.
        held: ResidentState,
    },
    /// What a node's links to its peers carry, as was seen of them.
    LinkMeasured {
        /// The node.
        node: NodeId,
        /// Bytes per second in one direction.
        bandwidth: f64,
        /// Seconds there and back.
        round_trip_s: f64,
    },
    /// A node is gone.
    Lost {
        /// The node.
        node: NodeId,
        /// How that was noticed.
        reason: String,
    },
    /// A node said something.
    Reported {
        /// The node.
        node: NodeId,
        /// What.
        message: NodeReport,
    },
    /// A checkpoint is durable and catalogued.
    CheckpointStored {
        /// Its step.
        step: Step,
    },
    /// A checkpoint could not be written.
    CheckpointFailed {
        /// Its step.
        step: Step,
        /// Why.
        reason: String,
    },
    /// Somebody asks for a checkpoint at the next boundary between steps.
    CheckpointRequested,
    /// Somebody asks a node to hand over what it has and leave.
    DrainRequested {
        /// The node.
        node: NodeId,
    },
    /// Somebody asks the run to write a checkpoint and end.
    StopRequested,
    /// Time has passed.
    Tick {
        /// Milliseconds since the tick before.
        ms: u64,
    },
}

/// One committed step, as it is journalled and written to the metrics.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Committed {
    /// The step.
    pub step: Step,
    /// The placement under which it ran.
    pub epoch: Epoch,
    /// Mean cross-entropy over the batch, in nats per token.
    pub loss: f64,
    /// Mean load-balancing loss.
    pub aux_loss: f64,
    /// Mean entropy of the gates' probabilities, in nats.
    pub gate_entropy: f64,
    /// Norm of the mean gradient before clipping.
    pub grad_norm: f64,
    /// What the replicas do with it.
    pub update: Update,
    /// Tokens in the step.
    pub tokens: u64,
    /// Nodes that took part.
    pub nodes: u32,
    /// Kept assignments per MoE layer and expert, over all lanes.
    pub load: Vec<Vec<u64>>,
    /// Assignments dropped for want of capacity.
    pub dropped: u64,
}

#[expect(missing_docs, reason = "the fields are what their names say")]
/// Something worth telling people.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Notice {
    /// A node joined.
    Joined { node: NodeId, capacity: f64, address: String },
    /// A node came back to a supervisor that had been away, with its state.
    Returned { node: NodeId, version: Step, shards: usize },
    /// A node is gone.
    Lost { node: NodeId, reason: String },
    /// A node was shut out; it may join anew.
    Fenced { node: NodeId, reason: String },
    /// A node is to leave.
    Draining { node: NodeId },
    /// A node has handed everything over and left.
    Left { node: NodeId },
    /// A new placement was made, in which so many shards are fetched before the next step and so many beside it. Layers
    /// are cut into so many stages; so many of the nodes have none and host experts. A step should take so long.
    /// `lanes` are those that each node takes through its stage.
    Placed {
        epoch: Epoch,
        step: Step,
        cause: String,
        nodes: Vec<NodeId>,
        fetched: usize,
        learning: usize,
        stages: usize,
        experts_only: usize,
        predicted_step_ms: f64,
        lanes: Vec<usize>,
    },
    /// What was copied beside the training is there, and the next placement uses it.
    Migrated { epoch: Epoch, step: Step, shards: usize },
    /// Shards could not be copied to a node.
    MigrationFailed { node: NodeId, reason: String },
    /// Measured speeds or the experts' loads ask for another placement.
    Rebalancing { step: Step, reason: String },
    /// A step in flight was dropped and will run again.
    Aborted { epoch: Epoch, step: Step, reason: String },
    /// The last copy of a shard is gone: the run went back to a checkpoint.
    WentBack { from: Step, to: Step, shard: ShardId },
    /// What is lost must be loaded again and does not fit on the nodes that are left: the run waits for more.
    NoRoom { reason: String },
    /// A checkpoint is durable.
    Checkpoint { step: Step },
    /// A checkpoint could not be written.
    CheckpointFailed { step: Step, reason: String },
    /// Two replicas of a shard hold unlike gradients.
    ReplicasDiffer { step: Step, shard: ShardId },
}

#[expect(missing_docs, reason = "the fields are what their names say")]
/// What the supervisor does next, in order.
#[derive(Clone, Debug, PartialEq)]
pub enum Effect {
    /// Send a message; the shell fills in a `Begin`'s tokens.
    Send { node: NodeId, message: NodeCommand },
    /// End a node's link: what it still sends is not heard any more.
    Fence { node: NodeId, reason: String },
    /// Make this step durable before the next effect.
    Journal(Box<Committed>),
    /// Make this durable before the next effect.
    Persist(PersistentState),
    /// Open a checkpoint of `step` that is complete when all of `shards` have come.
    OpenCheckpoint { step: Step, epoch: Epoch, shards: Vec<ShardId> },
    /// Give up a checkpoint that cannot be completed.
    DropCheckpoint { step: Step },
    /// Forget all committed steps after `step`.
    GoBack { step: Step },
    /// The held-out loss after `step`.
    Validated { step: Step, loss: f64, tokens: u64 },
    /// Tell people.
    Notice(Notice),
    /// The run is complete (or stopped as asked), with everything durable.
    Done,
    /// The run cannot go on.
    Fatal { reason: String },
}

/// What the supervisor is doing, for `status`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activity {
    /// Waiting for nodes.
    Gathering,
    /// Nodes fetch the shards of a new placement.
    Placing,
    /// A step is in flight.
    Training,
    /// The held-out loss is being measured.
    Validating,
    /// The last checkpoint is being written.
    Finishing,
    /// The run is over.
    Done,
}
