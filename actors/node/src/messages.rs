//! Every message between the actors of a node process.
//!
//! Messages stand apart from the actors that handle them, so that any actor can send to any other without
//! importing it. [`crate::handles`] wraps the shard actors in typed calls. Messages with reply ports never
//! cross a link: the counterparts on the wire are [`volary_protocol::frames`].
//!
//! | message | to | from |
//! | --- | --- | --- |
//! | [`NodeMsg`] | the agent | the process, lanes, the reducer, transfers |
//! | [`LaneMsg`] | a lane | the agent |
//! | [`DenseMsg`] | the embedding or a dense layer | lanes of this node, stage passes of others |
//! | [`RouterMsg`] | a router | as above |
//! | [`ExpertMsg`] | an expert | routers of this node, batches of others |
//! | [`ShardMsg`] | any of the last three | the agent, peers |
//! | [`ReducerMsg`] | the reducer | shard actors, peers, the agent |

use crate::device::credit::LeafCredit;
use crate::error::{Error, Result};
use crate::ids::LaneStep;
use crate::net::uplink::Uplink;
use crate::trace::{LaneTrace, TraceContext};
use ractor::{ActorRef, Message, RpcReplyPort};
use std::collections::BTreeMap;
use std::sync::Arc;
use tokio::sync::mpsc;
use volary_core::agent;
use volary_core::compute::{Compute, LaneLoss};
use volary_core::messages::{LaneReport, NodeCommand, Norm, Pass, ResidentState};
use volary_core::placement::Placement;
use volary_core::tree::LeafSpan;
use volary_core::update::Update;
use volary_core::{Digest, Epoch, NodeId, ShardId, Step};
use volary_protocol::frames::MoeLayerStats;
use volary_protocol::{ToSupervisor, TraceRequest};
use volary_telemetry::Meter;
use volary_transport::Frame;

/// Sends a message without waiting. An actor that has stopped drops it: its death is handled where it is
/// supervised, and a caller that waits for a reply sees a dropped reply port.
pub(crate) fn notify<M: Message>(actor: &ActorRef<M>, message: M) {
    drop(actor.cast(message));
}

/// Answers a call. A caller that has given up since then does not need the answer.
pub(crate) fn respond<T>(reply: RpcReplyPort<T>, answer: T) {
    drop(reply.send(answer));
}

/// The reply to a call that may fail.
pub(crate) type Reply<T> = RpcReplyPort<Result<T>>;

/// To the agent.
pub(crate) enum NodeMsg {
    /// The supervisor is connected.
    Connected(Connection),
    /// A command of the supervisor, with the trace that it belongs to.
    Command(NodeCommand, Option<TraceRequest>),
    /// The agent's own, when a pass has begun: a node without lanes may have nothing to wait for.
    Begun,
    /// A lane is done.
    LaneDone { at: LaneStep, pass: Pass, outcome: Result<LaneReport> },
    /// The gradients of all held shards are reduced.
    Reduced { epoch: Epoch, step: Step, norms: Vec<(ShardId, Norm)> },
    /// A gradient did not reach a learner.
    LearnerUnreached { epoch: Epoch, learner: NodeId, reason: String },
    /// The digests of the shards to compare.
    Compared { epoch: Epoch, step: Step, digests: Vec<(ShardId, Digest)> },
    /// Some part of an epoch failed.
    Failed { epoch: Epoch, error: Error },
    /// A fetch or copy of shards has ended.
    Transferred(agent::Event),
    /// The control stream to the supervisor has ended.
    SupervisorLost,
    /// A request for what this node holds.
    ResidentState { reply: RpcReplyPort<ResidentState> },
    /// The process was asked to leave.
    LeaveRequested,
    /// A request for the next shard of the checkpoint of `step`, stored; nothing when all are sent.
    NextStored { step: Step, reply: Reply<Option<(ShardId, Vec<u8>)>> },
    /// The supervisor cannot dial this node.
    Unreachable { address: String, reason: String },
}

/// The link to a supervisor, for as long as it holds.
pub(crate) struct Connection {
    pub(crate) messages: mpsc::Sender<ToSupervisor>,
    pub(crate) uplink: Uplink,
    /// Whether the supervisor accepts the state in this node's memory.
    pub(crate) keep: bool,
}

/// To a lane.
pub(crate) enum LaneMsg {
    /// Run these tokens, `[sequences, sequence_length + 1]` row by row.
    Run { at: LaneStep, pass: Pass, tokens: Vec<u32>, trace: LaneTrace },
    /// Cancel the pass in flight.
    Cancel,
}

/// A lane's loss in nats per token and, in training, the gradient of the residual stream.
pub(crate) type Loss<B> = (LaneLoss, Option<<B as Compute>::Tensor>);

