//! The supervisor's machine alone, with hand-written reports. The crate `volary-sim` tests whole clusters
//! with faults.

mod checkpoints;
mod comparison;
mod failures;
mod leaving;
mod nan;
mod steps;

use super::*;
use crate::architecture::presets;
use crate::digest::Digest;
use crate::ids::{Epoch, Lane};
use crate::limits::{ATTEMPTS_MAX, LEARNER_GRACE_MS, LEARNER_MISSES_MAX, RETRY_MS};
use crate::messages::{LaneReport, Norm, Source};
use crate::options::{CheckpointOptions, ClusterOptions, OnNan, TrainingOptions, ValidationOptions};
use crate::schedule::Schedule;
use crate::update::Update;

fn settings(nodes: usize) -> Settings {
    let mut architecture = presets().swap_remove(1).architecture;
    (architecture.layers, architecture.experts) = (2, 4);
    Settings {
        architecture,
        training: TrainingOptions {
            steps: 8,
            lanes: 6,
            lane_group: 2,
            sequences_per_lane: 1,
            sequence_length: 8,
            optimizer: Default::default(),
            schedule: Schedule::default(),
            clip_norm: None,
            aux_loss: 0.01,
            on_nan: OnNan::GoBack,
            max_skipped_steps: 2,
            z_loss: 0.0,
        },
        // Comparisons have their own tests.
        cluster: ClusterOptions { nodes, replication: 2, compare_within: 0, ..ClusterOptions::default() },
        checkpoint: CheckpointOptions { every: 3, keep: 2, store: None },
        validation: ValidationOptions { every: 0, rounds: 0 },
        stay: false,
    }
}

/// The treatment of an ordinary step's gradients.
fn update() -> Update {
    Update::decide(1.0, true, &settings(1).training, Step(1)).0
}

fn id(number: usize) -> NodeId {
    NodeId::new(format!("n{number}"))
}

/// A machine, and its last effects.
struct Harness {
    machine: Machine,
    effects: Vec<Effect>,
}

impl Harness {
    /// Nodes 1 to `nodes` have joined and are ready: step 1 is in flight.
    fn training(nodes: usize) -> Self {
        let mut run = Self::new(settings(nodes), Restored::default());
        for node in 1..=nodes {
            run.join(node, ResidentState::default());
        }
        run.all_ready();
        assert_eq!(run.machine.activity(), Activity::Training);
        run
    }

    fn new(settings: Settings, restored: Restored) -> Self {
        Self { machine: Machine::new(settings, restored), effects: Vec::new() }
    }

    fn handle(&mut self, event: Event) -> &[Effect] {
        self.effects = self.machine.handle(event);
        &self.effects
    }

    fn join(&mut self, node: usize, held: ResidentState) -> &[Effect] {
        let node = id(node);
        let profile = Box::new(Profile::relative(1.0));
        self.handle(Event::Joined { address: format!("{node}:1"), node, profile, held })
    }

    fn report(&mut self, node: usize, message: NodeReport) -> &[Effect] {
        self.handle(Event::Reported { node: id(node), message })
    }

    fn all_ready(&mut self) {
        let epoch = self.machine.placement().epoch;
        for node in self.machine.placement().voters() {
            self.handle(Event::Reported { node, message: NodeReport::Ready { epoch } });
        }
    }

    /// The shards that are compared in the step in flight.
    fn compared(&self) -> Vec<ShardId> {
        match &self.machine.phase {
            Phase::Training(reports) => reports.compare.clone(),
            _ => Vec::new(),
        }
    }

    /// The report of a node that has prepared the step in flight.
    fn prepared(&self, node: usize) -> NodeReport {
        let placement = self.machine.placement();
        let shards = self.machine.settings.architecture.shards().into_iter();
        let kept = shards.filter(|&shard| placement.holds_or_learns(&id(node), shard));
        let compare = self.compared();
        let report = |lane: Lane| (lane, LaneReport { loss: f64::from(lane.0), ..LaneReport::default() });
        NodeReport::Prepared {
            epoch: placement.epoch,
            step: self.machine.committed().next(),
            norms: kept.clone().map(|shard| (shard, Norm { squared: 1.0, finite: true })).collect(),
            digests: kept.filter(|s| compare.contains(s)).map(|s| (s, Digest::of(b"equal"))).collect(),
            lanes: placement.lanes_of(&id(node)).into_iter().map(report).collect(),
            speed: Some(1.0),
        }
    }

    /// Commits the step in flight.
    fn step(&mut self, nodes: usize) -> &[Effect] {
        for node in 1..=nodes {
            let message = self.prepared(node);
            self.report(node, message);
        }
        &self.effects
    }

    /// Every learner has copied its shards.
    fn learn_all(&mut self) {
        self.all_ready();
        let (epoch, version) = (self.machine.placement().epoch, self.machine.committed());
        let learners = self.machine.placement().learners.clone();
        for (shard, nodes) in learners {
            for node in nodes {
                let message = NodeReport::Learned { epoch, version, shards: vec![shard] };
                self.handle(Event::Reported { node, message });
            }
        }
    }

    fn is_fatal(&self) -> bool {
        self.effects.iter().any(|effect| matches!(effect, Effect::Fatal { .. }))
    }

    fn notices(&self) -> impl Iterator<Item = &Notice> {
        self.effects.iter().filter_map(|effect| match effect {
            Effect::Notice(notice) => Some(notice),
            _ => None,
        })
    }
}

fn is_commit(effect: &Effect) -> bool {
    matches!(effect, Effect::Send { message: NodeCommand::Commit { .. }, .. })
}

/// The number of the checkpoint that the last effects open, and its step.
fn opened(run: &Harness) -> (u64, Step) {
    let opened = run.effects.iter().find_map(|effect| match effect {
        Effect::OpenCheckpoint { attempt, step, .. } => Some((*attempt, *step)),
        _ => None,
    });
    opened.expect("a checkpoint is opened")
}
