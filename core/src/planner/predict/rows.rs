//! Rows of experts and residual streams on the network, in both passes.

use super::load::{Inputs, NodeLoad};
use crate::ids::{ExpertId, Lane, ShardId};
use crate::placement::Stage;
use std::collections::BTreeMap;

/// The rows of one stage's experts.
pub(super) struct StageRows {
    /// Rows that a lane sends to one expert.
    pub(super) rows_per_lane: f64,
    /// Rows that a lane sends to all experts of the stage.
    pub(super) rows_per_lane_of_all: f64,
    /// The replicas of each expert.
    pub(super) replicas: Vec<Vec<ReplicaRows>>,
    /// The lanes of each node of the stage, by the node that serves their group.
    pub(super) grouped: BTreeMap<usize, GroupedLanes>,
}

/// The lanes whose rows one replica serves.
#[derive(Clone, Copy)]
pub(super) struct ReplicaRows {
    pub(super) place: usize,
    /// Lanes of its own node.
    pub(super) local_lanes: f64,
    pub(super) remote_lanes: f64,
}

/// The lanes of one node, by the node that serves their group: the node of a group's first lane serves it,
/// where it holds the expert.
#[derive(Clone, Copy, Default)]
pub(super) struct GroupedLanes {
    /// Its own lanes in groups that it serves.
    pub(super) local: f64,
    /// Lanes of other nodes in groups that it serves.
    pub(super) foreign: f64,
    /// Its own lanes in groups that another node serves.
    pub(super) away: f64,
}

impl StageRows {
    pub(super) fn new(inputs: &Inputs<'_>, stage: &Stage) -> Self {
        let costs = inputs.costs;
        let grouped = grouped_lanes(inputs, stage);
        let first = ShardId::Expert { layer: stage.layers.start, expert: ExpertId(0) };
        let last = ShardId::Expert { layer: stage.layers.end, expert: ExpertId(0) };
        let rows_per_lane = costs.rows_per_lane() / costs.experts.max(1) as f64;
        let mut rows_per_lane_of_all = 0.0;
        let mut replicas = Vec::new();
        for (_, holders) in inputs.placement.experts.range(first..last) {
            rows_per_lane_of_all += rows_per_lane;
            // A replica serves the groups of its own node; the others are divided evenly.
            let places: Vec<usize> = holders.iter().map(|node| inputs.places[node]).collect();
            let grouped = |place: &usize| grouped.get(place).copied().unwrap_or_default();
            let served: f64 = places.iter().map(grouped).map(|lanes| lanes.local + lanes.foreign).sum();
            let others = (f64::from(costs.lanes) - served).max(0.0);
            let count = places.len() as f64;
            let replica = |place: usize| {
                let GroupedLanes { local, foreign, .. } = grouped(&place);
                ReplicaRows { place, local_lanes: local, remote_lanes: foreign + others / count }
            };
            replicas.push(places.into_iter().map(replica).collect());
        }
        Self { rows_per_lane, rows_per_lane_of_all, replicas, grouped }
    }
}

fn grouped_lanes(inputs: &Inputs<'_>, stage: &Stage) -> BTreeMap<usize, GroupedLanes> {
    let mut grouped: BTreeMap<usize, GroupedLanes> = BTreeMap::new();
    let place = |holder: u32| inputs.places[&stage.holders[holder as usize]];
    for group in stage.lanes.chunks(inputs.costs.lane_group.max(1) as usize) {
        let server = place(group[0]);
        for &holder in group {
            if place(holder) == server {
                grouped.entry(server).or_default().local += 1.0;
            } else {
                grouped.entry(server).or_default().foreign += 1.0;
                grouped.entry(place(holder)).or_default().away += 1.0;
            }
        }
    }
    grouped
}

/// Residual streams between the driver of a lane and its node in each later stage.
pub(super) fn add_residual_streams(inputs: &Inputs<'_>, loads: &mut [NodeLoad]) {
    let Some((first, later)) = inputs.placement.stages.split_first() else { return };
    // To the stage and back, in each pass and direction.
    let bytes = 2.0 * inputs.costs.lane_wire_bytes as f64;
    for stage in later {
        for (lane, &runner) in (0..).map(Lane).zip(&stage.lanes) {
            let Some(driver) = first.stage_node(lane) else { continue };
            let (there, here) = (inputs.places[&stage.holders[runner as usize]], inputs.places[driver]);
            if there != here {
                loads[there].rows.add_both(bytes);
                loads[here].rows.add_both(bytes);
            }
        }
    }
}

/// Rows to and from the experts of one stage.
pub(super) fn add_rows(inputs: &Inputs<'_>, rows: &StageRows, loads: &mut [NodeLoad]) {
    let row_bytes = inputs.costs.row_wire_bytes as f64;
    let mut kept_rows: BTreeMap<usize, f64> = BTreeMap::new();
    for replica in rows.replicas.iter().flatten() {
        let bytes = 2.0 * replica.remote_lanes * rows.rows_per_lane * row_bytes;
        loads[replica.place].rows.add_both(bytes);
        *kept_rows.entry(replica.place).or_default() += replica.local_lanes * rows.rows_per_lane;
    }
    for (&place, lanes) in &rows.grouped {
        let own_lanes = lanes.local + lanes.away;
        let own_rows = own_lanes * rows.rows_per_lane_of_all;
        let remote_rows = (own_rows - kept_rows.get(&place).copied().unwrap_or(0.0)).max(0.0);
        let load = &mut loads[place];
        load.rows.add_both(2.0 * remote_rows * row_bytes);
        if remote_rows > 0.0 {
            load.remote_row_share += remote_rows / own_rows;
            // With a replica of every expert, only lanes whose group another node serves leave.
            let only_away = remote_rows <= lanes.away * rows.rows_per_lane_of_all * (1.0 + 1e-9);
            load.remote_lane_share = if only_away { lanes.away / own_lanes } else { 1.0 };
        }
    }
}
