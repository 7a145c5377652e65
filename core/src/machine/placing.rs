//! New placements: who is in, who holds what, and where each shard's state comes from.
//!
//! There are two kinds. A *target* is what the planner wants of all usable nodes. While something that the target needs is
//! not where it is to be, the run goes on under a placement of those who have their shards already, in which the
//! others are *learners*: they copy in the background and get every summed gradient. When all have learned, the next
//! boundary between steps cuts over to the target, and nothing moves any more. So a death costs no copying before the next
//! step, and a join or a drain costs no abort.

use super::{Effect, Machine, Notice, PersistentState, Phase};
use crate::costs::Costs;
use crate::ids::{Epoch, NodeId, ShardId, Step};
use crate::messages::{Assignment, NodeCommand, Source};
use crate::placement::Placement;
use crate::planner::{self, Member, Request};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// Placements that follow one another at boundaries for one reason, each moving what the one before left over: a planner that cannot decide
/// between two must not go on for ever.
const REPLAN_ROUNDS_MAX: u32 = 16;
/// Nodes that a learner is told to ask for a shard, one after the other.
const COPY_SOURCES_MAX: usize = 8;

impl Machine {
    /// Drops the step in flight and places anew; the same step runs again.
    pub(super) fn abort(&mut self, reason: &str) {
        self.drop_step(reason);
        self.place(reason);
    }

    /// Drops the step in flight.
    pub(super) fn drop_step(&mut self, reason: &str) {
        let (epoch, step) = (self.placement.epoch, self.committed.next());
        self.notice(Notice::Aborted { epoch, step, reason: reason.into() });
        for node in self.voters() {
            self.effects.push(Effect::Send { node, message: NodeCommand::Abort { epoch } });
        }
    }

    /// At a boundary between steps: a better placement, if there is one now. Whether one begins.
    pub(super) fn replan_if_dirty(&mut self) -> bool {
        let leaving = self.nodes.values().any(|node| node.draining);
        // A node that leaves may still be sending its shards to the checkpoint.
        if !self.placement_dirty || self.suspicion.is_paused() || (leaving && self.checkpointing.is_some()) {
            return false;
        }
        if self.replan_rounds >= REPLAN_ROUNDS_MAX && self.placement.learners.is_empty() {
            self.placement_dirty = false;
            return false;
        }
        let learning = self.placement.learning_nodes();
        if self.all_learned() {
            let (epoch, step) = (self.placement.epoch, self.committed);
            let shards = self.placement.learners.values().map(BTreeSet::len).sum();
            self.notice(Notice::Migrated { epoch, step, shards });
        }
        let next = self.next_placement();
        let same = next.same_as(&self.placement)
            && next.learners == self.placement.learners
            && learning.iter().all(|node| self.nodes.contains_key(node));
        self.placement_dirty = false;
        if !same {
            self.replan_rounds += 1;
            let cause = self.cause(&next);
            self.begin_epoch(next, &cause);
        }
        !same
    }

    /// Makes a placement now, whatever is in flight.
    pub(super) fn place(&mut self, cause: &str) {
        if self.nodes.is_empty() {
            return self.wait_for_nodes();
        }
        self.go_back_if_a_shard_is_lost();
        if let Some(reason) = self.capacity_shortfall() {
            return self.wait_for_capacity(reason);
        }
        let next = self.next_placement();
        self.begin_epoch(next, cause);
    }

    /// What is lost must be loaded again, and there is no room for it. A run that has begun waits for more nodes; one that has
    /// not says what is wrong with it.
    fn wait_for_capacity(&mut self, reason: String) {
        if self.placement.epoch == Epoch(0) {
            return self.end(Effect::Fatal { reason });
        }
        if !matches!(self.phase, Phase::Gathering) {
            (self.phase, self.idle_ms) = (Phase::Gathering, 0);
            self.awaited.clear();
            self.wanted_nodes = 1;
        }
        self.notice(Notice::NoRoom { reason: reason.clone() });
        self.capacity_shortage = Some((self.nodes.keys().cloned().collect(), reason));
    }

