//! The names of things: runs count steps and epochs, nodes carry names, shards carry their place in the model.

use serde::{Deserialize, Serialize};
use std::fmt;

/// The number of a committed or running step, from 1; 0 is the state before the first step.
pub type Step = u64;

/// The number of a placement; every message carries it, and a receiver drops what is stale.
pub type Epoch = u64;

/// One logical slice of the global batch, numbered from 0; their number is fixed for the life of a run.
pub type Lane = u32;

/// A node's name, unique in its run: `node-1`, or what `--name` gave.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct NodeId(pub String);

impl NodeId {
    /// A node's id from its name.
    #[must_use]
    pub fn new(name: impl Into<String>) -> Self {
        Self(name.into())
    }
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The unit of state that is placed, replicated, moved and checkpointed.
///
/// The order is the fixed order in which norms are folded and digests are listed.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum ShardId {
    /// The tied token embedding and the final norm.
    Embedding,
    /// Attention of one layer and, where the layer has no experts, its gated feed-forward.
    Dense {
        /// The layer, from 0.
        layer: u16,
    },
    /// The gate of one MoE layer, with the norm before it.
    Router {
        /// The layer, from 0.
        layer: u16,
    },
    /// One expert of one MoE layer.
    Expert {
        /// The layer, from 0.
        layer: u16,
        /// The expert, from 0.
        expert: u16,
    },
}

impl ShardId {
    /// Whether this is an expert: experts are spread over nodes, every other shard is held by all.
    #[must_use]
    pub fn is_expert(self) -> bool {
        matches!(self, Self::Expert { .. })
    }
}

impl fmt::Display for ShardId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Embedding => f.write_str("embedding"),
            Self::Dense { layer } => write!(f, "layer.{layer}.dense"),
            Self::Router { layer } => write!(f, "layer.{layer}.router"),
            Self::Expert { layer, expert } => write!(f, "layer.{layer}.expert.{expert}"),
        }
    }
}

impl fmt::Debug for ShardId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
