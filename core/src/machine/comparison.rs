//! Replicas that are compared, and what follows where they differ.
//!
//! Every replica applies each update by itself. Within `cluster.compare_within` steps each shard has its
//! turn: its holders report a digest of its state before the step, and the step is committed only if all are
//! equal. A copy that a learner has made is compared before a placement uses it. Gradients are compared by
//! their norms in every step.
//!
//! Invariant **M-6**: a step is committed only if the compared replicas of its members are equal. A replica
//! that differs may have taken part in the steps since it was last equal, so that the run goes back to a
//! checkpoint from before that ([`Effect::CheckpointAgreed`]), unless no step lies between. Nodes that differ
//! from the majority are fenced.

use super::state::{Phase, Prepared, StepReports};
use super::{Compared, Effect, Machine, Notice};
use crate::ids::{NodeId, ShardId, Step};
use crate::limits::RETURNS_MAX;
use crate::placement::Placement;
use std::collections::{BTreeMap, BTreeSet};

/// What is known of the equality of replicas.
#[derive(Debug, Default)]
pub(super) struct Comparison {
    /// The last version at which all replicas of a shard were equal.
    equal_at: BTreeMap<ShardId, Step>,
    /// Shards that a member is about to give up: their replicas are compared in the next step.
    moving: BTreeSet<ShardId>,
    /// Copies of learners that were not compared yet.
    pub(super) new_copies: BTreeSet<(ShardId, NodeId)>,
    /// The newest checkpoint after which all replicas of every shard were equal.
    agreed: Option<Step>,
    /// Durable checkpoints after that one, each with the nodes that have stored its shards.
    later: BTreeMap<Step, BTreeSet<NodeId>>,
    /// Returns to the checkpoint `agreed`, or to the seed.
    returns: usize,
}

impl Comparison {
    /// The state of a run that starts at a checkpoint.
    pub(super) fn new(durable: Option<Step>, agreed: Option<Step>) -> Self {
        // Weights of step 0 came from elsewhere, and from no replica.
        let agreed = agreed.min(durable).or_else(|| durable.filter(|step| *step == Step(0)));
        let later = durable.filter(|_| agreed != durable).map(|step| (step, BTreeSet::new()));
        Self { agreed, later: later.into_iter().collect(), ..Self::default() }
    }
}

/// What nodes report of each shard.
type ByShard<'a, T> = BTreeMap<ShardId, Vec<(&'a NodeId, T)>>;

/// A shard whose replicas differ.
struct Difference {
    shard: ShardId,
    what: Compared,
    /// The members that were compared, the shard's owner first.
    nodes: Vec<NodeId>,
    /// Those that differ from the majority; none without a majority.
    blamed: Vec<NodeId>,
    /// Learners that differ from members who all agree.
    learners: Vec<NodeId>,
}

impl Machine {
    /// The shards whose turn it is in the next step, and those with new copies.
    pub(super) fn shards_to_compare(&self) -> Vec<ShardId> {
        let within = self.settings.cluster.compare_within;
        let shards = self.settings.architecture.shards();
        if within == 0 || shards.is_empty() {
            return Vec::new();
        }
        let count = shards.len() as u64;
        let in_turn = count.div_ceil(within);
        let start = (self.committed.0 % within) * in_turn;
        // No later step compares what the last one meets.
        let is_last = self.committed.next() >= self.settings.training.last_step();
        let turn = if is_last { 0..count } else { start..(start + in_turn).min(count) };
        let turn = turn.map(|index| shards[index as usize]);
        let new = self.comparison.new_copies.iter().map(|(shard, _)| *shard);
        let compare: BTreeSet<ShardId> =
            turn.chain(new).chain(self.comparison.moving.iter().copied()).collect();
        compare.into_iter().filter(|shard| self.replicas(*shard) > 1).collect()
    }

    /// Whether a placement waits for one step, which compares the replicas that members would give up:
    /// once they are released, no comparison is possible.
    pub(super) fn compares_before(&mut self, next: &Placement) -> bool {
        let was_asked = !std::mem::take(&mut self.comparison.moving).is_empty();
        if was_asked || self.settings.cluster.compare_within == 0 {
            return false;
        }
        let gives_up = |shard: &ShardId| {
            let mut holders = self.placement.holders_unordered(*shard).iter();
            self.replicas(*shard) > 1 && holders.any(|node| !next.holds(node, *shard))
        };
        let is_compared = |shard: &ShardId| {
            self.comparison.equal_at.get(shard).is_some_and(|at| at.next() == self.committed)
        };
        let shards = self.settings.architecture.shards().into_iter();
        self.comparison.moving = shards.filter(|shard| gives_up(shard) && !is_compared(shard)).collect();
        !self.comparison.moving.is_empty()
    }

