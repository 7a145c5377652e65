//! The replicas of each expert: spread by speed over the remaining memory, over zones, with few moves.

use super::candidates::Candidates;
use super::input::Request;
use super::stages::StageNodes;
use crate::architecture::Architecture;
use crate::costs::Costs;
use crate::ids::ShardId;
use std::collections::{BTreeMap, BTreeSet};

/// Nodes that are considered for one move, the lightest first.
const LIGHTEST_MAX: usize = 8;

/// The holders of each expert, its owner first, as places in the candidates.
pub(super) type Spread = BTreeMap<ShardId, Vec<usize>>;

/// The least number of replicas of a run: one of each expert.
pub(super) fn least_replicas(a: &Architecture) -> usize {
    a.moe_layers().count() * a.experts
}

/// The replicas of every expert, as many as there is room for; `None` when an expert has no room at all.
pub(super) fn spread(
    candidates: &Candidates<'_>,
    costs: &Costs,
    request: &Request<'_>,
    stages: &[StageNodes],
) -> Option<Spread> {
    let copies = |shard: &ShardId| {
        let wanted = request.extra_replicas.get(shard).copied().unwrap_or(0).max(request.replication);
        wanted.clamp(1, candidates.len())
    };
    let experts: Vec<ShardId> = request.architecture.shards().into_iter().filter(|s| s.is_expert()).collect();
    let mut loads =
        Loads::new(candidates, weights(candidates, costs, stages), slots(candidates, costs, stages));
    let mut spread = Spread::new();
    for &shard in &experts {
        let before = request.previous.and_then(|placement| placement.experts.get(&shard));
        let kept: Vec<usize> =
            before.into_iter().flatten().filter_map(|node| candidates.place(node)).collect();
        let mut holders = Vec::new();
        for node in kept {
            if holders.len() < copies(&shard) && loads.has_slot(node) {
                loads.add(node, shard);
                holders.push(node);
            }
        }
        spread.insert(shard, holders);
    }
    // One replica of every expert comes before a second one of any.
    let most = experts.iter().map(copies).max().unwrap_or(0);
    for round in 1..=most {
        for &shard in &experts {
            let Some(holders) = spread.get_mut(&shard) else { continue };
            if holders.len() >= round.min(copies(&shard)) {
                continue;
            }
            match loads.lightest(holders) {
                Some(node) => {
                    loads.add(node, shard);
                    holders.push(node);
                }
                None if holders.is_empty() => return None,
                None => {}
            }
        }
    }
    let moved = loads.separate_zones(&mut spread, request.moves_max);
    loads.even_out(&mut spread, (request.moves_max - moved).min(experts.len() * most.max(1)));
    balance_owners(&mut spread, candidates.len());
    Some(spread)
}

/// Room for replicas on each node besides its stage.
fn slots(candidates: &Candidates<'_>, costs: &Costs, stages: &[StageNodes]) -> Vec<usize> {
    let mut slots: Vec<usize> =
        (0..candidates.len()).map(|node| candidates.slots(costs, node, None)).collect();
    for stage in stages {
        for &node in &stage.nodes {
            slots[node] = candidates.slots(costs, node, Some(stage.layers));
        }
    }
    slots
}

/// The wanted number of replicas of each node relative to the others: proportional to its expert rate, less
/// the time for its dense work, so that nodes with and without a stage end at the same time.
fn weights(candidates: &Candidates<'_>, costs: &Costs, stages: &[StageNodes]) -> Vec<f64> {
    let rate = |node: usize| candidates.members[node].profile.expert.both();
    let mut weights: Vec<f64> = (0..candidates.len()).map(rate).collect();
    let staged: Vec<usize> = stages.iter().flat_map(|stage| stage.nodes.iter().copied()).collect();
    if staged.len() == candidates.len() {
        return weights;
    }
    // The slowest stage's nodes together take `dense_s` for their dense work. All nodes end at `end_s`.
    let dense_s: f64 = stages
        .iter()
        .map(|stage| {
            let together: f64 =
                stage.nodes.iter().map(|&n| 1.0 / candidates.lane_seconds(costs, n, stage.layers)).sum();
            f64::from(costs.lanes) / together
        })
        .fold(0.0, f64::max);
    let of_staged: f64 = staged.iter().map(|&node| rate(node)).sum();
    let all: f64 = weights.iter().sum();
    let end_s = (3.0 * costs.all_expert_flops() + dense_s * of_staged) / all;
    let free = (1.0 - dense_s / end_s).max(0.0);
    for node in staged {
        weights[node] *= free.max(1e-6);
    }
    weights
}

/// Replicas of each node over its weight, indexed for the lightest and the fullest nodes.
struct Loads<'a> {
    candidates: &'a Candidates<'a>,
    weights: Vec<f64>,
    slots: Vec<usize>,
    held: Vec<BTreeSet<ShardId>>,
    /// Nodes with room by zone, keyed by their load with one more replica.
    zones: Vec<BTreeSet<(u64, usize)>>,
    /// The lightest of each zone.
    heads: BTreeSet<(u64, usize)>,
    /// All nodes, keyed by their load.
    full: BTreeSet<(u64, usize)>,
}

