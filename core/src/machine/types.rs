//! The machine's settings, events and effects, and the records of a run.

use crate::architecture::Architecture;
use crate::data_skips::DataSkips;
use crate::ids::{Epoch, NodeId, ShardId, Step, Timeline};
use crate::messages::{LastCommit, NodeCommand, NodeReport, ResidentState};
use crate::options::{CheckpointOptions, ClusterOptions, TrainingOptions, ValidationOptions};
use crate::profile::Profile;
use crate::update::Update;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;

/// The settings of a run.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The model's shape.
    pub architecture: Architecture,
    /// Training.
    pub training: TrainingOptions,
    /// The cluster.
    pub cluster: ClusterOptions,
    /// Checkpoints.
    pub checkpoint: CheckpointOptions,
    /// Measurements of the held-out loss.
    pub validation: ValidationOptions,
    /// Whether the run waits for nodes for as long as it takes, instead of `cluster.gather_timeout_ms`.
    pub stay: bool,
}

/// The state on disk when a supervisor starts; empty in a new run.
#[derive(Clone, Debug, Default)]
pub struct Restored {
    /// The newest checkpoint in the catalogue. Its bytes are verified when they are about to be used.
    pub durable: Option<Step>,
    /// The checkpoint of the last [`Effect::CheckpointAgreed`].
    pub agreed: Option<Step>,
    /// The last journaled commit.
    pub last: Option<LastCommit>,
    /// The number of skipped steps at the end of the journal, up to `training.max_skipped_steps`.
    pub skipped_in_a_row: u64,
    /// The state of the last [`Effect::Persist`].
    pub persistent: PersistentState,
}

/// The state of the cluster that outlives the supervisor's process.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PersistentState {
    /// The number of the last placement. Numbers are never used twice.
    pub epoch: Epoch,
    /// The present timeline.
    pub timeline: Timeline,
    /// The members of the last placement, which may still hold their state after a restart of the supervisor.
    pub members: Vec<NodeId>,
    /// The training data that the run leaves out.
    pub data_skips: DataSkips,
}

/// An input of the machine.
#[derive(Clone, Debug)]
pub enum Event {
    /// A node joined, or returned with its state.
    Joined {
        /// The node.
        node: NodeId,
        /// Its profile by its own benchmark.
        profile: Box<Profile>,
        /// Its address for peers.
        address: String,
        /// Its state in memory; empty for a new node.
        held: ResidentState,
    },
    /// A measurement of a node's links to its peers.
    LinkMeasured {
        /// The node.
        node: NodeId,
        /// Bytes per second in one direction.
        bandwidth: f64,
        /// Round trip in seconds.
        round_trip_s: f64,
    },
    /// A node disconnected.
    Lost {
        /// The node.
        node: NodeId,
        /// What is known of its process.
        cause: LossCause,
        /// The reason.
        reason: String,
    },
    /// A node sent a message.
    Reported {
        /// The node.
        node: NodeId,
        /// The message.
        message: NodeReport,
    },
    /// A checkpoint is durable and catalogued.
    CheckpointStored {
        /// The number of the attempt.
        attempt: u64,
    },
    /// A checkpoint could not be written.
    CheckpointFailed {
        /// The number of the attempt.
        attempt: u64,
        /// The reason.
        reason: String,
    },
    /// The answer to [`Effect::VerifyCheckpoint`].
    CheckpointVerified {
        /// The newest intact checkpoint: the requested one, or one before it that an operator has allowed.
        intact: Option<Step>,
    },
    /// An operator asks for a checkpoint at the next boundary between steps.
    CheckpointRequested,
    /// An operator drains a node: it leaves when others hold its shards.
    DrainRequested {
        /// The node.
        node: NodeId,
    },
    /// An operator stops the run: it writes a checkpoint and ends.
    StopRequested,
    /// Time has passed.
    Tick {
        /// Milliseconds since the previous tick.
        ms: u64,
    },
}

/// What is known of the process of a node that disconnected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LossCause {
    /// It has ended, and its state with it.
    Ended,
    /// Its link ended or is silent. The process may live, and return with its state.
    Unlinked,
}

/// What replicas of one shard have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Compared {
    /// Parameters and optimizer state, before the step.
    State,
    /// The summed gradient of the step.
    Gradient,
}

impl fmt::Display for Compared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::State => "state",
            Self::Gradient => "gradient",
        })
    }
}

/// One committed step, for the journal and the metrics.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Committed {
    /// The step.
    pub step: Step,
    /// Its placement.
    pub epoch: Epoch,
    /// Mean cross-entropy over the batch, in nats per token.
    pub loss: f64,
    /// Mean load-balancing loss.
    pub aux_loss: f64,
    /// Mean entropy of the gates' probabilities, in nats.
    pub gate_entropy: f64,
    /// Norm of the mean gradient before clipping.
    pub grad_norm: f64,
    /// The treatment of the gradients.
    pub update: Update,
    /// Tokens of the batch.
    pub tokens: u64,
    /// Members of the placement.
    pub nodes: u32,
    /// Kept assignments of all lanes, `[MoE layers][experts]`.
    pub load: Vec<Vec<u64>>,
    /// Assignments dropped by the experts' capacity.
    pub dropped: u64,
}

