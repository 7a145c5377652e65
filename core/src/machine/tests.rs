//! The supervisor's machine alone, with hand-written reports. The crate `volary-sim` tests whole clusters
//! with faults.

use super::*;
use crate::architecture::presets;
use crate::ids::{Epoch, Lane};
use crate::limits::{ATTEMPTS_MAX, LEARNER_GRACE_MS, LEARNER_MISSES_MAX, RETRY_MS};
use crate::messages::{LaneReport, Norm, Source};
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
        stay: false,
    }
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

    /// The report of a node that has prepared the step in flight.
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

#[test]
fn the_run_waits_for_its_nodes_and_gives_up_after_the_timeout() {
    let mut run = Harness::new(settings(3), Restored::default());
    run.join(1, ResidentState::default());
    run.handle(Event::Tick { ms: run.machine.settings.cluster.gather_timeout_ms - 1 });
    assert_eq!(run.machine.activity(), Activity::Gathering);
    let effects = run.handle(Event::Tick { ms: 1 });
    let fatal = effects.iter().find_map(|effect| match effect {
        Effect::Fatal { reason } => Some(reason.as_str()),
        _ => None,
    });
    assert!(fatal.is_some_and(|reason| reason.ends_with("for 3 nodes, but only 1 joined")), "{fatal:?}");
}

/// M-1.
#[test]
fn a_step_is_committed_only_when_every_member_has_prepared() {
    let mut run = Harness::training(3);
    for node in [3, 1, 1] {
        let message = run.prepared(node);
        let effects = run.report(node, message);
        assert!(effects.is_empty(), "{effects:?}");
    }
    let message = run.prepared(2);
    run.report(2, message);
    assert_eq!(run.machine.committed(), Step(1));
}

/// M-2.
#[test]
fn a_commit_is_journaled_before_any_node_learns_of_it() {
    let mut run = Harness::training(3);
    let effects = run.step(3);
    let journaled = effects.iter().position(|e| matches!(e, Effect::Journal(_))).expect("a journal entry");
    let sent: Vec<usize> = (0..effects.len()).filter(|&i| is_commit(&effects[i])).collect();
    assert_eq!(sent.len(), 3);
    assert!(sent.iter().all(|&at| at > journaled), "{effects:?}");
}

/// M-3.
#[test]
fn a_message_of_another_epoch_changes_nothing() {
    let mut run = Harness::training(2);
    let NodeReport::Prepared { epoch, step, norms, lanes, speed } = run.prepared(1) else { unreachable!() };
    for epoch in [epoch.previous(), epoch.next()] {
        let (norms, lanes) = (norms.clone(), lanes.clone());
        run.report(1, NodeReport::Prepared { epoch, step, norms, lanes, speed });
        let failed = NodeReport::Failed { epoch, reason: "late".into(), fatal: true, suspect: None };
        assert!(run.report(1, failed).is_empty());
        assert!(
            run.report(1, NodeReport::Behind { epoch, version: Step(0), reason: String::new() }).is_empty()
        );
    }
    let message = run.prepared(2);
    run.report(2, message);
    assert_eq!(run.machine.committed(), Step(0), "node 1 has not reported in this epoch");
}

#[test]
fn a_gradient_that_is_not_finite_skips_the_update_and_the_run_continues() {
    let mut run = Harness::training(1);
    let NodeReport::Prepared { epoch, step, mut norms, lanes, speed } = run.prepared(1) else {
        unreachable!()
    };
    norms[2].1.finite = false;
    let effects = run.report(1, NodeReport::Prepared { epoch, step, norms, lanes, speed });
    let update = effects.iter().find_map(|effect| match effect {
        Effect::Send { message: NodeCommand::Commit { update, .. }, .. } => Some(*update),
        _ => None,
    });
    assert!(matches!(update, Some(Update { apply: false, .. })), "{update:?}");
    assert_eq!(run.machine.activity(), Activity::Training);
}

