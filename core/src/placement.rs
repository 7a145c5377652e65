//! Placements: the nodes of each shard and lane. The planner ([`crate::planner`]) makes them.
//!
//! The layers are cut into pipeline *stages*, usually one. All nodes of a stage hold all of its shards except
//! experts, since every lane passes through them, and divide its lanes. An expert is held by `replication`
//! nodes, with or without a stage. The *owner* of a shard makes the final sum of its gradient
//! ([`crate::reduction`]). No placement changes the mathematics.

mod encoding;
mod traffic;

pub(crate) use encoding::Names;
pub use traffic::Traffic;

use crate::ids::{Epoch, Lane, LayerId, LayerRange, NodeId, ShardId};
use crate::reduction::{ExpertLeaves, Reduction};
use crate::tree::LeafSpan;
use std::collections::{BTreeMap, BTreeSet};

/// Consecutive layers, the nodes that hold them, and the node of each lane. The first stage has the
/// embedding, and with it the loss: its nodes drive their lanes through the other stages.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Stage {
    /// Its layers.
    pub layers: LayerRange,
    /// The nodes that hold them, in the order of their names.
    pub holders: Vec<NodeId>,
    /// For each lane, the place in `holders` of the node that runs it.
    pub lanes: Vec<u32>,
}

impl Stage {
    /// The node that takes a lane through this stage.
    #[must_use]
    pub fn stage_node(&self, lane: Lane) -> Option<&NodeId> {
        self.holders.get(*self.lanes.get(lane.index())? as usize)
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
        let own = |lane: &Lane| self.lanes[lane.index()] as usize == place;
        Lane::first(self.lanes.len() as u32).filter(own).collect()
    }
}

/// A placement, numbered by its epoch.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Placement {
    /// Its number.
    pub epoch: Epoch,
    /// The members, in the order of their names.
    pub members: Vec<NodeId>,
    /// The layers from the first to the last.
    pub stages: Vec<Stage>,
    /// Lanes that share one product in an expert's weight gradient.
    pub lane_group: u32,
    /// Sums that one node adds, and nodes to which it passes the final sum; see [`crate::reduction`].
    pub fan_in: u32,
    /// The holders of each expert, its owner first.
    pub experts: BTreeMap<ShardId, Vec<NodeId>>,
    /// Nodes that copy a shard in the background for a later placement. They already receive its summed
    /// gradients.
    pub learners: BTreeMap<ShardId, BTreeSet<NodeId>>,
}

impl Placement {
    /// Lanes of the run.
    #[must_use]
    pub fn lanes(&self) -> u32 {
        self.stages.first().map_or(0, |stage| stage.lanes.len() as u32)
    }

    /// The stage of a layer.
    #[must_use]
    pub fn stage_of(&self, layer: LayerId) -> Option<&Stage> {
        self.stages.get(self.stages.partition_point(|stage| stage.layers.end <= layer))
    }

    /// Whether two placements differ in their epochs and learners only.
    #[must_use]
    pub fn has_same_layout(&self, other: &Self) -> bool {
        self.members == other.members && self.stages == other.stages && self.experts == other.experts
    }

    /// Whether `node` has a part in it besides learning.
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
    pub fn holds_or_learns(&self, node: &NodeId, shard: ShardId) -> bool {
        self.holds(node, shard) || self.learners.get(&shard).is_some_and(|nodes| nodes.contains(node))
    }

    /// The nodes that are copying shards.
    #[must_use]
    pub fn learning_nodes(&self) -> BTreeSet<NodeId> {
        self.learners.values().flatten().cloned().collect()
    }

    /// The nodes that must hold a step's whole gradient before its commit: members and learners.
    #[must_use]
    pub fn voters(&self) -> BTreeSet<NodeId> {
        self.members.iter().cloned().chain(self.learning_nodes()).collect()
    }

