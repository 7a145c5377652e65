//! Placement changes: forced by a failure, or at a boundary between steps.
//!
//! There are two kinds of placement. A *target* is the planner's choice for all usable nodes. While a shard
//! of the target is not on its node, the run goes on under a placement of the nodes that have their shards,
//! in which the others are *learners*: they copy in the background and already receive every summed gradient.
//! When all have learned, the next boundary switches to the target without moving anything. So a death copies
//! nothing before the next step, and a join or a drain aborts nothing.

use super::state::{Part, Phase};
use super::{Effect, Machine, Notice};
use crate::ids::{NodeId, ShardId, Step};
use crate::messages::{Assignment, NodeCommand, Source};
use crate::placement::Placement;
use std::collections::BTreeSet;

impl Machine {
    /// Drops the step in flight and makes a new placement; the same step reruns.
    pub(super) fn abort(&mut self, reason: &str) {
        self.drop_step(reason);
        self.place(reason);
    }

    /// Drops the step in flight.
    pub(super) fn drop_step(&mut self, reason: &str) {
        let (epoch, step) = (self.placement.epoch, self.committed.next());
        self.notice(Notice::Aborted { epoch, step, reason: reason.into() });
        self.trouble = Some(reason.into());
        for node in self.voters() {
            self.effects.push(Effect::Send { node, message: NodeCommand::Abort { epoch } });
        }
    }

    /// The next boundary between steps looks for a better placement.
    pub(super) fn schedule_replan(&mut self) {
        self.replan_due = true;
    }

    /// Begins a better placement at a boundary between steps, if there is one. Returns whether it did.
    pub(super) fn replan_if_due(&mut self) -> bool {
        if !self.replan_due || self.suspicion.is_paused() {
            return false;
        }
        self.replan_due = false;
        // While every shard is held, there is a placement.
        let Ok(next) = self.next_placement() else { return false };
        let learning = self.placement.learning_nodes();
        let unchanged = next.has_same_layout(&self.placement)
            && next.learners == self.placement.learners
            && learning.iter().all(|node| self.nodes.contains_key(node));
        if !unchanged && self.compares_before(&next) {
            self.replan_due = true;
            return false;
        }
        if self.all_learned() {
            let (epoch, step) = (self.placement.epoch, self.committed);
            let shards = self.placement.learners.values().map(BTreeSet::len).sum();
            self.notice(Notice::Migrated { epoch, step, shards });
        }
        if !unchanged {
            let cause = self.cause(&next);
            self.begin_epoch(next, cause);
        }
        !unchanged
    }

    /// Makes a placement now, whatever is in flight.
    pub(super) fn place(&mut self, cause: &str) {
        if self.nodes.is_empty() {
            return self.wait_for_nodes();
        }
        if self.wait_for_return() {
            return;
        }
        if let Some(step) = self.unverified_checkpoint() {
            return self.verify_checkpoint(step);
        }
        self.go_back_if_a_shard_is_lost();
        match self.next_placement() {
            Ok(next) => self.begin_epoch(next, cause.into()),
            Err(short) => self.wait_for_capacity(self.shortage_reason(short)),
        }
    }

    /// The checkpoint that nodes would load now, if its bytes are not known to be intact.
    fn unverified_checkpoint(&self) -> Option<Step> {
        let is_loaded = self.holders.is_empty() || self.lost_shard().is_some();
        self.durable.filter(|&step| is_loaded && self.verified != Some(step))
    }

    fn begin_epoch(&mut self, placement: Placement, cause: String) {
        self.placement = placement;
        self.learners_late.clear();
        self.gone.clear();
        self.forget_new_copies();
        self.idle_ms = 0;
        // The budget for moves may have left something over.
        self.replan_due = self.placement.learners.is_empty();
        let voters = self.voters();
        let assignments = self.assignments(&voters);
        let driven = self.placement.lanes_by_driver();
        let part = |(node, assignment): &(NodeId, Assignment)| {
            let lanes = driven.get(node).map_or(0, Vec::len);
            (node.clone(), Part { shards: assignment.shards.len(), lanes })
        };
        self.parts = assignments.iter().map(part).collect();
        let state = self.persistent(self.placement.members.clone());
        self.effects.push(Effect::Persist(state));
        let placed = self.placed_notice(cause, &assignments);
        self.notice(placed);
        for (node, assignment) in assignments {
            self.effects.push(Effect::Send { node, message: NodeCommand::Assign(Box::new(assignment)) });
        }
        self.phase = Phase::Placing { waiting: voters };
        self.release_drained();
    }

