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
use serde::Serialize;
use site::Site;
use std::collections::BTreeMap;
use std::fmt;

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
    /// What is missing when the model fits in no way: the placement takes no account of memory then.
    pub short: Option<Shortage>,
}

/// Memory that is not there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Shortage {
    /// How much, in bytes.
    pub bytes: u64,
    /// The layer that is too large for every single node; none when all nodes together are too small.
    pub layer: Option<u16>,
}

impl fmt::Display for Shortage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let gib = self.bytes as f64 / f64::from(1 << 30);
        match self.layer {
            Some(0) => write!(f, "layer 0 with the embedding takes {gib:.1} GiB more than any node has"),
            Some(layer) => write!(f, "layer {layer} takes {gib:.1} GiB more than any node has"),
            None => write!(f, "all nodes together have {gib:.1} GiB too little"),
        }
    }
}

/// The placement that promises the shortest step.
#[must_use]
pub fn plan(request: &Request<'_>) -> Plan {
    let costs = Costs::new(request.architecture, request.training);
    let mut site = Site::new(request.members);
    let present = request.previous.map_or(1, |placement| placement.stages.len().max(1));
    let mut best: Option<(usize, Plan)> = None;
    let counts = stages::counts(&costs, present).into_iter();
    let lean = request.previous.is_some_and(|placement| is_lean(placement, &site));
    for (count, lean) in counts.flat_map(|count| [(count, lean), (count, !lean)]) {
        let Some(placement) = attempt(&site, &costs, request, count, lean) else { continue };
        let prediction = predict(&placement, request.members, &costs);
        // Copies come before speed.
        let copies = placement.experts.values().map(Vec::len).sum();
        let better = best.as_ref().is_none_or(|(most, plan)| {
            copies > *most
                || (copies == *most && prediction.step_s < STAGES_WORTH_IT * plan.prediction.step_s)
        });
        if better {
            best = Some((copies, Plan { placement, prediction, short: None }));
        }
    }
    if let Some((_, best)) = best {
        return best;
    }
    let short = Some(site.shortage(&costs, experts::least_replicas(request.architecture)));
    site.ignore_memory();
    // One stage of everybody has no way to fail where memory does not count.
    let placement = attempt(&site, &costs, request, 1, false).unwrap_or_default();
    let prediction = predict(&placement, request.members, &costs);
    Plan { placement, prediction, short }
}

/// A placement with so many stages, if memory allows it. In a lean one nodes for which no lane is left hold no layers
/// either, so that nobody sends them gradients.
fn attempt(
    site: &Site<'_>,
    costs: &Costs,
    request: &Request<'_>,
    count: usize,
    lean: bool,
) -> Option<Placement> {
    let mut stages = stages::assign(site, costs, request, count)?;
    let mut experts = experts::spread(site, costs, request, &stages)?;
    if lean {
        if !lanes::drop_idle(site, costs, request, &mut stages, &experts) {
            return None;
        }
        experts = experts::spread(site, costs, request, &stages)?;
    }
    Some(lanes::complete(site, costs, request, stages, experts))
}

/// Whether there are members without a stage.
fn is_lean(placement: &Placement, site: &Site<'_>) -> bool {
    let staged = |node: &NodeId| placement.stages.iter().any(|stage| stage.holds(node));
    let known = placement.members.iter().filter(|node| site.place(node).is_some());
    known.into_iter().any(|node| !staged(node))
}

pub use survivors::of_survivors;

#[cfg(test)]
mod tests;
