//! The faults that a test can inject.

use volary_core::{NodeId, ShardId};

/// A fault, or an operator's action.
#[derive(Clone, Debug)]
pub enum Fault {
    /// A process ends at once.
    Kill(NodeId),
    /// A process stops for some milliseconds and continues.
    Freeze(NodeId, u64),
    /// A node is cut off from all others for some milliseconds.
    Partition(NodeId, u64),
    /// Two nodes cannot reach each other for some milliseconds.
    Cut(NodeId, NodeId, u64),
    /// Frames of the first node to the second are lost for some milliseconds; those of the second arrive.
    Mute(NodeId, NodeId, u64),
    /// A new node joins.
    Join,
    /// A new node joins that reaches the supervisor, and that no other node reaches.
    JoinHidden,
    /// A dead node restarts under its name.
    Respawn(NodeId),
    /// An operator drains a node.
    Drain(NodeId),
    /// The supervisor's process ends after some more effects, and restarts.
    KillSupervisor(u64),
    /// All processes end; the disk survives.
    KillEverything,
    /// A node works at this speed from now on, relative to the ordinary speed.
    Slow(NodeId, f64),
    /// An operator stops the run: it writes a checkpoint and ends.
    Stop,
    /// A bit flips in a node's copy of a shard, in its next update.
    Corrupt(NodeId, ShardId),
    /// The network treats messages in another way.
    Network(NetworkFaults),
}

/// The treatment of messages by the network.
#[derive(Clone, Copy, Debug, Default)]
pub struct NetworkFaults {
    /// Share of messages that are lost.
    pub drop: f64,
    /// Share of messages that arrive twice.
    pub duplicate: f64,
    /// Share of messages that are late, and so arrive out of order.
    pub reorder: f64,
}
