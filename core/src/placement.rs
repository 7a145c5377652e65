//! Which nodes hold which shards and run which lanes. The planner ([`crate::planner`]) makes placements; this is what they say.
//!
//! The layers are cut into *stages*, one as a rule. A stage's nodes hold all of its shards but experts, since lanes meet
//! them all, and share its lanes; an expert is held by `replication` nodes, whether these have a stage or not. The first
//! holder of a shard is its *owner*: it adds up the shard's gradient and sends the sum to the other holders. Nothing of
//! this shows in the mathematics.

use crate::ids::{Epoch, Lane, NodeId, ShardId};
use crate::tree::Span;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

/// Consecutive layers, the nodes that hold them, and which of these takes which lane through them. The first stage has
/// the embedding, and with it the loss: its nodes drive their lanes through the other stages.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Stage {
    /// Its layers.
    pub layers: Range<u16>,
    /// The nodes that hold them, in the order of their names.
    pub holders: Vec<NodeId>,
    /// For each lane, the place in `holders` of the node that runs it.
    pub lanes: Vec<u32>,
}

impl Stage {
    /// The node that takes a lane through this stage.
    #[must_use]
    pub fn runner(&self, lane: Lane) -> Option<&NodeId> {
        self.holders.get(*self.lanes.get(lane as usize)? as usize)
    }

    /// Whether `node` holds the stage's shards.
    #[must_use]
    pub fn holds(&self, node: &NodeId) -> bool {
        self.holders.binary_search(node).is_ok()
    }

    /// The lanes that `node` takes through this stage.
    #[must_use]
    pub fn lanes_of(&self, node: &NodeId) -> Vec<Lane> {
        let Ok(place) = self.holders.binary_search(node) else { return Vec::new() };
        let own = |lane: &Lane| self.lanes[*lane as usize] as usize == place;
        (0..self.lanes.len() as Lane).filter(own).collect()
    }
}

/// A placement, numbered by its epoch.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Placement {
    /// Its number.
    pub epoch: Epoch,
    /// The members, in the order of their names.
    pub members: Vec<NodeId>,
    /// The layers from the first to the last.
    pub stages: Vec<Stage>,
    /// Lanes that share one product in an expert's weight gradient.
    pub lane_group: u32,
    /// The holders of each expert, its owner first.
    pub experts: BTreeMap<ShardId, Vec<NodeId>>,
    /// Nodes that copy a shard in the background to hold it in a later placement: they get its summed gradients already.
    pub learners: BTreeMap<ShardId, BTreeSet<NodeId>>,
}

/// The layer that a shard belongs to; the embedding is the first's.
fn layer_of(shard: ShardId) -> u16 {
    match shard {
        ShardId::Embedding => 0,
        ShardId::Dense { layer } | ShardId::Router { layer } | ShardId::Expert { layer, .. } => layer,
    }
}

impl Placement {
    /// Lanes of the run.
    #[must_use]
    pub fn lanes(&self) -> u32 {
        self.stages.first().map_or(0, |stage| stage.lanes.len() as u32)
    }

    /// The stage of a layer.
    #[must_use]
    pub fn stage_of(&self, layer: u16) -> Option<&Stage> {
        self.stages.get(self.stages.partition_point(|stage| stage.layers.end <= layer))
    }

    /// Whether two placements differ in nothing but their numbers and learners.
    #[must_use]
    pub fn same_as(&self, other: &Self) -> bool {
        self.members == other.members && self.stages == other.stages && self.experts == other.experts
    }

    /// Whether `node` has a part in it that is not only learning.
    #[must_use]
    pub fn is_member(&self, node: &NodeId) -> bool {
        self.members.binary_search(node).is_ok()
    }

    /// Whether `node` is copying shards.
    #[must_use]
    pub fn is_learning(&self, node: &NodeId) -> bool {
        self.learners.values().any(|nodes| nodes.contains(node))
    }

    /// Whether `node` holds `shard` or is copying it.
    #[must_use]
    pub fn keeps(&self, node: &NodeId, shard: ShardId) -> bool {
        self.holds(node, shard) || self.learners.get(&shard).is_some_and(|nodes| nodes.contains(node))
    }

    /// The nodes that are copying shards.
    #[must_use]
    pub fn learning_nodes(&self) -> BTreeSet<NodeId> {
        self.learners.values().flatten().cloned().collect()
    }

    /// Everybody who must have a step's whole gradient before it is committed: members and learners.
    #[must_use]
    pub fn voters(&self) -> BTreeSet<NodeId> {
        self.members.iter().cloned().chain(self.learning_nodes()).collect()
    }

    /// The holders of a shard, its owner first.
    #[must_use]
    pub fn holders(&self, shard: ShardId) -> Vec<NodeId> {
        if let Some(holders) = self.experts.get(&shard) {
            return holders.clone();
        }
        let Some(stage) = self.stage_of(layer_of(shard)) else { return Vec::new() };
        let mut holders = stage.holders.clone();
        let first = turn(shard, holders.len());
        holders.rotate_left(first);
        holders
    }

