//! The latency of one lane: its layers in sequence, with their round trips and their waits on busy nodes.

use super::load::{Inputs, NodeLoad};
use super::rows::StageRows;
use crate::costs::LANES_AHEAD;
use crate::placement::Stage;
use std::collections::BTreeSet;

/// The waits of a stage's rows at the slowest busy node that serves them.
pub(super) fn add_waits(inputs: &Inputs<'_>, stage: &Stage, rows: &StageRows, loads: &mut [NodeLoad]) {
    let running: BTreeSet<usize> =
        inputs.runners(stage).into_iter().filter(|(_, lanes)| *lanes > 0.0).map(|(place, _)| place).collect();
    let servers: BTreeSet<usize> = rows.replicas.iter().flatten().map(|replica| replica.place).collect();
    let busy = servers.intersection(&running).map(|&place| (wait_at(inputs, stage, place), place));
    let mut slowest: Vec<(f64, usize)> = busy.collect();
    slowest.sort_by(|a, b| b.0.total_cmp(&a.0));
    for &place in &running {
        let other = slowest.iter().find(|(_, server)| *server != place);
        let wait = &mut loads[place].remote_wait_s;
        *wait = wait.max(other.map_or(0.0, |(wait, _)| *wait));
    }
}

/// The wait of arriving rows for a thread of a node: the rest of the running call on average, and one call of
/// each lane in flight beyond the threads. Calls are whole layers of the node's lanes, and the loss; they are
/// not interrupted.
fn wait_at(inputs: &Inputs<'_>, stage: &Stage, place: usize) -> f64 {
    let profile = &inputs.members[place].profile;
    let tokens = inputs.costs.tokens_per_lane as f64;
    let calls_s = inputs.costs.dense_flops[stage.layers.indices()].iter().flat_map(|flops| {
        let work = flops * tokens * profile.threads as f64;
        [work / profile.dense.forward, 2.0 * work / profile.dense.backward]
    });
    let (count, sum, squares) =
        calls_s.fold((0.0, 0.0, 0.0), |(count, sum, squares), t| (count + 1.0, sum + t, squares + t * t));
    if sum == 0.0 {
        return 0.0;
    }
    (squares / (2.0 * sum) + LANES_AHEAD as f64 * sum / count) / profile.threads as f64
}

/// Seconds of one lane of each node: its own layers, and the other stages on average.
pub(super) fn chains_s(inputs: &Inputs<'_>, loads: &[NodeLoad]) -> Vec<f64> {
    if inputs.placement.stages.is_empty() {
        return vec![0.0; loads.len()];
    }
    let later_s = later_stages_s(inputs, loads);
    (0..loads.len()).map(|place| lane_s(inputs, loads, 0, place) + later_s).collect()
}

/// Seconds of one lane in a stage on a node that runs nothing else.
fn lane_s(inputs: &Inputs<'_>, loads: &[NodeLoad], number: usize, place: usize) -> f64 {
    let costs = inputs.costs;
    let layers = inputs.placement.stages[number].layers;
    let (profile, load) = (&inputs.members[place].profile, &loads[place]);
    let moe_layers = costs.moe_layers.iter().filter(|layer| layers.contains(**layer)).count() as f64;
    let rows = costs.rows_per_lane();
    // A lane's dense calls run on one thread, its experts on all.
    let dense = profile.dense.seconds(costs.lane_flops(layers)) * profile.threads as f64;
    let experts = profile.expert.seconds(rows * moe_layers * costs.expert_flops);
    let trips = load.remote_lane_share * 2.0 * moe_layers * (profile.round_trip_s + load.remote_wait_s);
    let wire =
        4.0 * moe_layers * rows * load.remote_row_share * costs.row_wire_bytes as f64 / profile.bandwidth;
    let hop = profile.round_trip_s + 2.0 * costs.lane_wire_bytes as f64 / profile.bandwidth;
    dense + experts + trips + wire + if number > 0 { 2.0 * hop } else { 0.0 }
}

/// Seconds of one lane in all stages after the first, on average over their nodes.
fn later_stages_s(inputs: &Inputs<'_>, loads: &[NodeLoad]) -> f64 {
    let mut seconds = 0.0;
    for (number, stage) in inputs.placement.stages.iter().enumerate().skip(1) {
        let runners = inputs.runners(stage);
        let all: f64 = runners.iter().map(|(_, lanes)| lanes).sum();
        let sum: f64 =
            runners.iter().map(|&(place, lanes)| lanes * lane_s(inputs, loads, number, place)).sum();
        seconds += sum / all.max(1.0);
    }
    seconds
}
