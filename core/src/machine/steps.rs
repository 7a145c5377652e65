//! From one boundary between steps to the next: begin, prepared, commit; and the held-out loss between steps.

use super::state::{Finish, Part, Phase, Prepared, Retry, StepReports, ValidationReports};
use super::{Committed, Effect, Machine};
use crate::digest::Digest;
use crate::ids::{Lane, NodeId, ShardId, Step};
use crate::limits::LEARNER_GRACE_MS;
use crate::messages::{LaneReport, LastCommit, NodeCommand, Norm, Pass};
use crate::placement::Placement;
use crate::tree::fold_numbers;
use crate::update::Update;
use std::collections::{BTreeMap, BTreeSet};

impl Machine {
    /// At a boundary between steps: everything that is due, then the next step.
    pub(super) fn advance(&mut self) {
        let over = self.stopping || self.committed >= self.settings.training.last_step();
        if self.handle_broken(over) {
            return;
        }
        if self.is_validation_due(over) {
            self.phase = Phase::Validating(ValidationReports::default());
            return self.begin(Pass::Validate { round: 0 });
        }
        self.checkpoint_if_due(over);
        if over {
            return self.finish(Finish::Complete);
        }
        if self.are_all_leaving() {
            return self.empty();
        }
        if self.replan_if_due() {
            return;
        }
        let compare = self.shards_to_compare();
        self.phase = Phase::Training(StepReports { compare, ..StepReports::default() });
        self.begin(Pass::Train);
    }

    fn is_validation_due(&self, over: bool) -> bool {
        let options = &self.settings.validation;
        let every = options.every;
        let due = self.committed == Step(0) || over || (every > 0 && self.committed.is_multiple_of(every));
        due && options.rounds > 0 && !self.stopping && self.validated != Some(self.committed)
    }

    fn begin(&mut self, pass: Pass) {
        self.idle_ms = 0;
        let (epoch, step) = (self.placement.epoch, self.committed.next());
        let data = self.data_skips.data_step(step);
        let nodes: Vec<NodeId> = match pass {
            Pass::Train => self.voters().into_iter().collect(),
            Pass::Validate { .. } => self.placement.members.clone(),
        };
        let compare = match &self.phase {
            Phase::Training(reports) => reports.compare.clone(),
            _ => Vec::new(),
        };
        let driven = self.placement.lanes_by_driver();
        for node in nodes {
            let lanes = driven.get(&node).into_iter().flatten().map(|&lane| (lane, Vec::new())).collect();
            let compare = compare.clone();
            let message = NodeCommand::Begin { epoch, step, data, pass, lanes, compare };
            self.effects.push(Effect::Send { node, message });
        }
    }

    /// The members and learners of the placement that are still connected.
    pub(super) fn voters(&self) -> BTreeSet<NodeId> {
        let mut voters = self.placement.voters();
        voters.retain(|node| self.nodes.contains_key(node));
        voters
    }

    pub(super) fn on_prepared(
        &mut self,
        node: NodeId,
        step: Step,
        prepared: Prepared,
        lanes: Vec<(Lane, LaneReport)>,
    ) {
        let has_part = self.placement.is_member(&node) || self.placement.is_learning(&node);
        let is_voter = has_part && self.nodes.contains_key(&node);
        let Phase::Training(reports) = &mut self.phase else { return };
        if step != self.committed.next() || !is_voter || reports.prepared.contains_key(&node) {
            return;
        }
        let held = prepared.norms.iter().map(|(shard, _)| *shard).collect();
        let checked = check_part(&self.placement, self.parts.get(&node), &node, held, &lanes)
            .and_then(|()| check_digests(&self.placement, &node, &reports.compare, &prepared.digests));
        if let Err(reason) = checked {
            return self.on_failed(&node, &reason, false, None);
        }
        reports.lanes.extend(lanes);
        reports.prepared.insert(node, prepared);
        self.commit_if_prepared();
    }

