//! The planner: from profiles of nodes and costs of a model to the placement with the shortest predicted
//! step.
//!
//! A pure function of membership, profiles, measured expert loads and the previous placement. It cuts the
//! layers into as few pipeline stages as memory and time require (one, where every node has room), gives each
//! node with room a stage, spreads the experts' replicas over the remaining memory by speed and over zones,
//! and divides the lanes of each stage so that the slowest node ends soonest. It moves as little as possible
//! of the previous placement.
//!
//! ```
//! use std::collections::BTreeMap;
//! use volary_core::architecture::presets;
//! use volary_core::options::TrainingOptions;
//! use volary_core::planner::{Member, Request, plan};
//! use volary_core::profile::Profile;
//! use volary_core::{Epoch, NodeId};
//!
//! // Two nodes, the second one three times as fast.
//! let members = [("a", 1.0), ("b", 3.0)]
//!     .map(|(name, capacity)| Member { node: NodeId::new(name), profile: Profile::relative(capacity) });
//! let plan = plan(&Request {
//!     epoch: Epoch(1),
//!     members: &members,
//!     architecture: &presets()[1].architecture,
//!     training: &TrainingOptions { lanes: 8, ..TrainingOptions::new(1) },
//!     replication: 1,
//!     fan_in: 8,
//!     extra_replicas: &BTreeMap::new(),
//!     moves_max: usize::MAX,
//!     previous: None,
//! })
//! .expect("room for the model");
//! let lanes = |member: &Member| plan.placement.lanes_of(&member.node).len();
//! assert_eq!(members.each_ref().map(lanes), [2, 6]);
//! ```
//!
//! | file | content |
//! | --- | --- |
//! | `input`, `output` | members and requests; plans and shortages |
//! | `candidates` | the numbered nodes of a plan, and their participation |
//! | `participation` | plans without nodes behind slow links |
//! | `stages` | the cut of the layers, and the stage of each node |
//! | `experts` | the replicas of each expert |
//! | `lanes` | the lanes of each node |
//! | `survivors` | the placement that needs no transfer when nodes are lost |
//! | `memory` | the memory that a placement takes on each node |
//! | `transition` | the way to a placement, within the memory of every node |
//! | `predict` | the duration of a step under a placement, resource by resource |
//! | `links` | the bytes over each link |

mod candidates;
mod experts;
mod input;
mod lanes;
mod links;
mod memory;
mod output;
mod participation;
mod predict;
mod stages;
mod survivors;
mod transition;

pub use input::{Member, Request};
pub use links::links;
pub use memory::fits;
pub use output::{Plan, Shortage};
pub use predict::{NodePart, Prediction, predict};
pub use survivors::plan_for_survivors;
pub use transition::plan_transition;

use crate::costs::Costs;
use crate::ids::NodeId;
use crate::placement::Placement;
use candidates::Candidates;
use std::collections::{BTreeMap, BTreeSet};

/// The ratio of step times below which another number of stages replaces the present one, and fewer nodes
/// replace all.
const WORTHWHILE: f64 = 0.8;
/// The ratio of step times below which another placement replaces the present one.
const WORTH_IT: f64 = 0.97;
/// The ratio below which a placement that keeps nothing replaces one that keeps what it can.
const WORTH_ALL: f64 = 0.9;
/// Plans in which one plan looks for the placement that no later one replaces.
const SETTLING_ROUNDS_MAX: usize = 8;
/// The ratio of network time to compute time above which plans with fewer nodes are tried.
const NETWORK_BOUND: f64 = 0.5;

