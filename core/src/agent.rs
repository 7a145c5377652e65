//! A node's state machine: its placement, the versions of its shards, and its part in a step.
//!
//! [`Agent::handle`] takes one [`Event`] and returns the [`Effect`]s to carry out, in order. It is the
//! counterpart of [`crate::machine`] and as pure: it knows shards by name and version only. Invariants:
//!
//! - **A-1** a step is applied once, in order, and only after its commit;
//! - **A-2** messages of another epoch change nothing; state of another timeline is dropped;
//! - **A-3** the gradients of a prepared step stay until the next assignment says whether it was committed,
//!   so that a journaled commit that was missed can be applied;
//! - **A-4** a shard counts as held only at the version that every other held shard has; a copy whose
//!   gradient did not come in time is dropped and requested again.
//!
//! A node that enters a placement and applies one step:
//!
//! ```
//! use std::sync::Arc;
//! use volary_core::agent::{Agent, Effect, Event};
//! use volary_core::architecture::presets;
//! use volary_core::layout::Layout;
//! use volary_core::messages::{Assignment, NodeCommand, NodeReport, Pass, Source};
//! use volary_core::placement::{Placement, Stage};
//! use volary_core::shared::Shared;
//! use volary_core::update::{Moments, Update};
//! use volary_core::{Epoch, Lane, LayerId, NodeId, ShardId, Step, Timeline};
//!
//! let node = NodeId::new("a");
//! let stage = Stage { layers: LayerId::range(0..1), holders: vec![node.clone()], lanes: vec![0] };
//! let (epoch, step) = (Epoch(1), Step(1));
//! let placement =
//!     Placement { epoch, members: vec![node.clone()], stages: vec![stage], ..Placement::default() };
//! let assignment = Assignment {
//!     layout: Shared::new(Layout { placement: Arc::new(placement), ..Layout::default() }),
//!     timeline: Timeline(0),
//!     version: Step(0),
//!     last: None,
//!     shards: vec![(ShardId::Embedding, Source::Initial)],
//!     learn: Vec::new(),
//! };
//! let mut agent = Agent::new(node, Arc::new(presets()[1].architecture.clone()));
//!
//! let effects = agent.handle(Event::Command(NodeCommand::Assign(Box::new(assignment))));
//! assert!(matches!(effects[..], [Effect::Discard { .. }, Effect::Enter(_), Effect::Fetch { .. }]));
//! // The shell has fetched the shards.
//! let effects = agent.handle(Event::Fetched { epoch, outcome: Ok(()) });
//! assert_eq!(effects, [Effect::Report(NodeReport::Ready { epoch })]);
//!
//! let lanes = vec![(Lane(0), vec![1, 2, 3])];
//! let (pass, compare) = (Pass::Train, Vec::new());
//! agent.handle(Event::Command(NodeCommand::Begin { epoch, step, data: step, pass, lanes, compare }));
//! // The shell has run the lane and holds the gradient.
//! let (norms, digests, lanes) = (Vec::new(), Vec::new(), Vec::new());
//! agent.handle(Event::Done(NodeReport::Prepared { epoch, step, norms, digests, lanes, speed: None }));
//!
//! let update = Update { apply: true, rate: 0.01, scale: 1.0, moments: Moments::Decay(0.0) };
//! let effects = agent.handle(Event::Command(NodeCommand::Commit { epoch, step, update }));
//! assert!(matches!(effects[..], [Effect::Apply { step: Step(1), .. }]));
//! assert_eq!(agent.shards()[&ShardId::Embedding], step);
//! ```

mod copies;
mod types;

pub use types::{Effect, Event, Failure};

use crate::architecture::Architecture;
use crate::costs::stash_steps;
use crate::ids::{Epoch, Lane, NodeId, ShardId, Step, Timeline};
use crate::messages::{Assignment, NodeCommand, NodeReport, Pass, ResidentState, Source};
use crate::placement::Placement;
use crate::update::Update;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use types::PendingCopy;

