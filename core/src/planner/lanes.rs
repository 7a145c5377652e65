//! The lanes of each node: contiguous runs, so that nodes run whole subtrees, of lengths that make the
//! slowest node end soonest.

use super::candidates::Candidates;
use super::experts::Spread;
use super::input::Request;
use super::stages::StageNodes;
use crate::costs::Costs;
use crate::ids::{LayerRange, NodeId};
use crate::placement::{Placement, Stage};
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};

/// The placement of given stages and experts, with the lanes divided.
pub(super) fn complete(
    candidates: &Candidates<'_>,
    costs: &Costs,
    request: &Request<'_>,
    stages: Vec<StageNodes>,
    experts: Spread,
) -> Placement {
    let expert_s = expert_seconds(candidates, costs, &experts);
    let stages = stages
        .into_iter()
        .map(|stage| Stage {
            lanes: runs(&lanes_of_stage(candidates, costs, &stage, &expert_s)),
            holders: candidates.names(&stage.nodes),
            layers: stage.layers,
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

/// The number of lanes of each node of a stage.
fn lanes_of_stage(
    candidates: &Candidates<'_>,
    costs: &Costs,
    stage: &StageNodes,
    expert_s: &[f64],
) -> Vec<u32> {
    let lane_s = |node| candidates.lane_seconds(costs, node, stage.layers);
    let seconds: Vec<(f64, f64)> = stage.nodes.iter().map(|&node| (expert_s[node], lane_s(node))).collect();
    divide(&seconds, costs.lanes)
}

/// Removes nodes without a lane from their stages, while `replication` others in as many zones hold the
/// layers. Returns whether there were any.
pub(super) fn drop_idle(
    candidates: &Candidates<'_>,
    costs: &Costs,
    request: &Request<'_>,
    stages: &mut [StageNodes],
    experts: &Spread,
) -> bool {
    let expert_s = expert_seconds(candidates, costs, experts);
    let mut dropped = false;
    for stage in stages {
        let counts = lanes_of_stage(candidates, costs, stage, &expert_s);
        let kept = nodes_to_keep(candidates, stage, &counts, request.replication.max(1));
        dropped |= kept.len() < stage.nodes.len();
        stage.nodes = kept;
    }
    dropped
}

/// The nodes of a stage that run lanes, and as many others as `copies` of the layers need: first in zones
/// that have none, as far as the copies ask for zones.
fn nodes_to_keep(
    candidates: &Candidates<'_>,
    stage: &StageNodes,
    counts: &[u32],
    copies: usize,
) -> Vec<usize> {
    let zone = |node: &usize| candidates.zones[*node];
    let (running, idle): (Vec<_>, Vec<_>) =
        stage.nodes.iter().zip(counts).partition(|(_, lanes)| **lanes > 0);
    let mut kept: Vec<usize> = running.into_iter().map(|(&node, _)| node).collect();
    let idle: Vec<usize> = idle.into_iter().map(|(&node, _)| node).collect();
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
    kept
}

/// Seconds of a step that each node spends on its experts, if an expert's rows are divided evenly among its
/// replicas.
fn expert_seconds(candidates: &Candidates<'_>, costs: &Costs, experts: &Spread) -> Vec<f64> {
    let mut seconds = vec![0.0; candidates.len()];
    let rows = f64::from(costs.lanes) * costs.rows_per_lane() / costs.experts.max(1) as f64;
    for holders in experts.values() {
        for &node in holders {
            let flops = rows * costs.expert_flops / holders.len() as f64;
            seconds[node] += candidates.members[node].profile.expert.seconds(flops);
        }
    }
    seconds
}

/// The number of lanes of each node, from its seconds of other work and its seconds per lane. Each lane goes
/// to the node that ends soonest with it, which minimizes the last end.
pub(crate) fn divide(seconds: &[(f64, f64)], lanes: u32) -> Vec<u32> {
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

/// The node of each lane, from the number of lanes of each node.
pub(crate) fn runs(counts: &[u32]) -> Vec<u32> {
    let run = |(node, &count): (usize, &u32)| std::iter::repeat_n(node as u32, count as usize);
    counts.iter().enumerate().flat_map(run).collect()
}

/// The stage before, if its layers and holders are unchanged; otherwise a stage with its lanes divided
/// afresh.
pub(super) fn reuse_or_divide(
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
    Stage { lanes: runs(&divide(&seconds, costs.lanes)), holders, layers }
}