#[test]
fn replicas_that_differ_are_reported() {
    let mut run = Harness::training(2);
    let NodeReport::Prepared { epoch, step, mut norms, lanes, speed } = run.prepared(1) else {
        unreachable!()
    };
    let shard = norms[0].0;
    norms[0].1.squared = 1.0 + f64::EPSILON;
    run.report(1, NodeReport::Prepared { epoch, step, norms, lanes, speed });
    let message = run.prepared(2);
    run.report(2, message);
    assert!(run.notices().any(|notice| *notice == Notice::ReplicasDiffer { step: Step(1), shard }));
}

#[test]
fn a_failed_checkpoint_is_reported_and_the_next_one_is_written() {
    let mut run = Harness::training(1);
    for _ in 0..3 {
        run.step(1);
    }
    assert!(run.effects.iter().any(|e| matches!(e, Effect::OpenCheckpoint { step: Step(3), .. })));
    run.report(1, NodeReport::CheckpointFailed { step: Step(3), reason: "disk full".into() });
    let failed = Notice::CheckpointFailed { step: Step(3), reason: "n1: disk full".into() };
    assert!(run.notices().any(|notice| *notice == failed));
    for _ in 0..3 {
        run.step(1);
    }
    assert!(run.effects.iter().any(|e| matches!(e, Effect::OpenCheckpoint { step: Step(6), .. })));
}

#[test]
fn a_step_without_progress_is_retried_a_bounded_number_of_times() {
    let mut run = Harness::training(2);
    let ms = run.machine.settings.cluster.step_timeout_ms;
    let mut waited = 0;
    for _ in 0..ATTEMPTS_MAX {
        run.handle(Event::Tick { ms });
        let aborted = |notice: &Notice| matches!(notice, Notice::Aborted { step: Step(1), .. });
        assert!(run.notices().any(aborted), "{:?}", run.effects);
        while run.machine.activity() == Activity::Gathering {
            run.handle(Event::Tick { ms: RETRY_MS });
            waited += RETRY_MS;
        }
        run.all_ready();
    }
    run.handle(Event::Tick { ms });
    assert!(run.is_fatal());
    assert!(waited > 60_000, "quick failures do not end a run within seconds: {waited} ms");
}

#[test]
fn a_death_copies_nothing_before_the_next_step() {
    let mut run = Harness::training(3);
    run.step(3);
    run.handle(Event::Lost { node: id(2), cause: LossCause::Ended, reason: "killed".into() });
    let placed = run.notices().find_map(|notice| match notice {
        Notice::Placed { fetched, learning, nodes, .. } => Some((*fetched, *learning > 0, nodes.clone())),
        _ => None,
    });
    assert_eq!(placed, Some((0, true, vec![id(1), id(3)])));
}

#[test]
fn a_node_that_two_others_cannot_reach_is_fenced() {
    let mut run = Harness::training(3);
    run.step(3);
    for by in [1, 2] {
        let epoch = run.machine.placement().epoch;
        let suspect = Some(id(3));
        run.report(by, NodeReport::Failed { epoch, reason: "no answer".into(), fatal: false, suspect });
        run.all_ready();
    }
    assert!(run.machine.node_state(&id(3)) != "member");
    assert_eq!(run.machine.placement().members, [id(1), id(2)]);
}

/// A restarted supervisor accepts state at its last commit, or one commit behind with the gradients of that
/// commit; no other.
#[test]
fn a_restarted_supervisor_accepts_only_state_of_its_last_commit() {
    let quiet = Harness::training(3);
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
    assert!(!machine.accepts_state(&held(2, last.previous(), None)), "it cannot catch up");
    assert!(
        !machine.accepts_state(&held(2, last.previous(), Some((epoch.previous(), last)))),
        "of another attempt"
    );
    assert!(!machine.accepts_state(&held(1, last, None)), "of another timeline");
    assert!(!machine.accepts_state(&held(2, last.next(), None)), "of a step that was never journaled");
    assert!(!machine.accepts_state(&ResidentState::default()));
}