/// The placement with the shortest predicted step, which fits into the memory of every node: the present one,
/// unless another is safer, or as safe and worth the way.
///
/// Whether another one is worth the way is judged by where it leads, and not by how far `moves_max` lets one
/// placement go. Every placement on the way is safer or shorter than the one before it, so that repeated
/// plans settle.
///
/// # Errors
/// The missing memory, where no placement fits.
pub fn plan(request: &Request<'_>) -> Result<Plan, Shortage> {
    let costs = Costs::new(request.architecture, request.training);
    let Some(previous) = request.previous else {
        let plan = best(request, &costs)?;
        return Ok(settled(request, &costs, plan, None));
    };
    // Without one of its nodes, the previous placement is no choice: the next plan settles what this one
    // begins.
    let Some(present) = present(request, &costs) else { return best(request, &costs) };
    let fresh = best(&Request { previous: None, moves_max: usize::MAX, ..request.clone() }, &costs).ok();
    let target = destination(request, &costs, fresh.as_ref())?;
    if !target.beats(&present, request, WORTH_IT) {
        return Ok(present);
    }
    let target = settled(request, &costs, target, fresh.as_ref());
    if moves(previous, &target.placement) <= request.moves_max {
        return Ok(target);
    }
    let step = best(request, &costs)?;
    Ok(if step.beats(&present, request, 1.0) { step } else { target })
}

/// The best placement without a budget, which keeps what it can of the previous one; or `fresh`, which keeps
/// nothing, if that is worth it and the budget allows it. After many changes, what is kept may be spread
/// badly over the layers.
fn destination(request: &Request<'_>, costs: &Costs, fresh: Option<&Plan>) -> Result<Plan, Shortage> {
    let kept = best(&Request { moves_max: usize::MAX, ..request.clone() }, costs)?;
    let is_worth_all = |fresh: &&Plan| {
        let moves = request.previous.map_or(0, |previous| moves(previous, &fresh.placement));
        moves <= request.moves_max && fresh.beats(&kept, request, WORTH_ALL)
    };
    Ok(fresh.filter(is_worth_all).cloned().unwrap_or(kept))
}

/// The experts of a placement on nodes that do not hold them under the previous one.
fn moves(previous: &Placement, next: &Placement) -> usize {
    let placed = next.experts.iter().flat_map(|(shard, nodes)| nodes.iter().map(move |node| (shard, node)));
    placed.filter(|(shard, node)| !previous.holds(node, **shard)).count()
}

/// The plan that planning with `plan` as the present placement ends at: what is kept of the placement before
/// may hide a better one, which the next plan would find.
fn settled(request: &Request<'_>, costs: &Costs, mut plan: Plan, fresh: Option<&Plan>) -> Plan {
    for _ in 0..SETTLING_ROUNDS_MAX {
        let again = Request { previous: Some(&plan.placement), moves_max: usize::MAX, ..request.clone() };
        match destination(&again, costs, fresh) {
            Ok(next) if next.beats(&plan, request, WORTH_IT) => plan = next,
            _ => break,
        }
    }
    plan
}

/// The previous placement, if all of its nodes are there and have room for it.
fn present(request: &Request<'_>, costs: &Costs) -> Option<Plan> {
    let previous = request.previous.filter(|previous| !previous.members.is_empty())?;
    let names: BTreeSet<&NodeId> = request.members.iter().map(|member| &member.node).collect();
    let is_here = previous.members.iter().all(|node| names.contains(node));
    if !is_here || !fits(request, previous) {
        return None;
    }
    let placement = Placement { epoch: request.epoch, learners: BTreeMap::new(), ..previous.clone() };
    Some(predicted(placement, request, costs)).filter(|plan| plan.prediction.step_s.is_finite())
}

/// The best placement, whatever the present one is worth.
fn best(request: &Request<'_>, costs: &Costs) -> Result<Plan, Shortage> {
    let mut candidates = Candidates::new(request.members);
    let stage_count = request.previous.map_or(1, |placement| placement.stages.len().max(1));
    let mut best: Option<Incumbent> = None;
    let counts = stages::counts(costs, stage_count).into_iter();
    let drop_idle = request.previous.is_some_and(|placement| has_stageless_member(placement, &candidates));
    for (count, drop_idle) in counts.flat_map(|count| [(count, drop_idle), (count, !drop_idle)]) {
        let Some(placement) = attempt(&candidates, costs, request, count, drop_idle) else { continue };
        let plan = predicted(placement, request, costs);
        if best.as_ref().is_none_or(|best| plan.beats(&best.plan, request, WORTHWHILE)) {
            best = Some(Incumbent { stages: count, plan });
        }
    }
    match best {
        Some(best) => Ok(with_fewer_nodes(&mut candidates, costs, request, best)),
        None => Err(candidates.shortage(costs, experts::least_replicas(request.architecture))),
    }
}