/// To a dense actor. The first three are for the embedding, the next two for layers.
pub(crate) enum DenseMsg<B: Compute> {
    /// Token ids to the residual stream, `[sequences, sequence_length, hidden]`.
    Embed { tokens: Arc<Vec<u32>>, meter: Meter, reply: Reply<B::Tensor> },
    /// The residual stream, `[sequences, sequence_length, hidden]`, to the loss and its gradient.
    Loss {
        at: LaneStep,
        x: B::Tensor,
        tokens: Arc<Vec<u32>>,
        train: bool,
        meter: Meter,
        reply: Reply<Loss<B>>,
    },
    /// The gradient of the embedded input, shaped as it: the last call of a lane.
    EmbedBackward { at: LaneStep, dx: B::Tensor, tokens: Arc<Vec<u32>>, meter: Meter, reply: Reply<()> },
    /// A layer forward, from and to `[sequences, sequence_length, hidden]`.
    Forward { at: LaneStep, x: B::Tensor, train: bool, meter: Meter, reply: Reply<B::Tensor> },
    /// A layer backward: the gradient of the output to that of the input, shaped as in `Forward`.
    Backward { at: LaneStep, dy: B::Tensor, meter: Meter, reply: Reply<B::Tensor> },
    /// See [`ShardMsg`].
    Shard(ShardMsg<B>),
}

/// A layer's output, with the statistics of its gate.
pub(crate) struct Routed<B: Compute> {
    /// `[sequences, sequence_length, hidden]`.
    pub(crate) y: B::Tensor,
    pub(crate) stats: MoeLayerStats,
}

/// To a router.
pub(crate) enum RouterMsg<B: Compute> {
    /// Gate, dispatch, combine, from and to `[sequences, sequence_length, hidden]`.
    Forward { at: LaneStep, x: B::Tensor, train: bool, trace: TraceContext, reply: Reply<Routed<B>> },
    /// The same in reverse: the gradient of the output to that of the input.
    Backward { at: LaneStep, dy: B::Tensor, load: Arc<[u32]>, trace: TraceContext, reply: Reply<B::Tensor> },
    /// See [`ShardMsg`].
    Shard(ShardMsg<B>),
}

/// To an expert.
pub(crate) enum ExpertMsg<B: Compute> {
    /// A lane's rows forward, `[rows, hidden]`; there may be none.
    Forward { at: LaneStep, x: B::Tensor, train: bool, meter: Meter, reply: Reply<B::Tensor> },
    /// The gradient of the output, `[rows, hidden]`; that of the input is the reply.
    Backward { at: LaneStep, dy: B::Tensor, meter: Meter, reply: Reply<B::Tensor> },
    /// The expert's own, after a backward call: what the lane's weight gradient needs.
    BackwardDone { at: LaneStep, saved: B::Saved },
    /// See [`ShardMsg`].
    Shard(ShardMsg<B>),
}

/// To any actor that owns a shard, between steps.
pub(crate) enum ShardMsg<B: Compute> {
    /// One step of the optimizer; no gradient when no token reached the expert.
    Apply { gradient: Option<B::Gradient>, step: Step, update: Update, reply: Reply<()> },
    /// The stored form and its version; refused when another version is wanted.
    Store { version: Option<Step>, finite: bool, reply: Reply<(Step, Vec<u8>)> },
    /// A digest of the state at this version.
    Digest { version: Step, reply: Reply<Digest> },
    /// Flip a bit of the state: a fault of a scripted run.
    FlipBit { reply: Reply<()> },
    /// Drop everything that belongs to epochs before this one.
    Discard { epoch: Epoch },
}

/// A gradient on its way up the tree; `None` when no token reached the expert.
pub(crate) type Sum<B> = Option<<B as Compute>::Gradient>;

/// To the reducer.
pub(crate) enum ReducerMsg<B: Compute> {
    /// A step begins.
    Begin { epoch: Epoch, step: Step, placement: Arc<Placement> },
    /// A leaf that this node computed.
    Leaf { epoch: Epoch, step: Step, shard: ShardId, leaf: u32, gradient: Result<Sum<B>>, credit: LeafCredit },
    /// A sum from another node, or from an addition here, with the leaf that led to it.
    Summed {
        epoch: Epoch,
        step: Step,
        shard: ShardId,
        span: LeafSpan,
        gradient: Result<Sum<B>>,
        credit: Option<LeafCredit>,
    },
    /// The root of a shard with its norm; with the frame that brought it, to be forwarded.
    Root { epoch: Epoch, step: Step, shard: ShardId, gradient: Result<(Sum<B>, Norm)>, frame: Option<Frame> },
    /// The roots of shards that this node only learns had their time.
    GraceOver { epoch: Epoch, step: Step },
    /// The gradients of a step, for its commit.
    Take { epoch: Epoch, step: Step, reply: RpcReplyPort<BTreeMap<ShardId, Sum<B>>> },
    /// Drop everything that belongs to epochs before this one.
    Discard { epoch: Epoch },
}

impl<B: Compute> ReducerMsg<B> {
    /// A lane's gradient of a shard that every lane passes.
    pub(crate) fn lane_leaf(
        at: LaneStep,
        shard: ShardId,
        gradient: Result<B::Gradient>,
        credit: LeafCredit,
    ) -> Self {
        let LaneStep { epoch, step, lane } = at;
        Self::Leaf { epoch, step, shard, leaf: lane.0, gradient: gradient.map(Some), credit }
    }
}
