//! The planner: from what nodes can do and what a model costs to a placement that promises the shortest step.
//!
//! A pure function of membership, profiles, the experts' measured load and the previous placement. It cuts the layers into as few stages as
//! memory and time ask for (one, where every node has room), gives each node with room a stage, spreads the experts'
//! replicas over what memory is left, by speed and apart in zones, and shares the lanes of each stage so that the slowest
//! node ends soonest. What is held already is moved as little as possible.
//!
//! | file | what |
//! | --- | --- |
//! | `candidates` | the nodes as the planner sees them, numbered |
//! | `participation` | leaving nodes out |
//! | `stages` | cutting the layers, giving nodes their stages |
//! | `experts` | where the replicas go |
//! | `lanes` | who runs which lanes |
//! | `survivors` | going on at once when nodes are gone |
//! | `predict` | the time of a step under a placement, with its parts |
//! | `links` | the bytes over each link |

mod candidates;
mod experts;
mod lanes;
mod links;
mod participation;
mod predict;
mod stages;
mod survivors;

pub use links::links;
pub use predict::{NodePart, Prediction, predict};

use crate::architecture::Architecture;
use crate::costs::Costs;
use crate::ids::{Epoch, LayerId, NodeId, ShardId};
use crate::options::TrainingOptions;
use crate::placement::{Placement, Stage};
use crate::profile::Profile;
use candidates::Candidates;
use serde::Serialize;
use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::fmt;

/// Another number of stages must promise a step shorter by this factor than the present one, or than one alone; and leaving
/// nodes out a step shorter by this factor than with all.
const WORTH_IT: f64 = 0.8;
/// From which share of its computing on the network rules a node's step, so that leaving nodes out is looked at.
const NETWORK_RULES: f64 = 0.5;

/// A node as the planner sees it.
#[derive(Clone, Debug, PartialEq)]
pub struct Member {
    /// Its name.
    pub node: NodeId,
    /// What it can do.
    pub profile: Profile,
}

/// What a placement is made from.
#[derive(Clone, Debug)]
pub struct Request<'a> {
    /// The number that the placement gets.
    pub epoch: Epoch,
    /// The nodes; at least one.
    pub members: &'a [Member],
    /// The model.
    pub architecture: &'a Architecture,
    /// The shapes of the training.
    pub training: &'a TrainingOptions,
    /// Copies of every expert.
    pub replication: usize,
    /// Nodes whose sums one node adds up.
    pub fan_in: u32,
    /// Experts with more copies than that, because many tokens go to them.
    pub extra_replicas: &'a BTreeMap<ShardId, usize>,
    /// Experts that may move, beyond those that must, so that nodes are evenly full.
    pub moves_max: usize,
    /// The placement before this one: what it holds is moved as little as possible.
    pub previous: Option<&'a Placement>,
}

/// A placement and what speaks against it.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The placement.
    pub placement: Placement,
    /// What it promises.
    pub prediction: Prediction,
    /// What is missing when the model fits in no way: the placement takes no account of memory then.
    pub short: Option<Shortage>,
}

impl Plan {
    /// What is safer is greater: the fewer shards have no second copy where one is wanted, then the more copies there are, those of
    /// layers counted as far as they are wanted.
    fn safety(&self, replication: usize) -> (Reverse<usize>, usize) {
        let Placement { stages, experts, .. } = &self.placement;
        let layers =
            stages.iter().map(|stage: &Stage| (stage.layers.len(), stage.holders.len().min(replication)));
        let copies = layers.chain(experts.values().map(|holders| (1, holders.len())));
        let alone = copies.clone().filter(|(_, copies)| *copies < replication.min(2));
        (Reverse(alone.map(|(shards, _)| shards).sum()), copies.map(|(shards, copies)| shards * copies).sum())
    }
}

/// Memory that is not there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Shortage {
    /// How much, in bytes.
    pub bytes: u64,
    /// The layer that is too large for every single node; none when all nodes together are too small.
    pub layer: Option<LayerId>,
}

impl fmt::Display for Shortage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let gib = self.bytes as f64 / f64::from(1 << 30);
        match self.layer {
            Some(LayerId(0)) => {
                write!(f, "layer 0 with the embedding takes {gib:.1} GiB more than any node has")
            }
            Some(layer) => write!(f, "layer {layer} takes {gib:.1} GiB more than any node has"),
            None => write!(f, "all nodes together have {gib:.1} GiB too little"),
        }
    }
}