#[test]
fn a_restarted_supervisor_waits_for_its_nodes_and_resumes_with_those_that_return() {
    let persistent = PersistentState { epoch: Epoch(4), timeline: Timeline(0), members: vec![id(1), id(2)] };
    let update = Update::decide(1.0, true, 6, 0.1, None).0;
    let last = Some(LastCommit { epoch: Epoch(4), step: Step(2), update });
    let mut run = Harness::new(settings(2), Restored { durable: None, last, persistent });
    let shards = run.machine.settings.architecture.shards();
    run.join(1, ResidentState { timeline: Timeline(0), version: Step(2), shards, prepared: None });
    assert_eq!(run.machine.activity(), Activity::Gathering, "node 2 may return, too");
    run.handle(Event::Tick { ms: run.machine.settings.cluster.node_timeout_ms });
    assert_eq!(run.machine.placement().members, [id(1)]);
    run.all_ready();
    let begins =
        |e: &Effect| matches!(e, Effect::Send { message: NodeCommand::Begin { step: Step(3), .. }, .. });
    assert!(run.effects.iter().any(begins), "{:?}", run.effects);
}

/// The number of the checkpoint that the last effects open, and its step.
fn opened(run: &Harness) -> (u64, Step) {
    let opened = run.effects.iter().find_map(|effect| match effect {
        Effect::OpenCheckpoint { attempt, step, .. } => Some((*attempt, *step)),
        _ => None,
    });
    opened.expect("a checkpoint is opened")
}

fn left(run: &Harness) -> Vec<NodeId> {
    let node = |notice: &Notice| match notice {
        Notice::Left { node } => Some(node.clone()),
        _ => None,
    };
    run.notices().filter_map(node).collect()
}

#[test]
fn the_last_node_leaves_once_a_checkpoint_has_what_it_holds_and_the_run_waits_for_others() {
    let mut run = Harness::training(1);
    run.step(1);
    run.handle(Event::DrainRequested { node: id(1) });
    run.step(1);
    let (attempt, step) = opened(&run);
    assert_eq!((step, left(&run)), (Step(2), vec![]), "not before the checkpoint is durable");
    run.handle(Event::CheckpointStored { attempt });
    assert_eq!(left(&run), [id(1)]);
    assert_eq!(run.machine.activity(), Activity::Gathering);
    // Another node goes on where the last one stopped.
    run.join(2, ResidentState::default());
    let loads = |(_, source): &(ShardId, Source)| *source == Source::Checkpoint(Step(2));
    let assigned = run.effects.iter().find_map(|effect| match effect {
        Effect::Send { message: NodeCommand::Assign(assignment), .. } => {
            Some(assignment.shards.iter().all(loads))
        }
        _ => None,
    });
    assert_eq!(assigned, Some(true), "{:?}", run.effects);
}

#[test]
fn nodes_that_all_leave_at_once_are_released_together_after_one_checkpoint() {
    let mut run = Harness::training(2);
    run.step(2);
    run.handle(Event::DrainRequested { node: id(1) });
    run.handle(Event::DrainRequested { node: id(2) });
    run.step(2);
    let (attempt, _) = opened(&run);
    assert!(run.notices().any(|notice| matches!(notice, Notice::Emptying { step: Step(2) })));
    run.handle(Event::CheckpointStored { attempt });
    assert_eq!(left(&run), [id(1), id(2)]);
    let gather = run.machine.settings.cluster.gather_timeout_ms;
    run.machine.settings.stay = true;
    run.handle(Event::Tick { ms: 10 * gather });
    assert_eq!(run.machine.activity(), Activity::Gathering, "with `stay` the run waits as long as it takes");
    run.machine.settings.stay = false;
    run.handle(Event::Tick { ms: 1 });
    assert!(run.is_fatal());
}

#[test]
fn a_newcomer_takes_over_while_all_others_leave() {
    let mut run = Harness::training(1);
    run.handle(Event::DrainRequested { node: id(1) });
    run.step(1);
    opened(&run);
    run.join(2, ResidentState::default());
    assert!(run.machine.placement().is_learning(&id(2)), "{:?}", run.machine.placement());
}