    /// The nodes that hold or learn a shard in the present placement.
    fn replicas(&self, shard: ShardId) -> usize {
        let learners = self.placement.learners.get(&shard).map_or(0, BTreeSet::len);
        self.placement.holders_unordered(shard).len() + learners
    }

    /// A learner has a copy: it is compared before a placement uses it.
    pub(super) fn on_new_copy(&mut self, shard: ShardId, node: &NodeId) {
        if self.settings.cluster.compare_within > 0 {
            self.comparison.new_copies.insert((shard, node.clone()));
        }
    }

    /// Whether a learner's copy was not compared yet.
    pub(super) fn is_new_copy(&self, shard: ShardId, node: &NodeId) -> bool {
        // Most of the time there is none, and a name need not be cloned.
        !self.comparison.new_copies.is_empty() && self.comparison.new_copies.contains(&(shard, node.clone()))
    }

    /// Copies of nodes that learn no longer need no comparison of their own.
    pub(super) fn forget_new_copies(&mut self) {
        let learners = &self.placement.learners;
        let learns =
            |(shard, node): &(ShardId, NodeId)| learners.get(shard).is_some_and(|nodes| nodes.contains(node));
        self.comparison.new_copies.retain(learns);
    }

    /// M-6. Follows up the first difference; without one among the members, the step can be committed.
    pub(super) fn are_replicas_equal(&mut self, reports: &StepReports) -> bool {
        let step = self.committed.next();
        let differences = self.differences(&reports.prepared);
        for difference in &differences {
            let Difference { shard, what, nodes, blamed, learners } = difference;
            let blamed = [blamed.as_slice(), learners].concat();
            self.notice(Notice::ReplicasDiffer {
                step,
                shard: *shard,
                what: *what,
                nodes: nodes.clone(),
                blamed,
            });
        }
        for Difference { shard, what, learners, .. } in &differences {
            learners.iter().for_each(|node| self.on_wrong_copy(node, *shard, *what));
        }
        if let Some(difference) = differences.into_iter().find(|found| found.learners.is_empty()) {
            match difference.what {
                Compared::State => self.on_unequal_state(&difference),
                Compared::Gradient => self.on_unequal_gradients(&difference),
            }
        }
        // A node that was fenced, or going back, drops the step.
        let is_equal = matches!(self.phase, Phase::Training(_));
        if is_equal {
            self.record_equal(reports);
        }
        is_equal
    }

    fn differences(&self, prepared: &BTreeMap<NodeId, Prepared>) -> Vec<Difference> {
        let mut digests: ByShard<'_, [u8; 32]> = BTreeMap::new();
        let mut norms: ByShard<'_, (u64, bool)> = BTreeMap::new();
        for (node, report) in prepared {
            for (shard, digest) in &report.digests {
                digests.entry(*shard).or_default().push((node, digest.0));
            }
            for (shard, norm) in &report.norms {
                norms.entry(*shard).or_default().push((node, (norm.squared.to_bits(), norm.finite)));
            }
        }
        let states = digests.iter().filter_map(|(shard, all)| self.difference(*shard, Compared::State, all));
        let gradients =
            norms.iter().filter_map(|(shard, all)| self.difference(*shard, Compared::Gradient, all));
        states.chain(gradients).collect()
    }

    /// What differs among the reports of one shard. Learners are judged and have no vote: their copies come
    /// from members.
    fn difference<T: Ord + Copy>(
        &self,
        shard: ShardId,
        what: Compared,
        reports: &[(&NodeId, T)],
    ) -> Option<Difference> {
        if reports.iter().all(|(_, value)| *value == reports[0].1) {
            return None;
        }
        let (members, learners): (Vec<_>, Vec<_>) =
            reports.iter().partition(|(node, _)| self.placement.holds(node, shard));
        let mut votes: BTreeMap<T, usize> = BTreeMap::new();
        for (_, value) in &members {
            *votes.entry(*value).or_default() += 1;
        }
        let majority = votes.iter().find(|(_, count)| **count * 2 > members.len()).map(|(value, _)| *value);
        let differ = |from: &[(&NodeId, T)]| -> Vec<NodeId> {
            let others = from.iter().filter(|(_, value)| majority.is_some_and(|right| *value != right));
            others.map(|(node, _)| (*node).clone()).collect()
        };
        let blamed = differ(&members);
        let learners = if votes.len() == 1 { differ(&learners) } else { Vec::new() };
        let mut nodes = self.placement.holders(shard);
        nodes.retain(|node| members.iter().any(|(member, _)| *member == node));
        Some(Difference { shard, what, nodes, blamed, learners })
    }

