//! Going on at once when nodes are gone: whoever holds what, keeps it, and only lanes change hands.

use super::candidates::Candidates;
use super::experts::balance_owners;
use super::input::{Member, Request};
use super::lanes;
use crate::costs::Costs;
use crate::ids::{LayerId, LayerRange, NodeId, ShardId};
use crate::placement::Placement;
use std::collections::{BTreeMap, BTreeSet};

/// Who holds each shard.
type Holders = BTreeMap<ShardId, BTreeSet<NodeId>>;

/// The placement of those of the request's members that hold something: `before`, or what is held, without those who are gone. What
/// nobody of them holds goes to the one with the fewest, who must fetch it.
#[must_use]
pub fn plan_for_survivors(request: &Request<'_>, holders: &Holders, before: &Placement) -> Placement {
    let costs = Costs::new(request.architecture, request.training);
    let shards = request.architecture.shards();
    let cuts = if before.stages.is_empty() {
        cuts_of(holders, &costs, &shards)
    } else {
        before.stages.iter().map(|stage| stage.layers).collect()
    };
    let whole = Whole { holders, shards: &shards };
    let mut staged: Vec<Vec<NodeId>> = Vec::new();
    let mut in_stage: BTreeSet<NodeId> = BTreeSet::new();
    for (number, &layers) in cuts.iter().enumerate() {
        let taken = |node: &NodeId| in_stage.contains(node);
        let had = |node: &NodeId| before.stages.get(number).is_some_and(|stage| stage.holds(node));
        let all = request.members.iter().map(|member| &member.node);
        let able = all.filter(|node| (had(node) || !taken(node)) && whole.has(node, layers));
        staged.push(able.cloned().collect());
        in_stage.extend(staged[number].iter().cloned());
    }
    // Nodes without a stage go on as well if they had a part; who is still learning waits, unless a stage needs it.
    let needy = staged.iter().any(Vec::is_empty);
    let hosts = |node: &NodeId| {
        let part = needy || before.members.is_empty() || before.is_member(node);
        part && holders.values().any(|nodes| nodes.contains(node))
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

/// Who fetches layers that nobody holds: everybody where there is one stage, otherwise a few who hold none, or have
/// most memory.
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

/// Every expert where it is; one that is nowhere where least is.
fn experts(
    candidates: &Candidates<'_>,
    holders: &Holders,
    before: &Placement,
    shards: &[ShardId],
) -> BTreeMap<ShardId, Vec<NodeId>> {
    let mut held = vec![0usize; candidates.len()];
    let mut spread = BTreeMap::new();
    let mut nowhere = Vec::new();
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
            nowhere.push(shard);
        }
        spread.insert(shard, kept);
    }
    for shard in nowhere {
        let load = |place: usize| (held[place] + 1) as f64 / candidates.members[place].profile.expert.both();
        if let Some(place) = (0..candidates.len()).min_by(|&a, &b| load(a).total_cmp(&load(b))) {
            held[place] += 1;
            spread.insert(shard, vec![place]);
        }
    }
    balance_owners(&mut spread, candidates.len());
    spread.into_iter().map(|(shard, places)| (shard, candidates.names(&places))).collect()
}

/// Which nodes hold all of some layers but their experts.
struct Whole<'a> {
    holders: &'a Holders,
    shards: &'a [ShardId],
}

impl Whole<'_> {
    fn has(&self, node: &NodeId, layers: LayerRange) -> bool {
        let within = |shard: &&ShardId| match shard {
            ShardId::Embedding => layers.start == LayerId(0),
            ShardId::Dense { layer } | ShardId::Router { layer } => layers.contains(*layer),
            ShardId::Expert { .. } => false,
        };
        self.shards.iter().filter(within).all(|s| self.holders.get(s).is_some_and(|h| h.contains(node)))
    }
}

/// The stages that what is held shows: runs of layers that the same nodes hold.
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