/// A node's progress in its placement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum EpochState {
    /// Shards are being fetched.
    Entering,
    /// All shards are in memory.
    Ready,
    /// The placement was aborted, or the supervisor is lost. Late results are dropped.
    Stopped,
}

/// A node's state in the protocol.
#[derive(Debug)]
pub struct Agent {
    id: NodeId,
    /// The model, which says how large a shard's gradient is.
    architecture: Arc<Architecture>,
    epoch: Epoch,
    timeline: Timeline,
    /// The last step that was applied.
    version: Step,
    placement: Placement,
    /// The shards of the assignment.
    assigned: Vec<ShardId>,
    state: EpochState,
    /// Shards in memory, each with its version.
    shards: BTreeMap<ShardId, Step>,
    pending_copies: BTreeMap<ShardId, PendingCopy>,
    /// The shards that this node learns, each with its holders.
    sources: BTreeMap<ShardId, Vec<NodeId>>,
    /// Shards that it learns and whose gradient of the prepared step is not here.
    missed: BTreeSet<ShardId>,
    /// Shards to copy that are in memory since an earlier placement.
    already_here: Vec<ShardId>,
    prepared: Option<(Epoch, Step)>,
    effects: Vec<Effect>,
}

impl Agent {
    /// A node without state.
    #[must_use]
    pub fn new(id: NodeId, architecture: Arc<Architecture>) -> Self {
        Self {
            id,
            architecture,
            epoch: Epoch::default(),
            timeline: Timeline::default(),
            version: Step::default(),
            placement: Placement::default(),
            assigned: Vec::new(),
            state: EpochState::Stopped,
            shards: BTreeMap::new(),
            pending_copies: BTreeMap::new(),
            sources: BTreeMap::new(),
            missed: BTreeSet::new(),
            already_here: Vec::new(),
            prepared: None,
            effects: Vec::new(),
        }
    }

    /// Its name.
    #[must_use]
    pub fn id(&self) -> &NodeId {
        &self.id
    }

    /// The number of its placement.
    #[must_use]
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// The shards in memory, each with its version.
    #[must_use]
    pub fn shards(&self) -> &BTreeMap<ShardId, Step> {
        &self.shards
    }

    /// The state that it reports to a restarted supervisor. A-4.
    #[must_use]
    pub fn resident_state(&self) -> ResidentState {
        let shards = self.shards.iter().filter(|(_, at)| **at == self.version).map(|(shard, _)| *shard);
        ResidentState {
            timeline: self.timeline,
            version: self.version,
            shards: shards.collect(),
            prepared: self.prepared,
        }
    }

    /// Takes one event and returns the effects to carry out, in order.
    pub fn handle(&mut self, event: Event) -> Vec<Effect> {
        match event {
            Event::Command(message) => self.on_command(message),
            Event::Fetched { epoch, outcome }
                if epoch == self.epoch && self.state == EpochState::Entering =>
            {
                self.on_fetched(outcome)
            }
            Event::Copied { epoch, shard, outcome } if epoch == self.epoch && self.is_ready() => {
                self.on_copied(shard, outcome)
            }
            Event::Done(message) => self.on_done(message),
            Event::NotInstalled { shard, failure } => self.on_not_installed(shard, failure),
            Event::NotApplied { failure } => self.on_not_applied(&failure),
            Event::Failed { epoch, failure } if epoch == self.epoch => self.failed(failure),
            Event::SupervisorLost => self.stop_working(),
            // A-2.
            Event::Fetched { .. } | Event::Copied { .. } | Event::Failed { .. } => {}
        }
        std::mem::take(&mut self.effects)
    }