    /// The route of a shard's gradient; `None` for a shard without a stage.
    #[must_use]
    pub fn reduction(&self, shard: ShardId) -> Option<Reduction<'_>> {
        let stage = self.stage_of(shard.layer());
        let (lanes, runners) = stage.map_or((&[][..], &[][..]), |stage| (&stage.lanes, &stage.holders));
        let replicas = self.experts.get(&shard);
        let expert = match shard {
            ShardId::Expert { expert, .. } if replicas.is_some() => {
                Some(ExpertLeaves { lane_group: self.lane_group, rotation: expert.index() })
            }
            _ => None,
        };
        // The embedding and the layers rotate; experts have their owner first.
        let rotation = if shard == ShardId::Embedding { 0 } else { 1 + shard.layer().index() };
        (stage.is_some() || expert.is_some()).then(|| Reduction {
            leaves: self.leaves(shard),
            lanes,
            runners,
            holders: replicas.map_or(runners, Vec::as_slice),
            expert,
            rotation,
            fan_in: self.fan_in,
        })
    }

    /// The holders of a shard, its owner first.
    #[must_use]
    pub fn holders(&self, shard: ShardId) -> Vec<NodeId> {
        self.reduction(shard).map_or_else(Vec::new, |reduction| reduction.holders().cloned().collect())
    }

    /// The holders of a shard, in any order.
    #[must_use]
    pub fn holders_unordered(&self, shard: ShardId) -> &[NodeId] {
        match self.experts.get(&shard) {
            Some(holders) => holders,
            None => self.stage_of(shard.layer()).map_or(&[], |stage| &stage.holders),
        }
    }

    /// The number of lanes of each node in all of its stages; without nodes that have none.
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

    /// The lanes that each node drives; without nodes that drive none.
    #[must_use]
    pub fn lanes_by_driver(&self) -> BTreeMap<&NodeId, Vec<Lane>> {
        let mut driven: BTreeMap<&NodeId, Vec<Lane>> = BTreeMap::new();
        for lane in Lane::first(self.lanes()) {
            if let Some(node) = self.stages.first().and_then(|stage| stage.stage_node(lane)) {
                driven.entry(node).or_default().push(lane);
            }
        }
        driven
    }

    /// The holder that makes the final sum of a shard's gradient.
    #[must_use]
    pub fn owner(&self, shard: ShardId) -> Option<&NodeId> {
        self.reduction(shard)?.owner()
    }

    /// Whether `node` holds `shard`.
    #[must_use]
    pub fn holds(&self, node: &NodeId, shard: ShardId) -> bool {
        match self.experts.get(&shard) {
            Some(holders) => holders.contains(node),
            None => self.stage_of(shard.layer()).is_some_and(|stage| stage.holds(node)),
        }
    }

    /// The lanes that `node` drives: it embeds their tokens and has their loss.
    #[must_use]
    pub fn lanes_of(&self, node: &NodeId) -> Vec<Lane> {
        self.stages.first().map_or_else(Vec::new, |stage| stage.lanes_of(node))
    }

    /// The lanes of a node in all stages, weighted by the `share` of each stage in a lane's work.
    #[must_use]
    pub fn lane_work(&self, node: &NodeId, share: impl Fn(LayerRange) -> f64) -> f64 {
        self.stages.iter().map(|stage| stage.lanes_of(node).len() as f64 * share(stage.layers)).sum()
    }

    /// The number of leaves of a shard's gradient: lanes, or for an expert groups of lanes.
    #[must_use]
    pub fn leaves(&self, shard: ShardId) -> u32 {
        let lanes = self.lanes();
        if shard.is_expert() { lanes.div_ceil(self.lane_group.max(1)) } else { lanes }
    }

    /// The leaf of an expert's gradient that a lane belongs to.
    #[must_use]
    pub fn group_of(&self, lane: Lane) -> u32 {
        lane.0 / self.lane_group.max(1)
    }

    /// The lanes of leaf `leaf` of an expert's gradient.
    #[must_use]
    pub fn group_lanes(
        &self,
        leaf: u32,
    ) -> impl DoubleEndedIterator<Item = Lane> + ExactSizeIterator + Clone + use<> {
        let start = leaf * self.lane_group;
        (start..(start + self.lane_group).min(self.lanes())).map(Lane)
    }

    /// The node that computes a leaf of a shard's gradient; see [`Reduction::computed_by`].
    #[must_use]
    pub fn computed_by(&self, shard: ShardId, leaf: u32) -> Option<&NodeId> {
        self.reduction(shard)?.computed_by(leaf)
    }

    /// The replica that computes an expert for a lane.
    #[must_use]
    pub fn serving_replica(&self, shard: ShardId, lane: Lane) -> Option<&NodeId> {
        self.computed_by(shard, lane.0 / self.lane_group.max(1))
    }

    /// The node that makes the sum over `span` of a shard's gradient; see [`Reduction::reducer`].
    #[must_use]
    pub fn reducer(&self, shard: ShardId, span: LeafSpan) -> Option<&NodeId> {
        self.reduction(shard)?.reducer(span)
    }

    /// The nodes to which `node` passes the final sum of a shard's gradient; see
    /// [`Reduction::broadcast_children`].
    #[must_use]
    pub fn broadcast_children(&self, shard: ShardId, node: &NodeId) -> Vec<NodeId> {
        let Some(reduction) = self.reduction(shard) else { return Vec::new() };
        reduction.broadcast_children(node).cloned().collect()
    }

    /// The sums of a shard's gradient that `node` makes alone, from left to right.
    #[must_use]
    pub fn fragments(&self, shard: ShardId, node: &NodeId) -> Vec<LeafSpan> {
        self.reduction(shard).map_or_else(Vec::new, |reduction| reduction.fragments(node))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tree::{Fold, Next};
    use proptest::prelude::*;

    fn placement(nodes: u32, lanes: u32, fan_in: u32) -> Placement {
        let holders: Vec<NodeId> = (0..nodes).map(|node| NodeId::new(format!("n{node:04}"))).collect();
        let stage = Stage {
            layers: LayerId::range(0..3),
            holders: holders.clone(),
            lanes: (0..lanes).map(|lane| lane * nodes / lanes).collect(),
        };
        Placement {
            epoch: Epoch(1),
            members: holders,
            stages: vec![stage],
            lane_group: 1,
            fan_in,
            ..Placement::default()
        }
    }

    /// Plays the sum of a shard. Returns the node of the final sum, and the number of values that each node
    /// received.
    fn sum(placement: &Placement, shard: ShardId) -> (NodeId, BTreeMap<NodeId, u32>) {
        let lanes = placement.lanes();
        let mut folds: BTreeMap<NodeId, Fold<u32>> = BTreeMap::new();
        let mut received: BTreeMap<NodeId, u32> = BTreeMap::new();
        let leaf =
            |l| (LeafSpan { start: l, end: l + 1 }, placement.computed_by(shard, l).unwrap().clone(), 1);
        let mut open: Vec<(LeafSpan, NodeId, u32)> = (0..lanes).map(leaf).collect();
        while let Some((span, node, count)) = open.pop() {
            let fold = folds.entry(node.clone()).or_insert_with(|| Fold::new(lanes));
            match fold.put(span, count, |above| placement.reducer(shard, above) == Some(&node)) {
                Next::Wait => {}
                Next::Add { span, left, right } => open.push((span, node, left + right)),
                Next::Done { span, value } => {
                    let next = match span.parent(lanes) {
                        Some((parent, _)) => placement.reducer(shard, parent).unwrap().clone(),
                        None => placement.owner(shard).unwrap().clone(),
                    };
                    if next == node {
                        assert_eq!(value, lanes, "every lane is in it once");
                        assert!(open.is_empty());
                        return (node, received);
                    }
                    *received.entry(next.clone()).or_default() += 1;
                    open.push((span, next, value));
                }
            }
        }
        panic!("the sum does not end");
    }

    proptest! {
            #[test]
            fn sums_end_at_the_owner_and_no_node_adds_many(
                nodes in 1u32..70, spare in 0u32..40, fan_in in 2u32..9, layer in 0u16..3,
            ) {
                let placement = placement(nodes, nodes + spare, fan_in);
                let shard = ShardId::Dense { layer: LayerId(layer) };
                let (at, received) = sum(&placement, shard);
                prop_assert_eq!(Some(&at), placement.owner(shard));
    // A node may be a reducer at each level; runs of lanes that are no subtrees are several sums.
                let levels = (f64::from(nodes).ln() / f64::from(fan_in).ln()).ceil() as u32;
                let most = received.values().copied().max().unwrap_or(0);
                prop_assert!(most <= 8 * fan_in * levels.max(1), "{most} of {nodes} by {fan_in}");
                if nodes <= fan_in {
                    prop_assert!(received.keys().all(|node| node == &at), "few nodes send to the owner");
                }
            }

            #[test]
            fn a_sum_of_one_node_ends_at_the_owner(nodes in 1u32..20, runner in 0u32..20, layer in 0u16..3) {
                let mut placement = placement(nodes, 8, 2);
                placement.stages[0].lanes.fill(runner % nodes);
                let (at, _) = sum(&placement, ShardId::Dense { layer: LayerId(layer) });
                prop_assert_eq!(Some(&at), placement.owner(ShardId::Dense { layer: LayerId(layer) }));
            }

            #[test]
            fn the_final_sum_reaches_every_holder_once(nodes in 1u32..70, fan_in in 2u32..9, layer in 0u16..3) {
                let placement = placement(nodes, nodes, fan_in);
                let shard = ShardId::Dense { layer: LayerId(layer) };
                let mut open = vec![placement.owner(shard).unwrap().clone()];
                let mut reached = Vec::new();
                while let Some(node) = open.pop() {
                    let children = placement.broadcast_children(shard, &node);
                    prop_assert!(children.len() <= fan_in as usize);
                    open.extend(children);
                    reached.push(node);
                }
                reached.sort();
                prop_assert_eq!(reached, placement.members);
            }
        }
}
