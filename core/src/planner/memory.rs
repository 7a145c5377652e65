//! Memory of the shards on a node, with what training them takes.

use super::input::Request;
use crate::costs::{Costs, lanes_in_flight};
use crate::ids::{NodeId, ShardId};
use crate::placement::Placement;
use crate::profile::Profile;
use std::collections::BTreeMap;

pub(super) struct Memory<'a> {
    costs: Costs,
    profiles: BTreeMap<&'a NodeId, &'a Profile>,
    shards: Vec<ShardId>,
}

impl<'a> Memory<'a> {
    pub(super) fn new(request: &Request<'a>) -> Self {
        Self {
            costs: Costs::new(request.architecture, request.training),
            profiles: request.members.iter().map(|member| (&member.node, &member.profile)).collect(),
            shards: request.architecture.shards(),
        }
    }

    /// Memory of a node, in bytes.
    pub(super) fn of(&self, node: &NodeId) -> u64 {
        self.profiles.get(node).map_or(0, |profile| profile.memory_bytes)
    }

    /// Bytes of some shards on a node. A layer counts once, with its dense shard.
    pub(super) fn bytes(&self, node: &NodeId, shards: &[ShardId]) -> u64 {
        let in_flight = lanes_in_flight(self.profiles.get(node).map_or(1, |profile| profile.threads));
        let each = |shard: &ShardId| match shard {
            ShardId::Expert { .. } => self.costs.expert_bytes,
            ShardId::Dense { layer } => self.costs.stage_bytes(layer.alone(), in_flight),
            ShardId::Embedding | ShardId::Router { .. } => 0,
        };
        shards.iter().map(each).sum()
    }

    /// Bytes of what a placement puts on each node.
    pub(super) fn held(&self, placement: &Placement) -> BTreeMap<NodeId, u64> {
        let mut held = BTreeMap::new();
        for &shard in &self.shards {
            for node in placement.holders_unordered(shard) {
                *held.entry(node.clone()).or_default() += self.bytes(node, &[shard]);
            }
        }
        held
    }

    /// Whether every node has the memory for what a placement puts on it.
    pub(super) fn fits(&self, placement: &Placement) -> bool {
        self.held(placement).iter().all(|(node, bytes)| *bytes <= self.of(node))
    }
}

/// Whether every member has the memory to train what a placement puts on it.
#[must_use]
pub fn fits(request: &Request<'_>, placement: &Placement) -> bool {
    Memory::new(request).fits(placement)
}
