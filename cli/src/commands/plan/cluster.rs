//! `volary plan --inventory`: what a run would do on machines that nobody has rented yet.

use super::{bytes, short};
use crate::inventory::{Inventory, Kind};
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};
use volary_core::architecture::Architecture;
use volary_core::costs::Costs;
use volary_core::options::{ClusterOptions, TrainingOptions};
use volary_core::placement::Placement;
use volary_core::planner::{self, Member, NodePart, Plan, Request, Shortage};
use volary_core::{NodeId, ShardId};

/// Links are listed one by one in clusters of at most so many nodes.
const LINKS_MAX: usize = 64;
/// What a node that is added must bring to be worth naming: a step shorter by this part.
const SHORTER: f64 = 0.01;

/// A run on an inventory.
#[derive(Debug, Serialize)]
pub(super) struct ClusterPlan {
    fits: bool,
    /// What is missing when it does not fit.
    short: Option<Shortage>,
    nodes: usize,
    memory_bytes: u64,
    step_s: f64,
    /// Until the last lane is done.
    lanes_s: f64,
    /// Gradients on the wire, the optimizer, the commit.
    commit_s: f64,
    tokens_per_s: f64,
    /// The node that the others wait for, and its parts of the step.
    slowest: Option<Placed>,
    stages: Vec<StageOf>,
    replicas: usize,
    kinds: Vec<KindOf>,
    placement: Vec<Placed>,
    /// Bytes of one step over each link, in clusters of at most 64 nodes.
    links: Vec<LinkOf>,
    what_if: Vec<WhatIf>,
    /// The cheapest way to a shorter step, or to a model that fits, among the kinds with a price.
    cheapest: Option<Cheapest>,
    #[serde(skip_serializing_if = "Option::is_none")]
    price_per_hour: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    price_per_million_tokens: Option<f64>,
}

#[derive(Clone, Debug, Serialize)]
struct Placed {
    node: NodeId,
    zone: String,
    /// Its stage, from 0; none where it hosts experts only.
    stage: Option<usize>,
    #[serde(flatten)]
    part: NodePart,
}

#[derive(Debug, Serialize)]
struct StageOf {
    first_layer: u16,
    last_layer: u16,
    nodes: usize,
    zones: usize,
}

/// The nodes of one kind together: the most that any of them does.
#[derive(Debug, Serialize)]
struct KindOf {
    kind: String,
    nodes: usize,
    #[serde(flatten)]
    most: NodePart,
    memory_limit_bytes: u64,
}

#[derive(Debug, Serialize)]
struct LinkOf {
    from: NodeId,
    to: NodeId,
    bytes: u64,
}

#[derive(Debug, Serialize)]
struct WhatIf {
    /// `one more` or `one less`.
    change: &'static str,
    kind: String,
    fits: bool,
    step_s: f64,
    tokens_per_s: f64,
    /// State that must be copied first, or again.
    moved_bytes: u64,
}

#[derive(Debug, Serialize)]
struct Cheapest {
    kind: String,
    price_per_hour: f64,
    step_s: f64,
    /// Added tokens for each unit of money more.
    tokens_per_price: f64,
}

/// What is planned.
pub(super) struct Site<'a> {
    pub(super) architecture: &'a Architecture,
    pub(super) training: &'a TrainingOptions,
    pub(super) cluster: &'a ClusterOptions,
}

