//! The planner's output.

use super::predict::Prediction;
use crate::ids::LayerId;
use crate::placement::{Placement, Stage};
use serde::Serialize;
use std::cmp::Reverse;
use std::fmt;

/// A placement and its predicted step.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The placement.
    pub placement: Placement,
    /// Its predicted step.
    pub prediction: Prediction,
}

impl Plan {
    /// A greater value is safer: fewer shards without a wanted second copy, then more copies, where copies of
    /// layers count up to `replication`.
    pub(super) fn safety(&self, replication: usize) -> (Reverse<usize>, usize) {
        let Placement { stages, experts, .. } = &self.placement;
        let layers =
            stages.iter().map(|stage: &Stage| (stage.layers.len(), stage.holders.len().min(replication)));
        let copies = layers.chain(experts.values().map(|holders| (1, holders.len())));
        let alone = copies.clone().filter(|(_, copies)| *copies < replication.min(2));
        (Reverse(alone.map(|(shards, _)| shards).sum()), copies.map(|(shards, copies)| shards * copies).sum())
    }
}

/// Missing memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Shortage {
    /// The missing bytes.
    pub bytes: u64,
    /// The layer that is too large for every node; `None` when all nodes together are too small.
    pub layer: Option<LayerId>,
}

impl fmt::Display for Shortage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let gib = self.bytes as f64 / f64::from(1 << 30);
        match self.layer {
            Some(LayerId(0)) => {
                write!(f, "layer 0 with the embedding needs {gib:.1} GiB more than any node has")
            }
            Some(layer) => write!(f, "layer {layer} needs {gib:.1} GiB more than any node has"),
            None => write!(f, "all nodes together lack {gib:.1} GiB"),
        }
    }
}
