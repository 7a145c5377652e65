//! The supervisor's state machine: membership, the steps of a run, commits, checkpoints and recovery.
//!
//! [`Machine::handle`] takes one [`Event`] and returns the [`Effect`]s to carry out, in order. It knows no clock and
//! does no I/O. Its invariants, which its tests cite:
//!
//! - **M-1** a step is committed once, and only when every member of the placement holds its whole gradient;
//! - **M-2** a commit is journalled before any node hears of it, and never undone while a copy of every shard lives;
//! - **M-3** what carries another epoch than the current one changes nothing;
//! - **M-4** when the last copy of a shard is gone, the run goes back to the last durable checkpoint, as a whole.

mod checkpoints;
mod recovery;
mod types;

pub use types::{Activity, Committed, Effect, Event, Notice, Settings};

use crate::ids::{Epoch, Lane, NodeId, ShardId, Step};
use crate::messages::{FromNode, LaneReport, Norm, Pass, ToNode};
use crate::placement::Placement;
use crate::schedule::Update;
use crate::tree::fold_numbers;
use std::collections::{BTreeMap, BTreeSet};

/// How often one step is tried again before the run gives up.
pub const ATTEMPTS_MAX: u32 = 16;

#[derive(Debug)]
enum Phase {
    Gathering,
    Placing { waiting: BTreeSet<NodeId> },
    Training { prepared: BTreeMap<NodeId, Vec<(ShardId, Norm)>>, lanes: BTreeMap<Lane, LaneReport> },
    Validating { round: u64, done: BTreeSet<NodeId>, lanes: BTreeMap<(u64, Lane), LaneReport> },
    Finishing,
    Done,
}

#[derive(Clone, Debug)]
struct Node {
    capacity: f64,
    address: String,
}

/// The state of a run as the supervisor sees it.
#[derive(Debug)]
pub struct Machine {
    settings: Settings,
    nodes: BTreeMap<NodeId, Node>,
    placement: Placement,
    committed: Step,
    durable: Option<Step>,
    /// The nodes that hold each shard at version `committed`.
    holders: BTreeMap<ShardId, BTreeSet<NodeId>>,
    phase: Phase,
    attempts: u32,
    validated: Option<Step>,
    checkpointing: Option<Step>,
    checkpoint_wanted: bool,
    stopping: bool,
    wanted_nodes: usize,
    effects: Vec<Effect>,
}

impl Machine {
    /// The machine of a run whose last durable checkpoint is `durable` and whose last placement had number `epoch`.
    #[must_use]
    pub fn new(settings: Settings, durable: Option<Step>, epoch: Epoch) -> Self {
        let wanted_nodes = settings.cluster.nodes.max(1);
        Self {
            settings,
            nodes: BTreeMap::new(),
            placement: Placement { epoch, ..Placement::default() },
            committed: durable.unwrap_or(0),
            durable,
            holders: BTreeMap::new(),
            phase: Phase::Gathering,
            attempts: 0,
            validated: None,
            checkpointing: None,
            checkpoint_wanted: false,
            stopping: false,
            wanted_nodes,
            effects: Vec::new(),
        }
    }

    /// The last committed step.
    #[must_use]
    pub fn committed(&self) -> Step {
        self.committed
    }

    /// The current placement; its epoch is 0 before the first.
    #[must_use]
    pub fn placement(&self) -> &Placement {
        &self.placement
    }

    /// What the supervisor is doing.
    #[must_use]
    pub fn activity(&self) -> Activity {
        match self.phase {
            Phase::Gathering => Activity::Gathering,
            Phase::Placing { .. } => Activity::Placing,
            Phase::Training { .. } => Activity::Training,
            Phase::Validating { .. } => Activity::Validating,
            Phase::Finishing => Activity::Finishing,
            Phase::Done => Activity::Done,
        }
    }

    /// The last durable checkpoint.
    #[must_use]
    pub fn durable(&self) -> Option<Step> {
        self.durable
    }

