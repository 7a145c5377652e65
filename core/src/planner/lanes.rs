//! Who runs which lanes: contiguous runs, so that nodes run whole subtrees; as many for each as make the slowest end soonest.

use super::Request;
use super::candidates::Candidates;
use super::experts::Spread;
use super::stages::Staged;
use crate::costs::Costs;
use crate::ids::{LayerRange, NodeId};
use crate::placement::{Placement, Stage};
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};

/// The placement of given stages and experts, with the lanes shared.
pub(super) fn complete(
    candidates: &Candidates<'_>,
    costs: &Costs,
    request: &Request<'_>,
    stages: Vec<Staged>,
    experts: Spread,
) -> Placement {
    let busy = expert_seconds(candidates, costs, &experts);
    let stages = stages
        .into_iter()
        .map(|stage| {
            let seconds: Vec<(f64, f64)> = stage
                .nodes
                .iter()
                .map(|&n| (busy[n], candidates.lane_seconds(costs, n, stage.layers)))
                .collect();
            Stage {
                lanes: runs(&share(&seconds, costs.lanes)),
                holders: candidates.names(&stage.nodes),
                layers: stage.layers,
            }
        })
        .collect();
    Placement {
        epoch: request.epoch,
        members: candidates.members.iter().map(|member| member.node.clone()).collect(),
        stages,
        lane_group: request.training.lane_group,
        fan_in: request.fan_in,
        experts: experts.into_iter().map(|(shard, holders)| (shard, candidates.names(&holders))).collect(),
        learners: BTreeMap::new(),
    }
}

/// Takes the layers from nodes that would run no lane, as long as `replication` others hold them, in as many zones as there are.
/// Whether there was any.
pub(super) fn drop_idle(
    candidates: &Candidates<'_>,
    costs: &Costs,
    request: &Request<'_>,
    stages: &mut [Staged],
    experts: &Spread,
) -> bool {
    let busy = expert_seconds(candidates, costs, experts);
    let mut dropped = false;
    for stage in stages {
        let seconds: Vec<(f64, f64)> =
            stage.nodes.iter().map(|&n| (busy[n], candidates.lane_seconds(costs, n, stage.layers))).collect();
        let counts = share(&seconds, costs.lanes);
        let mut kept: Vec<usize> = Vec::new();
        let (with, without): (Vec<_>, Vec<_>) =
            stage.nodes.iter().zip(counts).partition(|(_, lanes)| *lanes > 0);
        kept.extend(with.into_iter().map(|(&node, _)| node));
        let idle: Vec<usize> = without.into_iter().map(|(&node, _)| node).collect();
        // Copies beside those who run lanes: first in zones that have none, as far as copies ask for zones.
        let zone = |node: &usize| candidates.zones[*node];
        let copies = request.replication.max(1);
        let wanted = stage.nodes.iter().map(zone).collect::<BTreeSet<_>>().len().min(copies);
        let mut zones: BTreeSet<usize> = kept.iter().map(zone).collect();
        for &node in &idle {
            if zones.len() < wanted && zones.insert(zone(&node)) {
                kept.push(node);
            }
        }
        for &node in &idle {
            if kept.len() < copies && !kept.contains(&node) {
                kept.push(node);
            }
        }
        kept.sort_unstable();
        dropped |= kept.len() < stage.nodes.len();
        stage.nodes = kept;
    }
    dropped
}

/// Seconds of a step that each node spends on its experts, when an expert's rows are shared evenly by its replicas.
fn expert_seconds(candidates: &Candidates<'_>, costs: &Costs, experts: &Spread) -> Vec<f64> {
    let mut busy = vec![0.0; candidates.len()];
    let rows = f64::from(costs.lanes) * costs.rows_per_lane() / costs.experts.max(1) as f64;
    for holders in experts.values() {
        for &node in holders {
            let flops = rows * costs.expert_flops / holders.len() as f64;
            busy[node] += candidates.members[node].profile.expert.seconds(flops);
        }
    }
    busy
}

/// How many lanes each node takes, given what it is busy with anyway and its seconds for a lane. A lane goes to who ends
/// soonest with it, which makes the last end as soon as can be.
pub(crate) fn share(seconds: &[(f64, f64)], lanes: u32) -> Vec<u32> {
    let mut counts = vec![0u32; seconds.len()];
    let end = |node: usize, count: u32| (seconds[node].0 + seconds[node].1 * f64::from(count)).to_bits();
    let mut soonest: BinaryHeap<Reverse<(u64, usize)>> =
        (0..seconds.len()).map(|node| Reverse((end(node, 1), node))).collect();
    for _ in 0..lanes {
        let Some(Reverse((_, node))) = soonest.pop() else { break };
        counts[node] += 1;
        soonest.push(Reverse((end(node, counts[node] + 1), node)));
    }
    counts
}

/// The runner of each lane, from how many each has.
pub(crate) fn runs(counts: &[u32]) -> Vec<u32> {
    let run = |(node, &count): (usize, &u32)| std::iter::repeat_n(node as u32, count as usize);
    counts.iter().enumerate().flat_map(run).collect()
}

/// Keeps who runs what where nothing about a stage has changed, and shares its lanes anew where something has.
pub(super) fn again(
    candidates: &Candidates<'_>,
    costs: &Costs,
    layers: LayerRange,
    holders: Vec<NodeId>,
    before: Option<&Stage>,
) -> Stage {
    if let Some(before) = before
        && before.layers == layers
        && before.holders == holders
        && before.lanes.len() == costs.lanes as usize
    {
        return before.clone();
    }
    let seconds: Vec<(f64, f64)> = holders
        .iter()
        .filter_map(|node| candidates.place(node))
        .map(|place| (0.0, candidates.lane_seconds(costs, place, layers)))
        .collect();
    Stage { lanes: runs(&share(&seconds, costs.lanes)), holders, layers }
}