#[test]
fn a_draining_node_stays_linked_until_its_shards_are_in_the_checkpoint_and_the_placement_does_not_wait() {
    let mut run = Harness::training(3);
    run.step(3);
    run.step(3);
    run.step(3);
    let (attempt, step) = opened(&run);
    assert_eq!(step, Step(3), "a checkpoint is under way, and the next one follows at once");
    run.handle(Event::DrainRequested { node: id(2) });
    run.step(3);
    run.learn_all();
    run.step(3);
    assert_eq!(run.machine.placement().members, [id(1), id(3)], "the drain goes on");
    assert_eq!(left(&run), [], "it still stores its shards");
    run.handle(Event::CheckpointStored { attempt });
    assert_eq!(left(&run), [id(2)]);
}

#[test]
fn a_drain_for_which_there_is_no_room_waits_with_the_shortage_in_numbers() {
    let mut settings = settings(2);
    (settings.cluster.replication, settings.checkpoint.every) = (1, 0);
    let costs = crate::costs::Costs::new(&settings.architecture, &settings.training);
    let in_flight = crate::costs::lanes_in_flight(1);
    // Room for all layers and three of four experts.
    let memory_bytes = costs.stage_bytes(costs.all_layers(), in_flight) + 3 * costs.expert_bytes;
    let mut run = Harness::new(settings, Restored::default());
    let join = |run: &mut Harness, node: usize| {
        let (node, held) = (id(node), ResidentState::default());
        let profile = Box::new(Profile { memory_bytes, ..Profile::relative(1.0) });
        run.handle(Event::Joined { address: String::new(), node, profile, held });
    };
    join(&mut run, 1);
    join(&mut run, 2);
    run.all_ready();
    run.step(2);
    run.handle(Event::DrainRequested { node: id(2) });
    run.step(2);
    let deferred = run.notices().find_map(|notice| match notice {
        Notice::DrainDeferred { node, reason } => Some((node.clone(), reason.clone())),
        _ => None,
    });
    assert!(
        deferred.is_some_and(|(node, reason)| node == id(2) && reason.contains("GiB")),
        "{:?}",
        run.effects
    );
    assert_eq!(run.machine.placement().members, [id(1), id(2)]);
    let held = run.machine.placement().experts.values().filter(|holders| holders.contains(&id(1))).count();
    assert!(held <= 3, "no node gets more than fits");
    // As soon as there is room, the drain is carried out.
    join(&mut run, 3);
    run.step(2);
    run.learn_all();
    run.step(3);
    assert_eq!(left(&run), [id(2)], "{:?}", run.effects);
}

#[test]
fn a_run_that_gives_up_first_writes_a_checkpoint_of_what_the_nodes_hold() {
    let failed = |run: &Harness| NodeReport::Failed {
        epoch: run.machine.placement().epoch,
        reason: "its device is full".into(),
        fatal: true,
        suspect: None,
    };
    let mut run = Harness::training(1);
    run.step(1);
    let fatal = failed(&run);
    run.report(1, fatal);
    assert!(!run.is_fatal(), "step 1 is in the memory of node 1 only");
    let (attempt, step) = opened(&run);
    assert_eq!(step, Step(1));
    // A failure of that checkpoint is retried.
    run.handle(Event::CheckpointFailed { attempt, reason: "disk full".into() });
    run.handle(Event::Tick { ms: 1 });
    let (attempt, _) = opened(&run);
    run.handle(Event::CheckpointStored { attempt });
    assert!(run.is_fatal());
    assert_eq!(run.machine.durable(), Some(Step(1)));
}

#[test]
fn a_checkpoint_that_the_run_has_abandoned_is_not_counted() {
    let mut run = Harness::training(3);
    for _ in 0..3 {
        run.step(3);
    }
    let (attempt, _) = opened(&run);
    for node in 1..=3 {
        run.handle(Event::Lost { node: id(node), cause: LossCause::Ended, reason: "killed".into() });
    }
    run.join(4, ResidentState::default());
    assert_eq!(run.machine.committed(), Step(0), "the run went back");
    run.handle(Event::CheckpointStored { attempt });
    assert_eq!(run.machine.durable(), None);
}

