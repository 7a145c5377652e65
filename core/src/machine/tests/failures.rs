//! Deaths, broken links, hanging and failing nodes, restarts of the supervisor.

use super::*;

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
    let update = update();
    let restored = || Restored {
        durable: Some(Step(3)),
        last: Some(LastCommit { epoch, step: last, update }),
        persistent: PersistentState {
            epoch,
            timeline: Timeline(2),
            members: vec![id(1), id(2), id(3)],
            ..PersistentState::default()
        },
        ..Restored::default()
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
    let persistent = PersistentState {
        epoch: Epoch(4),
        timeline: Timeline(0),
        members: vec![id(1), id(2)],
        ..PersistentState::default()
    };
    let update = update();
    let last = Some(LastCommit { epoch: Epoch(4), step: Step(2), update });
    let mut run = Harness::new(settings(2), Restored { last, persistent, ..Restored::default() });
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
