//! The predicted run, as `volary plan --json` serializes it. Times are in seconds, sizes in bytes.

use serde::Serialize;
use std::fmt;
use volary_core::NodeId;
use volary_core::planner::{NodePart, Shortage};

/// The predicted run on an inventory.
#[derive(Debug, Serialize)]
pub(crate) struct ClusterPlan {
    pub(super) fits: bool,
    /// The missing memory, if it does not fit.
    pub(super) short: Option<Shortage>,
    pub(super) nodes: usize,
    pub(super) memory_bytes: u64,
    pub(super) step_s: f64,
    /// Until the last lane is done.
    pub(super) lanes_s: f64,
    /// Gradients on the network, the optimizer, the commit.
    pub(super) commit_s: f64,
    pub(super) tokens_per_s: f64,
    /// The node that the others wait for.
    pub(super) slowest: Option<PlacedNode>,
    pub(super) stages: Vec<StageSummary>,
    /// Replicas of the expert with the fewest.
    pub(super) replicas: usize,
    pub(super) kinds: Vec<MachineLoad>,
    pub(super) placement: Vec<PlacedNode>,
    /// Empty in clusters of more than [`crate::limits::PLAN_LINKS_MAX`] nodes.
    pub(super) links: Vec<LinkTraffic>,
    pub(super) what_if: Vec<WhatIf>,
    /// The best machine to add, among those with a price.
    pub(super) cheapest: Option<BestOffer>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) price_per_hour: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) price_per_million_tokens: Option<f64>,
}

/// A node with its part of the step.
#[derive(Clone, Debug, Serialize)]
pub(super) struct PlacedNode {
    pub(super) node: NodeId,
    pub(super) zone: String,
    /// Its pipeline stage, from 0; none if it hosts experts only.
    pub(super) stage: Option<usize>,
    #[serde(flatten)]
    pub(super) part: NodePart,
}

/// A pipeline stage.
#[derive(Debug, Serialize)]
pub(super) struct StageSummary {
    pub(super) first_layer: u16,
    pub(super) last_layer: u16,
    pub(super) nodes: usize,
    pub(super) zones: usize,
}

/// The nodes of one machine type.
#[derive(Debug, Serialize)]
pub(super) struct MachineLoad {
    pub(super) kind: String,
    pub(super) nodes: usize,
    /// The maximum of every part over the nodes.
    #[serde(flatten)]
    pub(super) most: NodePart,
    pub(super) memory_limit_bytes: u64,
}

/// The traffic of one link in a step.
#[derive(Debug, Serialize)]
pub(super) struct LinkTraffic {
    pub(super) from: NodeId,
    pub(super) to: NodeId,
    pub(super) bytes: u64,
}

/// A change of the cluster by one node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(super) enum Change {
    #[serde(rename = "one more")]
    OneMore,
    #[serde(rename = "one less")]
    OneLess,
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::OneMore => "one more",
            Self::OneLess => "one less",
        })
    }
}

/// The run after a change of the cluster.
#[derive(Debug, Serialize)]
pub(super) struct WhatIf {
    pub(super) change: Change,
    /// The machine type.
    pub(super) kind: String,
    pub(super) fits: bool,
    pub(super) step_s: f64,
    pub(super) tokens_per_s: f64,
    /// Replicas that must be copied.
    pub(super) moved_bytes: u64,
}

/// A machine to add.
#[derive(Debug, Serialize)]
pub(super) struct BestOffer {
    /// The machine type.
    pub(super) kind: String,
    pub(super) price_per_hour: f64,
    pub(super) step_s: f64,
    /// Additional tokens per additional unit of money.
    pub(super) tokens_per_price: f64,
}
