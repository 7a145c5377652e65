//! `volary plan --inventory`: the predicted run of a model on a planned cluster.
//!
//! | file | content |
//! | --- | --- |
//! | `report` | the prediction, as it is serialized |
//! | `text` | the prediction as text |

mod report;
mod text;

use crate::inventory::{Inventory, MachineType};
use crate::limits::PLAN_LINKS_MAX;
pub(super) use report::ClusterPlan;
use report::{BestOffer, Change, LinkTraffic, MachineLoad, PlacedNode, StageSummary, WhatIf};
use std::collections::{BTreeMap, BTreeSet};
use volary_core::architecture::Architecture;
use volary_core::costs::Costs;
use volary_core::options::{ClusterOptions, TrainingOptions};
use volary_core::placement::{Placement, Stage};
use volary_core::planner::{self, Member, NodePart, Plan, Request, Shortage};
use volary_core::{Epoch, NodeId, ShardId};

/// The least reduction of a step, as a fraction, for which an additional node is worth naming.
const IMPROVEMENT_MIN: f64 = 0.01;

/// The input of a plan.
pub(super) struct Workload<'a> {
    pub(super) architecture: &'a Architecture,
    pub(super) training: &'a TrainingOptions,
    pub(super) cluster: &'a ClusterOptions,
}

impl Workload<'_> {
    /// A plan, with the missing memory where the model does not fit: such a plan ignores memory.
    fn plan(&self, members: &[Member], previous: Option<&Placement>) -> (Plan, Option<Shortage>) {
        let request = Request {
            epoch: Epoch(1),
            members,
            architecture: self.architecture,
            training: self.training,
            replication: self.cluster.replication,
            fan_in: self.cluster.fan_in,
            extra_replicas: &BTreeMap::new(),
            moves_max: usize::MAX,
            previous,
        };
        match planner::plan(&request) {
            Ok(plan) => (plan, None),
            Err(short) => (planner::plan_without_memory(&request), Some(short)),
        }
    }

    pub(super) fn plan_on(&self, inventory: &Inventory) -> ClusterPlan {
        let (types, members): (Vec<usize>, Vec<Member>) = inventory.members().into_iter().unzip();
        let costs = Costs::new(self.architecture, self.training);
        let (plan, short) = self.plan(&members, None);
        let placement = placed_nodes(&plan, &members);
        let prediction = &plan.prediction;
        let slowest =
            placement.iter().find(|placed| Some(&placed.node) == prediction.slowest.as_ref()).cloned();
        let price = inventory.price_per_hour();
        let what_if = self.what_if(inventory, &members, &plan, &costs);
        ClusterPlan {
            fits: short.is_none(),
            short,
            nodes: members.len(),
            memory_bytes: members.iter().map(|m| m.profile.memory_bytes).fold(0, u64::saturating_add),
            step_s: prediction.step_s,
            lanes_s: prediction.lanes_s,
            commit_s: prediction.commit_s,
            tokens_per_s: prediction.tokens_per_s,
            slowest,
            stages: stages(&plan.placement, &placement),
            replicas: plan.placement.experts.values().map(Vec::len).min().unwrap_or(0),
            kinds: load_by_type(inventory, &members, &types, &placement),
            links: links(&plan.placement, &costs),
            cheapest: best_offer(inventory, &plan, short.is_none(), &what_if),
            what_if,
            placement,
            price_per_hour: price,
            price_per_million_tokens: price.map(|price| price / 3600.0 / prediction.tokens_per_s * 1e6),
        }
    }

    /// The effect of one node more, and one less, of each machine type.
    fn what_if(&self, inventory: &Inventory, members: &[Member], plan: &Plan, costs: &Costs) -> Vec<WhatIf> {
        let replan = |change, machine: &MachineType, members: &[Member]| {
            let (after, short) = self.plan(members, Some(&plan.placement));
            WhatIf {
                change,
                kind: machine.name.clone(),
                fits: short.is_none(),
                step_s: after.prediction.step_s,
                tokens_per_s: after.prediction.tokens_per_s,
                moved_bytes: moved_bytes(&plan.placement, &after.placement, costs),
            }
        };
        let mut changes = Vec::new();
        for machine in inventory.nodes.iter().chain(&inventory.offers) {
            let mut more = members.to_vec();
            let mut new = machine.member(machine.count);
            new.node = NodeId::new(format!("{}-more", machine.name));
            more.push(new);
            changes.push(replan(Change::OneMore, machine, &more));
        }
        for machine in inventory.nodes.iter().filter(|_| members.len() > 1) {
            let removed = machine.member(machine.count - 1).node;
            let fewer: Vec<Member> = members.iter().filter(|m| m.node != removed).cloned().collect();
            changes.push(replan(Change::OneLess, machine, &fewer));
        }
        changes
    }
}

