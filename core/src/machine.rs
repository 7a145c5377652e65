//! The supervisor's state machine: membership, the steps of a run, commits, checkpoints and recovery.
//!
//! [`Machine::handle`] takes one [`Event`] and returns the [`Effect`]s to carry out, in order. It has no
//! clock and does no I/O; its counterpart on a node is [`crate::agent`]. Its tests cite its invariants:
//!
//! - **M-1** a step is committed once, and only when every member of the placement holds its whole gradient.
//!   A learner that has it not in time copies again;
//! - **M-2** a commit is journaled before any node learns of it, and never undone while a copy of every shard
//!   exists;
//! - **M-3** a report of another epoch changes nothing;
//! - **M-4** when the last copy of a shard is lost, the run goes back to the last durable checkpoint as a
//!   whole;
//! - **M-5** a node becomes a holder of a shard only by a placement's `Ready`, by its own `Learned`, or by
//!   its state when it returns to a restarted supervisor;
//! - **M-6** a step is committed only if the replicas that were compared are equal.
//!
//! Two nodes, and one step:
//!
//! ```
//! use volary_core::{Digest, NodeId};
//! use volary_core::architecture::presets;
//! use volary_core::machine::{Effect, Event, Machine, Restored, Settings};
//! use volary_core::messages::{LaneReport, NodeCommand, NodeReport, Norm};
//! use volary_core::options::{CheckpointOptions, ClusterOptions, TrainingOptions, ValidationOptions};
//! use volary_core::profile::Profile;
//!
//! let settings = Settings {
//!     architecture: presets()[1].architecture.clone(),
//!     training: TrainingOptions::new(1),
//!     cluster: ClusterOptions { nodes: 2, ..ClusterOptions::default() },
//!     checkpoint: CheckpointOptions::default(),
//!     validation: ValidationOptions { rounds: 0, ..ValidationOptions::default() },
//!     stay: false,
//! };
//! let shards = settings.architecture.shards();
//! let mut machine = Machine::new(settings, Restored::default());
//!
//! let mut effects = Vec::new();
//! for name in ["a", "b"] {
//!     effects.extend(machine.handle(Event::Joined {
//!         node: NodeId::new(name),
//!         profile: Box::new(Profile::relative(1.0)),
//!         address: format!("{name}:7100"),
//!         held: Default::default(),
//!     }));
//! }
//! // The shell sends the effects' messages; here every node answers at once.
//! let mut journal = Vec::new();
//! while !effects.is_empty() {
//!     for effect in std::mem::take(&mut effects) {
//!         let (node, message) = match effect {
//!             Effect::Send { node, message } => (node, message),
//!             Effect::Journal(step) => {
//!                 journal.push(step);
//!                 continue;
//!             }
//!             _ => continue,
//!         };
//!         let message = match message {
//!             NodeCommand::Assign(assignment) => {
//!                 NodeReport::Ready { epoch: assignment.layout.placement.epoch }
//!             }
//!             NodeCommand::Begin { epoch, step, lanes, compare, .. } => {
//!                 let held = shards.iter().filter(|shard| machine.placement().holds(&node, **shard));
//!                 let norm = Norm { squared: 1.0, finite: true };
//!                 let report = LaneReport { loss: 2.5, ..LaneReport::default() };
//!                 NodeReport::Prepared {
//!                     epoch,
//!                     step,
//!                     norms: held.map(|shard| (*shard, norm)).collect(),
//!                     digests: compare.into_iter().map(|shard| (shard, Digest::of(b"equal"))).collect(),
//!                     lanes: lanes.into_iter().map(|(lane, _)| (lane, report.clone())).collect(),
//!                     speed: None,
//!                 }
//!             }
//!             _ => continue,
//!         };
//!         effects.extend(machine.handle(Event::Reported { node, message }));
//!     }
//! }
//! assert_eq!(journal.len(), 1);
//! assert_eq!((journal[0].step.0, journal[0].nodes, journal[0].loss), (1, 2, 2.5));
//! ```
//!
//! | file | content |
//! | --- | --- |
//! | `types` | settings, events, effects, notices |
//! | `state` | the phases and the other parts of the state |
//! | `nodes` | nodes that join, return, disconnect, drain and leave |
//! | `gathering` | waiting for nodes |
//! | `steps` | between two boundaries: begin, prepared, commit; validation |
//! | `placing` | new placements, forced or at a boundary; background copies; going back |
//! | `target`, `assignments` | the next placement; each node's shards and their sources |
//! | `failures`, `suspicion` | failing, unreachable and slow nodes: retries, fences, suspensions |
//! | `rebalance`, `balance` | measured speeds and expert loads |
//! | `checkpoints` | when they are written, and the end of a run |
//! | `comparison` | replicas that are compared, and what follows where they differ |
//! | `nan` | skipped steps, weights that are not finite, going back past the data |

