//! The next placement: the planner's target, or the placement on the way to it.

use super::Machine;
use crate::ids::{Epoch, NodeId, ShardId};
use crate::placement::Placement;
use crate::planner::{self, Member, Request};
use std::collections::BTreeSet;

impl Machine {
    /// The target, if every shard of it is on its node; otherwise the surviving placement, with learners for
    /// the rest.
    pub(super) fn next_placement(&self) -> Placement {
        let target = self.target();
        if self.holders.is_empty() {
            return target;
        }
        let shards = self.settings.architecture.shards();
        let is_here =
            |&shard: &ShardId| target.holders_unordered(shard).iter().all(|node| self.is_holder(shard, node));
        if shards.iter().all(is_here) {
            return target;
        }
        let mut surviving = self.surviving_placement(target.epoch);
        for shard in shards {
            let learns = target.holders_unordered(shard).iter().filter(|node| !surviving.holds(node, shard));
            let learners: BTreeSet<NodeId> = learns.cloned().collect();
            if !learners.is_empty() {
                surviving.learners.insert(shard, learners);
            }
        }
        // Where every node fetches its missing shards before the next step, nothing is left to learn.
        if surviving.learners.is_empty() { target } else { surviving }
    }

    /// The planner's choice for all usable nodes.
    fn target(&self) -> Placement {
        let usable = |node: &&NodeId| !self.nodes[*node].draining && !self.suspicion.is_suspended(node);
        let mut names: Vec<&NodeId> = self.nodes.keys().filter(usable).collect();
        if names.is_empty() {
            names = self.nodes.keys().collect();
        }
        let members = self.members(names);
        let plan = |previous| self.request(&members, previous, planner::plan).placement;
        match self.placement.members.is_empty() {
            false => plan(Some(&self.placement)),
            true if self.holders.is_empty() => plan(None),
            // A restarted supervisor: the nodes' state shows the previous placement.
            true => plan(Some(&self.surviving_placement(self.placement.epoch))),
        }
    }

    /// A placement in which every node keeps its shards, so that the next step starts at once.
    fn surviving_placement(&self, epoch: Epoch) -> Placement {
        let make =
            |request: &Request<'_>| planner::plan_for_survivors(request, &self.holders, &self.placement);
        let mut placement = self.request(&self.members(self.nodes.keys().collect()), None, make);
        placement.epoch = epoch;
        placement
    }

    /// The reason why lost shards cannot be loaded on the nodes at hand. While every shard is held the run
    /// goes on, whatever the estimate of memory says.
    pub(super) fn capacity_shortfall(&self) -> Option<String> {
        let held = |shard: &ShardId| self.holders.get(shard).is_some_and(|nodes| !nodes.is_empty());
        if self.settings.architecture.shards().iter().all(held) {
            return None;
        }
        let members = self.members(self.nodes.keys().collect());
        let short = self.request(&members, None, planner::plan).short?;
        let parameters = self.settings.architecture.parameters();
        let names: Vec<&str> = members.iter().map(|m| m.node.0.as_str()).collect();
        Some(format!(
            "the model ({parameters} parameters, with gradients, optimizer state and activations) does not fit on {}: {short}; \
             add nodes with more memory, or choose a smaller model",
            names.join(", "),
        ))
    }

    fn members(&self, names: Vec<&NodeId>) -> Vec<Member> {
        let member = |n: &NodeId| Member { node: n.clone(), profile: self.nodes[n].profile.clone() };
        names.into_iter().map(member).collect()
    }

    /// Calls the planner with this run's settings.
    pub(super) fn request<T>(
        &self,
        members: &[Member],
        previous: Option<&Placement>,
        make: impl FnOnce(&Request<'_>) -> T,
    ) -> T {
        make(&Request {
            epoch: self.placement.epoch.next(),
            members,
            architecture: &self.settings.architecture,
            training: &self.settings.training,
            replication: self.settings.cluster.replication,
            fan_in: self.settings.cluster.fan_in,
            extra_replicas: &self.balance.extra_replicas,
            moves_max: self.moves_max(),
            previous,
        })
    }
}