#[test]
fn the_run_waits_for_a_sole_holder_whose_link_broke_and_goes_back_only_if_it_does_not_return() {
    let lose = |cause| {
        let mut run = Harness::training(1);
        run.step(1);
        let shards = run.machine.settings.architecture.shards();
        run.handle(Event::Lost { node: id(1), cause, reason: "its link ended".into() });
        let went_back = |run: &Harness| run.notices().any(|notice| matches!(notice, Notice::WentBack { .. }));
        assert!(!went_back(&run));
        run.join(2, ResidentState::default());
        (run, shards, went_back)
    };
    // It returns with its state: nothing is lost.
    let (mut run, shards, _) = lose(LossCause::Unlinked);
    assert_eq!(run.machine.activity(), Activity::Gathering, "node 1 may return");
    run.join(1, ResidentState { timeline: Timeline(0), version: Step(1), shards, prepared: None });
    assert_eq!((run.machine.committed(), run.machine.activity()), (Step(1), Activity::Placing));
    // It does not.
    let (mut run, _, went_back) = lose(LossCause::Unlinked);
    run.handle(Event::Tick { ms: run.machine.settings.cluster.return_timeout_ms });
    assert!(went_back(&run));
    // Its process is known to have ended: there is nothing to wait for.
    let (run, _, went_back) = lose(LossCause::Ended);
    assert!(went_back(&run));
}

#[test]
fn a_checkpoint_is_verified_before_it_is_loaded_and_not_when_nodes_return_with_their_state() {
    let persistent = PersistentState { epoch: Epoch(4), timeline: Timeline(0), members: vec![id(1)] };
    let update = Update::decide(1.0, true, 6, 0.1, None).0;
    let last = Some(LastCommit { epoch: Epoch(4), step: Step(5), update });
    let restored = || Restored { durable: Some(Step(3)), last, persistent: persistent.clone() };
    let is_verified = |e: &Effect| matches!(e, Effect::VerifyCheckpoint { step: Step(3) });
    let mut run = Harness::new(settings(1), restored());
    let shards = run.machine.settings.architecture.shards();
    run.join(1, ResidentState { timeline: Timeline(0), version: Step(5), shards, prepared: None });
    assert!(!run.effects.iter().any(is_verified), "{:?}", run.effects);
    assert_eq!(run.machine.activity(), Activity::Placing);

    let mut run = Harness::new(settings(1), restored());
    run.join(2, ResidentState::default());
    run.handle(Event::Tick { ms: run.machine.settings.cluster.return_timeout_ms });
    assert!(run.effects.iter().any(is_verified), "{:?}", run.effects);
    assert_eq!(run.machine.committed(), Step(5), "nothing is undone before it is known to be intact");
    // However long that takes.
    run.handle(Event::Tick { ms: 10 * run.machine.settings.cluster.gather_timeout_ms });
    assert_eq!(run.machine.activity(), Activity::Gathering);
    run.handle(Event::CheckpointVerified { intact: Some(Step(3)) });
    assert_eq!((run.machine.committed(), run.machine.activity()), (Step(3), Activity::Placing));
}

#[test]
fn a_node_that_hangs_in_a_validation_is_fenced() {
    let mut settings = settings(3);
    settings.validation.rounds = 1;
    let mut run = Harness::new(settings, Restored::default());
    for node in 1..=3 {
        run.join(node, ResidentState::default());
    }
    run.all_ready();
    assert_eq!(run.machine.activity(), Activity::Validating);
    let epoch = run.machine.placement().epoch;
    for node in [1, 3] {
        let NodeReport::Prepared { lanes, .. } = run.prepared(node) else { unreachable!() };
        run.report(node, NodeReport::Validated { epoch, round: 0, lanes });
    }
    let ms = run.machine.settings.cluster.step_timeout_ms;
    run.handle(Event::Tick { ms });
    assert_eq!(fenced(&run), [id(2)]);
}