/// The placement that promises the shortest step.
#[must_use]
pub fn plan(request: &Request<'_>) -> Plan {
    let costs = Costs::new(request.architecture, request.training);
    let mut candidates = Candidates::new(request.members);
    let present = request.previous.map_or(1, |placement| placement.stages.len().max(1));
    let mut best: Option<Best> = None;
    let counts = stages::counts(&costs, present).into_iter();
    let drop_idle = request.previous.is_some_and(|placement| leaves_idle_nodes_out(placement, &candidates));
    for (count, drop_idle) in counts.flat_map(|count| [(count, drop_idle), (count, !drop_idle)]) {
        let Some(placement) = attempt(&candidates, &costs, request, count, drop_idle) else { continue };
        let plan = promise(placement, request, &costs);
        if best.as_ref().is_none_or(|best| best.is_beaten_by(&plan, request.replication, WORTH_IT)) {
            best = Some(Best { stages: count, plan });
        }
    }
    if let Some(best) = best {
        return leave_out(&mut candidates, &costs, request, best);
    }
    let short = Some(candidates.shortage(&costs, experts::least_replicas(request.architecture)));
    candidates.ignore_memory();
    // One stage of everybody has no way to fail where memory does not count.
    let placement = attempt(&candidates, &costs, request, 1, false).unwrap_or_default();
    Plan { short, ..promise(placement, request, &costs) }
}

fn promise(placement: Placement, request: &Request<'_>, costs: &Costs) -> Plan {
    let prediction = predict(&placement, request.members, costs);
    Plan { placement, prediction, short: None }
}

/// The best plan so far, with its number of stages.
struct Best {
    stages: usize,
    plan: Plan,
}

impl Best {
    /// Safety comes before speed.
    fn is_beaten_by(&self, other: &Plan, replication: usize, factor: f64) -> bool {
        let (own, others) = (self.plan.safety(replication), other.safety(replication));
        others > own || (others == own && other.prediction.step_s < factor * self.plan.prediction.step_s)
    }

    /// Whether the network takes about as long as the computing, at the node that is waited for.
    fn is_ruled_by_network(&self) -> bool {
        let Prediction { slowest, nodes, .. } = &self.plan.prediction;
        let place = slowest.as_ref().and_then(|node| self.plan.placement.members.binary_search(node).ok());
        place.and_then(|place| nodes.get(place)).is_some_and(|part| {
            let computing = part.dense_s + part.expert_s;
            let network = part.network_s.max(part.chain_s - computing) + part.exchange_s;
            network > NETWORK_RULES * (computing + part.update_s)
        })
    }
}

/// The best plan, or one with fewer nodes, where slow links make that shorter.
fn leave_out(candidates: &mut Candidates<'_>, costs: &Costs, request: &Request<'_>, mut best: Best) -> Plan {
    if candidates.len() == 1 || !best.is_ruled_by_network() {
        return best.plan;
    }
    let running = request.previous.map(|placement| placement.lane_counts().len());
    let mut counts = vec![best.stages, 1];
    counts.dedup();
    for (runners, participation) in participation::alternatives(candidates, costs, request) {
        candidates.restrict_to(participation);
        for &count in &counts {
            let Some(placement) = attempt(candidates, costs, request, count, false) else { continue };
            let plan = promise(placement, request, costs);
            // What was left out once stays so until that is no shorter.
            let factor = if running == Some(runners) { 1.0 } else { WORTH_IT };
            if best.is_beaten_by(&plan, request.replication, factor) {
                best.plan = plan;
            }
        }
    }
    best.plan
}

/// A placement with so many stages, if memory allows it. In a drop_idle one nodes for which no lane is left hold no layers
/// either, so that nobody sends them gradients.
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

/// Whether there are members without a stage.
fn leaves_idle_nodes_out(placement: &Placement, candidates: &Candidates<'_>) -> bool {
    let staged = |node: &NodeId| placement.stages.iter().any(|stage| stage.holds(node));
    let known = placement.members.iter().filter(|node| candidates.place(node).is_some());
    known.into_iter().any(|node| !staged(node))
}

pub use survivors::plan_for_survivors;

#[cfg(test)]
mod tests;