mod assignments;
mod balance;
mod checkpoints;
mod comparison;
mod failures;
mod gathering;
mod nan;
mod nodes;
mod placing;
mod rebalance;
mod state;
mod steps;
mod suspicion;
mod target;
mod types;

pub use types::{
    Activity, Committed, Compared, Effect, Event, LossCause, Notice, PersistentState, Restored, Settings,
};

use crate::data_skips::DataSkips;
use crate::ids::{NodeId, ShardId, Step, Timeline};
use crate::messages::{LastCommit, NodeCommand, NodeReport, ResidentState};
use crate::placement::Placement;
use crate::profile::Profile;
use balance::Balance;
use comparison::Comparison;
use state::{Checkpoint, Finish, Gathering, LateLearner, Node, Part, Phase, Prepared, Retry};
use std::collections::{BTreeMap, BTreeSet};
use suspicion::Suspicion;

/// The state of a run from the supervisor's point of view.
#[derive(Debug)]
pub struct Machine {
    settings: Settings,
    nodes: BTreeMap<NodeId, Node>,
    placement: Placement,
    /// Each node's part in the placement.
    parts: BTreeMap<NodeId, Part>,
    timeline: Timeline,
    committed: Step,
    /// The last commit, for nodes that missed it; none after going back.
    last: Option<LastCommit>,
    durable: Option<Step>,
    comparison: Comparison,
    /// The checkpoint whose bytes are known to be intact.
    verified: Option<Step>,
    validated: Option<Step>,
    /// Steps since the last one whose update was applied.
    skipped_in_a_row: u64,
    /// Why weights in memory may not be stored: they are not finite.
    broken_weights: Option<String>,
    data_skips: DataSkips,
    /// The nodes that hold each shard at version `committed`; empty while no node holds anything.
    holders: BTreeMap<ShardId, BTreeSet<NodeId>>,
    phase: Phase,
    /// Milliseconds without progress in the present phase.
    idle_ms: u64,
    retry: Retry,
    /// Whether the next boundary between steps looks for a better placement.
    replan_due: bool,
    checkpoint: Option<Checkpoint>,
    /// Attempts at checkpoints so far.
    checkpoint_attempts: u64,
    checkpoint_requested: bool,
    /// The last step whose checkpoint was due and not begun.
    passed: Option<Step>,
    stopping: bool,
    suspicion: Suspicion,
    /// Why the last attempt at a step was dropped, until the next commit.
    trouble: Option<String>,
    /// Learners of this placement that have missed gradients.
    learners_late: BTreeMap<NodeId, LateLearner>,
    /// Nodes whose links broke since the last commit, each with the shards that it holds at version
    /// `committed`: they may return with them.
    away: BTreeMap<NodeId, BTreeSet<ShardId>>,
    /// Nodes of this placement whose processes have ended.
    gone: BTreeSet<NodeId>,
    balance: Balance,
    effects: Vec<Effect>,
}

impl Machine {
    /// The machine of a run, new or resumed.
    #[must_use]
    pub fn new(settings: Settings, restored: Restored) -> Self {
        let Restored { durable, agreed, last, skipped_in_a_row, persistent } = restored;
        // A checkpoint may be newer than what the database kept of the journal.
        let last = last.filter(|last| durable.is_none_or(|durable| last.step >= durable));
        let awaited: BTreeSet<NodeId> = persistent.members.into_iter().collect();
        // A cluster that was complete resumes with the nodes that return; a new one waits for all nodes it
        // wants.
        let wanted_nodes = if awaited.is_empty() { settings.cluster.nodes.max(1) } else { 1 };
        Self {
            settings,
            nodes: BTreeMap::new(),
            placement: Placement { epoch: persistent.epoch, ..Placement::default() },
            parts: BTreeMap::new(),
            timeline: persistent.timeline,
            committed: last.map(|last| last.step).max(durable).unwrap_or_default(),
            last,
            durable,
            comparison: Comparison::new(durable, agreed),
            verified: None,
            validated: None,
            skipped_in_a_row,
            broken_weights: None,
            data_skips: persistent.data_skips,
            holders: BTreeMap::new(),
            phase: Phase::Gathering(Gathering {
                wanted_nodes,
                awaited,
                shortage: None,
                pause_ms: 0,
                verifying: false,
            }),
            idle_ms: 0,
            retry: Retry::default(),
            replan_due: false,
            checkpoint: None,
            checkpoint_attempts: 0,
            checkpoint_requested: false,
            passed: None,
            stopping: false,
            suspicion: Suspicion::default(),
            trouble: None,
            learners_late: BTreeMap::new(),
            away: BTreeMap::new(),
            gone: BTreeSet::new(),
            balance: Balance::default(),
            effects: Vec::new(),
        }
    }