impl Site<'_> {
    fn plan(&self, members: &[Member], previous: Option<&Placement>) -> Plan {
        planner::plan(&Request {
            epoch: volary_core::Epoch(1),
            members,
            architecture: self.architecture,
            training: self.training,
            replication: self.cluster.replication,
            fan_in: self.cluster.fan_in,
            extra_replicas: &BTreeMap::new(),
            moves_max: usize::MAX,
            previous,
        })
    }

    pub(super) fn on(&self, inventory: &Inventory) -> ClusterPlan {
        let (kinds, members): (Vec<usize>, Vec<Member>) = inventory.members().into_iter().unzip();
        let costs = Costs::new(self.architecture, self.training);
        let plan = self.plan(&members, None);
        let placement = placed(&plan, &members);
        let prediction = &plan.prediction;
        let slowest = placement.iter().find(|at| Some(&at.node) == prediction.slowest.as_ref()).cloned();
        let price = inventory.price();
        let what_if = self.what_if(inventory, &members, &plan, &costs);
        ClusterPlan {
            fits: plan.short.is_none(),
            short: plan.short,
            nodes: members.len(),
            memory_bytes: members.iter().map(|m| m.profile.memory_bytes).fold(0, u64::saturating_add),
            step_s: prediction.step_s,
            lanes_s: prediction.lanes_s,
            commit_s: prediction.commit_s,
            tokens_per_s: prediction.tokens_per_s,
            slowest,
            stages: stages(&plan.placement, &placement),
            replicas: plan.placement.experts.values().map(Vec::len).min().unwrap_or(0),
            kinds: by_kind(inventory, &members, &kinds, &placement),
            links: links(&plan.placement, &costs),
            cheapest: cheapest(inventory, &plan, &what_if),
            what_if,
            placement,
            price_per_hour: price,
            price_per_million_tokens: price.map(|price| price / 3600.0 / prediction.tokens_per_s * 1e6),
        }
    }

    /// One node more of each kind, and one less.
    fn what_if(&self, inventory: &Inventory, members: &[Member], plan: &Plan, costs: &Costs) -> Vec<WhatIf> {
        let try_out = |change, kind: &Kind, members: &[Member]| {
            let after = self.plan(members, Some(&plan.placement));
            WhatIf {
                change,
                kind: kind.name.clone(),
                fits: after.short.is_none(),
                step_s: after.prediction.step_s,
                tokens_per_s: after.prediction.tokens_per_s,
                moved_bytes: moved(&plan.placement, &after.placement, costs),
            }
        };
        let mut found = Vec::new();
        for kind in inventory.nodes.iter().chain(&inventory.offers) {
            let mut more = members.to_vec();
            let mut new = kind.member(kind.count);
            new.node = NodeId::new(format!("{}-more", kind.name));
            more.push(new);
            found.push(try_out("one more", kind, &more));
        }
        for kind in inventory.nodes.iter().filter(|_| members.len() > 1) {
            let gone = kind.member(kind.count - 1).node;
            let fewer: Vec<Member> = members.iter().filter(|m| m.node != gone).cloned().collect();
            found.push(try_out("one less", kind, &fewer));
        }
        found
    }
}

fn placed(plan: &Plan, members: &[Member]) -> Vec<Placed> {
    let zones: BTreeMap<&NodeId, &str> = members.iter().map(|m| (&m.node, m.profile.zone.as_str())).collect();
    let stage_of = |node: &NodeId| plan.placement.stages.iter().position(|stage| stage.holds(node));
    let nodes = plan.placement.members.iter().zip(&plan.prediction.nodes);
    nodes
        .map(|(node, part)| Placed {
            node: node.clone(),
            zone: zones.get(node).copied().unwrap_or_default().to_owned(),
            stage: stage_of(node),
            part: part.clone(),
        })
        .collect()
}

fn stages(placement: &Placement, placed: &[Placed]) -> Vec<StageOf> {
    let of = |(number, stage): (usize, &volary_core::placement::Stage)| StageOf {
        first_layer: stage.layers.start.0,
        last_layer: stage.layers.end.previous().0,
        nodes: stage.holders.len(),
        zones: placed
            .iter()
            .filter(|at| at.stage == Some(number))
            .map(|at| at.zone.as_str())
            .collect::<BTreeSet<_>>()
            .len(),
    };
    placement.stages.iter().enumerate().map(of).collect()
}

