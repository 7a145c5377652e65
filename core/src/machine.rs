//! The supervisor's state machine: membership, the steps of a run, commits, checkpoints and recovery.
//!
//! [`Machine::handle`] takes one [`Event`] and returns the [`Effect`]s to carry out, in order. It knows no clock and
//! does no I/O; its counterpart on a node is [`crate::agent`]. Its invariants, which its tests cite:
//!
//! - **M-1** a step is committed once, and only when every member and learner of the placement holds its whole gradient;
//! - **M-2** a commit is journalled before any node hears of it, and never undone while a copy of every shard lives;
//! - **M-3** what carries another epoch than the current one changes nothing;
//! - **M-4** when the last copy of a shard is gone, the run goes back to the last durable checkpoint, as a whole;
//! - **M-5** nobody becomes a holder of a shard but by a placement's `Ready`, its own `Learned`, or what it had in memory
//!   when the supervisor came back.
//!
//! | file | what |
//! | --- | --- |
//! | `steps` | between two boundaries: begin, prepared, commit; validation |
//! | `placing` | new placements, forced or not; background copies; going back |
//! | `suspicion` | nodes that cannot be reached, are behind, or fail: retried, then shut out |
//! | `balance` | measured speeds and expert loads |
//! | `checkpoints` | when they are written, and the end of a run |
//! | `types` | events, effects, notices |

mod balance;
mod checkpoints;
mod placing;
mod steps;
mod suspicion;
mod types;

pub use types::{Activity, Committed, Effect, Event, Notice, PersistentState, Restored, Settings};

use crate::ids::{Lane, NodeId, ShardId, Step, Timeline};
use crate::messages::{LaneReport, LastCommit, NodeCommand, NodeReport, Norm, ResidentState};
use crate::placement::Placement;
use crate::profile::Profile;
use std::collections::{BTreeMap, BTreeSet};

/// How often one step is tried again before the run gives up.
pub const ATTEMPTS_MAX: u32 = 16;

#[derive(Debug)]
enum Phase {
    /// Waiting for nodes, new ones or such that come back.
    Gathering,
    Placing {
        waiting: BTreeSet<NodeId>,
    },
    Training {
        prepared: BTreeMap<NodeId, Vec<(ShardId, Norm)>>,
        lanes: BTreeMap<Lane, LaneReport>,
    },
    Validating {
        round: u64,
        done: BTreeSet<NodeId>,
        lanes: BTreeMap<(u64, Lane), LaneReport>,
    },
    Finishing,
    Done,
}

#[derive(Clone, Debug)]
struct Node {
    /// Capacity as it measured itself.
    declared: f64,
    /// What it can do, as the planner takes it: as it measured itself at first, then as was seen of it.
    profile: Profile,
    /// Lanes per second of computing, a moving average.
    speed: Option<f64>,
    address: String,
    draining: bool,
}

/// The state of a run as the supervisor sees it.
#[derive(Debug)]
pub struct Machine {
    settings: Settings,
    nodes: BTreeMap<NodeId, Node>,
    placement: Placement,
    timeline: Timeline,
    committed: Step,
    last: Option<LastCommit>,
    durable: Option<Step>,
    /// The nodes that hold each shard at version `committed`; empty when nobody holds anything yet.
    holders: BTreeMap<ShardId, BTreeSet<NodeId>>,
    phase: Phase,
    attempts: u32,
    /// Milliseconds since the last commit, while a step was tried again.
    blocked_ms: u64,
    validated: Option<Step>,
    checkpointing: Option<Step>,
    /// Milliseconds since it was begun.
    checkpoint_ms: u64,
    checkpoint_wanted: bool,
    stopping: bool,
    wanted_nodes: usize,
    /// Nodes that may come back with what they hold.
    awaited: BTreeSet<NodeId>,
    /// Nodes on which the model did not fit, and why.
    capacity_shortage: Option<(BTreeSet<NodeId>, String)>,
    /// Whether the next boundary between steps should look for a better placement.
    placement_dirty: bool,
    /// Placements that were made at boundaries since something last asked for one.
    replan_rounds: u32,
    suspicion: suspicion::Suspicion,
    balance: balance::Balance,
    /// Milliseconds since anything came of what is under way.
    idle_ms: u64,
    effects: Vec<Effect>,
}