    /// Everybody is gone. Those whose links broke may come back with their state.
    fn wait_for_nodes(&mut self) {
        self.awaited = self.placement.members.iter().cloned().collect();
        self.wanted_nodes = 1;
        self.idle_ms = 0;
        self.placement.members.clear();
        self.placement.learners.clear();
        self.holders.clear();
        self.phase = Phase::Gathering;
    }

    /// What the planner wants, or the way there.
    fn next_placement(&self) -> Placement {
        let target = self.target();
        if self.holders.is_empty() {
            return target;
        }
        let has = |shard: ShardId, node: &NodeId| {
            self.holders.get(&shard).is_some_and(|nodes| nodes.contains(node))
        };
        let shards = self.settings.architecture.shards();
        if shards.iter().all(|&shard| target.holders_unordered(shard).iter().all(|node| has(shard, node))) {
            return target;
        }
        let mut base = self.survivors(target.epoch);
        for shard in shards {
            let learns = target.holders_unordered(shard).iter().filter(|node| !base.holds(node, shard));
            let learners: BTreeSet<NodeId> = learns.cloned().collect();
            if !learners.is_empty() {
                base.learners.insert(shard, learners);
            }
        }
        // Where everybody fetches at once what is missing, nothing is left to learn.
        if base.learners.is_empty() { target } else { base }
    }

    /// Why what nobody holds cannot be loaded on these nodes. As long as every shard is held the run goes on, whatever the
    /// estimate says.
    fn capacity_shortfall(&self) -> Option<String> {
        let held = |shard: &ShardId| self.holders.get(shard).is_some_and(|nodes| !nodes.is_empty());
        if self.settings.architecture.shards().iter().all(held) {
            return None;
        }
        let members = self.members(self.nodes.keys().collect());
        let short = self.request(&members, None, planner::plan).short?;
        let parameters = self.settings.architecture.parameters();
        let names: Vec<&str> = members.iter().map(|m| m.node.0.as_str()).collect();
        Some(format!(
            "the model does not fit on {}: of its {parameters} parameters, with gradients, optimizer and activations, {short}; \
             add nodes with more memory, or choose a smaller model",
            names.join(", "),
        ))
    }

    /// The planner's wish, for every node that may be used.
    fn target(&self) -> Placement {
        let usable = |node: &&NodeId| !self.nodes[*node].draining && !self.suspicion.is_suspended(node);
        let mut names: Vec<&NodeId> = self.nodes.keys().filter(usable).collect();
        if names.is_empty() {
            names = self.nodes.keys().collect();
        }
        let members = self.members(names);
        if self.placement.members.is_empty() && !self.holders.is_empty() {
            // A supervisor that came back: what the nodes hold is the placement that was.
            let was = self.survivors(self.placement.epoch);
            return self.request(&members, Some(&was), planner::plan).placement;
        }
        let previous = (!self.placement.members.is_empty()).then_some(&self.placement);
        self.request(&members, previous, planner::plan).placement
    }

    /// Who can go on at once: whoever has all of a stage's layers, or had a part without any.
    fn survivors(&self, epoch: Epoch) -> Placement {
        let make = |request: &Request<'_>| planner::of_survivors(request, &self.holders, &self.placement);
        let mut placement = self.request(&self.members(self.nodes.keys().collect()), None, make);
        placement.epoch = epoch;
        placement
    }

    fn members(&self, names: Vec<&NodeId>) -> Vec<Member> {
        let member = |n: &NodeId| Member { node: n.clone(), profile: self.nodes[n].profile.clone() };
        names.into_iter().map(member).collect()
    }

