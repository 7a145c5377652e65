//! Membership: nodes that join, return, disconnect, drain and leave.

use super::state::{Finish, Node, Phase};
use super::{Effect, LossCause, Machine, Notice};
use crate::digest::Digest;
use crate::ids::{NodeId, ShardId};
use crate::messages::{NodeCommand, ResidentState};
use crate::placement::Placement;
use crate::profile::Profile;
use std::collections::{BTreeMap, BTreeSet};

/// Bytes of a parameter.
pub(super) const PARAMETER_BYTES: u64 = 4;

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
        let is_new_kind = self.is_new_arithmetic(profile.arithmetic);
        profile.scale(self.usual_speedup());
        self.gone.remove(&node);
        self.away.remove(&node);
        let (draining, deferred) = (false, false);
        self.nodes
            .insert(node, Node { declared_capacity, profile, speed: None, address, draining, deferred });
        if is_new_kind {
            let kinds = self.arithmetic_kinds();
            self.notice(Notice::ArithmeticMixed { kinds });
        }
        self.schedule_replan();
        match self.phase {
            // The run goes on with the newcomer.
            Phase::Finishing(Finish::Empty) => self.advance(),
            _ => self.gather(),
        }
    }

    /// Whether the nodes that are here are of other arithmetic kinds, and of known ones.
    fn is_new_arithmetic(&self, arithmetic: Option<Digest>) -> bool {
        let known: Vec<Digest> = self.nodes.values().filter_map(|node| node.profile.arithmetic).collect();
        arithmetic.is_some_and(|kind| !known.is_empty() && !known.contains(&kind))
    }

    /// The nodes of each arithmetic kind.
    fn arithmetic_kinds(&self) -> Vec<Vec<NodeId>> {
        let mut kinds: BTreeMap<Digest, Vec<NodeId>> = BTreeMap::new();
        for (name, node) in &self.nodes {
            if let Some(kind) = node.profile.arithmetic {
                kinds.entry(kind).or_default().push(name.clone());
            }
        }
        kinds.into_values().collect()
    }

    /// Measured capacity of all nodes over their declared one, so that newcomers are compared fairly.
    fn usual_speedup(&self) -> f64 {
        let (measured, declared) = self
            .nodes
            .values()
            .fold((0.0, 0.0), |sum, node| (sum.0 + node.profile.capacity(), sum.1 + node.declared_capacity));
        if declared > 0.0 { measured / declared } else { 1.0 }
    }

    pub(super) fn on_lost(&mut self, node: &NodeId, cause: LossCause, reason: &str) {
        if cause == LossCause::Ended {
            self.gone.insert(node.clone());
            self.away.remove(node);
        }
        if self.nodes.remove(node).is_some() {
            self.notice(Notice::Lost { node: node.clone(), reason: reason.into() });
            self.on_node_removed(node, reason);
        }
        // It is waited for no longer, whenever it was lost.
        if let (LossCause::Ended, Phase::Gathering(gathering)) = (cause, &mut self.phase) {
            gathering.awaited.remove(node);
            self.gather();
        }
    }

    /// The consequences of a removed node, whatever the cause.
    pub(super) fn on_node_removed(&mut self, node: &NodeId, reason: &str) {
        let has_last_copy = self.has_last_copy(node);
        let held = self.forget_holder(node);
        self.forget_stored_by(node);
        if !self.gone.contains(node) {
            self.away.insert(node.clone(), held);
        }
        let (member, learner) = (self.placement.is_member(node), self.placement.is_learning(node));
        let reason = format!("{node} is lost: {reason}");
        if let Some(checkpoint) = self.checkpoint.take_if(|checkpoint| checkpoint.senders.contains(node)) {
            self.effects.push(Effect::DropCheckpoint { attempt: checkpoint.attempt });
            self.notice(Notice::CheckpointFailed { step: checkpoint.step, reason: reason.clone() });
        }
        self.schedule_replan();
        match &mut self.phase {
            Phase::Gathering(gathering) if has_last_copy && !self.gone.contains(node) => {
                gathering.awaited.insert(node.clone());
            }
            Phase::Gathering(_) | Phase::Done => {}
            Phase::Finishing(Finish::GiveUp(why)) if has_last_copy => {
                let reason = format!("{why}; then {reason}");
                self.end(Effect::Fatal { reason });
            }
            // The others hold everything: the last checkpoint is repeated with them.
            Phase::Finishing(Finish::GiveUp(_) | Finish::Empty) if !has_last_copy => {}
            _ if member || has_last_copy => self.abort(&reason),
            _ if learner => self.on_learner_removed(node),
            _ => {}
        }
    }

    /// Returns what it held.
    fn forget_holder(&mut self, node: &NodeId) -> BTreeSet<ShardId> {
        let held = self.holders.iter_mut().filter_map(|(shard, nodes)| nodes.remove(node).then_some(*shard));
        held.collect()
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

    /// Every node may leave, at the latest once a checkpoint has what it holds.
    pub(super) fn on_drain(&mut self, node: NodeId) {
        let Some(known) = self.nodes.get_mut(&node).filter(|known| !known.draining) else { return };
        known.draining = true;
        self.schedule_replan();
        let (bytes, sole_bytes) = (self.bytes_on(&node), self.sole_bytes_on(&node));
        let bandwidth = self.nodes[&node].profile.bandwidth;
        self.notice(Notice::Draining { node, bytes, sole_bytes, seconds: sole_bytes as f64 / bandwidth });
        if let Phase::Gathering(_) = self.phase {
            self.release_drained();
            if self.are_all_leaving() && self.lost_shard().is_none() {
                self.empty();
            }
        }
    }

    /// Bytes of the weights that a node holds.
    fn bytes_on(&self, node: &NodeId) -> u64 {
        self.bytes_where(|holders| holders.contains(node))
    }

    /// Bytes of the weights that a node holds and no other node that stays.
    fn sole_bytes_on(&self, node: &NodeId) -> u64 {
        let stays = |other: &NodeId| self.nodes.get(other).is_some_and(|known| !known.draining);
        let elsewhere =
            |holders: &BTreeSet<NodeId>| holders.iter().any(|other| other != node && stays(other));
        self.bytes_where(|holders| holders.contains(node) && !elsewhere(holders))
    }

    /// Bytes of the weights of the shards whose holders meet a condition.
    fn bytes_where(&self, condition: impl Fn(&BTreeSet<NodeId>) -> bool) -> u64 {
        let shards = self.holders.iter().filter(|(_, holders)| condition(holders));
        shards.map(|(shard, _)| self.settings.architecture.shard_parameters(*shard) * PARAMETER_BYTES).sum()
    }

    /// Whether there are nodes, and all of them leave.
    pub(super) fn are_all_leaving(&self) -> bool {
        !self.nodes.is_empty() && self.nodes.values().all(|node| node.draining)
    }

    /// All nodes leave: a checkpoint takes over what they hold.
    pub(super) fn empty(&mut self) {
        self.notice(Notice::Emptying { step: self.committed });
        self.finish(Finish::Empty);
    }

    /// Releases draining nodes that do not vote, are no source of a pending fetch, and have stored all their
    /// shards of a checkpoint.
    pub(super) fn release_drained(&mut self) {
        let voters = match &self.phase {
            // The placement is over. Its members are needed as long as they hold something.
            Phase::Gathering(_) => self.holders.values().flatten().cloned().collect(),
            Phase::Placing { .. } => self.placement.voters().union(&self.sources()).cloned().collect(),
            _ => self.placement.voters(),
        };
        let stores = |name: &NodeId| self.checkpoint.as_ref().is_some_and(|c| c.senders.contains(name));
        let drained = self
            .nodes
            .iter()
            .filter(|(name, node)| node.draining && !voters.contains(*name) && !stores(name));
        for node in drained.map(|(name, _)| name.clone()).collect::<Vec<_>>() {
            self.release(node);
        }
    }

    /// The nodes from which members fetch shards before the next step.
    fn sources(&self) -> BTreeSet<NodeId> {
        let is_fetched = |shard: ShardId| {
            self.placement.holders_unordered(shard).iter().any(|node| !self.is_holder(shard, node))
        };
        let fetched = self.holders.iter().filter(|(shard, _)| is_fetched(**shard));
        fetched.flat_map(|(_, nodes)| nodes).cloned().collect()
    }

    /// All nodes leave. The run waits for others, who load the checkpoint.
    pub(super) fn release_all(&mut self) {
        for node in self.nodes.keys().cloned().collect::<Vec<_>>() {
            self.release(node);
        }
        self.placement = Placement { epoch: self.placement.epoch, ..Placement::default() };
        let state = self.persistent(Vec::new());
        self.effects.push(Effect::Persist(state));
        self.wait_for_nodes();
    }

    fn release(&mut self, node: NodeId) {
        self.nodes.remove(&node);
        self.forget_holder(&node);
        let reason = "drained".into();
        self.effects.push(Effect::Send { node: node.clone(), message: NodeCommand::Leave { reason } });
        self.notice(Notice::Left { node });
    }
}