impl Machine {
    /// The machine of a run, new or going on from what was restored.
    #[must_use]
    pub fn new(settings: Settings, restored: Restored) -> Self {
        let Restored { durable, last, persistent } = restored;
        let committed = last.map(|last| last.step).max(durable).unwrap_or_default();
        let awaited: BTreeSet<NodeId> = persistent.members.into_iter().collect();
        // A cluster that was whole goes on with those that come back; a new one waits for what was asked for.
        let wanted_nodes = if awaited.is_empty() { settings.cluster.nodes.max(1) } else { 1 };
        Self {
            settings,
            nodes: BTreeMap::new(),
            placement: Placement { epoch: persistent.epoch, ..Placement::default() },
            timeline: persistent.timeline,
            committed,
            last,
            durable,
            holders: BTreeMap::new(),
            phase: Phase::Gathering,
            attempts: 0,
            blocked_ms: 0,
            validated: None,
            checkpointing: None,
            checkpoint_ms: 0,
            checkpoint_wanted: false,
            stopping: false,
            wanted_nodes,
            awaited,
            capacity_shortage: None,
            placement_dirty: false,
            replan_rounds: 0,
            suspicion: suspicion::Suspicion::default(),
            balance: balance::Balance::default(),
            idle_ms: 0,
            effects: Vec::new(),
        }
    }

    /// The last committed step.
    #[must_use]
    pub fn committed(&self) -> Step {
        self.committed
    }

    /// The current placement; its members are empty before the first.
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