    /// The last committed step.
    #[must_use]
    pub fn committed(&self) -> Step {
        self.committed
    }

    /// The step whose data the last committed step was trained on: a later one if the run has left data out.
    #[must_use]
    pub fn data_step(&self) -> Step {
        self.data_skips.data_step(self.committed)
    }

    /// The current placement; its members are empty before the first.
    #[must_use]
    pub fn placement(&self) -> &Placement {
        &self.placement
    }

    /// The present activity of the run.
    #[must_use]
    pub fn activity(&self) -> Activity {
        self.phase.activity()
    }

    /// Why the step after the last commit was dropped, if it was: a node that was lost, or two nodes that
    /// cannot reach each other.
    #[must_use]
    pub fn trouble(&self) -> Option<&str> {
        self.trouble.as_deref()
    }

    /// The last durable checkpoint.
    #[must_use]
    pub fn durable(&self) -> Option<Step> {
        self.durable
    }

    /// The state of a node for `status`: `member`, `learning`, `draining`, `suspended` or `joined`.
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

    /// The profile of a node, as the planner uses it.
    #[must_use]
    pub fn profile(&self, node: &NodeId) -> Option<&Profile> {
        self.nodes.get(node).map(|n| &n.profile)
    }

    /// The nodes that hold a shard, its owner first, then learners that have copied it.
    #[must_use]
    pub fn holders(&self, shard: ShardId) -> Vec<NodeId> {
        let Some(known) = self.holders.get(&shard) else { return Vec::new() };
        let mut holders = self.placement.holders(shard);
        holders.retain(|node| known.contains(node));
        let learned: Vec<NodeId> = known.iter().filter(|node| !holders.contains(node)).cloned().collect();
        holders.extend(learned);
        holders
    }

    /// Whether a node that returns with state may keep it. Otherwise it joins without state.
    #[must_use]
    pub fn accepts_state(&self, held: &ResidentState) -> bool {
        matches!(self.phase, Phase::Gathering(_)) && !held.shards.is_empty() && self.is_current(held)
    }

    /// Whether state is that of the last commit, or becomes so by applying that commit.
    fn is_current(&self, held: &ResidentState) -> bool {
        let missed = self.last.filter(|last| last.step == held.version.next());
        let prepared = missed.is_some_and(|last| held.prepared == Some((last.epoch, last.step)));
        held.timeline == self.timeline && (held.version == self.committed || prepared)
    }

    /// Takes one event and returns the effects to carry out, in order.
    pub fn handle(&mut self, event: Event) -> Vec<Effect> {
        if !matches!(self.phase, Phase::Done) {
            match event {
                Event::Joined { node, profile, address, held } => {
                    self.on_joined(node, *profile, address, &held)
                }
                Event::LinkMeasured { node, bandwidth, round_trip_s } => {
                    self.record_link(&node, bandwidth, round_trip_s);
                }
                Event::Lost { node, cause, reason } => self.on_lost(&node, cause, &reason),
                Event::Reported { node, message } => self.on_report(node, message),
                Event::CheckpointStored { attempt } => self.on_checkpoint_stored(attempt),
                Event::CheckpointFailed { attempt, reason } => self.on_checkpoint_failed(attempt, reason),
                Event::CheckpointVerified { intact } => self.on_checkpoint_verified(intact),
                Event::CheckpointRequested => self.checkpoint_requested = true,
                Event::DrainRequested { node } => self.on_drain(node),
                Event::StopRequested => self.on_stop_requested(),
                Event::Tick { ms } => self.on_tick(ms),
            }
        }
        std::mem::take(&mut self.effects)
    }

