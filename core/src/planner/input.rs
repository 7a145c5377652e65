//! The planner's input.

use crate::architecture::Architecture;
use crate::ids::{Epoch, NodeId, ShardId};
use crate::options::TrainingOptions;
use crate::placement::Placement;
use crate::profile::Profile;
use std::collections::BTreeMap;

/// A node and its profile.
#[derive(Clone, Debug, PartialEq)]
pub struct Member {
    /// Its name.
    pub node: NodeId,
    /// Its compute, memory and network.
    pub profile: Profile,
}

/// The input of one plan.
#[derive(Clone, Debug)]
pub struct Request<'a> {
    /// The number of the placement.
    pub epoch: Epoch,
    /// The nodes; at least one.
    pub members: &'a [Member],
    /// The model.
    pub architecture: &'a Architecture,
    /// The shapes of the training.
    pub training: &'a TrainingOptions,
    /// Replicas of every expert.
    pub replication: usize,
    /// Sums that one node adds; see [`crate::reduction`].
    pub fan_in: u32,
    /// Experts with more replicas, because many tokens are routed to them.
    pub extra_replicas: &'a BTreeMap<ShardId, usize>,
    /// Replicas that may move beyond the necessary ones, to fill nodes evenly.
    pub moves_max: usize,
    /// The placement before this one. The plan moves as little as possible of it.
    pub previous: Option<&'a Placement>,
}
