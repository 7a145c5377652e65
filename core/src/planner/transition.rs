//! The transition to a target placement: nodes copy missing shards while they keep the shards that they hold,
//! as far as both fit into their memory.

use super::input::Request;
use super::memory::Memory;
use super::survivors::{Holders, plan_with_newcomers};
use crate::ids::{LayerId, NodeId, ShardId};
use crate::placement::Placement;
use std::collections::{BTreeMap, BTreeSet};

/// The placement of the nodes that have their shards, with learners for the shards of `target` that are not
/// on their nodes yet. A node without memory for both the shards that it holds and those that it copies first
/// releases replicas that the target does not place on it and that other nodes hold. Shards that still do not
/// fit are copied in a later transition.
///
/// `None` if nothing new is left to copy or fits, or if a node holds more than it could train with, as one
/// does that fetched for a placement that never began. Then nodes fetch the target between two steps, when
/// the memory of activations and gradients is free.
#[must_use]
pub fn plan_transition(
    request: &Request<'_>,
    holders: &Holders,
    before: &Placement,
    target: &Placement,
) -> Option<Placement> {
    let way = Way { memory: Memory::new(request), request, target };
    // Those who have learned all of their shards take part, so that others can give up theirs.
    let newcomers = way.complete(holders);
    let mut surviving = plan_with_newcomers(request, holders, before, &newcomers);
    let crowded = way.crowded(&surviving);
    if !crowded.is_empty() {
        let mut kept = holders.clone();
        crowded.iter().for_each(|node| way.give_up(node, &surviving, &mut kept));
        surviving = plan_with_newcomers(request, &kept, before, &newcomers);
    }
    if !way.memory.fits(&surviving) {
        return None;
    }
    let mut learners: BTreeMap<ShardId, BTreeSet<NodeId>> = BTreeMap::new();
    let held = way.memory.held(&surviving);
    for (node, parts) in way.missing(&surviving) {
        let mut room = way.memory.of(&node).saturating_sub(held.get(&node).copied().unwrap_or(0));
        for part in parts {
            let bytes = way.memory.bytes(&node, &part);
            if bytes > room {
                continue;
            }
            room -= bytes;
            for shard in part {
                learners.entry(shard).or_default().insert(node.clone());
            }
        }
    }
    let is_new = |(shard, nodes): (&ShardId, &BTreeSet<NodeId>)| {
        !holders.get(shard).is_some_and(|h| nodes.is_subset(h))
    };
    let makes_progress = learners.iter().any(is_new);
    surviving.learners = learners;
    makes_progress.then_some(surviving)
}

/// Shards that are copied and given up together: one expert, or the dense shards of a stage.
type Part = Vec<ShardId>;

struct Way<'a> {
    memory: Memory<'a>,
    request: &'a Request<'a>,
    target: &'a Placement,
}

impl Way<'_> {
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

    /// The nodes that hold all that the target places on them.
    fn complete(&self, holders: &Holders) -> BTreeSet<NodeId> {
        let mut complete: BTreeSet<NodeId> = self.target.members.iter().cloned().collect();
        for shard in self.shards() {
            for node in self.target.holders_unordered(shard) {
                if !holders.get(&shard).is_some_and(|nodes| nodes.contains(node)) {
                    complete.remove(node);
                }
            }
        }
        complete
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
        let held = self.memory.held(surviving);
        let is_crowded = |(node, parts): &(NodeId, Vec<Part>)| {
            let lacking: u64 = parts.iter().map(|part| self.memory.bytes(node, part)).sum();
            held.get(node).copied().unwrap_or(0).saturating_add(lacking) > self.memory.of(node)
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
