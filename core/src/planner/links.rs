//! The bytes of a step over each link, counted leaf by leaf.

use crate::costs::Costs;
use crate::ids::{Lane, NodeId, ShardId};
use crate::placement::Placement;
use std::collections::BTreeMap;

/// Bytes of a step over each link, keyed by sender and receiver: rows, residual streams and gradients.
#[must_use]
pub fn links(placement: &Placement, costs: &Costs) -> BTreeMap<(NodeId, NodeId), u64> {
    let mut bytes: BTreeMap<(NodeId, NodeId), u64> = BTreeMap::new();
    let mut add = |from: &NodeId, to: &NodeId, amount: u64| {
        if from != to {
            *bytes.entry((from.clone(), to.clone())).or_default() += amount;
        }
    };
    let rows = (costs.rows_per_lane() / costs.experts.max(1) as f64 * costs.row_wire_bytes as f64) as u64;
    for &shard in placement.experts.keys() {
        let ShardId::Expert { layer, .. } = shard else { continue };
        for leaf in 0..placement.leaves(shard) {
            let Some(server) = placement.computed_by(shard, leaf) else { continue };
            for lane in placement.group_lanes(leaf) {
                if let Some(runner) = placement.stage_of(layer).and_then(|stage| stage.stage_node(lane)) {
                    add(runner, server, 2 * rows);
                    add(server, runner, 2 * rows);
                }
            }
        }
    }
    let Some(first) = placement.stages.first() else { return bytes };
    for stage in &placement.stages[1..] {
        for lane in Lane::first(placement.lanes()) {
            if let (Some(driver), Some(runner)) = (first.stage_node(lane), stage.stage_node(lane)) {
                add(driver, runner, 2 * costs.lane_wire_bytes);
                add(runner, driver, 2 * costs.lane_wire_bytes);
            }
        }
    }
    let layers = costs
        .all_layers()
        .iter()
        .map(|layer| (ShardId::Dense { layer }, costs.dense_wire_bytes[layer.index()]));
    let experts = placement.experts.keys().map(|&shard| (shard, costs.expert_wire_bytes));
    for (shard, wire) in layers.chain(experts) {
        for transfer in placement.reduction(shard).into_iter().flat_map(|reduction| reduction.transfers()) {
            add(transfer.from, transfer.to, wire);
        }
    }
    bytes
}