fn by_kind(inventory: &Inventory, members: &[Member], kinds: &[usize], placed: &[Placed]) -> Vec<KindOf> {
    let of_node: BTreeMap<&NodeId, usize> =
        members.iter().map(|m| &m.node).zip(kinds.iter().copied()).collect();
    let mut found: Vec<KindOf> = inventory
        .nodes
        .iter()
        .map(|kind| KindOf {
            kind: kind.name.clone(),
            nodes: kind.count,
            most: NodePart::default(),
            memory_limit_bytes: kind.memory.0,
        })
        .collect();
    for Placed { node, part, .. } in placed {
        let most = &mut found[of_node[node]].most;
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
    found
}

fn links(placement: &Placement, costs: &Costs) -> Vec<LinkOf> {
    if placement.members.len() > LINKS_MAX {
        return Vec::new();
    }
    let all = planner::links(placement, costs);
    all.into_iter().map(|((from, to), bytes)| LinkOf { from, to, bytes }).collect()
}

/// State that somebody holds after and did not hold before.
fn moved(before: &Placement, after: &Placement, costs: &Costs) -> u64 {
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

/// Of what could be added: what brings most for its price, or the cheapest with which the model fits.
fn cheapest(inventory: &Inventory, plan: &Plan, what_if: &[WhatIf]) -> Option<Cheapest> {
    let priced = |at: &WhatIf| {
        let kind = inventory.nodes.iter().chain(&inventory.offers).find(|kind| kind.name == at.kind)?;
        let price_per_hour = kind.price_per_hour?;
        let gain = (at.tokens_per_s - plan.prediction.tokens_per_s) * 3600.0;
        Some(Cheapest {
            kind: at.kind.clone(),
            price_per_hour,
            step_s: at.step_s,
            tokens_per_price: gain / price_per_hour,
        })
    };
    let more = what_if.iter().filter(|at| at.change == "one more" && at.fits);
    if plan.short.is_some() {
        return more.filter_map(priced).min_by(|a, b| a.price_per_hour.total_cmp(&b.price_per_hour));
    }
    let shorter = more.filter(|at| at.step_s < (1.0 - SHORTER) * plan.prediction.step_s);
    shorter.filter_map(priced).max_by(|a, b| a.tokens_per_price.total_cmp(&b.tokens_per_price))
}

fn seconds(s: f64) -> String {
    if s < 1.0 { format!("{:.1} ms", s * 1e3) } else { format!("{s:.2} s") }
}

impl ClusterPlan {
    pub(super) fn print(&self) {
        println!();
        let (nodes, memory) = (self.nodes, bytes(self.memory_bytes));
        match self.short {
            None => println!("fits on {nodes} nodes with {memory} of memory"),
            Some(short) => println!(
                "DOES NOT FIT on {nodes} nodes with {memory} of memory: {short}. What follows takes no account of that"
            ),
        }
        println!(
            "  step                  {:>10}   {} tokens/s",
            seconds(self.step_s),
            short(self.tokens_per_s as u64)
        );
        println!("    lanes               {:>10}   forward and backward", seconds(self.lanes_s));
        println!(
            "    commit              {:>10}   gradients on the wire, optimizer, commit",
            seconds(self.commit_s)
        );
        if let Some(Placed { node, part, .. }) = &self.slowest {
            println!("  the others wait for {node}:");
            println!(
                "    dense {}, experts {}, network {}, one lane after the other {}; then gradients {}, update {}",
                seconds(part.dense_s),
                seconds(part.expert_s),
                seconds(part.network_s),
                seconds(part.chain_s),
                seconds(part.exchange_s),
                seconds(part.update_s)
            );
        }
        for (number, stage) in self.stages.iter().enumerate() {
            println!(
                "  stage {number}: layers {} to {} on {} nodes in {} zones",
                stage.first_layer, stage.last_layer, stage.nodes, stage.zones
            );
        }
        println!("  replicas of each expert: {}", self.replicas);
        println!(
            "  kind              nodes   lanes experts      memory   sent/step   received   (most of one node)"
        );
        for kind in &self.kinds {
            println!(
                "    {:<16}{:>5}{:>8}{:>8}{:>12}{:>12}{:>11}",
                kind.kind,
                kind.nodes,
                kind.most.lanes,
                kind.most.experts,
                bytes(kind.most.memory_bytes),
                bytes(kind.most.sent_bytes),
                bytes(kind.most.received_bytes)
            );
        }
        let mut longest: Vec<&LinkOf> = self.links.iter().collect();
        longest.sort_by_key(|link| std::cmp::Reverse(link.bytes));
        if !longest.is_empty() {
            println!("  links (the fullest; all with --json)");
        }
        for link in longest.iter().take(6) {
            println!("    {} -> {}: {} in a step", link.from, link.to, bytes(link.bytes));
        }
        println!("  what if");
        for at in &self.what_if {
            let fits = if at.fits { "" } else { ", DOES NOT FIT" };
            println!(
                "    {} {}: step {}, {} tokens/s, {} to copy{fits}",
                at.change,
                at.kind,
                seconds(at.step_s),
                short(at.tokens_per_s as u64),
                bytes(at.moved_bytes)
            );
        }
        if let (Some(hour), Some(million)) = (self.price_per_hour, self.price_per_million_tokens) {
            println!("  price: {hour:.2} an hour, {million:.4} for a million tokens");
        }
        match &self.cheapest {
            Some(best) => println!(
                "  cheapest to add: {} at {:.2} an hour: step {}",
                best.kind,
                best.price_per_hour,
                seconds(best.step_s)
            ),
            None if self.short.is_some() => {
                println!("  cheapest to add: no single node with a price makes it fit");
            }
            None => println!("  cheapest to add: nothing with a price makes the step shorter"),
        }
    }
}