/// The nodes of a plan with their zones, stages and parts of the step.
fn placed_nodes(plan: &Plan, members: &[Member]) -> Vec<PlacedNode> {
    let zones: BTreeMap<&NodeId, &str> = members.iter().map(|m| (&m.node, m.profile.zone.as_str())).collect();
    let stage_of = |node: &NodeId| plan.placement.stages.iter().position(|stage| stage.holds(node));
    let nodes = plan.placement.members.iter().zip(&plan.prediction.nodes);
    nodes
        .map(|(node, part)| PlacedNode {
            node: node.clone(),
            zone: zones.get(node).copied().unwrap_or_default().to_owned(),
            stage: stage_of(node),
            part: part.clone(),
        })
        .collect()
}

fn stages(placement: &Placement, nodes: &[PlacedNode]) -> Vec<StageSummary> {
    let summary = |(number, stage): (usize, &Stage)| StageSummary {
        first_layer: stage.layers.start.0,
        last_layer: stage.layers.end.previous().0,
        nodes: stage.holders.len(),
        zones: nodes
            .iter()
            .filter(|node| node.stage == Some(number))
            .map(|node| node.zone.as_str())
            .collect::<BTreeSet<_>>()
            .len(),
    };
    placement.stages.iter().enumerate().map(summary).collect()
}

/// For each machine type, the maximum of every part over its nodes. `types` are the type indices of
/// `members`.
fn load_by_type(
    inventory: &Inventory,
    members: &[Member],
    types: &[usize],
    placed: &[PlacedNode],
) -> Vec<MachineLoad> {
    let type_of: BTreeMap<&NodeId, usize> =
        members.iter().map(|m| &m.node).zip(types.iter().copied()).collect();
    let mut loads: Vec<MachineLoad> = inventory
        .nodes
        .iter()
        .map(|machine| MachineLoad {
            kind: machine.name.clone(),
            nodes: machine.count,
            most: NodePart::default(),
            memory_limit_bytes: machine.memory.0,
        })
        .collect();
    for PlacedNode { node, part, .. } in placed {
        let most = &mut loads[type_of[node]].most;
        *most = NodePart {
            dense_s: most.dense_s.max(part.dense_s),
            expert_s: most.expert_s.max(part.expert_s),
            update_s: most.update_s.max(part.update_s),
            network_s: most.network_s.max(part.network_s),
            chain_s: most.chain_s.max(part.chain_s),
            exchange_s: most.exchange_s.max(part.exchange_s),
            received_bytes: most.received_bytes.max(part.received_bytes),
            sent_bytes: most.sent_bytes.max(part.sent_bytes),
            memory_bytes: most.memory_bytes.max(part.memory_bytes),
            experts: most.experts.max(part.experts),
            lanes: most.lanes.max(part.lanes),
        };
    }
    loads
}

/// The traffic of each link in one step; empty for large clusters.
fn links(placement: &Placement, costs: &Costs) -> Vec<LinkTraffic> {
    if placement.members.len() > PLAN_LINKS_MAX {
        return Vec::new();
    }
    let all = planner::links(placement, costs);
    all.into_iter().map(|((from, to), bytes)| LinkTraffic { from, to, bytes }).collect()
}

/// Bytes of the replicas that nodes hold after the change and did not hold before.
fn moved_bytes(before: &Placement, after: &Placement, costs: &Costs) -> u64 {
    let mut bytes = 0;
    for stage in &after.stages {
        for layer in stage.layers.iter() {
            let shard = ShardId::Dense { layer };
            let new = stage.holders.iter().filter(|node| !before.holds(node, shard)).count();
            bytes += new as u64 * costs.dense_wire_bytes[layer.index()];
        }
    }
    for (shard, holders) in &after.experts {
        let new = holders.iter().filter(|node| !before.holds(node, *shard)).count();
        bytes += new as u64 * costs.expert_wire_bytes;
    }
    bytes
}

/// Of the machines that could be added, the one with the most additional tokens for its price; if the model
/// does not fit, the cheapest one with which it fits.
fn best_offer(inventory: &Inventory, plan: &Plan, fits: bool, what_if: &[WhatIf]) -> Option<BestOffer> {
    let priced = |change: &WhatIf| {
        let price_per_hour = inventory.machine(&change.kind)?.price_per_hour?;
        let gain = (change.tokens_per_s - plan.prediction.tokens_per_s) * 3600.0;
        Some(BestOffer {
            kind: change.kind.clone(),
            price_per_hour,
            step_s: change.step_s,
            tokens_per_price: gain / price_per_hour,
        })
    };
    let more = what_if.iter().filter(|change| change.change == Change::OneMore && change.fits);
    if !fits {
        return more.filter_map(priced).min_by(|a, b| a.price_per_hour.total_cmp(&b.price_per_hour));
    }
    let shorter = more.filter(|change| change.step_s < (1.0 - IMPROVEMENT_MIN) * plan.prediction.step_s);
    shorter.filter_map(priced).max_by(|a, b| a.tokens_per_price.total_cmp(&b.tokens_per_price))
}