    fn on_report(&mut self, node: NodeId, message: NodeReport) {
        let current = self.placement.epoch;
        match message {
            NodeReport::LeaveRequested => self.on_drain(node),
            NodeReport::Ready { epoch } if epoch == current => self.on_ready(&node),
            NodeReport::Prepared { epoch, step, norms, digests, lanes, speed } if epoch == current => {
                self.record_speed(&node, speed);
                self.on_prepared(node, step, Prepared { norms, digests }, lanes);
            }
            NodeReport::Validated { epoch, round, lanes } if epoch == current => {
                self.on_validated(node, round, lanes)
            }
            NodeReport::Learned { epoch, version, shards } if epoch == current => {
                self.on_learned(&node, version, &shards)
            }
            NodeReport::LearnerUnreached { epoch, node: learner, reason } if epoch == current => {
                self.on_learner_unreached(&node, &learner, &reason)
            }
            NodeReport::CannotLearn { epoch, reason } if epoch == current => {
                self.on_cannot_learn(&node, reason)
            }
            NodeReport::Behind { epoch, version, reason } if epoch == current => {
                let committed = self.committed;
                let reason = format!("its state is at step {version}, the run at step {committed}: {reason}");
                self.fence(&node, &reason);
            }
            NodeReport::Failed { epoch, reason, fatal, suspect } if epoch == current => {
                self.on_failed(&node, &reason, fatal, suspect)
            }
            // A checkpoint may outlive its epoch.
            NodeReport::WeightsNotFinite { step, shard } => self.on_not_finite(step, shard),
            NodeReport::CheckpointFailed { step, reason } => self.on_shard_not_stored(&node, step, &reason),
            // M-3.
            _ => {}
        }
    }

    fn on_stop_requested(&mut self) {
        self.stopping = true;
        match self.phase {
            // No node can be asked for what a checkpoint lacks. The journal has every step, and nodes that
            // return to the next supervisor have the state.
            Phase::Gathering(_) if !self.is_durable() && self.lost_shard().is_some() => self.halt(),
            // Nothing is in flight. Otherwise the last commit is only in the nodes' memory, and waits for a
            // placement.
            Phase::Gathering(_) | Phase::Placing { .. } if self.is_durable() => {
                self.checkpoint = None;
                self.finish(Finish::Complete);
            }
            Phase::Finishing(Finish::Empty) => self.finish(Finish::Complete),
            Phase::Validating(_) => self.advance(),
            _ => {}
        }
    }

    fn on_tick(&mut self, ms: u64) {
        self.idle_ms = self.idle_ms.saturating_add(ms);
        self.retry.pass(ms);
        if self.suspicion.pass(ms) {
            self.schedule_replan();
        }
        self.watch_checkpoint(ms);
        self.pass_grace(ms);
        match self.phase {
            Phase::Gathering(_) => self.gather(),
            Phase::Finishing(_) | Phase::Done => {}
            _ if self.idle_ms >= self.settings.cluster.step_timeout_ms => {
                let limit = self.settings.cluster.step_timeout_ms;
                let reason = format!("step {} made no progress within {limit} ms", self.committed.next());
                self.idle_ms = 0;
                self.on_timeout(&reason);
            }
            _ => {}
        }
    }

    /// Ends the supervisor before the run: nodes keep what they hold for the next one.
    fn halt(&mut self) {
        let durable = self.durable.unwrap_or_default();
        let reason = format!(
            "stopped after step {} without a checkpoint of it: the nodes that hold it are not here (the last \
             checkpoint is of step {durable}); start the supervisor again to continue",
            self.committed
        );
        self.phase = Phase::Done;
        self.effects.push(Effect::Halt { reason });
    }

    /// Ends the run, with `end` as its last effect; all nodes leave.
    fn end(&mut self, end: Effect) {
        let reason = match &end {
            Effect::Fatal { reason } => format!("the run failed: {reason}"),
            _ => "the run has ended".into(),
        };
        for node in self.nodes.keys().cloned().collect::<Vec<_>>() {
            self.effects.push(Effect::Send { node, message: NodeCommand::Leave { reason: reason.clone() } });
        }
        self.phase = Phase::Done;
        self.effects.push(end);
    }

    fn notice(&mut self, notice: Notice) {
        self.effects.push(Effect::Notice(notice));
    }
}

#[cfg(test)]
mod tests;