    /// Takes one event and returns what to do, in order.
    pub fn handle(&mut self, event: Event) -> Vec<Effect> {
        if !matches!(self.phase, Phase::Done) {
            match event {
                Event::Joined { node, capacity, address } => self.on_joined(node, capacity, address),
                Event::Lost { node, reason } => self.on_lost(&node, &reason),
                Event::Said { node, message } => self.on_said(node, message),
                Event::CheckpointStored { step } => self.on_checkpoint_stored(step),
                Event::CheckpointFailed { step, reason } => self.on_checkpoint_failed(step, reason),
                Event::CheckpointRequested => self.checkpoint_wanted = true,
                Event::StopRequested => self.on_stop_requested(),
                Event::Stalled => self.on_stalled(),
                Event::GatherTimeout => self.on_gather_timeout(),
            }
        }
        std::mem::take(&mut self.effects)
    }

    fn on_joined(&mut self, node: NodeId, capacity: f64, address: String) {
        self.notice(Notice::Joined { node: node.clone(), capacity, address: address.clone() });
        self.nodes.insert(node, Node { capacity, address });
        if matches!(self.phase, Phase::Gathering) && self.nodes.len() >= self.wanted_nodes {
            self.place();
        }
    }

    fn on_lost(&mut self, node: &NodeId, reason: &str) {
        if self.nodes.remove(node).is_none() {
            return;
        }
        self.notice(Notice::Lost { node: node.clone(), reason: reason.into() });
        self.holders.values_mut().for_each(|nodes| {
            nodes.remove(node);
        });
        if let (Some(step), true) = (self.checkpointing, self.placement.members.contains(node)) {
            self.checkpointing = None;
            self.effects.push(Effect::DropCheckpoint { step });
        }
        if self.placement.members.contains(node) && !matches!(self.phase, Phase::Gathering) {
            self.abort(&format!("{node} is gone: {reason}"));
        }
    }

    fn on_said(&mut self, node: NodeId, message: FromNode) {
        let current = self.placement.epoch;
        match message {
            FromNode::Ready { epoch } if epoch == current => self.on_ready(&node),
            FromNode::Prepared { epoch, step, norms, lanes } if epoch == current => {
                self.on_prepared(node, step, norms, lanes);
            }
            FromNode::Validated { epoch, round, lanes } if epoch == current => {
                self.on_validated(node, round, lanes)
            }
            FromNode::Failed { epoch, reason, fatal } if epoch == current => {
                self.on_failed(&node, &reason, fatal)
            }
            // A checkpoint's shards may still be on their way when the epoch is over.
            FromNode::CheckpointFailed { step, reason } if self.checkpointing == Some(step) => {
                self.effects.push(Effect::DropCheckpoint { step });
                self.on_checkpoint_failed(step, format!("{node}: {reason}"));
            }
            // M-3: another epoch's word changes nothing. `Applied` is told by the order of the control stream.
            _ => {}
        }
    }

    fn on_ready(&mut self, node: &NodeId) {
        let Phase::Placing { waiting } = &mut self.phase else { return };
        waiting.remove(node);
        if waiting.is_empty() {
            let shards = self.settings.architecture.shards();
            let holders = |shard| (shard, self.placement.holders(shard).into_iter().collect());
            self.holders = shards.into_iter().map(holders).collect();
            self.advance();
        }
    }

    fn on_prepared(
        &mut self,
        node: NodeId,
        step: Step,
        norms: Vec<(ShardId, Norm)>,
        reports: Vec<(Lane, LaneReport)>,
    ) {
        let Phase::Training { prepared, lanes } = &mut self.phase else { return };
        if step != self.committed + 1 || !self.placement.members.contains(&node) {
            return;
        }
        lanes.extend(reports);
        prepared.insert(node, norms);
        if prepared.len() == self.placement.members.len() {
            self.commit();
        }
    }

