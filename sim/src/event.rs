//! The events of the simulated world.

use crate::fault::Fault;
use crate::limits::TRACE_CHARS_MAX;
use std::fmt;
use volary_core::messages::{NodeCommand, NodeReport};
use volary_core::{Epoch, NodeId, ShardId, Step, agent};

/// Something that happens at a moment of simulated time. A session is a link between a node and the
/// supervisor; a process is one life of a node.
#[derive(Debug)]
pub(crate) enum Event {
    /// A node's message arrives at the supervisor.
    ToSupervisor { node: NodeId, session: u64, message: NodeReport },
    /// A supervisor's message arrives at a node.
    ToNode { node: NodeId, session: u64, message: NodeCommand },
    /// Shards for a checkpoint arrive at the supervisor.
    CheckpointShards { node: NodeId, session: u64, step: Step, shards: Vec<ShardId> },
    /// The supervisor notices the end of a link.
    LinkEnds { node: NodeId, session: u64 },
    /// A node notices the end of a link.
    LinkEndsForNode { node: NodeId, session: u64 },
    /// A node connects to the supervisor.
    Dial { node: NodeId, process: u64 },
    /// Work of a node's shell has a result.
    Agent { node: NodeId, process: u64, event: agent::Event },
    /// A node's part of a step may be done.
    Work { node: NodeId, process: u64, epoch: Epoch, step: Step, since: u64 },
    /// A node reads a shard from a peer in the background.
    ReadCopy { node: NodeId, process: u64, epoch: Epoch, shard: ShardId, from: Vec<NodeId> },
    /// A checkpoint is durable.
    Stored { life: u64, attempt: u64, step: Step },
    /// All bytes of a checkpoint have been read.
    Verified { life: u64, step: Step },
    /// The supervisor's clock.
    Tick { life: u64 },
    /// The supervisor restarts.
    SupervisorStarts,
    /// A fault is injected.
    Fault(Fault),
}

impl Event {
    /// Whether it is too frequent for a trace.
    pub(crate) fn is_routine(&self) -> bool {
        matches!(self, Self::Tick { .. } | Self::Work { .. })
    }
}

/// One line of a trace.
impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = format!("{self:?}");
        f.write_str(&text.chars().take(TRACE_CHARS_MAX).collect::<String>())
    }
}