    /// Commits when every member is prepared, and with it every learner that takes no longer than its grace.
    pub(super) fn commit_if_prepared(&mut self) {
        let Phase::Training(reports) = &mut self.phase else { return };
        // A disconnected node aborts the step if it was a member, so that this cheap test comes first.
        if reports.prepared.len() < self.placement.members.len()
            || !self.placement.members.iter().all(|node| reports.prepared.contains_key(node))
        {
            return;
        }
        let is_late = |node: &NodeId| self.learners_late.get(node).is_some_and(|late| late.is_behind);
        let missing: Vec<NodeId> = self
            .placement
            .learning_nodes()
            .into_iter()
            .filter(|node| !reports.prepared.contains_key(node) && self.nodes.contains_key(node))
            .collect();
        let took_ms = self.idle_ms.saturating_sub(reports.grace_ms);
        let in_time = reports.grace_ms < LEARNER_GRACE_MS.max(took_ms);
        if in_time && missing.iter().any(|node| !is_late(node)) {
            return;
        }
        let reports = std::mem::take(reports);
        if self.are_replicas_equal(&reports) {
            self.commit(reports, &missing);
        }
    }

    /// The time that a commit waits for learners.
    pub(super) fn pass_grace(&mut self, ms: u64) {
        let Phase::Training(reports) = &mut self.phase else { return };
        if reports.prepared.len() >= self.placement.members.len()
            && self.placement.members.iter().all(|node| reports.prepared.contains_key(node))
        {
            reports.grace_ms = reports.grace_ms.saturating_add(ms);
            self.commit_if_prepared();
        }
    }

    /// M-1, M-2: every member holds the whole gradient; the step becomes part of the run.
    fn commit(&mut self, reports: StepReports, late: &[NodeId]) {
        let (step, epoch) = (self.committed.next(), self.placement.epoch);
        let members = reports.prepared.iter().filter(|(node, _)| self.placement.is_member(node));
        let norms = members.flat_map(|(_, prepared)| &prepared.norms).copied().collect();
        let committed = self.committed_record(step, &norms, &reports.lanes);
        let update = committed.update;
        self.record_load(&committed.load);
        self.effects.push(Effect::Journal(Box::new(committed)));
        self.committed = step;
        self.count_skipped(update.apply);
        self.away.clear();
        self.last = Some(LastCommit { epoch, step, update });
        self.retry = Retry::default();
        self.suspicion.clear();
        self.trouble = None;
        for node in self.voters() {
            self.effects.push(Effect::Send { node, message: NodeCommand::Commit { epoch, step, update } });
        }
        self.forget_missed_copies(&reports.prepared);
        for node in late {
            self.on_learner_late(node, step);
        }
        self.rebalance_if_worthwhile();
        self.advance();
    }

    /// A learner without a shard's gradient of the committed step has no copy of it any more.
    fn forget_missed_copies(&mut self, prepared: &BTreeMap<NodeId, Prepared>) {
        for (shard, learners) in &self.placement.learners {
            let Some(holders) = self.holders.get_mut(shard) else { continue };
            for node in learners.iter().filter(|node| !self.placement.holds(node, *shard)) {
                let has = |prepared: &Prepared| prepared.norms.iter().any(|(at, _)| at == shard);
                if !prepared.get(node).is_some_and(has) {
                    holders.remove(node);
                }
            }
        }
    }

    /// The record of a step from its norms by shard and its reports by lane.
    fn committed_record(
        &self,
        step: Step,
        norms: &BTreeMap<ShardId, Norm>,
        lanes: &BTreeMap<Lane, LaneReport>,
    ) -> Committed {
        let squared: Vec<f64> = norms.values().map(|norm| norm.squared).collect();
        let finite = norms.values().all(|norm| norm.finite);
        let training = &self.settings.training;
        let (update, grad_norm) = Update::decide(fold_numbers(&squared), finite, training, step);
        let count = f64::from(training.lanes);
        let mean =
            |of: fn(&LaneReport) -> f64| fold_numbers(&lanes.values().map(of).collect::<Vec<_>>()) / count;
        Committed {
            step,
            epoch: self.placement.epoch,
            loss: mean(|lane| lane.loss),
            aux_loss: mean(|lane| lane.aux_loss),
            gate_entropy: mean(|lane| lane.gate_entropy),
            grad_norm,
            update,
            tokens: training.tokens_per_step(),
            nodes: self.placement.members.len() as u32,
            load: sum_load(lanes.values()),
            dropped: lanes.values().map(|lane| u64::from(lane.dropped)).sum(),
        }
    }