    fn placed_notice(&self, cause: String, assignments: &[(NodeId, Assignment)]) -> Notice {
        let placement = &self.placement;
        let nodes = placement.members.clone();
        let sources = assignments.iter().flat_map(|(_, assignment)| &assignment.shards);
        let fetched = sources.filter(|(_, source)| *source != Source::Held).count();
        let learners = placement.learners.iter().flat_map(|(s, nodes)| nodes.iter().map(move |n| (s, n)));
        let learning = learners.filter(|(shard, node)| !self.is_holder(**shard, node)).count();
        let staged = |node: &&NodeId| placement.stages.iter().any(|stage| stage.holds(node));
        let experts_only = nodes.len() - nodes.iter().filter(staged).count();
        let counts = placement.lane_counts();
        let lanes = nodes.iter().map(|node| counts.get(node).copied().unwrap_or(0)).collect();
        Notice::Placed {
            epoch: placement.epoch,
            step: self.committed,
            cause,
            nodes,
            fetched,
            learning,
            stages: placement.stages.len(),
            experts_only,
            predicted_step_ms: 1e3 * self.predicted_step_s(),
            lanes,
        }
    }

    /// Whether a node holds a shard at the committed version.
    pub(super) fn is_holder(&self, shard: ShardId, node: &NodeId) -> bool {
        self.holders.get(&shard).is_some_and(|nodes| nodes.contains(node))
    }

    pub(super) fn on_ready(&mut self, node: &NodeId) {
        let Phase::Placing { waiting } = &mut self.phase else { return };
        waiting.remove(node);
        self.finish_placing_if_ready();
    }

    pub(super) fn finish_placing_if_ready(&mut self) {
        if !matches!(&self.phase, Phase::Placing { waiting } if waiting.is_empty()) {
            return;
        }
        for shard in self.settings.architecture.shards() {
            let learners = self.placement.learners.get(&shard);
            let learned = self.holders.remove(&shard).unwrap_or_default();
            let learned = learned.into_iter().filter(|n| learners.is_some_and(|nodes| nodes.contains(n)));
            let placed = self.placement.holders_unordered(shard).iter().cloned();
            let mut holders: BTreeSet<NodeId> = placed.chain(learned).collect();
            holders.retain(|node| self.nodes.contains_key(node));
            self.holders.insert(shard, holders);
        }
        self.replan_due |= self.all_learned();
        self.release_drained();
        self.advance();
    }

    /// M-5. Copies of another version are of a step that the learner has missed or not yet applied.
    pub(super) fn on_learned(&mut self, node: &NodeId, version: Step, shards: &[ShardId]) {
        // It receives gradients again: the next commit waits for it.
        if let Some(late) = self.learners_late.get_mut(node) {
            late.is_behind = false;
        }
        if version != self.committed {
            return;
        }
        for shard in shards {
            if self.placement.learners.get(shard).is_some_and(|nodes| nodes.contains(node)) {
                let is_new = self.holders.entry(*shard).or_default().insert(node.clone());
                if is_new {
                    self.on_new_copy(*shard, node);
                }
            }
        }
        self.replan_due |= self.all_learned();
    }

    /// Whether there are learners, and all that are still connected have their shards, equal to the members'.
    pub(super) fn all_learned(&self) -> bool {
        let has = |shard: ShardId, node: &NodeId| {
            let is_equal = || self.is_holder(shard, node) && !self.is_new_copy(shard, node);
            !self.nodes.contains_key(node) || is_equal()
        };
        let learners = &self.placement.learners;
        !learners.is_empty()
            && learners.iter().all(|(shard, nodes)| nodes.iter().all(|node| has(*shard, node)))
    }

    /// A shard of which no copy exists: neither in memory nor, at the committed version, in a checkpoint or
    /// the seed.
    pub(super) fn lost_shard(&self) -> Option<ShardId> {
        self.lost_shards().first().copied()
    }

    /// All of them; see [`Machine::lost_shard`].
    pub(super) fn lost_shards(&self) -> Vec<ShardId> {
        if self.is_durable() && self.holders.is_empty() {
            return Vec::new();
        }
        let nowhere = |shard: &ShardId| self.holders.get(shard).is_none_or(BTreeSet::is_empty);
        self.settings.architecture.shards().into_iter().filter(nowhere).collect()
    }

    /// M-4.
    fn go_back_if_a_shard_is_lost(&mut self) {
        let Some(shard) = self.lost_shard() else { return };
        let checkpoint = self.durable.unwrap_or_default();
        if self.committed != checkpoint {
            self.go_back(Notice::WentBack { from: self.committed, to: checkpoint, shard });
        }
        self.holders.clear();
        self.away.clear();
    }

    /// The cause of a placement at a boundary, for the log.
    fn cause(&self, next: &Placement) -> String {
        let voters = next.voters();
        let is_new = |n: &&NodeId| self.nodes.contains_key(*n) && !self.placement.members.contains(n);
        let new: Vec<&NodeId> = voters.iter().filter(is_new).collect();
        let draining: Vec<&NodeId> =
            self.nodes.iter().filter(|(_, n)| n.is_leaving()).map(|(n, _)| n).collect();
        let list = |names: &[&NodeId]| names.iter().map(|n| n.0.as_str()).collect::<Vec<_>>().join(", ");
        match (new.is_empty(), draining.is_empty()) {
            (false, _) => format!("{} joins", list(&new)),
            (true, false) => format!("{} leaves", list(&draining)),
            (true, true) => "load is rebalanced".into(),
        }
    }
}