    fn on_command(&mut self, message: NodeCommand) {
        match message {
            NodeCommand::Assign(assignment) => self.on_assign(*assignment),
            NodeCommand::Begin { epoch, step, pass, lanes, compare, .. } if epoch == self.epoch => {
                self.on_begin((epoch, step), pass, lanes, compare)
            }
            NodeCommand::Commit { epoch, step, update } if epoch == self.epoch => {
                self.on_commit(epoch, step, update)
            }
            NodeCommand::Abort { epoch } if epoch == self.epoch => self.stop_working(),
            NodeCommand::Checkpoint { epoch, step, shards } => {
                self.push(Effect::Store { epoch, step, shards })
            }
            NodeCommand::Leave { reason } => self.push(Effect::Leave { reason }),
            // A-2.
            NodeCommand::Begin { .. }
            | NodeCommand::Commit { .. }
            | NodeCommand::Abort { .. }
            | NodeCommand::LeaveDeferred { .. } => {}
        }
    }

    fn is_ready(&self) -> bool {
        self.state == EpochState::Ready
    }

    fn push(&mut self, effect: Effect) {
        self.effects.push(effect);
    }

    fn failed(&mut self, failure: Failure) {
        let Failure { reason, fatal, suspect } = failure;
        let epoch = self.epoch;
        self.push(Effect::Report(NodeReport::Failed { epoch, reason, fatal, suspect }));
    }

    /// Ends the work of this epoch; a prepared step stays. A-3.
    fn stop_working(&mut self) {
        self.state = EpochState::Stopped;
        self.push(Effect::Discard { epoch: self.epoch, all: self.prepared.is_none() });
    }

    fn on_assign(&mut self, assignment: Assignment) {
        if assignment.layout.placement.epoch <= self.epoch {
            return;
        }
        self.roll_forward(&assignment);
        let same = assignment.timeline == self.timeline && assignment.version == self.version;
        let version = self.version;
        let stale: Vec<ShardId> =
            self.shards.iter().filter(|(_, at)| !same || **at != version).map(|(s, _)| *s).collect();
        if !stale.is_empty() {
            self.shards.retain(|shard, _| !stale.contains(shard));
            self.push(Effect::Release(stale));
        }
        self.epoch = assignment.layout.placement.epoch;
        self.push(Effect::Discard { epoch: self.epoch.previous(), all: true });
        (self.timeline, self.version) = (assignment.timeline, assignment.version);
        (self.state, self.prepared) = (EpochState::Entering, None);
        self.assigned = assignment.shards.iter().map(|(shard, _)| *shard).collect();
        self.placement = Placement::clone(&assignment.layout.placement);
        let (here, pending): (Vec<_>, Vec<_>) =
            assignment.learn.iter().partition(|(shard, _)| self.shards.contains_key(shard));
        self.already_here = here.into_iter().map(|(shard, _)| *shard).collect();
        let pending = pending.into_iter();
        self.pending_copies = pending.map(|(shard, from)| (*shard, PendingCopy::new(from.clone()))).collect();
        self.sources = assignment.learn.iter().cloned().collect();
        self.missed.clear();
        let (epoch, version) = (self.epoch, self.version);
        let absent = |(shard, source): &&(ShardId, Source)| {
            *source == Source::Held && !self.shards.contains_key(shard)
        };
        if assignment.shards.iter().any(|entry| absent(&entry)) {
            let reason = "it does not have all shards that it is to hold".to_owned();
            return self.push(Effect::Report(NodeReport::Behind { epoch, version, reason }));
        }
        let wanted: Vec<_> = assignment
            .shards
            .iter()
            .filter(|(shard, source)| *source != Source::Held && !self.shards.contains_key(shard))
            .cloned()
            .collect();
        self.push(Effect::Enter(Box::new(assignment)));
        if wanted.is_empty() {
            return self.on_fetched(Ok(()));
        }
        self.push(Effect::Fetch { epoch, version, shards: wanted });
    }

    /// Applies a step that was prepared here and journaled by the supervisor, and whose commit was missed.
    /// A-3.
    fn roll_forward(&mut self, assignment: &Assignment) {
        let Some(last) = assignment.last else { return };
        let missed = last.step == assignment.version && last.step == self.version.next();
        if missed && assignment.timeline == self.timeline && self.prepared == Some((last.epoch, last.step)) {
            self.apply(last.epoch, last.step, last.update);
        }
    }

