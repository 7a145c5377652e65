//! Which nodes hold which shards and run which lanes: a pure function of membership, capacity and the previous placement.
//!
//! Every shard but the experts is held by every node, since lanes meet them all; an expert is held by
//! `replication` nodes. The first holder of a shard is its *owner*: it adds up the shard's gradient and
//! sends the sum to the other holders. Nothing of this shows in the mathematics.

use crate::architecture::Architecture;
use crate::ids::{Epoch, Lane, NodeId, ShardId};
use crate::tree::Span;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// A node as the planner sees it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Member {
    /// Its name.
    pub node: NodeId,
    /// How much it does in a second, relative to the others.
    pub capacity: f64,
}

/// A placement, numbered by its epoch.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Placement {
    /// Its number.
    pub epoch: Epoch,
    /// The members, in the order of their names.
    pub members: Vec<NodeId>,
    /// The node that runs each lane.
    pub lanes: Vec<NodeId>,
    /// Lanes that share one product in an expert's weight gradient.
    pub lane_group: u32,
    /// The holders of each expert, its owner first.
    pub experts: BTreeMap<ShardId, Vec<NodeId>>,
    /// Nodes that copy a shard in the background to hold it in a later placement: they get its summed gradients already.
    pub learners: BTreeMap<ShardId, BTreeSet<NodeId>>,
}

/// What a placement is made from.
#[derive(Clone, Debug)]
pub struct Request<'a> {
    /// The number that the placement gets.
    pub epoch: Epoch,
    /// The nodes; at least one.
    pub members: &'a [Member],
    /// The model.
    pub architecture: &'a Architecture,
    /// Lanes of the run.
    pub lanes: u32,
    /// Lanes that share one product in an expert's weight gradient.
    pub lane_group: u32,
    /// Copies of every expert.
    pub replication: usize,
    /// Experts with more copies than that, because many tokens go to them.
    pub hot: &'a BTreeMap<ShardId, usize>,
    /// Experts that may move, beyond those that must, so that nodes are evenly full.
    pub moves_max: usize,
    /// The placement before this one: what it holds is moved as little as possible.
    pub previous: Option<&'a Placement>,
}

impl Placement {
    /// Makes a placement.
    #[must_use]
    pub fn plan(request: &Request<'_>) -> Self {
        let mut members = request.members.to_vec();
        members.sort_by(|a, b| a.node.cmp(&b.node));
        Self {
            epoch: request.epoch,
            members: members.iter().map(|m| m.node.clone()).collect(),
            lanes: share_lanes(&members, request.lanes),
            lane_group: request.lane_group,
            experts: spread_experts(&members, request),
            learners: BTreeMap::new(),
        }
    }

    /// The placement that goes on at once when others are gone: `members` share the lanes, and every expert stays where
    /// it is. One that no member holds goes to the member with the fewest, who must fetch it.
    #[must_use]
    pub fn of_survivors(
        request: &Request<'_>,
        holders: &BTreeMap<ShardId, BTreeSet<NodeId>>,
        before: &Self,
    ) -> Self {
        let mut members = request.members.to_vec();
        members.sort_by(|a, b| a.node.cmp(&b.node));
        let names: Vec<NodeId> = members.iter().map(|m| m.node.clone()).collect();
        let mut loads = Loads { members: &members, held: BTreeMap::new() };
        let mut experts = BTreeMap::new();
        let all: Vec<ShardId> = request.architecture.shards().into_iter().filter(|s| s.is_expert()).collect();
        for &shard in &all {
            let alive = |node: &&NodeId| {
                names.contains(node) && holders.get(&shard).is_some_and(|nodes| nodes.contains(*node))
            };
            let mut kept: Vec<NodeId> =
                before.experts.get(&shard).into_iter().flatten().filter(alive).cloned().collect();
            for node in holders.get(&shard).into_iter().flatten().filter(alive) {
                if !kept.contains(node) {
                    kept.push(node.clone());
                }
            }
            if kept.is_empty()
                && let Some(member) = loads.lightest(&[])
            {
                kept.push(member.node.clone());
            }
            for node in &kept {
                if let Some(member) = members.iter().find(|m| &m.node == node) {
                    *loads.held.entry(&member.node).or_default() += 1;
                }
            }
            experts.insert(shard, kept);
        }
        take_turns(&all, &mut experts);
        let lanes = if before.members == names && before.lanes.len() == request.lanes as usize {
            before.lanes.clone()
        } else {
            share_lanes(&members, request.lanes)
        };
        Self {
            epoch: request.epoch,
            members: names,
            lanes,
            lane_group: request.lane_group,
            experts,
            learners: BTreeMap::new(),
        }
    }

