//! The placement that needs no transfer when nodes are lost: holders keep their shards, and only lanes move.

use super::candidates::Candidates;
use super::experts::balance_owners;
use super::input::{Member, Request};
use super::lanes;
use crate::costs::Costs;
use crate::ids::{LayerId, LayerRange, NodeId, ShardId};
use crate::placement::Placement;
use std::collections::{BTreeMap, BTreeSet};

/// The holders of each shard.
pub(super) type Holders = BTreeMap<ShardId, BTreeSet<NodeId>>;

/// The placement of the request's members that hold shards: `before` without the lost nodes or, without a
/// placement before, the one that `holders` shows. A shard without a holder goes to the node with the
/// lightest load, which must fetch it.
#[must_use]
pub fn plan_for_survivors(request: &Request<'_>, holders: &Holders, before: &Placement) -> Placement {
    plan_with_newcomers(request, holders, before, &BTreeSet::new())
}

/// [`plan_for_survivors`] where some nodes that were no members have a part, too.
pub(super) fn plan_with_newcomers(
    request: &Request<'_>,
    holders: &Holders,
    before: &Placement,
    newcomers: &BTreeSet<NodeId>,
) -> Placement {
    let costs = Costs::new(request.architecture, request.training);
    let shards = request.architecture.shards();
    let cuts = if before.stages.is_empty() {
        cuts_of(holders, &costs, &shards)
    } else {
        before.stages.iter().map(|stage| stage.layers).collect()
    };
    let dense = DenseShards { holders, shards: &shards };
    let mut staged: Vec<Vec<NodeId>> = Vec::new();
    let mut in_stage: BTreeSet<NodeId> = BTreeSet::new();
    for (number, &layers) in cuts.iter().enumerate() {
        let taken = |node: &NodeId| in_stage.contains(node);
        let had = |node: &NodeId| before.stages.get(number).is_some_and(|stage| stage.holds(node));
        // What it learned of this stage does not bring a node out of the stage that it has, or into both.
        let other =
            |node: &NodeId| before.stages.iter().any(|s| s.holds(node) && dense.are_held_by(node, s.layers));
        let all = request.members.iter().map(|member| &member.node);
        let able = all
            .filter(|node| (had(node) || !(taken(node) || other(node))) && dense.are_held_by(node, layers));
        staged.push(able.cloned().collect());
        in_stage.extend(staged[number].iter().cloned());
    }
    // Nodes without a stage stay if they were members. Learners wait, unless a stage has no node.
    let stage_without_node = staged.iter().any(Vec::is_empty);
    let hosts = |node: &NodeId| {
        let has_part = stage_without_node || before.members.is_empty() || before.is_member(node);
        (has_part || newcomers.contains(node)) && holders.values().any(|nodes| nodes.contains(node))
    };
    let members: Vec<Member> =
        request.members.iter().filter(|m| in_stage.contains(&m.node) || hosts(&m.node)).cloned().collect();
    let candidates = Candidates::new(&members);
    let alone = cuts.len() == 1;
    let mut stages = Vec::new();
    for (number, (layers, mut nodes)) in cuts.into_iter().zip(staged).enumerate() {
        if nodes.is_empty() {
            nodes = fetchers(&candidates, before, layers, request.replication, alone);
        }
        nodes.sort();
        stages.push(lanes::reuse_or_divide(&candidates, &costs, layers, nodes, before.stages.get(number)));
    }
    Placement {
        epoch: request.epoch,
        members: candidates.members.iter().map(|member| member.node.clone()).collect(),
        stages,
        lane_group: request.training.lane_group,
        fan_in: request.fan_in,
        experts: experts(&candidates, holders, before, &shards),
        learners: BTreeMap::new(),
    }
}