    pub(super) fn on_validated(&mut self, node: NodeId, round: u64, lanes: Vec<(Lane, LaneReport)>) {
        let Phase::Validating(reports) = &mut self.phase else { return };
        if round != reports.round || !self.placement.is_member(&node) {
            return;
        }
        if let Err(reason) = check_lanes(&self.placement, self.parts.get(&node), &node, &lanes) {
            return self.on_failed(&node, &reason, false, None);
        }
        reports.lanes.extend(lanes.into_iter().map(|(lane, report)| ((round, lane), report)));
        reports.done.insert(node);
        if reports.done.len() < self.placement.members.len() {
            return;
        }
        reports.round += 1;
        reports.done.clear();
        if reports.round < self.settings.validation.rounds {
            let pass = Pass::Validate { round: reports.round };
            return self.begin(pass);
        }
        let losses: Vec<f64> = reports.lanes.values().map(|lane| lane.loss).collect();
        let tokens = losses.len() as u64 * self.settings.training.tokens_per_lane() as u64;
        let loss = fold_numbers(&losses) / losses.len().max(1) as f64;
        let sequences =
            reports.lanes.values_mut().map(|lane| std::mem::take(&mut lane.sequence_losses)).collect();
        self.validated = Some(self.committed);
        self.effects.push(Effect::Validated { step: self.committed, loss, tokens, sequences });
        self.advance();
    }
}

/// Checks that a node reports its own part of a step: every shard that it holds, and its lanes.
fn check_part(
    placement: &Placement,
    part: Option<&Part>,
    node: &NodeId,
    reported: BTreeSet<ShardId>,
    lanes: &[(Lane, LaneReport)],
) -> Result<(), String> {
    check_lanes(placement, part, node, lanes)?;
    if let Some(shard) = reported.iter().find(|shard| !placement.holds_or_learns(node, **shard)) {
        return Err(format!("it reports {shard}, which it does not hold"));
    }
    let expected = part.copied().unwrap_or_default().shards;
    let held = reported.iter().filter(|shard| placement.holds(node, **shard)).count();
    if held == expected {
        return Ok(());
    }
    Err(format!("it reports {held} of the {expected} shards that it holds"))
}

/// Checks that a member reports the content of every shard to compare that it holds.
fn check_digests(
    placement: &Placement,
    node: &NodeId,
    compare: &[ShardId],
    digests: &[(ShardId, Digest)],
) -> Result<(), String> {
    let reported: BTreeSet<ShardId> = digests.iter().map(|(shard, _)| *shard).collect();
    match compare.iter().find(|shard| placement.holds(node, **shard) && !reported.contains(*shard)) {
        Some(shard) => Err(format!("it does not report the content of {shard}")),
        None => Ok(()),
    }
}

/// Checks that a node reports the lanes that it drives, each once.
fn check_lanes(
    placement: &Placement,
    part: Option<&Part>,
    node: &NodeId,
    lanes: &[(Lane, LaneReport)],
) -> Result<(), String> {
    let driver = |lane| placement.stages.first().and_then(|stage| stage.stage_node(lane));
    if let Some((lane, _)) = lanes.iter().find(|(lane, _)| driver(*lane) != Some(node)) {
        return Err(format!("it reports lane {lane}, which is not its own"));
    }
    let expected = part.copied().unwrap_or_default().lanes;
    let distinct: BTreeSet<Lane> = lanes.iter().map(|(lane, _)| *lane).collect();
    if distinct.len() == expected {
        return Ok(());
    }
    Err(format!("it reports {} of its {expected} lanes", distinct.len()))
}

/// The kept assignments of all lanes, `[MoE layers][experts]`.
fn sum_load<'a>(lanes: impl Iterator<Item = &'a LaneReport>) -> Vec<Vec<u64>> {
    let mut total: Vec<Vec<u64>> = Vec::new();
    for lane in lanes {
        total.resize(total.len().max(lane.load.len()), Vec::new());
        for (sums, counts) in total.iter_mut().zip(&lane.load) {
            sums.resize(sums.len().max(counts.len()), 0);
            sums.iter_mut().zip(counts).for_each(|(sum, &count)| *sum += u64::from(count));
        }
    }
    total
}