    /// The holders of a shard in no order that matters.
    #[must_use]
    pub fn holders_unordered(&self, shard: ShardId) -> &[NodeId] {
        match self.experts.get(&shard) {
            Some(holders) => holders,
            None => self.stage_of(layer_of(shard)).map_or(&[], |stage| &stage.holders),
        }
    }

    /// How many lanes each node takes through its stages; those with none are left out.
    #[must_use]
    pub fn lane_counts(&self) -> BTreeMap<&NodeId, usize> {
        let mut counts = BTreeMap::new();
        for (stage, &place) in
            self.stages.iter().flat_map(|stage| stage.lanes.iter().map(move |l| (stage, l)))
        {
            if let Some(node) = stage.holders.get(place as usize) {
                *counts.entry(node).or_default() += 1;
            }
        }
        counts
    }

    /// The lanes that each node drives; those with none are left out.
    #[must_use]
    pub fn driven(&self) -> BTreeMap<&NodeId, Vec<Lane>> {
        let mut driven: BTreeMap<&NodeId, Vec<Lane>> = BTreeMap::new();
        for lane in 0..self.lanes() {
            if let Some(node) = self.stages.first().and_then(|stage| stage.runner(lane)) {
                driven.entry(node).or_default().push(lane);
            }
        }
        driven
    }

    /// The node that adds up a shard's gradient.
    #[must_use]
    pub fn owner(&self, shard: ShardId) -> Option<&NodeId> {
        if let Some(holders) = self.experts.get(&shard) {
            return holders.first();
        }
        let holders = &self.stage_of(layer_of(shard))?.holders;
        holders.get(turn(shard, holders.len()))
    }

    /// Whether `node` holds `shard`.
    #[must_use]
    pub fn holds(&self, node: &NodeId, shard: ShardId) -> bool {
        match self.experts.get(&shard) {
            Some(holders) => holders.contains(node),
            None => self.stage_of(layer_of(shard)).is_some_and(|stage| stage.holds(node)),
        }
    }

    /// The lanes that `node` drives: it embeds their tokens and has their loss.
    #[must_use]
    pub fn lanes_of(&self, node: &NodeId) -> Vec<Lane> {
        self.stages.first().map_or_else(Vec::new, |stage| stage.lanes_of(node))
    }

    /// The lanes that a node has in all stages together, whole lanes: a third of the layers of three lanes are one.
    #[must_use]
    pub fn lane_work(&self, node: &NodeId, share: impl Fn(&Range<u16>) -> f64) -> f64 {
        self.stages.iter().map(|stage| stage.lanes_of(node).len() as f64 * share(&stage.layers)).sum()
    }

    /// How many leaves the gradient of a shard has: lanes, or for an expert groups of lanes.
    #[must_use]
    pub fn leaves(&self, shard: ShardId) -> u32 {
        let lanes = self.lanes();
        if shard.is_expert() { lanes.div_ceil(self.lane_group.max(1)) } else { lanes }
    }

    /// The lanes of leaf `leaf` of an expert's gradient.
    #[must_use]
    pub fn group_lanes(&self, leaf: u32) -> Range<Lane> {
        let start = leaf * self.lane_group;
        start..(start + self.lane_group).min(self.lanes())
    }

    /// The node that computes a leaf of a shard's gradient: the runner of the lane or, for an expert, the replica that
    /// serves the group; a replica on the node that runs the group's first lane is preferred.
    #[must_use]
    pub fn home(&self, shard: ShardId, leaf: u32) -> Option<&NodeId> {
        let stage = self.stage_of(layer_of(shard))?;
        let Some(holders) = self.experts.get(&shard) else { return stage.runner(leaf) };
        let runner = stage.runner(leaf * self.lane_group)?;
        if let Some(local) = holders.iter().find(|&holder| holder == runner) {
            return Some(local);
        }
        let turn = match shard {
            ShardId::Expert { expert, .. } => leaf as usize + usize::from(expert),
            _ => leaf as usize,
        };
        holders.get(turn % holders.len().max(1))
    }

    /// The replica that serves an expert to a lane.
    #[must_use]
    pub fn server(&self, shard: ShardId, lane: Lane) -> Option<&NodeId> {
        self.home(shard, lane / self.lane_group.max(1))
    }

    /// The sums that `node` can make alone of a shard's gradient.
    #[must_use]
    pub fn fragments(&self, shard: ShardId, node: &NodeId) -> Vec<Span> {
        Span::fragments(self.leaves(shard), |leaf| self.home(shard, leaf) == Some(node))
    }
}

/// Shards that all nodes of a stage hold take turns at their owners, so that no node adds up everything.
fn turn(shard: ShardId, holders: usize) -> usize {
    let ordinal = match shard {
        ShardId::Embedding => 0,
        shard => 1 + usize::from(layer_of(shard)),
    };
    ordinal % holders.max(1)
}