/// A placement as if every node had enough memory, for a report on a cluster that is too small.
#[must_use]
pub fn plan_without_memory(request: &Request<'_>) -> Plan {
    let costs = Costs::new(request.architecture, request.training);
    let mut candidates = Candidates::new(request.members);
    candidates.ignore_memory();
    // One stage of all nodes cannot fail where memory does not count.
    let placement = attempt(&candidates, &costs, request, 1, false).unwrap_or_default();
    predicted(placement, request, &costs)
}

fn predicted(placement: Placement, request: &Request<'_>, costs: &Costs) -> Plan {
    let prediction = predict(&placement, request.members, costs);
    Plan { placement, prediction }
}

/// The best plan so far, with its number of stages.
struct Incumbent {
    stages: usize,
    plan: Plan,
}

impl Incumbent {
    /// Whether the network dominates the step of the slowest node.
    fn is_network_bound(&self) -> bool {
        let Prediction { slowest, nodes, .. } = &self.plan.prediction;
        let place = slowest.as_ref().and_then(|node| self.plan.placement.members.binary_search(node).ok());
        place.and_then(|place| nodes.get(place)).is_some_and(|part| {
            let compute_s = part.dense_s + part.expert_s;
            let network_s = part.network_s.max(part.chain_s - compute_s) + part.exchange_s;
            network_s > NETWORK_BOUND * (compute_s + part.update_s)
        })
    }
}

/// The best plan, or a plan with fewer nodes where slow links make its step shorter.
fn with_fewer_nodes(
    candidates: &mut Candidates<'_>,
    costs: &Costs,
    request: &Request<'_>,
    mut best: Incumbent,
) -> Plan {
    if candidates.len() == 1 || !best.is_network_bound() {
        return best.plan;
    }
    let running = request.previous.map(|placement| placement.lane_counts().len());
    let mut counts = vec![best.stages, 1];
    counts.dedup();
    for (runners, participation) in participation::alternatives(candidates, costs, request) {
        candidates.restrict_to(participation);
        for &count in &counts {
            let Some(placement) = attempt(candidates, costs, request, count, false) else { continue };
            let plan = predicted(placement, request, costs);
            // A present choice stays until it is no longer shorter.
            let factor = if running == Some(runners) { 1.0 } else { WORTHWHILE };
            if plan.beats(&best.plan, request, factor) {
                best.plan = plan;
            }
        }
    }
    best.plan
}

/// A placement with `count` stages, if memory allows it. With `drop_idle`, nodes without a lane hold no
/// layers either, so that no gradients are sent to them.
fn attempt(
    candidates: &Candidates<'_>,
    costs: &Costs,
    request: &Request<'_>,
    count: usize,
    drop_idle: bool,
) -> Option<Placement> {
    let mut stages = stages::assign(candidates, costs, request, count)?;
    if stages.iter().any(|stage| !stage.nodes.iter().any(|&node| candidates.may_run(node))) {
        return None;
    }
    let mut experts = experts::spread(candidates, costs, request, &stages)?;
    if drop_idle {
        if !lanes::drop_idle(candidates, costs, request, &mut stages, &experts) {
            return None;
        }
        experts = experts::spread(candidates, costs, request, &stages)?;
    }
    Some(lanes::complete(candidates, costs, request, stages, experts))
}

/// Whether a member has no stage.
fn has_stageless_member(placement: &Placement, candidates: &Candidates<'_>) -> bool {
    let staged = |node: &NodeId| placement.stages.iter().any(|stage| stage.holds(node));
    placement.members.iter().any(|node| candidates.place(node).is_some() && !staged(node))
}

#[cfg(test)]
mod tests;
