//! The next placement: the planner's target, or the placement on the way to it.

use super::state::Node;
use super::{Effect, Machine, Notice};
use crate::ids::{Epoch, NodeId, ShardId};
use crate::messages::NodeCommand;
use crate::placement::Placement;
use crate::planner::{self, Member, Request, Shortage};

impl Machine {
    /// The target, if every shard of it is on its node; otherwise the surviving placement, with learners for
    /// the rest. Nodes whose memory is too small for any placement stay as they are, if they have what the
    /// next step needs.
    ///
    /// # Errors
    /// The missing memory, where shards that must be loaded do not fit.
    pub(super) fn next_placement(&mut self) -> Result<Placement, Shortage> {
        let target = match self.target() {
            Ok(target) => target,
            Err(shortage) if self.are_all_held() => {
                let surviving = self.surviving_placement(self.placement.epoch.next());
                let may_stay = self.is_here(&surviving) && self.is_bearable(&surviving);
                return if may_stay { Ok(surviving) } else { Err(shortage) };
            }
            Err(shortage) => return Err(shortage),
        };
        if self.holders.is_empty() {
            return Ok(target);
        }
        if self.is_here(&target) {
            return Ok(target);
        }
        let make = |request: &Request<'_>| {
            planner::plan_transition(request, &self.holders, &self.placement, &target)
        };
        let transition = self.request(&self.members(self.nodes.keys().collect()), None, make);
        // Where nodes must fetch before the next step in any case, they fetch what they keep, which fits.
        Ok(match transition {
            Some(transition) if self.is_here(&transition) => Placement { epoch: target.epoch, ..transition },
            _ => target,
        })
    }

    /// The planner's choice: without nodes that leave or are suspended, if the others have room.
    fn target(&mut self) -> Result<Placement, Shortage> {
        let of = |usable: &dyn Fn(&NodeId, &Node) -> bool| -> Vec<NodeId> {
            let usable = self.nodes.iter().filter(|(name, node)| usable(name, node));
            usable.map(|(name, _)| name.clone()).collect()
        };
        let is_suspended = |name: &NodeId| self.suspicion.is_suspended(name);
        let choices = [
            of(&|name, node| !node.draining && !is_suspended(name)),
            of(&|name, node| !node.draining || !is_suspended(name)),
            of(&|_, _| true),
        ];
        let mut short = None;
        for (attempt, names) in choices.into_iter().enumerate().filter(|(_, names)| !names.is_empty()) {
            match self.plan(&names) {
                Ok(placement) => {
                    self.defer_drains(attempt > 0, short);
                    return Ok(placement);
                }
                Err(shortage) => short = short.or(Some(shortage)),
            }
        }
        self.defer_drains(true, short);
        Err(short.unwrap_or(Shortage { bytes: 0, layer: None }))
    }

    fn plan(&self, names: &[NodeId]) -> Result<Placement, Shortage> {
        let members = self.members(names.iter().collect());
        let plan = |previous| Ok(self.request(&members, previous, planner::plan)?.placement);
        match self.placement.members.is_empty() {
            false => plan(Some(&self.placement)),
            true if self.holders.is_empty() => plan(None),
            // A restarted supervisor: the nodes' state shows the previous placement.
            true => plan(Some(&self.surviving_placement(self.placement.epoch))),
        }
    }

    /// Records whether the drains wait for room, and says so once.
    fn defer_drains(&mut self, deferred: bool, short: Option<Shortage>) {
        let lonely = self.are_all_leaving();
        let mut notices = Vec::new();
        for (node, known) in self.nodes.iter_mut().filter(|(_, known)| known.draining) {
            let was = std::mem::replace(&mut known.deferred, deferred && !lonely);
            if let (true, false, Some(short)) = (known.deferred, was, short) {
                let reason =
                    format!("without {node} the model does not fit: {short}; it leaves when there is room");
                notices.push(Notice::DrainDeferred { node: node.clone(), reason });
            }
        }
        for notice in notices {
            if let Notice::DrainDeferred { node, reason } = &notice {
                let (node, reason) = (node.clone(), reason.clone());
                self.effects.push(Effect::Send { node, message: NodeCommand::LeaveDeferred { reason } });
            }
            self.notice(notice);
        }
    }

    /// Whether every shard of a placement is on its nodes.
    fn is_here(&self, placement: &Placement) -> bool {
        let is_here =
            |&shard: &ShardId| placement.holders_unordered(shard).iter().all(|n| self.is_holder(shard, n));
        self.settings.architecture.shards().iter().all(is_here)
    }

    /// Whether a placement fits, or puts nothing on a node that is not there now.
    fn is_bearable(&self, placement: &Placement) -> bool {
        let is_old = |&shard: &ShardId| {
            placement.holders_unordered(shard).iter().all(|n| self.placement.holds(n, shard))
        };
        let fits = |request: &Request<'_>| planner::fits(request, placement);
        self.request(&self.members(self.nodes.keys().collect()), None, fits)
            || self.settings.architecture.shards().iter().all(is_old)
    }

    /// Whether a node holds each shard.
    fn are_all_held(&self) -> bool {
        let held = |shard: &ShardId| self.holders.get(shard).is_some_and(|nodes| !nodes.is_empty());
        self.settings.architecture.shards().iter().all(held)
    }

    /// A placement in which every node keeps its shards, so that the next step starts at once.
    fn surviving_placement(&self, epoch: Epoch) -> Placement {
        let make =
            |request: &Request<'_>| planner::plan_for_survivors(request, &self.holders, &self.placement);
        let mut placement = self.request(&self.members(self.nodes.keys().collect()), None, make);
        placement.epoch = epoch;
        placement
    }

    /// Why shards cannot be loaded on the nodes at hand.
    pub(super) fn shortage_reason(&self, short: Shortage) -> String {
        let parameters = self.settings.architecture.parameters();
        let names: Vec<&str> = self.nodes.keys().map(|node| node.0.as_str()).collect();
        format!(
            "the model ({parameters} parameters, with gradients, optimizer state and activations) does not fit on {}: {short}; \
             add nodes with more memory, or choose a smaller model",
            names.join(", "),
        )
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