    /// Whether two placements differ in nothing but their numbers and learners.
    #[must_use]
    pub fn same_as(&self, other: &Self) -> bool {
        self.members == other.members && self.lanes == other.lanes && self.experts == other.experts
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
        // Shards that all nodes hold take turns at their owners, so that no node adds up everything.
        let ordinal = match shard {
            ShardId::Embedding => 0,
            ShardId::Dense { layer } | ShardId::Router { layer } | ShardId::Expert { layer, .. } => {
                1 + layer as usize
            }
        };
        let mut holders = self.members.clone();
        let count = holders.len().max(1);
        holders.rotate_left(ordinal % count);
        holders
    }

    /// The node that adds up a shard's gradient.
    #[must_use]
    pub fn owner(&self, shard: ShardId) -> Option<NodeId> {
        self.holders(shard).into_iter().next()
    }

    /// Whether `node` holds `shard`.
    #[must_use]
    pub fn holds(&self, node: &NodeId, shard: ShardId) -> bool {
        match self.experts.get(&shard) {
            Some(holders) => holders.contains(node),
            None => self.members.contains(node),
        }
    }

    /// The lanes that `node` runs.
    #[must_use]
    pub fn lanes_of(&self, node: &NodeId) -> Vec<Lane> {
        (0..self.lanes.len() as u32).filter(|&lane| &self.lanes[lane as usize] == node).collect()
    }

    /// How many leaves the gradient of a shard has: lanes, or for an expert groups of lanes.
    #[must_use]
    pub fn leaves(&self, shard: ShardId) -> u32 {
        let lanes = self.lanes.len() as u32;
        if shard.is_expert() { lanes.div_ceil(self.lane_group.max(1)) } else { lanes }
    }

    /// The lanes of leaf `leaf` of an expert's gradient.
    #[must_use]
    pub fn group_lanes(&self, leaf: u32) -> std::ops::Range<Lane> {
        let start = leaf * self.lane_group;
        start..(start + self.lane_group).min(self.lanes.len() as u32)
    }

    /// The node that computes a leaf of a shard's gradient: the runner of the lane or, for an expert, the replica that
    /// serves the group; a replica on the node that runs the group's first lane is preferred.
    #[must_use]
    pub fn home(&self, shard: ShardId, leaf: u32) -> Option<&NodeId> {
        let Some(holders) = self.experts.get(&shard) else { return self.lanes.get(leaf as usize) };
        let runner = self.lanes.get((leaf * self.lane_group) as usize)?;
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

/// Contiguous runs of lanes, so that nodes run whole subtrees; as many for each node as make the slowest end soonest.
pub(crate) fn share_lanes(members: &[Member], lanes: u32) -> Vec<NodeId> {
    let mut counts = vec![0u32; members.len()];
    let seconds = |index: usize, count: u32| f64::from(count) / members[index].capacity;
    for _ in 0..lanes {
        let soonest = (0..members.len())
            .min_by(|&a, &b| seconds(a, counts[a] + 1).total_cmp(&seconds(b, counts[b] + 1)));
        if let Some(index) = soonest {
            counts[index] += 1;
        }
    }
    members.iter().zip(counts).flat_map(|(m, n)| std::iter::repeat_n(m.node.clone(), n as usize)).collect()
}

/// Experts held per unit of capacity, by node.
struct Loads<'a> {
    members: &'a [Member],
    held: BTreeMap<&'a NodeId, usize>,
}

impl<'a> Loads<'a> {
    fn of(&self, member: &Member, more: usize) -> f64 {
        (self.held.get(&member.node).copied().unwrap_or(0) + more) as f64 / member.capacity
    }

