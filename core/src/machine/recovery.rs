//! New placements: who is in, who holds what, and where each shard's state comes from.

use super::{Effect, Machine, Notice, Phase};
use crate::ids::{NodeId, ShardId};
use crate::messages::{Assignment, Source, ToNode};
use crate::placement::{Member, Placement, Request};
use std::collections::BTreeSet;

impl Machine {
    /// Drops the step in flight and places anew; the same step runs again.
    pub(super) fn abort(&mut self, reason: &str) {
        let (epoch, step) = (self.placement.epoch, self.committed + 1);
        self.notice(Notice::Aborted { epoch, step, reason: reason.into() });
        for node in self.placement.members.clone() {
            if self.nodes.contains_key(&node) {
                self.effects.push(Effect::Send { node, message: ToNode::Abort { epoch } });
            }
        }
        self.place();
    }

    /// Makes the next placement of all nodes at hand, and tells each where its shards come from.
    pub(super) fn place(&mut self) {
        if self.nodes.is_empty() {
            self.wanted_nodes = 1;
            self.phase = Phase::Gathering;
            return;
        }
        self.go_back_if_a_shard_is_lost();
        let members: Vec<Member> =
            self.nodes.iter().map(|(node, n)| Member { node: node.clone(), capacity: n.capacity }).collect();
        let previous = (!self.placement.members.is_empty()).then_some(&self.placement);
        let training = &self.settings.training;
        let placement = Placement::plan(&Request {
            epoch: self.placement.epoch + 1,
            members: &members,
            architecture: &self.settings.architecture,
            lanes: training.lanes,
            lane_group: training.lane_group,
            replication: self.settings.cluster.replication,
            previous,
        });
        self.placement = placement;
        let waiting: BTreeSet<NodeId> = self.nodes.keys().cloned().collect();
        let assignments: Vec<_> = waiting.iter().map(|node| (node.clone(), self.assignment(node))).collect();
        let fetched =
            |(_, source): &&(ShardId, Source)| matches!(source, Source::Peer(_) | Source::Checkpoint(_));
        let moved = assignments.iter().map(|(_, a)| a.shards.iter().filter(fetched).count()).sum();
        let (epoch, step) = (self.placement.epoch, self.committed);
        self.notice(Notice::Placed { epoch, step, nodes: self.placement.members.clone(), moved });
        for (node, assignment) in assignments {
            self.effects.push(Effect::Send { node, message: ToNode::Assign(Box::new(assignment)) });
        }
        self.phase = Phase::Placing { waiting };
    }

    pub(super) fn assignment(&self, node: &NodeId) -> Assignment {
        let shards = self.settings.architecture.shards();
        let held = shards.into_iter().filter(|&shard| self.placement.holds(node, shard));
        Assignment {
            placement: self.placement.clone(),
            version: self.committed,
            shards: held.map(|shard| (shard, self.source(node, shard))).collect(),
            addresses: self.nodes.iter().map(|(node, n)| (node.clone(), n.address.clone())).collect(),
        }
    }

    pub(super) fn source(&self, node: &NodeId, shard: ShardId) -> Source {
        match self.holders.get(&shard) {
            Some(holders) if holders.contains(node) => Source::Held,
            // Unlike shards ask unlike peers first, so that one survivor does not serve them all.
            Some(holders) if !holders.is_empty() => {
                let turn = match shard {
                    ShardId::Expert { expert, .. } => usize::from(expert),
                    ShardId::Dense { layer } | ShardId::Router { layer } => usize::from(layer),
                    ShardId::Embedding => 0,
                };
                let peer = holders.iter().nth(turn % holders.len());
                peer.map_or(Source::Initial, |peer| Source::Peer(peer.clone()))
            }
            _ if self.committed == 0 => Source::Initial,
            _ => Source::Checkpoint(self.committed),
        }
    }

    /// M-4.
    pub(super) fn go_back_if_a_shard_is_lost(&mut self) {
        let back = self.durable.unwrap_or(0);
        let lost = self.holders.iter().find(|(_, nodes)| nodes.is_empty()).map(|(&shard, _)| shard);
        if let Some(shard) = lost {
            self.notice(Notice::WentBack { from: self.committed, to: back, shard });
            self.effects.push(Effect::GoBack { step: back });
            self.committed = back;
            self.validated = self.validated.filter(|&step| step <= back);
            self.holders.clear();
        }
    }
}