#[test]
fn a_report_that_is_not_a_nodes_own_part_commits_nothing() {
    let mut run = Harness::training(2);
    run.step(2);
    let NodeReport::Prepared { epoch, step, norms, lanes, speed } = run.prepared(1) else { unreachable!() };
    let prepared = |norms, lanes| NodeReport::Prepared { epoch, step, norms, lanes, speed };
    let mut foreign = lanes.clone();
    foreign[0].0 = run.machine.placement().lanes_of(&id(2))[0];
    let wrong = [
        prepared(Vec::new(), Vec::new()),
        prepared(norms[1..].to_vec(), lanes.clone()),
        prepared(norms.clone(), foreign),
        prepared(norms.clone(), lanes[1..].to_vec()),
        prepared([&norms[..1], &norms[..]].concat()[..norms.len()].to_vec(), lanes.clone()),
    ];
    for report in wrong {
        let mut run = Harness::training(2);
        run.step(2);
        let other = run.prepared(2);
        run.report(2, other);
        run.report(1, report.clone());
        assert_eq!(run.machine.committed(), Step(1), "{report:?}");
        let aborted = |notice: &Notice| matches!(notice, Notice::Aborted { reason, .. } if reason.contains("n1: it reports"));
        assert!(run.notices().any(aborted), "{:?}", run.effects);
    }
}

#[test]
fn a_learner_that_receives_no_gradients_delays_a_step_by_its_grace_and_is_fenced() {
    let mut run = Harness::training(2);
    run.step(2);
    run.join(3, ResidentState::default());
    run.step(2);
    run.all_ready();
    assert!(run.machine.placement().is_learning(&id(3)));
    let before = run.machine.committed();
    for _ in 0..4 * LEARNER_MISSES_MAX {
        run.step(2);
        run.handle(Event::Tick { ms: LEARNER_GRACE_MS });
        if fenced(&run) == [id(3)] {
            assert!(run.machine.committed() > before);
            return;
        }
        let (epoch, version) = (run.machine.placement().epoch, run.machine.committed());
        let shards = run.machine.settings.architecture.shards();
        run.report(3, NodeReport::Learned { epoch, version, shards });
    }
    panic!("it is never fenced");
}

fn fenced(run: &Harness) -> Vec<NodeId> {
    let node = |notice: &Notice| match notice {
        Notice::Fenced { node, .. } => Some(node.clone()),
        _ => None,
    };
    run.notices().filter_map(node).collect()
}

#[test]
fn a_failing_node_is_fenced_while_others_hold_its_shards() {
    let failed = |run: &Harness, fatal| NodeReport::Failed {
        epoch: run.machine.placement().epoch,
        reason: "its device is full".into(),
        fatal,
        suspect: None,
    };
    let mut run = Harness::training(3);
    run.step(3);
    let fatal = failed(&run, true);
    run.report(2, fatal);
    assert_eq!(fenced(&run), [id(2)]);
    assert!(!run.effects.iter().any(|effect| matches!(effect, Effect::Fatal { .. })));
    // A temporary failure is retried twice.
    let mut run = Harness::training(3);
    run.step(3);
    for _ in 0..2 {
        let message = failed(&run, false);
        run.report(2, message);
        assert!(fenced(&run).is_empty());
        run.all_ready();
    }
    let message = failed(&run, false);
    run.report(2, message);
    assert_eq!(fenced(&run), [id(2)]);
    // A node with the last copy of a shard is not fenced.
    let mut run = Harness::training(1);
    run.step(1);
    let fatal = failed(&run, true);
    run.report(1, fatal);
    assert!(fenced(&run).is_empty());
}

#[test]
fn a_node_that_all_others_wait_for_is_fenced() {
    let mut run = Harness::training(3);
    run.step(3);
    for node in [1, 3] {
        let message = run.prepared(node);
        run.report(node, message);
    }
    let ms = run.machine.settings.cluster.step_timeout_ms;
    run.handle(Event::Tick { ms });
    assert_eq!(fenced(&run), [id(2)]);
}