impl<'a> Loads<'a> {
    fn new(candidates: &'a Candidates<'a>, weights: Vec<f64>, slots: Vec<usize>) -> Self {
        let mut loads = Self {
            candidates,
            weights,
            slots,
            held: vec![BTreeSet::new(); candidates.len()],
            zones: vec![BTreeSet::new(); candidates.zone_count],
            heads: BTreeSet::new(),
            full: BTreeSet::new(),
        };
        (0..candidates.len()).for_each(|node| loads.index(node));
        loads
    }

    /// The load with `more` replicas. The bits of positive floats sort as the floats do.
    fn key(&self, node: usize, more: usize) -> u64 {
        ((self.held[node].len() + more) as f64 / self.weights[node]).to_bits()
    }

    fn has_slot(&self, node: usize) -> bool {
        self.held[node].len() < self.slots[node]
    }

    fn index(&mut self, node: usize) {
        self.full.insert((self.key(node, 0), node));
        if self.has_slot(node) {
            self.with_head(node, |zone, entry| _ = zone.insert(entry));
        }
    }

    fn unindex(&mut self, node: usize) {
        self.full.remove(&(self.key(node, 0), node));
        self.with_head(node, |zone, entry| _ = zone.remove(&entry));
    }

    fn with_head(&mut self, node: usize, change: impl FnOnce(&mut BTreeSet<(u64, usize)>, (u64, usize))) {
        let entry = (self.key(node, 1), node);
        let zone = &mut self.zones[self.candidates.zones[node]];
        if let Some(head) = zone.first() {
            self.heads.remove(head);
        }
        change(zone, entry);
        if let Some(head) = zone.first() {
            self.heads.insert(*head);
        }
    }

    fn add(&mut self, node: usize, shard: ShardId) {
        self.unindex(node);
        self.held[node].insert(shard);
        self.index(node);
    }

    fn remove(&mut self, node: usize, shard: ShardId) {
        self.unindex(node);
        self.held[node].remove(&shard);
        self.index(node);
    }

    /// The node with room and the least load with one more replica, in a zone without any of `holders` if
    /// possible.
    fn lightest(&self, holders: &[usize]) -> Option<usize> {
        let known = |zone: usize| holders.iter().any(|&holder| self.candidates.zones[holder] == zone);
        let apart = self.heads.iter().find(|(_, node)| !known(self.candidates.zones[*node]));
        if let Some(&(_, node)) = apart {
            return Some(node);
        }
        let of_zone =
            |zone: &BTreeSet<(u64, usize)>| zone.iter().find(|(_, node)| !holders.contains(node)).copied();
        self.zones.iter().filter_map(of_zone).min().map(|(_, node)| node)
    }

    fn zones_of(&self, holders: &[usize]) -> usize {
        holders.iter().map(|&node| self.candidates.zones[node]).collect::<BTreeSet<_>>().len()
    }

    /// Moves replicas that share a zone to zones without one, at most `moves_max`. Returns the number of
    /// moves.
    fn separate_zones(&mut self, spread: &mut Spread, moves_max: usize) -> usize {
        let mut moved = 0;
        for (&shard, holders) in spread.iter_mut() {
            let possible = holders.len().min(self.candidates.zone_count);
            while moved < moves_max && self.zones_of(holders) < possible {
                let Some(node) = self.lightest(holders) else { break };
                let mut wider = holders.clone();
                let shared = (0..holders.len()).rev().find(|&i| {
                    let zone = self.candidates.zones[holders[i]];
                    holders.iter().filter(|&&other| self.candidates.zones[other] == zone).count() > 1
                });
                let Some(place) = shared else { break };
                wider[place] = node;
                if self.zones_of(&wider) <= self.zones_of(holders) {
                    break;
                }
                self.remove(holders[place], shard);
                self.add(node, shard);
                holders[place] = node;
                moved += 1;
            }
        }
        moved
    }

    /// Moves up to `moves_max` replicas from the fullest node to a light one while that evens out the loads.
    fn even_out(&mut self, spread: &mut Spread, moves_max: usize) {
        for _ in 0..moves_max {
            let Some(&(load, full)) = self.full.last() else { return };
            let light = self.heads.iter().take(LIGHTEST_MAX).filter(|(after, _)| *after < load);
            let found = light.filter(|(_, node)| *node != full).find_map(|&(_, light)| {
                self.held[full]
                    .iter()
                    .find(|&shard| self.may_move(&spread[shard], full, light))
                    .map(|s| (*s, light))
            });
            let Some((shard, light)) = found else { return };
            self.remove(full, shard);
            self.add(light, shard);
            if let Some(holder) = spread.get_mut(&shard).and_then(|h| h.iter_mut().find(|n| **n == full)) {
                *holder = light;
            }
        }
    }

    fn may_move(&self, holders: &[usize], from: usize, to: usize) -> bool {
        if holders.contains(&to) {
            return false;
        }
        let after: Vec<usize> = holders.iter().map(|&node| if node == from { to } else { node }).collect();
        self.zones_of(&after) >= self.zones_of(holders)
    }
}

/// Spreads ownership over the holders: the holder that owns the fewest experts so far owns the next.
pub(super) fn balance_owners(spread: &mut Spread, nodes: usize) {
    let mut owned = vec![0usize; nodes];
    for holders in spread.values_mut() {
        let fewest = (0..holders.len()).min_by_key(|&i| owned[holders[i]]);
        if let Some(index) = fewest {
            holders.swap(0, index);
            owned[holders[0]] += 1;
        }
    }
}
