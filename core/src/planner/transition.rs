//! The transition to a target placement: nodes copy missing shards while they keep the shards that they hold,
//! as far as both fit into their memory.

use super::input::Request;
use super::survivors::{Holders, plan_for_survivors};
use crate::costs::{Costs, lanes_in_flight};
use crate::ids::{LayerId, NodeId, ShardId};
use crate::placement::Placement;
use crate::profile::Profile;
use std::collections::{BTreeMap, BTreeSet};

/// The placement of the nodes that have their shards, with learners for the shards of `target` that are not
/// on their nodes yet. A node without memory for both the shards that it holds and those that it copies first
/// releases replicas that the target does not place on it and that other nodes hold. Shards that still do not
/// fit are copied in a later transition. `None` if there is nothing left to copy.
#[must_use]
pub fn plan_transition(
    request: &Request<'_>,
    holders: &Holders,
    before: &Placement,
    target: &Placement,
) -> Option<Placement> {
    let way = Way {
        costs: &Costs::new(request.architecture, request.training),
        profiles: request.members.iter().map(|member| (&member.node, &member.profile)).collect(),
        request,
        target,
    };
    let mut surviving = plan_for_survivors(request, holders, before);
    let crowded = way.crowded(&surviving);
    if !crowded.is_empty() {
        let mut kept = holders.clone();
        crowded.iter().for_each(|node| way.give_up(node, &surviving, &mut kept));
        surviving = plan_for_survivors(request, &kept, before);
    }
    let mut waits = false;
    let mut learners: BTreeMap<ShardId, BTreeSet<NodeId>> = BTreeMap::new();
    let held = way.held_bytes(&surviving);
    for (node, parts) in way.missing(&surviving) {
        let mut room = way.memory(&node).saturating_sub(held.get(&node).copied().unwrap_or(0));
        for part in parts {
            let bytes = way.bytes(&node, &part);
            if bytes > room {
                waits = true;
                continue;
            }
            room -= bytes;
            for shard in part {
                learners.entry(shard).or_default().insert(node.clone());
            }
        }
    }
    surviving.learners = learners;
    (waits || !surviving.learners.is_empty()).then_some(surviving)
}

/// Shards that are copied and given up together: one expert, or the dense shards of a stage.
type Part = Vec<ShardId>;

struct Way<'a> {
    costs: &'a Costs,
    profiles: BTreeMap<&'a NodeId, &'a Profile>,
    request: &'a Request<'a>,
    target: &'a Placement,
}

impl Way<'_> {
    fn memory(&self, node: &NodeId) -> u64 {
        self.profiles.get(node).map_or(0, |profile| profile.memory_bytes)
    }

    /// Memory of some shards on a node. A layer counts once, with its dense shard.
    fn bytes(&self, node: &NodeId, shards: &[ShardId]) -> u64 {
        let in_flight = lanes_in_flight(self.profiles.get(node).map_or(1, |profile| profile.threads));
        let each = |shard: &ShardId| match shard {
            ShardId::Expert { .. } => self.costs.expert_bytes,
            ShardId::Dense { layer } => self.costs.stage_bytes(layer.alone(), in_flight),
            ShardId::Embedding | ShardId::Router { .. } => 0,
        };
        shards.iter().map(each).sum()
    }

    /// Memory of what each node holds.
    fn held_bytes(&self, placement: &Placement) -> BTreeMap<NodeId, u64> {
        let mut held = BTreeMap::new();
        for shard in self.shards() {
            for node in placement.holders_unordered(shard) {
                *held.entry(node.clone()).or_default() += self.bytes(node, &[shard]);
            }
        }
        held
    }

    fn shards(&self) -> impl Iterator<Item = ShardId> + use<> {
        self.request.architecture.shards().into_iter()
    }

    /// The parts of some shards, by the stages of `placement`.
    fn parts(&self, placement: &Placement, wanted: impl Fn(ShardId) -> bool) -> Vec<Part> {
        let mut dense: BTreeMap<LayerId, Part> = BTreeMap::new();
        let mut parts = Vec::new();
        for shard in self.shards().filter(|shard| wanted(*shard)) {
            match placement.stage_of(shard.layer()) {
                Some(stage) if !shard.is_expert() => dense.entry(stage.layers.start).or_default().push(shard),
                _ => parts.push(vec![shard]),
            }
        }
        // Layers first: without them a node runs no lane.
        dense.into_values().chain(parts).collect()
    }

    /// What each node of the target lacks.
    fn missing(&self, surviving: &Placement) -> BTreeMap<NodeId, Vec<Part>> {
        let mut missing: BTreeMap<NodeId, Vec<ShardId>> = BTreeMap::new();
        for shard in self.shards() {
            for node in self.target.holders_unordered(shard).iter().filter(|n| !surviving.holds(n, shard)) {
                missing.entry(node.clone()).or_default().push(shard);
            }
        }
        let parts = |(node, shards): (NodeId, Vec<ShardId>)| {
            let parts = self.parts(self.target, |shard| shards.binary_search(&shard).is_ok());
            (node, parts)
        };
        missing.into_iter().map(parts).collect()
    }

    /// The nodes without room for what they hold and what they lack.
    fn crowded(&self, surviving: &Placement) -> Vec<NodeId> {
        let held = self.held_bytes(surviving);
        let is_crowded = |(node, parts): &(NodeId, Vec<Part>)| {
            let lacking: u64 = parts.iter().map(|part| self.bytes(node, part)).sum();
            held.get(node).copied().unwrap_or(0).saturating_add(lacking) > self.memory(node)
        };
        self.missing(surviving).into_iter().filter(is_crowded).map(|(node, _)| node).collect()
    }

    /// Removes a node from the holders of shards that the target does not place on it and another node holds.
    fn give_up(&self, node: &NodeId, surviving: &Placement, kept: &mut Holders) {
        let unwanted =
            self.parts(surviving, |shard| surviving.holds(node, shard) && !self.target.holds(node, shard));
        for part in unwanted {
            let has_all = |other: &&NodeId| {
                part.iter().all(|shard| kept.get(shard).is_some_and(|h| h.contains(*other)))
            };
            let mut others = part.iter().flat_map(|shard| surviving.holders_unordered(*shard));
            if !others.any(|other| other != node && has_all(&other)) {
                continue;
            }
            for shard in part {
                if let Some(holders) = kept.get_mut(&shard) {
                    holders.remove(node);
                }
            }
        }
    }
}
