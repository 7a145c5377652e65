//! The supervisor's machine alone, told by hand what nodes say. Whole clusters, with both ends of the
//! protocol and everything that can go wrong, are the simulation's (crate `volary-sim`).

use super::*;
use crate::architecture::presets;
use crate::ids::{Epoch, Lane};
use crate::limits::ATTEMPTS_MAX;
use crate::messages::{LaneReport, Norm};
use crate::options::{CheckpointOptions, ClusterOptions, TrainingOptions, ValidationOptions};
use crate::schedule::{Schedule, Update};

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
            z_loss: 0.0,
        },
        cluster: ClusterOptions { nodes, replication: 2, ..ClusterOptions::default() },
        checkpoint: CheckpointOptions { every: 3, keep: 2 },
        validation: ValidationOptions { every: 0, rounds: 0 },
    }
}

fn id(number: usize) -> NodeId {
    NodeId::new(format!("n{number}"))
}

/// A machine, and what it did last.
struct Driven {
    machine: Machine,
    effects: Vec<Effect>,
}

impl Driven {
    /// Nodes 1 to `nodes` have joined and are ready: step 1 is in flight.
    fn training(nodes: usize) -> Self {
        let mut driven = Self::new(settings(nodes), Restored::default());
        for node in 1..=nodes {
            driven.join(node, ResidentState::default());
        }
        driven.all_ready();
        assert_eq!(driven.machine.activity(), Activity::Training);
        driven
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

    fn say(&mut self, node: usize, message: NodeReport) -> &[Effect] {
        self.handle(Event::Reported { node: id(node), message })
    }

    fn all_ready(&mut self) {
        let epoch = self.machine.placement().epoch;
        for node in self.machine.placement().voters() {
            self.handle(Event::Reported { node, message: NodeReport::Ready { epoch } });
        }
    }

    /// What a node says when it has its part of the step in flight.
    fn prepared(&self, node: usize) -> NodeReport {
        let placement = self.machine.placement();
        let shards = self.machine.settings.architecture.shards().into_iter();
        let kept = shards.filter(|&shard| placement.holds_or_learns(&id(node), shard));
        let report = |lane: Lane| (lane, LaneReport { loss: f64::from(lane.0), ..LaneReport::default() });
        NodeReport::Prepared {
            epoch: placement.epoch,
            step: self.machine.committed().next(),
            norms: kept.map(|shard| (shard, Norm { squared: 1.0, finite: true })).collect(),
            lanes: placement.lanes_of(&id(node)).into_iter().map(report).collect(),
            speed: Some(1.0),
        }
    }

    /// Commits the step in flight.
    fn step(&mut self, nodes: usize) -> &[Effect] {
        for node in 1..=nodes {
            let message = self.prepared(node);
            self.say(node, message);
        }
        &self.effects
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

#[test]
fn the_run_waits_for_its_nodes_and_gives_up_after_the_limit() {
    let mut driven = Driven::new(settings(3), Restored::default());
    driven.join(1, ResidentState::default());
    driven.handle(Event::Tick { ms: driven.machine.settings.cluster.gather_timeout_ms - 1 });
    assert_eq!(driven.machine.activity(), Activity::Gathering);
    let effects = driven.handle(Event::Tick { ms: 1 });
    let fatal = effects.iter().find_map(|effect| match effect {
        Effect::Fatal { reason } => Some(reason.as_str()),
        _ => None,
    });
    assert!(fatal.is_some_and(|reason| reason.ends_with("for 3 nodes, but only 1 joined")), "{fatal:?}");
}

/// M-1.
#[test]
fn a_step_is_committed_only_when_every_member_has_prepared() {
    let mut driven = Driven::training(3);
    for node in [3, 1, 1] {
        let message = driven.prepared(node);
        let effects = driven.say(node, message);
        assert!(effects.is_empty(), "{effects:?}");
    }
    let message = driven.prepared(2);
    driven.say(2, message);
    assert_eq!(driven.machine.committed(), Step(1));
}

/// M-2.
#[test]
fn a_commit_is_journalled_before_anybody_hears_of_it() {
    let mut driven = Driven::training(3);
    let effects = driven.step(3);
    let journalled = effects.iter().position(|e| matches!(e, Effect::Journal(_))).expect("a journal entry");
    let told: Vec<usize> = (0..effects.len()).filter(|&i| is_commit(&effects[i])).collect();
    assert_eq!(told.len(), 3);
    assert!(told.iter().all(|&at| at > journalled), "{effects:?}");
}

/// M-3.
#[test]
fn another_epochs_word_changes_nothing() {
    let mut driven = Driven::training(2);
    let NodeReport::Prepared { epoch, step, norms, lanes, speed } = driven.prepared(1) else {
        unreachable!()
    };
    for epoch in [epoch.previous(), epoch.next()] {
        let (norms, lanes) = (norms.clone(), lanes.clone());
        driven.say(1, NodeReport::Prepared { epoch, step, norms, lanes, speed });
        let failed = NodeReport::Failed { epoch, reason: "late".into(), fatal: true, suspect: None };
        assert!(driven.say(1, failed).is_empty());
        assert!(driven.say(1, NodeReport::Behind { epoch, version: Step(0) }).is_empty());
    }
    let message = driven.prepared(2);
    driven.say(2, message);
    assert_eq!(driven.machine.committed(), Step(0), "node 1 has said nothing of this epoch");
}

#[test]
fn a_gradient_that_is_not_finite_skips_the_update_and_the_run_goes_on() {
    let mut driven = Driven::training(1);
    let NodeReport::Prepared { epoch, step, mut norms, lanes, speed } = driven.prepared(1) else {
        unreachable!()
    };
    norms[2].1.finite = false;
    let effects = driven.say(1, NodeReport::Prepared { epoch, step, norms, lanes, speed });
    let update = effects.iter().find_map(|effect| match effect {
        Effect::Send { message: NodeCommand::Commit { update, .. }, .. } => Some(*update),
        _ => None,
    });
    assert!(matches!(update, Some(Update { apply: false, .. })), "{update:?}");
    assert_eq!(driven.machine.activity(), Activity::Training);
}

#[test]
fn replicas_that_differ_are_a_loud_event() {
    let mut driven = Driven::training(2);
    let NodeReport::Prepared { epoch, step, mut norms, lanes, speed } = driven.prepared(1) else {
        unreachable!()
    };
    let shard = norms[0].0;
    norms[0].1.squared = 1.0 + f64::EPSILON;
    driven.say(1, NodeReport::Prepared { epoch, step, norms, lanes, speed });
    let message = driven.prepared(2);
    driven.say(2, message);
    assert!(driven.notices().any(|notice| *notice == Notice::ReplicasDiffer { step: Step(1), shard }));
}

#[test]
fn a_checkpoint_that_fails_is_told_and_the_next_one_is_written_all_the_same() {
    let mut driven = Driven::training(1);
    for _ in 0..3 {
        driven.step(1);
    }
    assert!(driven.effects.iter().any(|e| matches!(e, Effect::OpenCheckpoint { step: Step(3), .. })));
    driven.say(1, NodeReport::CheckpointFailed { step: Step(3), reason: "disk full".into() });
    let told = Notice::CheckpointFailed { step: Step(3), reason: "n1: disk full".into() };
    assert!(driven.notices().any(|notice| *notice == told));
    for _ in 0..3 {
        driven.step(1);
    }
    assert!(driven.effects.iter().any(|e| matches!(e, Effect::OpenCheckpoint { step: Step(6), .. })));
}

#[test]
fn a_step_that_nothing_comes_of_is_tried_again_a_bounded_number_of_times() {
    let mut driven = Driven::training(2);
    let ms = driven.machine.settings.cluster.step_timeout_ms;
    for _ in 0..ATTEMPTS_MAX {
        driven.handle(Event::Tick { ms });
        assert!(driven.notices().any(|notice| matches!(notice, Notice::Aborted { step: Step(1), .. })));
        driven.all_ready();
    }
    driven.handle(Event::Tick { ms });
    assert!(driven.effects.iter().any(|effect| matches!(effect, Effect::Fatal { .. })));
}

#[test]
fn a_death_costs_no_copying_before_the_next_step() {
    let mut driven = Driven::training(3);
    driven.step(3);
    driven.handle(Event::Lost { node: id(2), reason: "killed".into() });
    let placed = driven.notices().find_map(|notice| match notice {
        Notice::Placed { fetched, learning, nodes, .. } => Some((*fetched, *learning > 0, nodes.clone())),
        _ => None,
    });
    assert_eq!(placed, Some((0, true, vec![id(1), id(3)])));
}

#[test]
fn a_link_that_two_complain_of_costs_the_accused_its_place() {
    let mut driven = Driven::training(3);
    driven.step(3);
    for by in [1, 2] {
        let epoch = driven.machine.placement().epoch;
        let suspect = Some(id(3));
        driven.say(by, NodeReport::Failed { epoch, reason: "no answer".into(), fatal: false, suspect });
        driven.all_ready();
    }
    assert!(driven.machine.node_state(&id(3)) != "member");
    assert_eq!(driven.machine.placement().members, [id(1), id(2)]);
}

/// A supervisor that comes back takes the state of the journal, and the one that is a commit behind it and
/// has the gradients; no other.
#[test]
fn a_supervisor_that_comes_back_takes_only_state_of_its_last_commit() {
    let quiet = Driven::training(3);
    let (epoch, last) = (quiet.machine.placement().epoch, Step(5));
    let update = Update::decide(1.0, true, 6, 0.1, None).0;
    let restored = || Restored {
        durable: Some(Step(3)),
        last: Some(LastCommit { epoch, step: last, update }),
        persistent: PersistentState { epoch, timeline: Timeline(2), members: vec![id(1), id(2), id(3)] },
    };
    let machine = Machine::new(settings(3), restored());
    let shards: Vec<ShardId> = machine.settings.architecture.shards();
    let held = |timeline, version, prepared| ResidentState {
        timeline: Timeline(timeline),
        version,
        shards: shards.clone(),
        prepared,
    };
    assert!(machine.accepts_state(&held(2, last, None)));
    assert!(machine.accepts_state(&held(2, last.previous(), Some((epoch, last)))));
    assert!(!machine.accepts_state(&held(2, last.previous(), None)), "its commit is beyond reach");
    assert!(
        !machine.accepts_state(&held(2, last.previous(), Some((epoch.previous(), last)))),
        "of another attempt"
    );
    assert!(!machine.accepts_state(&held(1, last, None)), "of a history that the run went back from");
    assert!(!machine.accepts_state(&held(2, last.next(), None)), "of a step that was never journalled");
    assert!(!machine.accepts_state(&ResidentState::default()));
}

#[test]
fn a_supervisor_that_comes_back_waits_for_its_nodes_and_goes_on_with_those_that_come() {
    let persistent = PersistentState { epoch: Epoch(4), timeline: Timeline(0), members: vec![id(1), id(2)] };
    let update = Update::decide(1.0, true, 6, 0.1, None).0;
    let last = Some(LastCommit { epoch: Epoch(4), step: Step(2), update });
    let mut driven = Driven::new(settings(2), Restored { durable: None, last, persistent });
    let shards = driven.machine.settings.architecture.shards();
    driven.join(1, ResidentState { timeline: Timeline(0), version: Step(2), shards, prepared: None });
    assert_eq!(driven.machine.activity(), Activity::Gathering, "node 2 may come, too");
    driven.handle(Event::Tick { ms: driven.machine.settings.cluster.node_timeout_ms });
    assert_eq!(driven.machine.placement().members, [id(1)]);
    driven.all_ready();
    let begins =
        |e: &Effect| matches!(e, Effect::Send { message: NodeCommand::Begin { step: Step(3), .. }, .. });
    assert!(driven.effects.iter().any(begins), "{:?}", driven.effects);
}

#[test]
fn the_last_node_cannot_be_drained() {
    let mut driven = Driven::training(1);
    driven.handle(Event::DrainRequested { node: id(1) });
    assert!(driven.notices().any(|notice| matches!(notice, Notice::MigrationFailed { .. })));
    assert_eq!(driven.machine.node_state(&id(1)), "member");
}

fn fenced(driven: &Driven) -> Vec<NodeId> {
    let node = |notice: &Notice| match notice {
        Notice::Fenced { node, .. } => Some(node.clone()),
        _ => None,
    };
    driven.notices().filter_map(node).collect()
}

#[test]
fn a_node_that_fails_by_itself_is_shut_out_while_others_have_what_it_has() {
    let failed = |driven: &Driven, fatal| NodeReport::Failed {
        epoch: driven.machine.placement().epoch,
        reason: "its device is full".into(),
        fatal,
        suspect: None,
    };
    let mut driven = Driven::training(3);
    driven.step(3);
    let fatal = failed(&driven, true);
    driven.say(2, fatal);
    assert_eq!(fenced(&driven), [id(2)]);
    assert!(!driven.effects.iter().any(|effect| matches!(effect, Effect::Fatal { .. })));
    // What may pass is tried again twice.
    let mut driven = Driven::training(3);
    driven.step(3);
    for _ in 0..2 {
        let message = failed(&driven, false);
        driven.say(2, message);
        assert!(fenced(&driven).is_empty());
        driven.all_ready();
    }
    let message = failed(&driven, false);
    driven.say(2, message);
    assert_eq!(fenced(&driven), [id(2)]);
    // The last copy of something is not shut out.
    let mut driven = Driven::training(1);
    driven.step(1);
    let fatal = failed(&driven, true);
    driven.say(1, fatal);
    assert!(driven.effects.iter().any(|effect| matches!(effect, Effect::Fatal { .. })));
}

#[test]
fn whoever_everybody_waits_for_in_vain_is_shut_out() {
    let mut driven = Driven::training(3);
    driven.step(3);
    for node in [1, 3] {
        let message = driven.prepared(node);
        driven.say(node, message);
    }
    let ms = driven.machine.settings.cluster.step_timeout_ms;
    driven.handle(Event::Tick { ms });
    assert_eq!(fenced(&driven), [id(2)]);
}
