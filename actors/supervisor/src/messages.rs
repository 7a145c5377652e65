//! Every message between the actors of the supervisor's process.

use bytes::Bytes;
use ractor::{ActorRef, Message, RpcReplyPort};
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use volary_core::machine;
use volary_core::messages::{NodeReport, ResidentState};
use volary_core::profile::Profile;
use volary_core::{Epoch, NodeId, ShardId, Step, Timeline};
use volary_protocol::operator::{OperatorReply, OperatorRequest};
use volary_protocol::{LinkReport, NodeInfo, ToNode};
use volary_storage::CheckpointRecord;
use volary_storage::mirror::Copied;
use volary_telemetry::Scope;
use volary_transport::{BytePermit, CanaryKey, Link};

/// Sends a message without waiting. An actor that has stopped drops it: the run has ended.
pub(crate) fn notify<M: Message>(actor: &ActorRef<M>, message: M) {
    drop(actor.cast(message));
}

/// Answers a call. A caller that has given up since then does not need the answer.
pub(crate) fn respond<T>(reply: RpcReplyPort<T>, answer: T) {
    drop(reply.send(answer));
}

/// One connection of a node: messages of an earlier one are ignored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SessionId {
    pub(crate) node: NodeId,
    pub(crate) number: u64,
}

/// To the supervisor actor.
pub(crate) enum SupervisorMsg {
    /// An event for the state machine.
    Event(machine::Event),
    /// A node is connected, new or returning.
    Connected(Box<NodeArrival>),
    /// What a node says. Its place in the mailbox is taken until the message is handled.
    FromNode { session: SessionId, message: FromNode, place: Place },
    /// A node's link has ended.
    Disconnected { session: SessionId, cause: machine::LossCause, reason: String },
    /// A shard for the checkpoint, with its share of the memory budget.
    Shard { session: SessionId, step: Step, shard: ShardId, bytes: Bytes, permit: Option<BytePermit> },
    /// Something failed without which the supervisor cannot go on.
    Failed(crate::error::Error),
    /// Certificates are revoked, also between nodes.
    Revoked(Vec<[u8; 32]>),
    /// A checkpoint has been read.
    Verified(crate::error::Result<Option<Step>>),
    /// A copy of a checkpoint has ended.
    Copied(CopyOutcome),
    /// Time has passed.
    Tick,
    /// An operator's request.
    Operator { request: OperatorRequest, reply: RpcReplyPort<OperatorReply> },
}

/// What a node says to the actor.
pub(crate) enum FromNode {
    /// A report, as the protocol has it.
    Report(NodeReport),
    /// It has measured its profile.
    Measured(Box<Profile>),
    /// Its links.
    Links(Vec<LinkReport>),
}

/// One of the places in the mailbox that a node has.
pub(crate) type Place = OwnedSemaphorePermit;

/// A node that has connected, new or returning.
pub(crate) struct NodeArrival {
    pub(crate) session: SessionId,
    pub(crate) info: NodeInfo,
    /// What it has in memory.
    pub(crate) held: ResidentState,
    /// Its control stream.
    pub(crate) messages: mpsc::Sender<ToNode>,
    pub(crate) link: Link,
    /// The port and key of the canary for its process.
    pub(crate) canary: Option<(u16, CanaryKey)>,
}

/// A checkpoint to copy.
pub(crate) struct CopyJob {
    pub(crate) record: CheckpointRecord,
    /// Copies to keep.
    pub(crate) keep: usize,
    /// Steps whose copies stay in any case.
    pub(crate) must_stay: Vec<Option<Step>>,
    /// Who is told of the end.
    pub(crate) from: ActorRef<CheckpointerMsg>,
}

/// What became of a copy.
#[derive(Clone, Debug)]
pub(crate) struct CopyOutcome {
    pub(crate) step: Step,
    /// What was copied and the seconds that it took; `None` for one that a newer one has replaced.
    pub(crate) result: Option<Result<(Copied, f64), String>>,
}

/// To the copier actor.
pub(crate) enum CopierMsg {
    /// Copy a checkpoint to the object store.
    Copy(Box<CopyJob>),
    /// A copy has ended, well or not.
    Ended(CopyOutcome),
    /// Answer with the last outcome when nothing is left to copy.
    Idle { reply: RpcReplyPort<Option<CopyOutcome>> },
}

/// To the checkpointer actor.
pub(crate) enum CheckpointerMsg {
    /// Open a checkpoint of `step`, complete when all of `shards` are stored.
    Open { attempt: u64, at: (Step, Timeline, Epoch), shards: Vec<ShardId>, scope: Scope },
    /// Store a shard.
    Shard { step: Step, shard: ShardId, bytes: Bytes, permit: Option<BytePermit> },
    /// Give the checkpoint up.
    Drop { attempt: u64 },
    /// The replicas of every shard were equal after this checkpoint: it stays until another one is named.
    Agreed { step: Step },
    /// A copy in the object store has ended.
    Copied(CopyOutcome),
    /// Answer when everything before this message is done: no checkpoint becomes durable behind the sender's
    /// back.
    Idle { reply: RpcReplyPort<()> },
}