    /// M-1, M-2: everybody holds the whole gradient; the step becomes part of the run.
    fn commit(&mut self) {
        let Phase::Training { prepared, lanes } = std::mem::replace(&mut self.phase, Phase::Finishing) else {
            return;
        };
        let step = self.committed + 1;
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
            epoch: self.placement.epoch,
            loss: mean(|lane| lane.loss),
            aux_loss: mean(|lane| lane.aux_loss),
            grad_norm,
            update,
            tokens: training.tokens_per_step(),
            nodes: self.placement.members.len() as u32,
            load: sum_load(lanes.values()),
            dropped: lanes.values().map(|lane| u64::from(lane.dropped)).sum(),
        };
        self.effects.push(Effect::Journal(Box::new(committed)));
        self.committed = step;
        self.attempts = 0;
        self.broadcast(&ToNode::Commit { epoch: self.placement.epoch, step, update });
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

    /// Between two steps: whatever is due, then the next step.
    fn advance(&mut self) {
        let over = self.stopping || self.committed >= self.settings.training.steps;
        let every = self.settings.validation.every;
        let due = self.committed == 0 || over || (every > 0 && self.committed.is_multiple_of(every));
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
        if self.nodes.len() != self.placement.members.len() {
            return self.place();
        }
        self.phase = Phase::Training { prepared: BTreeMap::new(), lanes: BTreeMap::new() };
        self.begin(Pass::Train);
    }

    fn begin(&mut self, pass: Pass) {
        let (epoch, step) = (self.placement.epoch, self.committed + 1);
        for node in self.placement.members.clone() {
            let lanes = self.placement.lanes_of(&node).into_iter().map(|lane| (lane, Vec::new())).collect();
            self.effects.push(Effect::Send { node, message: ToNode::Begin { epoch, step, pass, lanes } });
        }
    }

    fn on_validated(&mut self, node: NodeId, at: u64, reports: Vec<(Lane, LaneReport)>) {
        let Phase::Validating { round, done, lanes } = &mut self.phase else { return };
        if at != *round {
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

    fn on_stop_requested(&mut self) {
        self.stopping = true;
        match self.phase {
            // Nothing is in flight. What is committed and not durable is in the nodes' memory, and waits for a placement.
            Phase::Gathering | Phase::Placing { .. } if self.durable.unwrap_or(0) == self.committed => {
                self.checkpointing = None;
                self.finish_when_durable();
            }
            Phase::Validating { .. } => self.advance(),
            _ => {}
        }
    }

    fn on_gather_timeout(&mut self) {
        if matches!(self.phase, Phase::Gathering) {
            let reason = format!("waited for {} nodes, and {} came", self.wanted_nodes, self.nodes.len());
            self.phase = Phase::Done;
            self.effects.push(Effect::Fatal { reason });
        }
    }

    fn on_failed(&mut self, node: &NodeId, reason: &str, fatal: bool) {
        self.try_again(&format!("{node}: {reason}"), fatal);
    }

    fn on_stalled(&mut self) {
        if !matches!(self.phase, Phase::Gathering | Phase::Finishing | Phase::Done) {
            let limit = self.settings.cluster.step_timeout_ms;
            self.try_again(&format!("nothing came of step {} within {limit} ms", self.committed + 1), false);
        }
    }

    /// The same step again, unless that cannot help or has been tried too often.
    fn try_again(&mut self, reason: &str, fatal: bool) {
        self.attempts += 1;
        if fatal || self.attempts > ATTEMPTS_MAX {
            self.phase = Phase::Done;
            return self.effects.push(Effect::Fatal { reason: reason.into() });
        }
        self.abort(reason);
    }

    fn broadcast(&mut self, message: &ToNode) {
        for node in self.placement.members.clone() {
            self.effects.push(Effect::Send { node, message: message.clone() });
        }
    }

    fn notice(&mut self, notice: Notice) {
        self.effects.push(Effect::Notice(notice));
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

#[cfg(test)]
#[path = "machine_tests.rs"]
mod tests;
