//! What goes wrong on a node while it takes part in a run. Blame and severity follow from the variant.

use std::fmt;
use std::time::Duration;
use volary_core::agent::Failure;
use volary_core::compute::ComputeError;
use volary_core::{Epoch, NodeId, ShardId, Step};
use volary_protocol::{FrameRefusal, FrameRefusalCode};
use volary_transport::FrameKind;

use crate::ids::{LaneStep, PassId};

/// A node could not do its part.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// A part of a step failed: a lane, or the gradient of a shard.
    #[error("{part}: {source}")]
    Part { part: String, source: Box<Error> },
    /// The shards in memory could not be brought to a committed step. They cannot take part any more.
    #[error("the shards are not at step {step}: {source}")]
    NotUpdated { step: Step, source: Box<Error> },
    /// A computation of a lane failed. The same step may succeed on the next attempt.
    #[error(transparent)]
    Compute(#[from] ComputeError),
    /// The state of a shard could not be loaded, updated or stored.
    #[error("{shard}: {source}")]
    Replica { shard: ShardId, source: ComputeError },
    /// The weights of a shard are not finite.
    #[error("{shard}: its weights are not finite")]
    NotFinite { shard: ShardId },
    /// A peer cannot be reached, or its link broke.
    #[error("{peer} cannot be reached: {reason}")]
    Unreachable { peer: NodeId, reason: String },
    /// A peer is linked and gave no answer.
    #[error("{peer} did not answer within {limit:?}")]
    NoAnswer { peer: NodeId, limit: Duration },
    /// A peer refused a frame.
    #[error("{peer} refused: {refusal}")]
    Refused { peer: NodeId, refusal: FrameRefusal },
    /// A frame is over a bound of the transport and cannot be sent.
    #[error("a frame for {peer} is too large: {reason}")]
    TooLarge { peer: NodeId, reason: String },
    /// The supervisor did not deliver or take a shard.
    #[error("the supervisor: {reason}")]
    Supervisor {
        reason: String,
        /// Whether the link holds, so that the supervisor will not give another answer.
        link_open: bool,
    },
    /// The placement has an address that cannot be dialed.
    #[error("{peer} has no usable address: {address}")]
    BadAddress { peer: NodeId, address: String },
    /// The placement names a node that is not a member.
    #[error("{peer} is not a member of the placement")]
    NotAMember { peer: NodeId },
    /// A frame of a pass that is over here.
    #[error("stale: {wanted} after {current}")]
    Stale { wanted: PassId, current: PassId },
    /// A frame of a placement that is over here.
    #[error("epoch {wanted} is over here: the placement is that of epoch {current}")]
    OtherPlacement { wanted: Epoch, current: Epoch },
    /// A frame that the placement does not foresee from its sender.
    #[error("the placement does not have {peer} send {what} to this node")]
    NotForeseen { peer: NodeId, what: String },
    /// A frame of a pass that did not begin here in time.
    #[error("{wanted} did not begin here within {limit:?}")]
    NotBegun { wanted: PassId, limit: Duration },
    /// A shard is not on this node.
    #[error("{shard} is not on this node")]
    MissingShard { shard: ShardId },
    /// A shard is on this node at another version.
    #[error("{shard} is at step {version}, expected step {wanted}")]
    WrongVersion { shard: ShardId, version: Step, wanted: Step },
    /// The placement assigns no node to a shard.
    #[error("{shard} has no holder")]
    NoHolder { shard: ShardId },
    /// A backward call without its forward call.
    #[error("no saved activations of {at}")]
    MissingActivations { at: LaneStep },
    /// The reducer has no gradient of a shard that is to be updated.
    #[error("{shard} has no gradient of step {step}")]
    MissingGradient { shard: ShardId, step: Step },
    /// A frame that this node does not take.
    #[error("unexpected {kind:?} frame")]
    UnexpectedFrame { kind: FrameKind },
    /// A frame is malformed.
    #[error(transparent)]
    Frame(volary_protocol::Error),
    /// One layer does not fit into a benchmark's memory or time.
    #[error("one layer is too large to benchmark")]
    TooLargeToBenchmark,
    /// An actor gave no reply in time.
    #[error("the {actor} actor did not reply within {limit:?}")]
    NoReply { actor: &'static str, limit: Duration },
    /// An actor has stopped.
    #[error("the {actor} actor is gone")]
    ActorGone { actor: &'static str },
    /// A computation ended without a result: it panicked, or the device's queue was full.
    #[error("a computation was dropped")]
    ComputationDropped,
    /// An actor of this process failed.
    #[error("actor {actor} died: {reason}")]
    ActorDied { actor: String, reason: String },
}

/// The result of something that a node does for a run.
pub(crate) type Result<T> = std::result::Result<T, Error>;

impl From<volary_protocol::Error> for Error {
    fn from(error: volary_protocol::Error) -> Self {
        match error {
            volary_protocol::Error::Compute(error) => Self::Compute(error),
            other => Self::Frame(other),
        }
    }
}

impl Error {
    /// Names the part of a step that failed.
    pub(crate) fn of(self, part: impl fmt::Display) -> Self {
        Self::Part { part: part.to_string(), source: Box::new(self) }
    }

    /// Attributes a failure of the tensor library to a shard's state.
    pub(crate) fn replica(shard: ShardId) -> impl FnOnce(ComputeError) -> Self {
        move |source| Self::Replica { shard, source }
    }

    /// The node to blame, when the cause is not this one.
    fn suspect(&self) -> Option<&NodeId> {
        match self {
            Self::Unreachable { peer, .. } => Some(peer),
            Self::Part { source, .. } => source.suspect(),
            _ => None,
        }
    }

    /// Whether another attempt at the same step cannot help: the same bytes and the same memory fail again.
    fn is_fatal(&self) -> bool {
        match self {
            Self::Part { source, .. } => source.is_fatal(),
            Self::NotUpdated { .. }
            | Self::Replica { .. }
            | Self::WrongVersion { .. }
            | Self::MissingGradient { .. }
            | Self::ActorDied { .. }
            | Self::TooLarge { .. } => true,
            // A supervisor that is gone returns, and a new placement with it.
            Self::Supervisor { link_open, .. } => *link_open,
            _ => false,
        }
    }

    /// The failure as the state machines know it.
    pub(crate) fn failure(&self) -> Failure {
        Failure { reason: self.to_string(), fatal: self.is_fatal(), suspect: self.suspect().cloned() }
    }

    /// The refusal that a peer gets for a frame that failed here.
    pub(crate) fn refusal(&self) -> FrameRefusal {
        let code = match self {
            Self::Part { source, .. } => source.refusal().code,
            Self::Stale { .. } | Self::OtherPlacement { .. } => FrameRefusalCode::Stale,
            Self::NotForeseen { .. } => FrameRefusalCode::NotForeseen,
            Self::NotBegun { .. } => FrameRefusalCode::NotBegun,
            Self::MissingShard { .. } => FrameRefusalCode::MissingShard,
            Self::WrongVersion { .. } => FrameRefusalCode::WrongVersion,
            Self::Frame(_) | Self::UnexpectedFrame { .. } => FrameRefusalCode::Malformed,
            Self::Unreachable { .. } | Self::NoAnswer { .. } | Self::Refused { .. } => {
                FrameRefusalCode::Unreachable
            }
            _ => FrameRefusalCode::Failed,
        };
        FrameRefusal::new(code, self)
    }
}

#[cfg(test)]
#[path = "error_tests.rs"]
mod tests;
