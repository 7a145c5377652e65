//! What a step sends over each link, leaf by leaf.

use crate::costs::Costs;
use crate::ids::{Lane, NodeId, ShardId};
use crate::placement::Placement;
use crate::tree::LeafSpan;
use std::collections::BTreeMap;

/// Bytes of a step over each link, sender first: rows, residual streams and gradients, leaf by leaf.
#[must_use]
pub fn links(placement: &Placement, costs: &Costs) -> BTreeMap<(NodeId, NodeId), u64> {
    let mut bytes: BTreeMap<(NodeId, NodeId), u64> = BTreeMap::new();
    let mut add = |from: &NodeId, to: &NodeId, amount: u64| {
        if from != to {
            *bytes.entry((from.clone(), to.clone())).or_default() += amount;
        }
    };
    let rows = (costs.rows_per_lane() / costs.experts.max(1) as f64 * costs.row_wire as f64) as u64;
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
                add(driver, runner, 2 * costs.lane_wire);
                add(runner, driver, 2 * costs.lane_wire);
            }
        }
    }
    let layers =
        costs.all_layers().iter().map(|layer| (ShardId::Dense { layer }, costs.dense_wire[layer.index()]));
    let experts = placement.experts.keys().map(|&shard| (shard, costs.expert_wire));
    for (shard, wire) in layers.chain(experts) {
        let holders = placement.holders(shard);
        sums(placement, shard, &mut |from, to| add(from, to, wire));
        for holder in &holders {
            placement.broadcast_children(shard, holder).iter().for_each(|next| add(holder, next, wire));
        }
    }
    bytes
}

/// Every sum of a shard's gradient that goes from one node to another.
fn sums(placement: &Placement, shard: ShardId, add: &mut impl FnMut(&NodeId, &NodeId)) {
    let root = LeafSpan::root(placement.leaves(shard));
    if let (Some(there), Some(owner)) = (placement.reducer(shard, root), placement.owner(shard)) {
        add(there, owner);
    }
    let mut open = vec![root];
    while let Some(span) = open.pop() {
        let (Some(here), Some((left, right))) = (placement.reducer(shard, span), span.children()) else {
            continue;
        };
        for below in [left, right] {
            let Some(there) = placement.reducer(shard, below) else { continue };
            add(there, here);
            // Whoever makes a sum alone gets nothing for it.
            if placement.computed_by(shard, below.start) != Some(there)
                || !placement.fragments(shard, there).contains(&below)
            {
                open.push(below);
            }
        }
    }
}
