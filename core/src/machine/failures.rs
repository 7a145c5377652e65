//! Nodes that fail, are unreachable or slow: the step is retried, and the node responsible is fenced if it is
//! dispensable. A fenced node may rejoin; it is not used before its suspension ends.

use super::state::Phase;
use super::{Effect, Machine, Notice};
use crate::ids::{NodeId, Step};
use crate::limits::{IMMEDIATE_ATTEMPTS_MAX, LEARNER_MISSES_MAX};
use std::cmp::Reverse;
use std::collections::BTreeSet;

impl Machine {
    pub(super) fn on_failed(&mut self, node: &NodeId, reason: &str, fatal: bool, suspect: Option<NodeId>) {
        if matches!(self.phase, Phase::Gathering(_)) {
            // The step is dropped already.
            return;
        }
        if !self.placement.is_member(node) {
            // A learner has no part in the step yet, and must not stop the run.
            return self.on_cannot_learn(node, reason.to_owned());
        }
        let reason = format!("{node}: {reason}");
        match suspect.filter(|suspect| self.nodes.contains_key(suspect)) {
            Some(suspect) => {
                self.suspicion.record_report(node.clone(), suspect.clone());
                if let Some(culprit) = self.culprit() {
                    return self.fence(&culprit, &format!("a link to it is broken ({reason})"));
                }
                if !fatal && self.retry.attempts >= IMMEDIATE_ATTEMPTS_MAX {
                    return self.wait_for_network(suspect, &reason);
                }
            }
            None => {
                // The node fails by itself: its device, its memory, an actor. Others may hold the same
                // shards.
                let too_many = self.suspicion.record_failure(node);
                if (fatal || too_many) && self.is_dispensable(node) {
                    return self.fence(node, &reason);
                }
            }
        }
        self.retry_step(&reason, fatal);
    }

    /// Of nodes that cannot reach each other, the one with more reports against it; on a tie the one with
    /// less capacity. Never a node whose loss would lose a shard.
    fn culprit(&self) -> Option<NodeId> {
        let rank = |node: &NodeId| {
            let capacity = self.nodes.get(node).map_or(0.0, |n| n.profile.capacity());
            (self.suspicion.reporters_of(node), Reverse(capacity.to_bits()))
        };
        let reported = self.suspicion.reported().into_iter();
        let fenceable = reported.filter(|node| self.nodes.contains_key(*node) && !self.has_last_copy(node));
        fenceable.max_by(|a, b| rank(a).cmp(&rank(b)).then(a.cmp(b))).cloned()
    }

    /// Whether a node has the last copy of a shard.
    pub(super) fn has_last_copy(&self, node: &NodeId) -> bool {
        self.holders.values().any(|nodes| nodes.len() == 1 && nodes.contains(node))
    }

    /// Whether the run can go on without a node.
    pub(super) fn is_dispensable(&self, node: &NodeId) -> bool {
        self.nodes.len() > 1 && !self.has_last_copy(node) && !self.holders.is_empty()
    }

    /// A step, or the move to a placement, timed out: the missing nodes are fenced if they are dispensable,
    /// and the step is retried.
    pub(super) fn on_timeout(&mut self, reason: &str) {
        let missing = self.awaited_nodes();
        let (members, learners): (Vec<NodeId>, Vec<NodeId>) =
            missing.into_iter().partition(|node| self.placement.is_member(node));
        // Where all members are missing, none of them is to blame.
        let some_reported = members.len() < self.placement.members.len();
        if let Some(node) = members.iter().find(|node| some_reported && self.is_dispensable(node)) {
            return self.fence(node, reason);
        }
        let only_learners = members.is_empty() && !learners.is_empty();
        learners.iter().for_each(|node| self.fence(node, reason));
        if !only_learners {
            self.retry_step(reason, false);
        }
    }

    /// The nodes that the present phase waits for.
    pub(super) fn awaited_nodes(&self) -> BTreeSet<NodeId> {
        let without = |done: &dyn Fn(&NodeId) -> bool, nodes: BTreeSet<NodeId>| {
            nodes.into_iter().filter(|node| !done(node)).collect()
        };
        match &self.phase {
            Phase::Gathering(gathering) => gathering.awaited.clone(),
            Phase::Placing { waiting } => waiting.clone(),
            Phase::Training(reports) => without(&|n| reports.prepared.contains_key(n), self.voters()),
            Phase::Validating(reports) => {
                let members = self.placement.members.iter().cloned().collect();
                without(&|n| reports.done.contains(n), members)
            }
            Phase::Finishing(_) => {
                self.checkpoint.as_ref().map(|checkpoint| checkpoint.senders.clone()).unwrap_or_default()
            }
            Phase::Done => BTreeSet::new(),
        }
    }

    /// Fences a node: nothing that it still sends counts. It may rejoin without state.
    pub(super) fn fence(&mut self, node: &NodeId, reason: &str) {
        if self.expel(node, reason) {
            self.on_node_removed(node, reason);
        }
    }

    /// Ends a node's link, with no consequences for the step in flight. Returns whether it was here.
    pub(super) fn expel(&mut self, node: &NodeId, reason: &str) -> bool {
        if self.nodes.remove(node).is_none() {
            return false;
        }
        self.suspicion.suspend(node);
        // Its state does not count any more.
        self.gone.insert(node.clone());
        self.notice(Notice::Fenced { node: node.clone(), reason: reason.into() });
        self.effects.push(Effect::Fence { node: node.clone(), reason: reason.into() });
        true
    }

    /// A background copy failed: a new node is fenced; for a member placement changes pause.
    pub(super) fn on_cannot_learn(&mut self, node: &NodeId, reason: String) {
        if !self.placement.is_learning(node) {
            return;
        }
        self.notice(Notice::MigrationFailed { node: node.clone(), reason: reason.clone() });
        self.schedule_replan();
        if self.placement.is_member(node) {
            self.suspicion.pause();
        } else {
            self.fence(node, &reason);
        }
    }

    /// A member could not send a gradient to a learner.
    pub(super) fn on_learner_unreached(&mut self, by: &NodeId, learner: &NodeId, reason: &str) {
        if self.placement.is_member(by) && self.nodes.contains_key(learner) {
            self.on_cannot_learn(learner, format!("{by} cannot reach it: {reason}"));
        }
    }

    /// A step was committed without a learner: its copies are worthless, and it copies again.
    pub(super) fn on_learner_late(&mut self, node: &NodeId, step: Step) {
        let misses = self.learners_late.entry(node.clone()).or_default();
        misses.count += 1;
        misses.is_behind = true;
        let count = misses.count;
        for shard in self.placement.learners.iter().filter(|(_, nodes)| nodes.contains(node)).map(|(s, _)| *s)
        {
            if let Some(holders) = self.holders.get_mut(&shard) {
                holders.remove(node);
            }
        }
        self.notice(Notice::LearnerLate { node: node.clone(), step });
        if count >= LEARNER_MISSES_MAX {
            self.on_cannot_learn(node, format!("it missed the gradients of {count} steps"));
        }
    }

    /// Retries the step, unless the failure is permanent or attempts are exhausted. Later attempts wait.
    pub(super) fn retry_step(&mut self, reason: &str, fatal: bool) {
        match self.retry.after_failure().filter(|_| !fatal) {
            None => self.give_up(reason.into()),
            Some(0) => self.abort(reason),
            Some(ms) => self.abort_and_wait(reason, ms),
        }
    }
}
