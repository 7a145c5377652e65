//! The duration of a step under a placement, resource by resource.
//!
//! A step has two parts that do not overlap. First the lanes run: on every node the device, the network and
//! the latency of one lane's layers overlap, and the longest of them dominates. Then gradients are summed and
//! applied. The slowest node determines both. Routing is taken as even.
//!
//! | file | resource |
//! | --- | --- |
//! | `load` | the loads of all nodes, and the shared inputs |
//! | `device` | compute and memory |
//! | `rows` | rows of experts and residual streams on the network |
//! | `gradients` | gradients on the network, sums and the optimizer |
//! | `latency` | one lane's layers in sequence, with their round trips and waits |

mod device;
mod gradients;
mod latency;
mod load;
mod rows;

use super::input::Member;
use crate::costs::{Costs, lanes_in_flight};
use crate::ids::NodeId;
use crate::placement::Placement;
use load::{Inputs, NodeLoad};
use serde::Serialize;

/// The overlap of a node's device, network and latency: perfect at infinity, none at 1.
const OVERLAP: f64 = 3.0;

/// One node's part in a step. Times are in seconds, sizes in bytes.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct NodePart {
    /// Compute of attention, dense feed-forward, gates and loss for its lanes, and of sending and receiving
    /// rows.
    pub dense_s: f64,
    /// Compute of its experts.
    pub expert_s: f64,
    /// Sums of gradients and the optimizer.
    pub update_s: f64,
    /// Rows and residual streams on the wire, in the slower direction.
    pub network_s: f64,
    /// The layers of its lanes in sequence, with the round trips between them.
    pub chain_s: f64,
    /// Gradients on the wire after the lanes, in the slower direction.
    pub exchange_s: f64,
    /// Rows, residual streams and gradients received.
    pub received_bytes: u64,
    /// Rows, residual streams and gradients sent.
    pub sent_bytes: u64,
    /// Parameters, optimizer state, gradients and activations.
    pub memory_bytes: u64,
    /// Replicas of experts.
    pub experts: usize,
    /// Lanes that it takes through its stages.
    pub lanes: usize,
}

impl NodePart {
    /// The time from the start of the first lane to the end of the last one, in seconds: a norm of the three
    /// overlapping times, fitted to measurements by `cargo bench --bench placement`.
    #[must_use]
    pub fn lanes_s(&self) -> f64 {
        let parts = [self.dense_s + self.expert_s, self.network_s, self.chain_s];
        parts.map(|part| part.powf(OVERLAP)).iter().sum::<f64>().powf(1.0 / OVERLAP)
    }
}

/// The predicted step of a placement.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Prediction {
    /// Seconds from one commit to the next; infinite where the placement is not of the given members.
    pub step_s: f64,
    /// Seconds of it until the last lane is done.
    pub lanes_s: f64,
    /// Seconds of it for the exchange of gradients, the optimizer and the messages of the commit.
    pub commit_s: f64,
    /// Tokens per second.
    pub tokens_per_s: f64,
    /// The node that the others wait for.
    pub slowest: Option<NodeId>,
    /// Each member's part, in the order of the placement's members.
    #[serde(skip)]
    pub nodes: Vec<NodePart>,
}

/// The predicted step of a placement on these members.
#[must_use]
pub fn predict(placement: &Placement, members: &[Member], costs: &Costs) -> Prediction {
    let Some(inputs) = Inputs::new(placement, members, costs) else {
        return Prediction { step_s: f64::INFINITY, ..Prediction::default() };
    };
    let mut loads = vec![NodeLoad::default(); inputs.members.len()];
    device::add_lanes(&inputs, &mut loads);
    rows::add_residual_streams(&inputs, &mut loads);
    for stage in &placement.stages {
        let rows = rows::StageRows::new(&inputs, stage);
        device::add_experts(&inputs, &rows, &mut loads);
        rows::add_rows(&inputs, &rows, &mut loads);
        gradients::add_expert_updates(&inputs, &rows, &mut loads);
        latency::add_waits(&inputs, stage, &rows, &mut loads);
    }
    gradients::add_dense(&inputs, &mut loads);
    gradients::add_experts(&inputs, &mut loads);
    total(&inputs, &loads)
}

/// The parts of all nodes, and the step that they make together.
fn total(inputs: &Inputs<'_>, loads: &[NodeLoad]) -> Prediction {
    let chains = latency::chains_s(inputs, loads);
    let (mut lanes_s, mut commit_s, mut longest, mut slowest) = (0.0f64, 0.0f64, 0.0, None);
    let mut nodes = Vec::with_capacity(loads.len());
    for ((member, load), chain_s) in inputs.members.iter().zip(loads).zip(chains) {
        let part = part(member, load, chain_s);
        let commit = part.exchange_s + part.update_s;
        (lanes_s, commit_s) = (lanes_s.max(part.lanes_s()), commit_s.max(commit));
        if part.lanes_s() + commit > longest || slowest.is_none() {
            (longest, slowest) = (part.lanes_s() + commit, Some(member.node.clone()));
        }
        nodes.push(part);
    }
    let slowest_trip_s = inputs.members.iter().map(|m| m.profile.round_trip_s).fold(0.0, f64::max);
    // One trip for prepare and commit, besides those of the gradients.
    let commit_s = commit_s + (1.0 + gradients::hops(inputs)) * slowest_trip_s;
    let step_s = lanes_s + commit_s;
    let tokens = f64::from(inputs.costs.lanes) * inputs.costs.tokens_per_lane as f64;
    Prediction { step_s, lanes_s, commit_s, tokens_per_s: tokens / step_s, slowest, nodes }
}

/// One node's times from its load; `chain_s` are the seconds of one of its lanes.
fn part(member: &Member, load: &NodeLoad, chain_s: f64) -> NodePart {
    let profile = &member.profile;
    let (rows, gradients) = (load.rows, load.gradients);
    let processing_s_per_byte = profile.network_s_per_byte / profile.threads as f64;
    let exchange_s = gradients.seconds(profile.bandwidth)
        + (gradients.sent_bytes + gradients.received_bytes) * processing_s_per_byte;
    NodePart {
        // Threads that send and receive compute no lanes.
        dense_s: load.dense_s + (rows.sent_bytes + rows.received_bytes) * processing_s_per_byte,
        expert_s: load.expert_s,
        update_s: load.updated_bytes / profile.update_bytes_per_s,
        network_s: rows.seconds(profile.bandwidth),
        chain_s: chain_s * load.driven_lanes.div_ceil(lanes_in_flight(profile.threads)) as f64,
        exchange_s,
        received_bytes: (rows.received_bytes + gradients.received_bytes) as u64,
        sent_bytes: (rows.sent_bytes + gradients.sent_bytes) as u64,
        memory_bytes: load.memory_bytes,
        experts: load.experts,
        lanes: load.lanes,
    }
}