    fn on_fetched(&mut self, outcome: Result<(), Failure>) {
        if let Err(failure) = outcome {
            return self.failed(failure);
        }
        for shard in &self.assigned {
            self.shards.entry(*shard).or_insert(self.version);
        }
        self.state = EpochState::Ready;
        let epoch = self.epoch;
        self.push(Effect::Report(NodeReport::Ready { epoch }));
        let shards = std::mem::take(&mut self.already_here);
        if !shards.is_empty() {
            self.learned(shards);
        }
        self.copy_more();
    }

    fn on_begin(
        &mut self,
        (epoch, step): (Epoch, Step),
        pass: Pass,
        lanes: Vec<(Lane, Vec<u32>)>,
        mut compare: Vec<ShardId>,
    ) {
        // A repeated command changes nothing: the gradients of a prepared step wait for its commit. A-3.
        if !self.is_ready() || self.prepared == Some((epoch, step)) {
            return;
        }
        if step != self.version.next() {
            // A commit was lost. The next assignment repeats it.
            let reason = format!("step {step} began while this node is at step {}", self.version);
            return self.failed(Failure { reason, fatal: false, suspect: None });
        }
        let kept: BTreeSet<ShardId> = self
            .shards
            .keys()
            .copied()
            .filter(|&shard| self.placement.holds_or_learns(&self.id, shard))
            .collect();
        let released: Vec<ShardId> =
            self.shards.keys().copied().filter(|shard| !kept.contains(shard)).collect();
        if !released.is_empty() {
            self.shards.retain(|shard, _| kept.contains(shard));
            self.push(Effect::Release(released));
        }
        compare.retain(|shard| self.shards.get(shard) == Some(&self.version));
        self.prepared = None;
        self.push(Effect::Run { epoch, step, pass, lanes, compare });
    }

    fn on_done(&mut self, message: NodeReport) {
        match &message {
            NodeReport::Prepared { epoch, step, norms, .. }
                if *epoch == self.epoch && *step == self.version.next() && self.is_ready() =>
            {
                self.prepared = Some((*epoch, *step));
                let here: BTreeSet<ShardId> = norms.iter().map(|(shard, _)| *shard).collect();
                self.missed = self.sources.keys().filter(|shard| !here.contains(shard)).copied().collect();
            }
            NodeReport::Validated { epoch, .. } if *epoch == self.epoch => {}
            _ => return,
        }
        self.push(Effect::Report(message));
    }

    fn on_commit(&mut self, epoch: Epoch, step: Step, update: Update) {
        // A-1. A repeated commit changes nothing.
        if step != self.version.next() {
            return;
        }
        if self.prepared == Some((epoch, step)) {
            self.apply(epoch, step, update);
        } else if !self.placement.is_member(&self.id) {
            self.miss_step(step);
        } else {
            return;
        }
        let learned = self.sources.keys().filter(|shard| self.shards.contains_key(shard)).copied().collect();
        self.learned(learned);
        self.copy_more();
    }

    fn apply(&mut self, epoch: Epoch, step: Step, update: Update) {
        self.drop_missed();
        let behind = self.shards.iter().filter(|(_, at)| at.next() == step);
        let shards: Vec<ShardId> = behind.map(|(shard, _)| *shard).collect();
        for shard in &shards {
            self.shards.insert(*shard, step);
        }
        let mut stash = Vec::new();
        let missed = &self.missed;
        let stashing =
            |(shard, pending): &(&ShardId, &mut PendingCopy)| pending.requested && !missed.contains(*shard);
        for (shard, pending) in self.pending_copies.iter_mut().filter(stashing) {
            let most = stash_steps(self.architecture.shard_parameters(*shard));
            stash.push((*shard, most));
            pending.stash.push_back(step);
            if pending.stash.len() > most {
                pending.stash.pop_front();
            }
        }
        self.version = step;
        self.prepared = None;
        self.push(Effect::Apply { epoch, step, update, shards, stash });
    }
}

#[cfg(test)]
mod tests;