    fn lightest(&self, without: &[NodeId]) -> Option<&'a Member> {
        self.members
            .iter()
            .filter(|m| !without.contains(&m.node))
            .min_by(|a, b| self.of(a, 1).total_cmp(&self.of(b, 1)))
    }
}

fn spread_experts(members: &[Member], request: &Request<'_>) -> BTreeMap<ShardId, Vec<NodeId>> {
    let copies_of = |shard: &ShardId| {
        let wanted = request.hot.get(shard).copied().unwrap_or(0).max(request.replication);
        wanted.clamp(1, members.len())
    };
    let alive: BTreeSet<&NodeId> = members.iter().map(|m| &m.node).collect();
    let experts: Vec<ShardId> = request.architecture.shards().into_iter().filter(|s| s.is_expert()).collect();
    let mut placed: BTreeMap<ShardId, Vec<NodeId>> = BTreeMap::new();
    let mut loads = Loads { members, held: BTreeMap::new() };
    for &shard in &experts {
        let before = request.previous.and_then(|p| p.experts.get(&shard));
        let copies = copies_of(&shard);
        let kept: Vec<NodeId> =
            before.into_iter().flatten().filter(|n| alive.contains(n)).take(copies).cloned().collect();
        for node in &kept {
            if let Some(member) = members.iter().find(|m| &m.node == node) {
                *loads.held.entry(&member.node).or_default() += 1;
            }
        }
        placed.insert(shard, kept);
    }
    for &shard in &experts {
        let copies = copies_of(&shard);
        let holders = placed.entry(shard).or_default();
        while holders.len() < copies {
            let Some(member) = loads.lightest(holders) else { break };
            holders.push(member.node.clone());
            *loads.held.entry(&member.node).or_default() += 1;
        }
    }
    level(&experts, &mut placed, &mut loads, request.moves_max);
    take_turns(&experts, &mut placed);
    placed
}

/// Moves replicas from the fullest node to the lightest until a move would no longer help, or enough have moved.
fn level(
    experts: &[ShardId],
    placed: &mut BTreeMap<ShardId, Vec<NodeId>>,
    loads: &mut Loads<'_>,
    moves_max: usize,
) {
    for _ in 0..moves_max.min(experts.len() * loads.members.len()) {
        let Some(full) = loads.members.iter().max_by(|a, b| loads.of(a, 0).total_cmp(&loads.of(b, 0))) else {
            return;
        };
        let Some(light) = loads.lightest(std::slice::from_ref(&full.node)) else { return };
        if loads.of(light, 1) >= loads.of(full, 0) {
            return;
        }
        let moved = experts.iter().find_map(|shard| {
            let holders = placed.get_mut(shard)?;
            let from = holders.iter().position(|n| n == &full.node)?;
            (!holders.contains(&light.node)).then(|| holders[from] = light.node.clone())
        });
        if moved.is_none() {
            return;
        }
        *loads.held.entry(&full.node).or_default() -= 1;
        *loads.held.entry(&light.node).or_default() += 1;
    }
}

