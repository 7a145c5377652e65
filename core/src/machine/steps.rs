//! From one boundary between steps to the next: begin, prepared, commit; and the held-out loss in between.

use super::{Committed, Effect, Machine, Notice, Phase};
use crate::ids::{Lane, NodeId, ShardId, Step};
use crate::messages::{LaneReport, LastCommit, NodeCommand, Norm, Pass};
use crate::schedule::Update;
use crate::tree::fold_numbers;
use std::collections::{BTreeMap, BTreeSet};

impl Machine {
    /// Between two steps: whatever is due, then the next step.
    pub(super) fn advance(&mut self) {
        let over = self.stopping || self.committed >= self.settings.training.last_step();
        let every = self.settings.validation.every;
        let due = self.committed == Step(0) || over || (every > 0 && self.committed.is_multiple_of(every));
        if due
            && self.settings.validation.rounds > 0
            && !self.stopping
            && self.validated != Some(self.committed)
        {
            self.phase = Phase::Validating { round: 0, done: BTreeSet::new(), lanes: BTreeMap::new() };
            return self.begin(Pass::Validate { round: 0 });
        }
        self.checkpoint_if_due(over);
        if over {
            self.phase = Phase::Finishing;
            return self.finish_when_durable();
        }
        if self.replan_if_dirty() {
            return;
        }
        self.phase = Phase::Training { prepared: BTreeMap::new(), lanes: BTreeMap::new() };
        self.begin(Pass::Train);
    }

    fn begin(&mut self, pass: Pass) {
        self.idle_ms = 0;
        let (epoch, step) = (self.placement.epoch, self.committed.next());
        let who: Vec<NodeId> = match pass {
            Pass::Train => self.voters().into_iter().collect(),
            Pass::Validate { .. } => self.placement.members.clone(),
        };
        let driven = self.placement.lanes_by_driver();
        for node in who {
            let lanes = driven.get(&node).into_iter().flatten().map(|&lane| (lane, Vec::new())).collect();
            self.effects
                .push(Effect::Send { node, message: NodeCommand::Begin { epoch, step, pass, lanes } });
        }
    }

    /// Everybody in the placement who is still there.
    pub(super) fn voters(&self) -> BTreeSet<NodeId> {
        let mut voters = self.placement.voters();
        voters.retain(|node| self.nodes.contains_key(node));
        voters
    }

    pub(super) fn on_prepared(
        &mut self,
        node: NodeId,
        step: Step,
        norms: Vec<(ShardId, Norm)>,
        reports: Vec<(Lane, LaneReport)>,
    ) {
        let voter = self.placement.is_member(&node) || self.placement.is_learning(&node);
        let voter = voter && self.nodes.contains_key(&node);
        let Phase::Training { prepared, lanes } = &mut self.phase else { return };
        if step != self.committed.next() || !voter {
            return;
        }
        lanes.extend(reports);
        prepared.insert(node, norms);
        self.when_prepared();
    }

    pub(super) fn when_prepared(&mut self) {
        let Phase::Training { prepared, .. } = &self.phase else { return };
        // Who is gone is no member any more, so that the number tells first.
        if prepared.len() < self.placement.members.len() {
            return;
        }
        let voters = self.voters();
        if voters.iter().all(|node| prepared.contains_key(node)) {
            self.commit();
        }
    }

    /// M-1, M-2: everybody holds the whole gradient; the step becomes part of the run.
    fn commit(&mut self) {
        let Phase::Training { prepared, lanes } = std::mem::replace(&mut self.phase, Phase::Finishing) else {
            return;
        };
        let (step, epoch) = (self.committed.next(), self.placement.epoch);
        let norms = self.fold_norms(step, &prepared);
        let squared: Vec<f64> = norms.values().map(|norm| norm.squared).collect();
        let finite = norms.values().all(|norm| norm.finite);
        let training = &self.settings.training;
        let rate = training.schedule.rate(step, training.steps);
        let (update, grad_norm) =
            Update::decide(fold_numbers(&squared), finite, training.lanes, rate, training.clip_norm);
        let count = f64::from(training.lanes);
        let mean =
            |of: fn(&LaneReport) -> f64| fold_numbers(&lanes.values().map(of).collect::<Vec<_>>()) / count;
        let committed = Committed {
            step,
            epoch,
            loss: mean(|lane| lane.loss),
            aux_loss: mean(|lane| lane.aux_loss),
            gate_entropy: mean(|lane| lane.gate_entropy),
            grad_norm,
            update,
            tokens: training.tokens_per_step(),
            nodes: self.placement.members.len() as u32,
            load: sum_load(lanes.values()),
            dropped: lanes.values().map(|lane| u64::from(lane.dropped)).sum(),
        };
        self.record_load(&committed.load);
        self.effects.push(Effect::Journal(Box::new(committed)));
        self.committed = step;
        self.last = Some(LastCommit { epoch, step, update });
        (self.attempts, self.blocked_ms) = (0, 0);
        self.suspicion.clear();
        for node in self.voters() {
            self.effects.push(Effect::Send { node, message: NodeCommand::Commit { epoch, step, update } });
        }
        self.rebalance_if_worth_it();
        self.advance();
    }

    /// The norm of every shard in the fixed order; holders of one shard must agree to the bit.
    fn fold_norms(
        &mut self,
        step: Step,
        prepared: &BTreeMap<NodeId, Vec<(ShardId, Norm)>>,
    ) -> BTreeMap<ShardId, Norm> {
        let mut folded: BTreeMap<ShardId, Norm> = BTreeMap::new();
        let mut unlike = Vec::new();
        for (shard, norm) in prepared.values().flatten() {
            match folded.insert(*shard, *norm) {
                Some(other) if other.squared.to_bits() != norm.squared.to_bits() => unlike.push(*shard),
                _ => {}
            }
        }
        for shard in unlike {
            self.notice(Notice::ReplicasDiffer { step, shard });
        }
        folded
    }

    pub(super) fn on_validated(&mut self, node: NodeId, at: u64, reports: Vec<(Lane, LaneReport)>) {
        let Phase::Validating { round, done, lanes } = &mut self.phase else { return };
        if at != *round || !self.placement.is_member(&node) {
            return;
        }
        lanes.extend(reports.into_iter().map(|(lane, report)| ((at, lane), report)));
        done.insert(node);
        if done.len() < self.placement.members.len() {
            return;
        }
        *round += 1;
        done.clear();
        if *round < self.settings.validation.rounds {
            let pass = Pass::Validate { round: *round };
            return self.begin(pass);
        }
        let losses: Vec<f64> = lanes.values().map(|lane| lane.loss).collect();
        let tokens = losses.len() as u64 * self.settings.training.tokens_per_lane() as u64;
        let loss = fold_numbers(&losses) / losses.len().max(1) as f64;
        self.validated = Some(self.committed);
        self.effects.push(Effect::Validated { step: self.committed, loss, tokens });
        self.advance();
    }
}

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