    fn request<T>(
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

    fn begin_epoch(&mut self, placement: Placement, cause: &str) {
        self.placement = placement;
        self.idle_ms = 0;
        // A budget may have left something to move.
        self.placement_dirty = self.placement.learners.is_empty();
        let voters = self.voters();
        let assignments = self.assignments(&voters);
        let fetches = |a: &Assignment| a.shards.iter().filter(|(_, source)| *source != Source::Held).count();
        let fetched = assignments.iter().map(|(_, a)| fetches(a)).sum();
        let here =
            |shard: &ShardId, node: &&NodeId| self.holders.get(shard).is_some_and(|h| h.contains(*node));
        let learners = self.placement.learners.iter();
        let learning = learners.map(|(s, nodes)| nodes.iter().filter(|node| !here(s, node)).count()).sum();
        let (epoch, step) = (self.placement.epoch, self.committed);
        let members = self.placement.members.clone();
        self.effects.push(Effect::Persist(PersistentState {
            epoch,
            timeline: self.timeline,
            members: members.clone(),
        }));
        let cause = cause.to_owned();
        let (nodes, stages) = (members, self.placement.stages.len());
        let staged = |node: &&NodeId| self.placement.stages.iter().any(|stage| stage.holds(node));
        let experts_only = nodes.len() - nodes.iter().filter(staged).count();
        let predicted_step_ms = 1e3 * self.predicted_step_s();
        let counts = self.placement.lane_counts();
        let lanes = nodes.iter().map(|node| counts.get(node).copied().unwrap_or(0)).collect();
        self.notice(Notice::Placed {
            epoch,
            step,
            cause,
            nodes,
            fetched,
            learning,
            stages,
            experts_only,
            predicted_step_ms,
            lanes,
        });
        for (node, assignment) in assignments {
            self.effects.push(Effect::Send { node, message: NodeCommand::Assign(Box::new(assignment)) });
        }
        self.phase = Phase::Placing { waiting: voters };
        self.release_drained();
    }

    /// How long a step of the present placement should take, by what was seen of its nodes.
    #[must_use]
    pub fn predicted_step_s(&self) -> f64 {
        let costs = Costs::new(&self.settings.architecture, &self.settings.training);
        let step_s = planner::predict(&self.placement, &self.observed_profiles(&costs), &costs).step_s;
        if step_s.is_finite() { step_s } else { 0.0 }
    }

    /// Nodes that were to leave, and have no part in the run any more.
    pub(super) fn release_drained(&mut self) {
        let voters = self.placement.voters();
        let gone: Vec<NodeId> = self
            .nodes
            .iter()
            .filter(|(n, s)| s.draining && !voters.contains(*n))
            .map(|(n, _)| n.clone())
            .collect();
        for node in gone {
            self.nodes.remove(&node);
            self.holders.values_mut().for_each(|nodes| {
                nodes.remove(&node);
            });
            let reason = "drained".into();
            self.effects.push(Effect::Send { node: node.clone(), message: NodeCommand::Leave { reason } });
            self.notice(Notice::Left { node });
        }
    }

    /// What each of `voters` is told. What is the same for all is shared, and shards are gone through once and not for
    /// every node.
    fn assignments(&self, voters: &BTreeSet<NodeId>) -> Vec<(NodeId, Assignment)> {
        let placement = Arc::new(self.placement.clone());
        let addresses = self.nodes.iter().map(|(node, n)| (node.clone(), n.address.clone())).collect();
        let addresses: Arc<Vec<(NodeId, String)>> = Arc::new(addresses);
        let blank = |node: &NodeId| {
            let assignment = Assignment {
                placement: Arc::clone(&placement),
                timeline: self.timeline,
                version: self.committed,
                last: self.last,
                shards: Vec::new(),
                learn: Vec::new(),
                addresses: Arc::clone(&addresses),
            };
            (node.clone(), assignment)
        };
        let mut assignments: BTreeMap<NodeId, Assignment> = voters.iter().map(blank).collect();
        for shard in self.settings.architecture.shards() {
            for node in self.placement.holders_unordered(shard) {
                if let Some(assignment) = assignments.get_mut(node) {
                    assignment.shards.push((shard, self.source(node, shard)));
                }
            }
        }
        for (shard, nodes) in &self.placement.learners {
            let copy_sources = self.copy_sources(*shard);
            for node in nodes {
                if let Some(assignment) = assignments.get_mut(node) {
                    assignment.learn.push((*shard, copy_sources.clone()));
                }
            }
        }
        assignments.into_iter().collect()
    }

    /// Who can give a shard away, in an order that spreads the work; not more than anybody would ask.
    fn copy_sources(&self, shard: ShardId) -> Vec<NodeId> {
        let Some(holders) = self.holders.get(&shard).filter(|holders| !holders.is_empty()) else {
            return Vec::new();
        };
        let turn = match shard {
            ShardId::Expert { expert, .. } => expert.index(),
            ShardId::Dense { layer } | ShardId::Router { layer } => layer.index(),
            ShardId::Embedding => 0,
        };
        let first = turn % holders.len();
        holders.iter().cycle().skip(first).take(holders.len().min(COPY_SOURCES_MAX)).cloned().collect()
    }

    fn source(&self, node: &NodeId, shard: ShardId) -> Source {
        match self.holders.get(&shard) {
            Some(holders) if holders.contains(node) => Source::Held,
            Some(holders) if !holders.is_empty() => {
                self.copy_sources(shard).into_iter().next().map_or(Source::Initial, Source::Peer)
            }
            _ if self.committed == Step(0) => Source::Initial,
            _ => Source::Checkpoint(self.committed),
        }
    }

    pub(super) fn on_ready(&mut self, node: &NodeId) {
        let Phase::Placing { waiting } = &mut self.phase else { return };
        waiting.remove(node);
        self.when_placed();
    }

    pub(super) fn when_placed(&mut self) {
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
        self.placement_dirty |= self.all_learned();
        self.advance();
    }

    /// M-5.
    pub(super) fn on_learned(&mut self, node: &NodeId, shards: &[ShardId]) {
        for shard in shards {
            if self.placement.learners.get(shard).is_some_and(|nodes| nodes.contains(node)) {
                self.holders.entry(*shard).or_default().insert(node.clone());
            }
        }
        self.placement_dirty |= self.all_learned();
    }

    /// Whether there is something to learn, and everybody who is still there has learned it.
    fn all_learned(&self) -> bool {
        let has = |shard: &ShardId, node: &NodeId| {
            !self.nodes.contains_key(node) || self.holders.get(shard).is_some_and(|h| h.contains(node))
        };
        let learners = &self.placement.learners;
        !learners.is_empty()
            && learners.iter().all(|(shard, nodes)| nodes.iter().all(|node| has(shard, node)))
    }

    /// A shard that must be somewhere and is nowhere: neither in memory nor, as it is, in a checkpoint or the seed.
    pub(super) fn lost_shard(&self) -> Option<ShardId> {
        if self.committed == self.durable.unwrap_or_default() && self.holders.is_empty() {
            return None;
        }
        let nowhere = |shard: &ShardId| self.holders.get(shard).is_none_or(BTreeSet::is_empty);
        self.settings.architecture.shards().into_iter().find(nowhere)
    }

    /// M-4.
    fn go_back_if_a_shard_is_lost(&mut self) {
        let back = self.durable.unwrap_or_default();
        let Some(shard) = self.lost_shard() else { return };
        if self.committed != back {
            self.timeline = self.timeline.next();
            self.notice(Notice::WentBack { from: self.committed, to: back, shard });
            self.effects.push(Effect::GoBack { step: back });
            self.last = None;
            self.committed = back;
            self.validated = self.validated.filter(|&step| step <= back);
        }
        self.holders.clear();
    }

    /// Why a placement changes at a boundary, for people.
    fn cause(&self, next: &Placement) -> String {
        let new: Vec<&NodeId> = next
            .voters()
            .iter()
            .filter_map(|n| self.nodes.get_key_value(n))
            .map(|(n, _)| n)
            .filter(|n| !self.placement.members.contains(n))
            .collect();
        let leaving: Vec<&NodeId> = self.nodes.iter().filter(|(_, n)| n.draining).map(|(n, _)| n).collect();
        let list = |names: &[&NodeId]| names.iter().map(|n| n.0.as_str()).collect::<Vec<_>>().join(", ");
        match (new.is_empty(), leaving.is_empty()) {
            (false, _) => format!("{} joins", list(&new)),
            (true, false) => format!("{} leaves", list(&leaving)),
            (true, true) => "the nodes are made even".into(),
        }
    }
}
