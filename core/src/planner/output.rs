//! The planner's output.

use super::input::Request;
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
    /// Whether it is safer than another plan, or as safe and shorter by a factor.
    pub(super) fn beats(&self, other: &Self, request: &Request<'_>, factor: f64) -> bool {
        let (ours, theirs) = (self.safety(request), other.safety(request));
        ours > theirs || (ours == theirs && self.prediction.step_s < factor * other.prediction.step_s)
    }

    /// A greater value is safer: fewer shards without a wanted second copy, then more copies, up to those
    /// that are wanted.
    pub(super) fn safety(&self, request: &Request<'_>) -> (Reverse<usize>, usize) {
        let Placement { stages, experts, .. } = &self.placement;
        let replication = request.replication;
        let layers =
            stages.iter().map(|stage: &Stage| (stage.layers.len(), stage.holders.len().min(replication)));
        let wanted = |shard| request.extra_replicas.get(shard).copied().unwrap_or(0).max(replication);
        let experts = experts.iter().map(|(shard, holders)| (1, holders.len().min(wanted(shard))));
        let copies = layers.chain(experts);
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
        let mib = self.bytes.div_ceil(1 << 20);
        let size = if mib < 1024 { format!("{mib} MiB") } else { format!("{:.1} GiB", mib as f64 / 1024.0) };
        match self.layer {
            Some(LayerId(0)) => {
                write!(f, "layer 0 with the embedding needs {size} more than any node has")
            }
            Some(layer) => write!(f, "layer {layer} needs {size} more than any node has"),
            None => write!(f, "all nodes together lack {size}"),
        }
    }
}