#[expect(missing_docs, reason = "the names of the fields describe them")]
/// An event for the operator.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Notice {
    /// A node joined.
    Joined { node: NodeId, capacity: f64, address: String },
    /// The nodes are of several arithmetic kinds: the bits of a run on them depend on its placements.
    ArithmeticMixed { kinds: Vec<Vec<NodeId>> },
    /// A node returned with its state to a restarted supervisor.
    Returned { node: NodeId, version: Step, shards: usize },
    /// A node disconnected.
    Lost { node: NodeId, reason: String },
    /// A node was fenced; it may rejoin without state.
    Fenced { node: NodeId, reason: String },
    /// A node is being drained. It holds `bytes` of weights, `sole_bytes` of them as the last one that stays:
    /// others or a checkpoint take these over, in `seconds` at least by the bandwidth that was measured.
    Draining { node: NodeId, bytes: u64, sole_bytes: u64, seconds: f64 },
    /// A drain waits: the other nodes have no room for the node's shards. It is carried out when they have.
    DrainDeferred { node: NodeId, reason: String },
    /// All nodes leave: they are released once a checkpoint of `step` is durable.
    Emptying { step: Step },
    /// A drained node left.
    Left { node: NodeId },
    /// A new placement. `fetched` shards are loaded before the next step and `learning` in the background;
    /// `experts_only` nodes have no stage; `lanes` are those of each of `nodes`.
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
    /// All background copies are complete; the next placement uses them.
    Migrated { epoch: Epoch, step: Step, shards: usize },
    /// Steps are committed without a learner: it does not receive every gradient in time.
    LearnerLate { node: NodeId, step: Step },
    /// Shards could not be copied to a node.
    MigrationFailed { node: NodeId, reason: String },
    /// Measured speeds or expert loads call for another placement.
    Rebalancing { step: Step, reason: String },
    /// The step in flight was dropped and will rerun.
    Aborted { epoch: Epoch, step: Step, reason: String },
    /// The last copy of a shard is lost: the run went back to a checkpoint.
    WentBack { from: Step, to: Step, shard: ShardId },
    /// The run was broken by numbers that are not finite: it went back to a healthy checkpoint, and goes on
    /// with the data of step `data`.
    WentBackFromNan { from: Step, to: Step, data: Step, reason: String },
    /// Lost shards do not fit on the remaining nodes: the run waits for more nodes.
    NoRoom { reason: String },
    /// A checkpoint is durable.
    Checkpoint { step: Step },
    /// A checkpoint could not be written.
    CheckpointFailed { step: Step, reason: String },
    /// A checkpoint that was due was not begun; the next one follows in its turn.
    CheckpointPassed { step: Step, reason: String },
    /// The run cannot go on. What the nodes hold is written to a checkpoint first.
    GivingUp { step: Step, reason: String },
    /// Replicas of a shard are not equal, or have unlike gradients: step `step` is not committed. `blamed`
    /// nodes differ from the majority; without a majority there are none.
    ReplicasDiffer { step: Step, shard: ShardId, what: Compared, nodes: Vec<NodeId>, blamed: Vec<NodeId> },
    /// Replicas were not equal: the run went back to the newest checkpoint from before.
    WentBackFromDifference { from: Step, to: Step, shard: ShardId },
}

#[expect(missing_docs, reason = "the names of the fields describe them")]
/// An output of the machine. The shell carries effects out in order.
#[derive(Clone, Debug, PartialEq)]
pub enum Effect {
    /// Send a message; the shell fills in a `Begin`'s tokens.
    Send { node: NodeId, message: NodeCommand },
    /// End a node's link. Nothing that it still sends counts.
    Fence { node: NodeId, reason: String },
    /// Make this step durable before the next effect.
    Journal(Box<Committed>),
    /// Make this state durable before the next effect.
    Persist(PersistentState),
    /// Open a checkpoint of `step` that is complete when all of `shards` are stored, each by its sender.
    OpenCheckpoint {
        attempt: u64,
        step: Step,
        epoch: Epoch,
        timeline: Timeline,
        senders: BTreeMap<ShardId, NodeId>,
    },
    /// Abandon an incomplete checkpoint.
    DropCheckpoint { attempt: u64 },
    /// The replicas of every shard were equal after the checkpoint of `step`: the run can go back to it,
    /// until a later one is named.
    CheckpointAgreed { step: Step },
    /// Read all bytes of a checkpoint, off the event loop, then report [`Event::CheckpointVerified`].
    VerifyCheckpoint { step: Step },
    /// Delete all committed steps after `step`, and make `state` durable in the same transaction.
    GoBack { step: Step, state: PersistentState },
    /// The held-out loss after `step`: the mean over `tokens` tokens, and that of each sequence by round and
    /// lane.
    Validated { step: Step, loss: f64, tokens: u64, sequences: Vec<Vec<f32>> },
    /// Tell the operator.
    Notice(Notice),
    /// The run is complete, or stopped by an operator, and durable.
    Done,
    /// The supervisor ends, and the run continues with its next one: nodes keep what they hold.
    Halt { reason: String },
    /// The run cannot go on.
    Fatal { reason: String },
}

/// The activity of a run, for `status`.
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
