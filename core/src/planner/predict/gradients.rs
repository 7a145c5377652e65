//! Gradients on the network, their sums and the optimizer.
//!
//! Counted by formula: [`crate::reduction::Reduction::transfers`] lists the same transfers one by one, which
//! is too slow for the planner's many attempts. Dense gradients of at most `fan_in` nodes are counted
//! exactly, the others on average.

use super::load::{Inputs, NodeLoad, Traffic};
use super::rows::StageRows;
use crate::ids::{NodeId, ShardId};
use crate::placement::Stage;
use crate::tree::LeafSpan;
use std::collections::BTreeMap;

/// Sums and the optimizer of the experts of one stage.
pub(super) fn add_expert_updates(inputs: &Inputs<'_>, rows: &StageRows, loads: &mut [NodeLoad]) {
    let group = f64::from(inputs.costs.lane_group.max(1));
    for replica in rows.replicas.iter().flatten() {
        let leaves = (replica.local_lanes + replica.remote_lanes) / group;
        loads[replica.place].updated_bytes += (1.0 + leaves) * inputs.costs.expert_wire_bytes as f64;
    }
}

/// The dense parts of all stages: sums to the owners, final sums from them, and the optimizer on every
/// holder.
pub(super) fn add_dense(inputs: &Inputs<'_>, loads: &mut [NodeLoad]) {
    for stage in &inputs.placement.stages {
        let runners = inputs.runners(stage);
        let (mut sums, mut first) = (Vec::new(), 0);
        for &(_, lanes) in &runners {
            sums.push(f64::from(LeafSpan::parts_of_run(inputs.costs.lanes, first..first + lanes as u32)));
            first += lanes as u32;
        }
        if has_several_reducers(inputs, stage) {
            add_dense_of_many(inputs, stage, &runners, &sums, loads);
        } else {
            add_dense_of_few(inputs, stage, &runners, &sums, loads);
        }
    }
}

/// Whether more nodes than the owner reduce a stage's gradients.
fn has_several_reducers(inputs: &Inputs<'_>, stage: &Stage) -> bool {
    stage.holders.len() > inputs.placement.fan_in as usize
}

/// At most `fan_in` nodes: each sends its `sums` to the owner, which sends the final sum to each.
fn add_dense_of_few(
    inputs: &Inputs<'_>,
    stage: &Stage,
    runners: &[(usize, f64)],
    sums: &[f64],
    loads: &mut [NodeLoad],
) {
    let all_sums: f64 = sums.iter().sum();
    for layer in stage.layers.iter() {
        let owner = inputs.placement.owner(ShardId::Dense { layer }).map(|node| inputs.places[node]);
        let bytes = inputs.costs.dense_wire_bytes[layer.index()] as f64;
        for (&(place, lanes), sums) in runners.iter().zip(sums) {
            let (sent, received) = match owner == Some(place) {
                true => (runners.len() as f64 - 1.0, all_sums - sums),
                false => (*sums, 1.0),
            };
            let load = &mut loads[place];
            load.gradients.sent_bytes += bytes * sent;
            load.gradients.received_bytes += bytes * received;
            load.updated_bytes += bytes * (1.0 + lanes);
        }
    }
}

/// More than `fan_in` nodes: reducers rotate from layer to layer. With many layers the load is even; with few
/// layers a reducer has at least the load of one.
fn add_dense_of_many(
    inputs: &Inputs<'_>,
    stage: &Stage,
    runners: &[(usize, f64)],
    sums: &[f64],
    loads: &mut [NodeLoad],
) {
    let fan_in = f64::from(inputs.placement.fan_in);
    let layers = &inputs.costs.dense_wire_bytes[stage.layers.indices()];
    let all_bytes = layers.iter().sum::<u64>() as f64;
    let most_bytes = layers.iter().max().map_or(0.0, |bytes| *bytes as f64);
    let running = runners.iter().filter(|(_, lanes)| *lanes > 0.0).count().max(1) as f64;
    // Each sum is sent once to a reducer, and so is each sum of `fan_in` sums.
    let added = sums.iter().sum::<f64>() / running * (1.0 + 1.0 / fan_in);
    for (&(place, lanes), sums) in runners.iter().zip(sums) {
        let load = &mut loads[place];
        load.gradients.sent_bytes += all_bytes * (sums + 1.0 / fan_in) + all_bytes.max(fan_in * most_bytes);
        load.gradients.received_bytes += (all_bytes * added).max(fan_in * most_bytes) + all_bytes;
        load.updated_bytes += all_bytes * (1.0 + lanes + added);
    }
}

/// Experts with several replicas.
pub(super) fn add_experts(inputs: &Inputs<'_>, loads: &mut [NodeLoad]) {
    let bytes = inputs.costs.expert_wire_bytes as f64;
    for (&shard, holders) in inputs.placement.experts.iter().filter(|(_, holders)| holders.len() > 1) {
        let sums = expert_sums(inputs, shard);
        let all_sums: u32 = sums.values().sum();
        let others = holders.len() as f64 - 1.0;
        for (i, node) in holders.iter().enumerate() {
            let own = sums.get(node).copied().unwrap_or(0);
            let (sent, received) =
                if i == 0 { (others, f64::from(all_sums - own)) } else { (f64::from(own), 1.0) };
            let Traffic { sent_bytes, received_bytes } = &mut loads[inputs.places[node]].gradients;
            *sent_bytes += bytes * sent;
            *received_bytes += bytes * received;
        }
    }
}

/// The sums of an expert's gradient that each replica makes, about: one for each run of consecutive leaves.
fn expert_sums<'a>(inputs: &Inputs<'a>, shard: ShardId) -> BTreeMap<&'a NodeId, u32> {
    let mut sums: BTreeMap<&NodeId, u32> = BTreeMap::new();
    let Some(reduction) = inputs.placement.reduction(shard) else { return sums };
    let mut last = None;
    for leaf in 0..inputs.costs.lanes.div_ceil(inputs.costs.lane_group.max(1)) {
        let node = reduction.computed_by(leaf);
        if node != last {
            node.into_iter().for_each(|node| *sums.entry(node).or_default() += 1);
        }
        last = node;
    }
    sums
}

/// Hops of a gradient up to its owner and back to all holders: 2 where the owner is the only reducer.
pub(super) fn hops(inputs: &Inputs<'_>) -> f64 {
    let several = inputs.placement.stages.iter().filter(|stage| has_several_reducers(inputs, stage));
    let levels = |stage: &Stage| (stage.holders.len() as f64).log(f64::from(inputs.placement.fan_in.max(2)));
    several.map(|stage| 2.0 * levels(stage).ceil()).fold(2.0, f64::max)
}