    /// What a node is, for `status`: `member`, `learning`, `draining`, `suspended` or `joined`.
    #[must_use]
    pub fn node_state(&self, node: &NodeId) -> &'static str {
        let draining = self.nodes.get(node).is_some_and(|n| n.draining);
        match () {
            () if draining => "draining",
            () if self.placement.is_member(node) => "member",
            () if self.placement.is_learning(node) => "learning",
            () if self.suspicion.is_suspended(node) => "suspended",
            () => "joined",
        }
    }

    /// What a node can do, as the planner takes it.
    #[must_use]
    pub fn profile(&self, node: &NodeId) -> Option<&Profile> {
        self.nodes.get(node).map(|n| &n.profile)
    }

    /// The nodes that hold a shard, its owner first, then those that copy it and have it already.
    #[must_use]
    pub fn holders(&self, shard: ShardId) -> Vec<NodeId> {
        let Some(known) = self.holders.get(&shard) else { return Vec::new() };
        let mut holders = self.placement.holders(shard);
        holders.retain(|node| known.contains(node));
        let learned: Vec<NodeId> = known.iter().filter(|node| !holders.contains(node)).cloned().collect();
        holders.extend(learned);
        holders
    }

    /// Whether a node that comes back with state may keep it. Otherwise it is to start anew.
    #[must_use]
    pub fn accepts_state(&self, held: &ResidentState) -> bool {
        matches!(self.phase, Phase::Gathering) && !held.shards.is_empty() && self.is_current(held)
    }

    /// Whether state is that of the last commit, or becomes so by applying that commit.
    fn is_current(&self, held: &ResidentState) -> bool {
        let missed = self.last.filter(|last| last.step == held.version.next());
        let prepared = missed.is_some_and(|last| held.prepared == Some((last.epoch, last.step)));
        held.timeline == self.timeline && (held.version == self.committed || prepared)
    }

    /// Takes one event and returns what to do, in order.
    pub fn handle(&mut self, event: Event) -> Vec<Effect> {
        if !matches!(self.phase, Phase::Done) {
            match event {
                Event::Joined { node, profile, address, held } => {
                    self.on_joined(node, *profile, address, &held)
                }
                Event::LinkMeasured { node, bandwidth, round_trip_s } => {
                    self.record_link(&node, bandwidth, round_trip_s);
                }
                Event::Lost { node, reason } => self.on_lost(&node, &reason),
                Event::Reported { node, message } => self.on_report(node, message),
                Event::CheckpointStored { step } => self.on_checkpoint_stored(step),
                Event::CheckpointFailed { step, reason } => self.on_checkpoint_failed(step, reason),
                Event::CheckpointRequested => self.checkpoint_wanted = true,
                Event::DrainRequested { node } => self.on_drain(node),
                Event::StopRequested => self.on_stop_requested(),
                Event::Tick { ms } => self.on_tick(ms),
            }
        }
        std::mem::take(&mut self.effects)
    }

    fn on_joined(&mut self, node: NodeId, mut profile: Profile, address: String, held: &ResidentState) {
        self.awaited.remove(&node);
        let declared = profile.capacity();
        if self.accepts_state(held) {
            let (version, shards) = (held.version, held.shards.len());
            self.notice(Notice::Returned { node: node.clone(), version, shards });
            for &shard in &held.shards {
                self.holders.entry(shard).or_default().insert(node.clone());
            }
        } else {
            let capacity = declared;
            self.notice(Notice::Joined { node: node.clone(), capacity, address: address.clone() });
        }
        profile.scale(self.balance.scale(self.nodes.values()));
        self.nodes.insert(node, Node { declared, profile, speed: None, address, draining: false });
        self.mark_placement_dirty();
        self.gather();
    }

    fn on_lost(&mut self, node: &NodeId, reason: &str) {
        if self.nodes.remove(node).is_none() {
            return;
        }
        self.notice(Notice::Lost { node: node.clone(), reason: reason.into() });
        self.on_node_removed(node, reason);
    }

    /// What follows when a node is gone, however it went.
    fn on_node_removed(&mut self, node: &NodeId, reason: &str) {
        self.holders.values_mut().for_each(|nodes| {
            nodes.remove(node);
        });
        let (member, learner) = (self.placement.is_member(node), self.placement.is_learning(node));
        if let (Some(step), true) = (self.checkpointing, member) {
            self.checkpointing = None;
            self.effects.push(Effect::DropCheckpoint { step });
        }
        if matches!(self.phase, Phase::Gathering) {
            return;
        }
        self.mark_placement_dirty();
        if member {
            self.abort(&format!("{node} is gone: {reason}"));
        } else if learner {
            self.on_learner_removed(node);
        }
    }

    /// A learner held nothing that anybody needs: the others go on as if it had not been there.
    fn on_learner_removed(&mut self, node: &NodeId) {
        match &mut self.phase {
            Phase::Placing { waiting } => {
                waiting.remove(node);
                self.when_placed();
            }
            Phase::Training { prepared, .. } => {
                prepared.remove(node);
                self.when_prepared();
            }
            _ => {}
        }
    }

    fn on_drain(&mut self, node: NodeId) {
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

    fn on_report(&mut self, node: NodeId, message: NodeReport) {
        let current = self.placement.epoch;
        match message {
            NodeReport::LeaveRequested => self.on_drain(node),
            NodeReport::Ready { epoch } if epoch == current => self.on_ready(&node),
            NodeReport::Prepared { epoch, step, norms, lanes, speed } if epoch == current => {
                self.record_speed(&node, speed);
                self.on_prepared(node, step, norms, lanes);
            }
            NodeReport::Validated { epoch, round, lanes } if epoch == current => {
                self.on_validated(node, round, lanes)
            }
            NodeReport::Learned { epoch, shards } if epoch == current => self.on_learned(&node, &shards),
            NodeReport::CannotLearn { epoch, reason } if epoch == current => {
                self.on_cannot_learn(&node, reason)
            }
            NodeReport::Behind { epoch, version } if epoch == current => {
                let reason = format!("it is at step {version}, and the run at {}", self.committed);
                self.fence(&node, &reason);
            }
            NodeReport::Failed { epoch, reason, fatal, suspect } if epoch == current => {
                self.on_failed(&node, &reason, fatal, suspect)
            }
            // A checkpoint's shards may still be on their way when the epoch is over.
            NodeReport::CheckpointFailed { step, reason } if self.checkpointing == Some(step) => {
                self.effects.push(Effect::DropCheckpoint { step });
                self.on_checkpoint_failed(step, format!("{node}: {reason}"));
            }
            // M-3: another epoch's word changes nothing.
            _ => {}
        }
    }

    fn on_stop_requested(&mut self) {
        self.stopping = true;
        match self.phase {
            // Nothing is in flight. What is committed and not durable is in the nodes' memory, and waits for a placement.
            Phase::Gathering | Phase::Placing { .. }
                if self.durable.unwrap_or_default() == self.committed =>
            {
                self.checkpointing = None;
                self.finish_when_durable();
            }
            Phase::Validating { .. } => self.advance(),
            _ => {}
        }
    }

    fn on_tick(&mut self, ms: u64) {
        self.idle_ms = self.idle_ms.saturating_add(ms);
        if self.attempts > 0 {
            self.blocked_ms = self.blocked_ms.saturating_add(ms);
        }
        if self.suspicion.pass(ms) {
            self.mark_placement_dirty();
        }
        self.watch_checkpoint(ms);
        match self.phase {
            Phase::Gathering => self.gather(),
            Phase::Finishing | Phase::Done => {}
            _ if self.idle_ms >= self.settings.cluster.step_timeout_ms => {
                let limit = self.settings.cluster.step_timeout_ms;
                let reason = format!("nothing came of step {} within {limit} ms", self.committed.next());
                self.idle_ms = 0;
                self.on_too_slow(&reason);
            }
            _ => {}
        }
    }

    /// Begins when those who are wanted or awaited are here, and does not wait for ever.
    fn gather(&mut self) {
        if !matches!(self.phase, Phase::Gathering) {
            return;
        }
        if self.committed >= self.settings.training.last_step() && self.durable == Some(self.committed) {
            // The supervisor died after its last word.
            return self.end(Effect::Done);
        }
        let cluster = &self.settings.cluster;
        let whole = self.nodes.len() >= self.wanted_nodes && self.awaited.is_empty();
        let goes_on = !self.nodes.is_empty() && self.wanted_nodes == 1;
        let enough = self.idle_ms >= cluster.node_timeout_ms && self.lost_shard().is_none();
        let over = self.idle_ms >= cluster.return_timeout_ms;
        let gather_timeout_ms = cluster.gather_timeout_ms;
        let same_nodes = |(nodes, _): &(BTreeSet<NodeId>, String)| nodes.iter().eq(self.nodes.keys());
        let capacity_shortage = self.capacity_shortage.as_ref().is_some_and(same_nodes);
        if !capacity_shortage && (whole || (goes_on && (enough || over))) {
            self.awaited.clear();
            return self.place("the nodes are here");
        }
        if self.idle_ms >= gather_timeout_ms {
            let waited = || {
                let (wanted, came) = (self.wanted_nodes, self.nodes.len());
                format!(
                    "waited {gather_timeout_ms} ms (cluster.gather_timeout_ms) for {wanted} nodes, and {came} came"
                )
            };
            let reason = self.capacity_shortage.take().map_or_else(waited, |(_, reason)| reason);
            self.end(Effect::Fatal { reason });
        }
    }

    /// The last effect of a run; nodes hear of it.
    fn end(&mut self, end: Effect) {
        let reason = match &end {
            Effect::Fatal { reason } => format!("the run cannot go on: {reason}"),
            _ => "the run is over".into(),
        };
        for node in self.nodes.keys().cloned().collect::<Vec<_>>() {
            self.effects.push(Effect::Send { node, message: NodeCommand::Leave { reason: reason.clone() } });
        }
        self.phase = Phase::Done;
        self.effects.push(end);
    }

    /// Something has happened that may ask for another placement.
    fn mark_placement_dirty(&mut self) {
        (self.placement_dirty, self.replan_rounds) = (true, 0);
    }

    fn notice(&mut self, notice: Notice) {
        self.effects.push(Effect::Notice(notice));
    }
}

#[cfg(test)]
mod tests;