/// The nodes that fetch layers without a holder: all nodes if there is one stage, otherwise `replication`
/// nodes, first those without layers, then those with the most memory.
fn fetchers(
    candidates: &Candidates<'_>,
    before: &Placement,
    layers: LayerRange,
    replication: usize,
    alone: bool,
) -> Vec<NodeId> {
    let mut nodes: Vec<usize> = (0..candidates.len()).collect();
    let other =
        |place: usize| before.stages.iter().any(|s| s.layers != layers && s.holds(candidates.name(place)));
    nodes.sort_by_key(|&n| (other(n), std::cmp::Reverse(candidates.members[n].profile.memory_bytes), n));
    if !alone {
        nodes.truncate(replication.max(1));
    }
    candidates.names(&nodes)
}

/// The holders of every expert; the lightest node for an expert without a holder.
fn experts(
    candidates: &Candidates<'_>,
    holders: &Holders,
    before: &Placement,
    shards: &[ShardId],
) -> BTreeMap<ShardId, Vec<NodeId>> {
    let mut held = vec![0usize; candidates.len()];
    let mut spread = BTreeMap::new();
    let mut lost = Vec::new();
    for &shard in shards.iter().filter(|shard| shard.is_expert()) {
        let there = holders.get(&shard);
        let alive = |node: &&NodeId| there.is_some_and(|nodes| nodes.contains(*node));
        let first = before.experts.get(&shard).into_iter().flatten().filter(alive);
        let mut kept: Vec<usize> = Vec::new();
        for place in first.chain(there.into_iter().flatten()).filter_map(|node| candidates.place(node)) {
            if !kept.contains(&place) {
                kept.push(place);
                held[place] += 1;
            }
        }
        if kept.is_empty() {
            lost.push(shard);
        }
        spread.insert(shard, kept);
    }
    for shard in lost {
        let load = |place: usize| (held[place] + 1) as f64 / candidates.members[place].profile.expert.both();
        if let Some(place) = (0..candidates.len()).min_by(|&a, &b| load(a).total_cmp(&load(b))) {
            held[place] += 1;
            spread.insert(shard, vec![place]);
        }
    }
    balance_owners(&mut spread, candidates.len());
    spread.into_iter().map(|(shard, places)| (shard, candidates.names(&places))).collect()
}

/// Tests whether nodes hold all shards of some layers except experts.
struct DenseShards<'a> {
    holders: &'a Holders,
    shards: &'a [ShardId],
}

impl DenseShards<'_> {
    fn are_held_by(&self, node: &NodeId, layers: LayerRange) -> bool {
        let within = |shard: &&ShardId| match shard {
            ShardId::Embedding => layers.start == LayerId(0),
            ShardId::Dense { layer } | ShardId::Router { layer } => layers.contains(*layer),
            ShardId::Expert { .. } => false,
        };
        self.shards.iter().filter(within).all(|s| self.holders.get(s).is_some_and(|h| h.contains(node)))
    }
}

/// The stages that `holders` shows: runs of layers with the same holders.
fn cuts_of(holders: &Holders, costs: &Costs, shards: &[ShardId]) -> Vec<LayerRange> {
    let none = BTreeSet::new();
    let of_layer = |layer: LayerId| {
        let own = shards.iter().filter(move |shard| match shard {
            ShardId::Embedding => layer == LayerId(0),
            ShardId::Dense { layer: at } | ShardId::Router { layer: at } => *at == layer,
            ShardId::Expert { .. } => false,
        });
        own.map(|shard| holders.get(shard).unwrap_or(&none))
            .fold(None, |common: Option<BTreeSet<&NodeId>>, nodes| match common {
                Some(common) => Some(common.into_iter().filter(|node| nodes.contains(*node)).collect()),
                None => Some(nodes.iter().collect()),
            })
            .unwrap_or_default()
    };
    let mut cuts: Vec<LayerRange> = Vec::new();
    let mut last = BTreeSet::new();
    for layer in costs.all_layers().iter() {
        let nodes = of_layer(layer);
        match cuts.last_mut() {
            Some(cut) if nodes == last => cut.end = layer.next(),
            _ => cuts.push(layer.alone()),
        }
        last = nodes;
    }
    cuts
}
