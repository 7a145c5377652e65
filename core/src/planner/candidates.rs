//! The nodes of a plan, numbered in the order of their names, and their participation.

use super::input::Member;
use super::output::Shortage;
use crate::costs::{Costs, lanes_in_flight};
use crate::ids::{LayerRange, NodeId};
use std::collections::{BTreeMap, BTreeSet};

/// The nodes of a plan. Elsewhere in the planner a node is its place in this list.
#[derive(Debug)]
pub(super) struct Candidates<'a> {
    pub(super) members: Vec<&'a Member>,
    /// The number of each node's zone.
    pub(super) zones: Vec<usize>,
    pub(super) zone_count: usize,
    participation: Participation,
    memory: Vec<u64>,
    places: BTreeMap<&'a NodeId, usize>,
}

impl<'a> Candidates<'a> {
    pub(super) fn new(members: &'a [Member]) -> Self {
        let mut members: Vec<&Member> = members.iter().collect();
        members.sort_by(|a, b| a.node.cmp(&b.node));
        let mut names: BTreeMap<&str, usize> = BTreeMap::new();
        let zones: Vec<usize> = members
            .iter()
            .map(|member| {
                let next = names.len();
                *names.entry(&member.profile.zone).or_insert(next)
            })
            .collect();
        Self {
            zone_count: names.len(),
            zones,
            participation: Participation::all(members.len()),
            memory: members.iter().map(|member| member.profile.memory_bytes).collect(),
            places: members.iter().enumerate().map(|(place, member)| (&member.node, place)).collect(),
            members,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.members.len()
    }

    pub(super) fn name(&self, place: usize) -> &NodeId {
        &self.members[place].node
    }

    pub(super) fn place(&self, node: &NodeId) -> Option<usize> {
        self.places.get(node).copied()
    }

    pub(super) fn names(&self, places: &[usize]) -> Vec<NodeId> {
        places.iter().map(|&place| self.name(place).clone()).collect()
    }

    /// A node's memory for the dense parts of some layers.
    pub(super) fn stage_bytes(&self, costs: &Costs, place: usize, layers: LayerRange) -> u64 {
        costs.stage_bytes(layers, lanes_in_flight(self.members[place].profile.threads))
    }

    pub(super) fn has_room(&self, costs: &Costs, place: usize, layers: LayerRange) -> bool {
        self.participation.holds[place] && self.stage_bytes(costs, place, layers) <= self.memory[place]
    }

    /// Experts that fit besides the dense parts of some layers.
    pub(super) fn slots(&self, costs: &Costs, place: usize, layers: Option<LayerRange>) -> usize {
        if !self.participation.holds[place] {
            return 0;
        }
        if self.memory[place] == u64::MAX || costs.expert_bytes == 0 {
            return usize::MAX;
        }
        let dense = layers.map_or(0, |layers| self.stage_bytes(costs, place, layers));
        usize::try_from(self.memory[place].saturating_sub(dense) / costs.expert_bytes).unwrap_or(usize::MAX)
    }

    /// The missing memory for one copy of every shard.
    pub(super) fn shortage(&self, costs: &Costs, experts: usize) -> Shortage {
        let most = self.memory.iter().copied().max().unwrap_or(0);
        let layers = costs
            .all_layers()
            .iter()
            .map(|layer| (costs.stage_bytes(layer.alone(), lanes_in_flight(1)), layer));
        if let Some((bytes, layer)) = layers.max().filter(|(bytes, _)| *bytes > most) {
            return Shortage { bytes: bytes - most, layer: Some(layer) };
        }
        let wanted = costs.stage_bytes(costs.all_layers(), lanes_in_flight(1)) as u128
            + costs.expert_bytes as u128 * experts as u128;
        let there: u128 = self.memory.iter().map(|&bytes| u128::from(bytes)).sum();
        let bytes = u64::try_from(wanted.saturating_sub(there)).unwrap_or(u64::MAX).max(1);
        Shortage { bytes, layer: None }
    }

    /// Limits the plan to the nodes of `participation`.
    pub(super) fn restrict_to(&mut self, participation: Participation) {
        self.participation = participation;
    }

    /// Whether a node may run lanes.
    pub(super) fn may_run(&self, place: usize) -> bool {
        self.participation.runs[place]
    }

    pub(super) fn ignore_memory(&mut self) {
        self.memory.fill(u64::MAX);
    }

    /// Seconds of a node for a lane's dense part in some layers; infinite where it may run no lane.
    pub(super) fn lane_seconds(&self, costs: &Costs, place: usize, layers: LayerRange) -> f64 {
        if !self.may_run(place) {
            return f64::INFINITY;
        }
        self.members[place].profile.dense.seconds(costs.lane_flops(layers))
    }
}

/// The nodes that may run lanes and those that may hold shards, by place in the candidates.
#[derive(Clone, Debug)]
pub(super) struct Participation {
    pub(super) runs: Vec<bool>,
    pub(super) holds: Vec<bool>,
}

impl Participation {
    /// All nodes.
    pub(super) fn all(nodes: usize) -> Self {
        Self { runs: vec![true; nodes], holds: vec![true; nodes] }
    }

    /// The first `runners` of an order run lanes. They hold all shards, with as many others as the replicas
    /// and their zones need.
    pub(super) fn first(runners: usize, order: &[usize], candidates: &Candidates<'_>, copies: usize) -> Self {
        let mut participation = Self { runs: vec![false; order.len()], holds: vec![false; order.len()] };
        for &node in &order[..runners] {
            (participation.runs[node], participation.holds[node]) = (true, true);
        }
        let copies = copies.min(order.len());
        let zones_wanted = copies.min(candidates.zone_count);
        let mut zones: BTreeSet<usize> =
            order[..runners].iter().map(|&node| candidates.zones[node]).collect();
        let mut holders = runners;
        for &node in &order[runners..] {
            if zones.len() < zones_wanted && zones.insert(candidates.zones[node]) {
                participation.holds[node] = true;
                holders += 1;
            }
        }
        for &node in &order[runners..] {
            if holders < copies && !participation.holds[node] {
                participation.holds[node] = true;
                holders += 1;
            }
        }
        participation
    }
}
