//! Compute and memory.

use super::load::{Inputs, NodeLoad};
use super::rows::StageRows;
use crate::costs::lanes_in_flight;

/// The dense parts of all stages.
pub(super) fn add_lanes(inputs: &Inputs<'_>, loads: &mut [NodeLoad]) {
    for (number, stage) in inputs.placement.stages.iter().enumerate() {
        let flops = inputs.costs.lane_flops(stage.layers);
        for (place, lanes) in inputs.runners(stage) {
            let profile = &inputs.members[place].profile;
            let load = &mut loads[place];
            load.dense_s += profile.dense.seconds(flops * lanes);
            load.lanes += lanes as usize;
            if number == 0 {
                load.driven_lanes = lanes as usize;
            }
            load.memory_bytes += inputs.costs.stage_bytes(stage.layers, lanes_in_flight(profile.threads));
        }
    }
}

/// The experts of one stage.
pub(super) fn add_experts(inputs: &Inputs<'_>, rows: &StageRows, loads: &mut [NodeLoad]) {
    for replica in rows.replicas.iter().flatten() {
        let load = &mut loads[replica.place];
        let count = (replica.local_lanes + replica.remote_lanes) * rows.rows_per_lane;
        let profile = &inputs.members[replica.place].profile;
        load.expert_s += profile.expert.seconds(count * inputs.costs.expert_flops);
        load.experts += 1;
        load.memory_bytes += inputs.costs.expert_bytes;
    }
}
