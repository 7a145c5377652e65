//! Membership: nodes that join, return, disconnect, drain and leave.

use super::state::{Node, Phase};
use super::{Effect, Machine, Notice};
use crate::ids::NodeId;
use crate::messages::{NodeCommand, ResidentState};
use crate::profile::Profile;

impl Machine {
    pub(super) fn on_joined(
        &mut self,
        node: NodeId,
        mut profile: Profile,
        address: String,
        held: &ResidentState,
    ) {
        if let Phase::Gathering(gathering) = &mut self.phase {
            gathering.awaited.remove(&node);
        }
        let declared_capacity = profile.capacity();
        if self.accepts_state(held) {
            let (version, shards) = (held.version, held.shards.len());
            self.notice(Notice::Returned { node: node.clone(), version, shards });
            for &shard in &held.shards {
                self.holders.entry(shard).or_default().insert(node.clone());
            }
        } else {
            let capacity = declared_capacity;
            self.notice(Notice::Joined { node: node.clone(), capacity, address: address.clone() });
        }
        profile.scale(self.usual_speedup());
        self.nodes.insert(node, Node { declared_capacity, profile, speed: None, address, draining: false });
        self.mark_placement_dirty();
        self.gather();
    }

    /// Measured capacity of all nodes over their declared one, so that newcomers are compared fairly.
    fn usual_speedup(&self) -> f64 {
        let (measured, declared) = self
            .nodes
            .values()
            .fold((0.0, 0.0), |sum, node| (sum.0 + node.profile.capacity(), sum.1 + node.declared_capacity));
        if declared > 0.0 { measured / declared } else { 1.0 }
    }

    pub(super) fn on_lost(&mut self, node: &NodeId, reason: &str) {
        if self.nodes.remove(node).is_none() {
            return;
        }
        self.notice(Notice::Lost { node: node.clone(), reason: reason.into() });
        self.on_node_removed(node, reason);
    }

    /// The consequences of a removed node, whatever the cause.
    pub(super) fn on_node_removed(&mut self, node: &NodeId, reason: &str) {
        self.forget_holder(node);
        let (member, learner) = (self.placement.is_member(node), self.placement.is_learning(node));
        if member && let Some(checkpoint) = self.checkpoint.take() {
            self.effects.push(Effect::DropCheckpoint { step: checkpoint.step });
        }
        if matches!(self.phase, Phase::Gathering(_)) {
            return;
        }
        self.mark_placement_dirty();
        if member {
            self.abort(&format!("{node} is lost: {reason}"));
        } else if learner {
            self.on_learner_removed(node);
        }
    }

    fn forget_holder(&mut self, node: &NodeId) {
        for nodes in self.holders.values_mut() {
            nodes.remove(node);
        }
    }

    /// No other node depends on a learner: the step goes on without it.
    fn on_learner_removed(&mut self, node: &NodeId) {
        match &mut self.phase {
            Phase::Placing { waiting } => {
                waiting.remove(node);
                self.finish_placing_if_ready();
            }
            Phase::Training(reports) => {
                reports.prepared.remove(node);
                self.commit_if_prepared();
            }
            _ => {}
        }
    }

    pub(super) fn on_drain(&mut self, node: NodeId) {
        let others = self.nodes.iter().any(|(name, n)| name != &node && !n.draining);
        let Some(known) = self.nodes.get_mut(&node) else { return };
        if known.draining {
            return;
        }
        if !others {
            let reason = format!("{node} is the last node: stop the run instead of draining it");
            return self.notice(Notice::MigrationFailed { node, reason });
        }
        known.draining = true;
        self.mark_placement_dirty();
        self.notice(Notice::Draining { node });
    }

    /// Releases draining nodes that have no part in the placement.
    pub(super) fn release_drained(&mut self) {
        let voters = self.placement.voters();
        let drained = self.nodes.iter().filter(|(name, node)| node.draining && !voters.contains(*name));
        for node in drained.map(|(name, _)| name.clone()).collect::<Vec<_>>() {
            self.nodes.remove(&node);
            self.forget_holder(&node);
            let reason = "drained".into();
            self.effects.push(Effect::Send { node: node.clone(), message: NodeCommand::Leave { reason } });
            self.notice(Notice::Left { node });
        }
    }
}