    /// A learner's copy is not equal to the members' state.
    fn on_wrong_copy(&mut self, node: &NodeId, shard: ShardId, what: Compared) {
        if let Some(holders) = self.holders.get_mut(&shard) {
            holders.remove(node);
        }
        self.comparison.new_copies.remove(&(shard, node.clone()));
        let reason = format!("its {what} of {shard} is not that of the members");
        match self.is_dispensable(node) {
            true => self.fence(node, &reason),
            false => self.on_cannot_learn(node, reason),
        }
    }

    /// Members have unlike gradients: the step runs again without the nodes that differ, or, without a
    /// majority, with another owner.
    fn on_unequal_gradients(&mut self, difference: &Difference) {
        let reason = format!("replicas of {} have unlike gradients", difference.shard);
        let suspects = match difference.blamed.is_empty() {
            true => &difference.nodes,
            false => &difference.blamed,
        };
        match suspects.iter().find(|node| self.is_dispensable(node)).cloned() {
            Some(node) => self.fence(&node, &reason),
            None => self.retry_step(&reason, false),
        }
    }

    /// Replicas of members are not equal.
    fn on_unequal_state(&mut self, difference: &Difference) {
        let Difference { shard, blamed, .. } = difference;
        let reason = format!("replicas of {shard} are not equal");
        let was_equal = self.comparison.equal_at.get(shard).copied();
        // Neither a step nor a checkpoint can have met the difference.
        let is_new = was_equal.is_some_and(|at| at.next() == self.committed);
        let is_clean = is_new && self.durable != Some(self.committed) && !blamed.is_empty();
        if is_clean && blamed.iter().all(|node| self.is_dispensable(node)) {
            return blamed.iter().for_each(|node| self.fence(node, &reason));
        }
        self.go_back_from_difference(difference, &reason);
    }

    fn go_back_from_difference(&mut self, difference: &Difference, reason: &str) {
        let Difference { shard, nodes, blamed, .. } = difference;
        if self.comparison.returns >= RETURNS_MAX {
            let names: Vec<&str> = nodes.iter().map(|node| node.0.as_str()).collect();
            let reason = format!(
                "{reason} again, after {RETURNS_MAX} returns to the same checkpoint: {} compute with unlike \
                 results, or one of them is broken",
                names.join(" and ")
            );
            return self.end(Effect::Fatal { reason });
        }
        self.comparison.returns += 1;
        self.drop_step(reason);
        let (from, to) = (self.committed, self.comparison.agreed.unwrap_or_default());
        self.durable = self.comparison.agreed;
        self.go_back(Notice::WentBackFromDifference { from, to, shard: *shard });
        for node in blamed {
            self.expel(node, reason);
        }
        self.place(reason);
    }

    /// All replicas come from the newest checkpoint now.
    pub(super) fn forget_comparisons(&mut self) {
        let Comparison { agreed, returns, .. } = self.comparison;
        self.comparison = Comparison { returns, ..Comparison::new(self.durable, agreed) };
    }

    /// What a node has stored can be compared with nothing any more.
    pub(super) fn forget_stored_by(&mut self, node: &NodeId) {
        self.comparison.later.retain(|_, senders| !senders.contains(node));
    }

    fn record_equal(&mut self, reports: &StepReports) {
        let version = self.committed;
        for shard in &reports.compare {
            self.comparison.equal_at.insert(*shard, version);
        }
        let mut compared =
            |shard: ShardId, node: &NodeId| self.comparison.new_copies.remove(&(shard, node.clone()));
        let digests = reports
            .prepared
            .iter()
            .flat_map(|(node, report)| report.digests.iter().map(move |d| (node, d.0)));
        let new = digests.filter(|(node, shard)| compared(*shard, node)).count();
        self.replan_due |= new > 0 && self.all_learned();
        self.agree_on_checkpoint();
    }

    /// A checkpoint is durable.
    pub(super) fn on_later_checkpoint(&mut self, step: Step, senders: BTreeSet<NodeId>) {
        self.comparison.later.insert(step, senders);
        self.agree_on_checkpoint();
    }

    /// Replicas that are equal after a checkpoint was written were equal when it was written.
    fn agree_on_checkpoint(&mut self) {
        let Some(&first) = self.comparison.later.keys().next() else { return };
        let is_compared = self.settings.cluster.compare_within > 0;
        let equal_at = |shard: ShardId| match is_compared && self.replicas(shard) > 1 {
            true => self.comparison.equal_at.get(&shard).copied().unwrap_or_default(),
            false => self.committed,
        };
        let shards = self.settings.architecture.shards();
        let Some(all) = shards.into_iter().map(equal_at).min().filter(|all| *all >= first) else { return };
        let newer = self.comparison.later.split_off(&all.next());
        let older = std::mem::replace(&mut self.comparison.later, newer);
        if let Some((&step, _)) = older.last_key_value() {
            self.comparison.agreed = Some(step);
            self.comparison.returns = 0;
            self.effects.push(Effect::CheckpointAgreed { step });
        }
    }
}