/// Spreads ownership over the holders: each expert is owned by the holder that owns fewest so far.
fn take_turns(experts: &[ShardId], placed: &mut BTreeMap<ShardId, Vec<NodeId>>) {
    let mut owned: BTreeMap<NodeId, usize> = BTreeMap::new();
    for shard in experts {
        let Some(holders) = placed.get_mut(shard) else { continue };
        let fewest = (0..holders.len()).min_by_key(|&i| owned.get(&holders[i]).copied().unwrap_or(0));
        if let Some(index) = fewest {
            holders.swap(0, index);
            *owned.entry(holders[0].clone()).or_default() += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::architecture::presets;
    use proptest::prelude::*;

    fn small(experts: usize) -> Architecture {
        let mut a = presets().swap_remove(1).architecture;
        (a.layers, a.experts) = (4, experts);
        a
    }

    fn members(capacities: &[f64]) -> Vec<Member> {
        let member =
            |(i, &capacity): (usize, &f64)| Member { node: NodeId::new(format!("node-{i}")), capacity };
        capacities.iter().enumerate().map(member).collect()
    }

    fn plan(
        members: &[Member],
        experts: usize,
        replication: usize,
        previous: Option<&Placement>,
    ) -> Placement {
        let architecture = &small(experts);
        Placement::plan(&Request {
            epoch: 1,
            members,
            architecture,
            lanes: 12,
            lane_group: 4,
            replication,
            hot: &BTreeMap::new(),
            moves_max: usize::MAX,
            previous,
        })
    }

    proptest! {
        #[test]
        fn every_shard_has_its_copies_and_every_lane_its_runner(
            capacities in proptest::collection::vec(0.1f64..4.0, 1..7), experts in 2usize..20, replication in 1usize..4,
        ) {
            let members = members(&capacities);
            let placement = plan(&members, experts, replication, None);
            prop_assert_eq!(placement.lanes.len(), 12);
            for (shard, holders) in &placement.experts {
                prop_assert_eq!(holders.len(), replication.min(members.len()));
                let distinct: BTreeSet<_> = holders.iter().collect();
                prop_assert_eq!(distinct.len(), holders.len());
                for leaf in 0..placement.leaves(*shard) {
                    prop_assert!(holders.contains(placement.home(*shard, leaf).expect("a home")));
                }
            }
            for shard in small(experts).shards() {
                let covered: u32 = placement.members.iter()
                    .flat_map(|node| placement.fragments(shard, node)).map(|span| span.end - span.start).sum();
                prop_assert_eq!(covered, placement.leaves(shard));
            }
        }

        /// A node that joins takes only its share, and one that leaves disturbs only what it held.
        #[test]
        fn little_moves_when_one_node_comes_or_goes(nodes in 2usize..6, experts in 8usize..24) {
            let capacities = vec![1.0; nodes + 1];
            let all = members(&capacities);
            let before = plan(&all[..nodes], experts, 2, None);
            let after = plan(&all, experts, 2, Some(&before));
            let moved = after.experts.iter().map(|(s, h)| h.iter().filter(|n| !before.experts[s].contains(n)).count()).sum::<usize>();
            let share = (after.experts.len() * 2).div_ceil(nodes + 1);
            prop_assert!(moved <= share, "moved {} of a share of {}", moved, share);
        }
    }

    /// Against every way of sharing 12 lanes among three nodes.
    #[test]
    fn lanes_follow_capacity_in_contiguous_runs() {
        for capacities in [[4.0, 2.0, 1.0], [1.0, 1.0, 1.0], [9.0, 1.0, 0.2], [0.7, 1.3, 1.1]] {
            let placement = plan(&members(&capacities), 4, 1, None);
            let slowest = |counts: [usize; 3]| {
                counts.iter().zip(capacities).map(|(&n, capacity)| n as f64 / capacity).fold(0.0, f64::max)
            };
            let counts = [0, 1, 2].map(|node| placement.lanes_of(&placement.members[node]).len());
            let splits = (0..=12).flat_map(|a| (0..=12 - a).map(move |b| [a, b, 12 - a - b]));
            let best = splits.map(slowest).fold(f64::INFINITY, f64::min);
            assert_eq!(slowest(counts), best, "{counts:?} for {capacities:?}");
            assert!(placement.lanes.is_sorted());
        }
    }
}
