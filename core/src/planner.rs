//! The planner: from what nodes can do and what a model costs to a placement that promises the shortest step.
//!
//! A pure function of membership, profiles, the experts' measured load and the previous placement. It cuts the layers into as few stages as
//! memory and time ask for (one, where every node has room), gives each node with room a stage, spreads the experts'
//! replicas over what memory is left, by speed and apart in zones, and shares the lanes of each stage so that the slowest
//! node ends soonest. What is held already is moved as little as possible.
//!
//! | file | what |
//! | --- | --- |
//! | `site` | the nodes as the planner sees them, numbered |
//! | `stages` | cutting the layers, giving nodes their stages |
//! | `experts` | where the replicas go |
//! | `lanes` | who runs which lanes |
//! | `survivors` | going on at once when nodes are gone |
//! | `predict` | the time of a step under a placement, with its parts |

mod experts;
mod lanes;
mod predict;
mod site;
mod stages;
mod survivors;

pub use predict::{NodePart, Prediction, links, predict};

use crate::architecture::Architecture;
use crate::costs::Costs;
use crate::ids::{Epoch, NodeId, ShardId};
use crate::options::TrainingOptions;
use crate::placement::Placement;
use crate::profile::Profile;
use site::Site;
use std::collections::BTreeMap;

/// Another number of stages must promise a step shorter by this factor than the present one, or than one alone.
const STAGES_WORTH_IT: f64 = 0.8;

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
    /// Experts with more copies than that, because many tokens go to them.
    pub hot: &'a BTreeMap<ShardId, usize>,
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
    /// Memory that is missing, in bytes, when the model fits in no way: the placement takes no account of it then.
    pub short_bytes: u64,
}

/// The placement that promises the shortest step.
#[must_use]
pub fn plan(request: &Request<'_>) -> Plan {
    let costs = Costs::new(request.architecture, request.training);
    let mut site = Site::new(request.members);
    let present = request.previous.map_or(1, |placement| placement.stages.len().max(1));
    let mut best: Option<(usize, Plan)> = None;
    for count in stages::counts(&costs, present) {
        let Some(placement) = attempt(&site, &costs, request, count) else { continue };
        let prediction = predict(&placement, request.members, &costs);
        // Copies come before speed.
        let copies = placement.experts.values().map(Vec::len).sum();
        let better = best.as_ref().is_none_or(|(most, plan)| {
            copies > *most
                || (copies == *most && prediction.step_s < STAGES_WORTH_IT * plan.prediction.step_s)
        });
        if better {
            best = Some((copies, Plan { placement, prediction, short_bytes: 0 }));
        }
    }
    if let Some((_, best)) = best {
        return best;
    }
    let short_bytes = site.short_bytes(&costs, experts::least_replicas(request.architecture)).max(1);
    site.ignore_memory();
    // One stage of everybody has no way to fail where memory does not count.
    let placement = attempt(&site, &costs, request, 1).unwrap_or_default();
    let prediction = predict(&placement, request.members, &costs);
    Plan { placement, prediction, short_bytes }
}

/// A placement with so many stages, if memory allows it.
fn attempt(site: &Site, costs: &Costs, request: &Request<'_>, count: usize) -> Option<Placement> {
    let stages = stages::assign(site, costs, request, count)?;
    let experts = experts::spread(site, costs, request, &stages)?;
    Some(lanes::complete(site, costs, request, stages, experts))
}

pub use survivors::of_survivors;

#[cfg(test)]
mod tests;
