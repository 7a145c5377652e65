//! The loads of all nodes under a placement, and the inputs that all resources share.

use crate::costs::Costs;
use crate::ids::NodeId;
use crate::placement::{Placement, Stage};
use crate::planner::input::Member;
use std::collections::BTreeMap;

/// The work of one node in a step, before it becomes time.
#[derive(Clone, Debug, Default)]
pub(super) struct NodeLoad {
    /// Lanes that it takes through its stages.
    pub(super) lanes: usize,
    /// Lanes that it drives: those of the first stage.
    pub(super) driven_lanes: usize,
    /// Replicas of experts.
    pub(super) experts: usize,
    /// Compute of the dense parts of its lanes.
    pub(super) dense_s: f64,
    /// Compute of its experts.
    pub(super) expert_s: f64,
    pub(super) memory_bytes: u64,
    /// Rows and residual streams.
    pub(super) rows: Traffic,
    pub(super) gradients: Traffic,
    /// Bytes that the sums and the optimizer read.
    pub(super) updated_bytes: f64,
    /// Share of its lanes' rows that leave the node.
    pub(super) remote_row_share: f64,
    /// Share of its lanes with a row that leaves the node.
    pub(super) remote_lane_share: f64,
    /// Wait of its rows, per call, at the slowest of the nodes that serve them.
    pub(super) remote_wait_s: f64,
}

/// Bytes in and out of one node.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Traffic {
    pub(super) received_bytes: f64,
    pub(super) sent_bytes: f64,
}

impl Traffic {
    /// The same number of bytes in both directions.
    pub(super) fn add_both(&mut self, bytes: f64) {
        self.received_bytes += bytes;
        self.sent_bytes += bytes;
    }

    /// The slower direction at `bandwidth` bytes per second.
    pub(super) fn seconds(self, bandwidth: f64) -> f64 {
        self.received_bytes.max(self.sent_bytes) / bandwidth
    }
}

/// A placement with its members' profiles. A node is its place among the members.
pub(super) struct Inputs<'a> {
    pub(super) placement: &'a Placement,
    pub(super) members: Vec<&'a Member>,
    pub(super) costs: &'a Costs,
    pub(super) places: BTreeMap<&'a NodeId, usize>,
}

impl<'a> Inputs<'a> {
    /// `None` where a node of the placement is not among the members.
    pub(super) fn new(placement: &'a Placement, members: &'a [Member], costs: &'a Costs) -> Option<Self> {
        let known: BTreeMap<&NodeId, &Member> = members.iter().map(|member| (&member.node, member)).collect();
        let members: Option<Vec<&Member>> =
            placement.members.iter().map(|node| known.get(node).copied()).collect();
        let places: BTreeMap<&NodeId, usize> = placement.members.iter().zip(0..).collect();
        let staged = placement.stages.iter().flat_map(|stage| &stage.holders);
        let mut holders = staged.chain(placement.experts.values().flatten());
        if !holders.all(|node| places.contains_key(node)) {
            return None;
        }
        Some(Self { placement, members: members?, costs, places })
    }

    /// The places of a stage's nodes, each with its number of lanes.
    pub(super) fn runners(&self, stage: &Stage) -> Vec<(usize, f64)> {
        let mut counts = vec![0u32; stage.holders.len()];
        stage.lanes.iter().for_each(|&holder| counts[holder as usize] += 1);
        stage.holders.iter().map(|node| self.places[node]).zip(counts.into_iter().map(f64::from)).collect()
    }
}
