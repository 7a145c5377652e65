//! Checkpoints: of a run that goes on, that gives up, and that resumes.

use super::*;

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
fn a_checkpoint_is_verified_before_it_is_loaded_and_not_when_nodes_return_with_their_state() {
    let persistent = PersistentState {
        epoch: Epoch(4),
        timeline: Timeline(0),
        members: vec![id(1)],
        ..PersistentState::default()
    };
    let update = update();
    let last = Some(LastCommit { epoch: Epoch(4), step: Step(5), update });
    let restored =
        || Restored { durable: Some(Step(3)), last, persistent: persistent.clone(), ..Restored::default() };
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
fn a_run_that_begins_with_weights_from_elsewhere_loads_them_and_can_go_back_to_them() {
    let from_checkpoint = |run: &Harness| {
        let loads = |(_, source): &(ShardId, Source)| *source == Source::Checkpoint(Step(0));
        let assigned = run.effects.iter().filter_map(|effect| match effect {
            Effect::Send { message: NodeCommand::Assign(assignment), .. } => Some(&assignment.shards),
            _ => None,
        });
        assigned.map(|shards| shards.iter().all(loads)).collect::<Vec<_>>()
    };
    let restored = Restored { durable: Some(Step(0)), ..Restored::default() };
    let mut run = Harness::new(settings(1), restored);
    run.join(1, ResidentState::default());
    run.handle(Event::CheckpointVerified { intact: Some(Step(0)) });
    assert_eq!(from_checkpoint(&run), [true], "{:?}", run.effects);
}

#[test]
fn what_becomes_of_an_abandoned_attempt_does_not_touch_the_next_one() {
    let mut run = Harness::training(2);
    (0..3).for_each(|_| _ = run.step(2));
    let (attempt, _) = opened(&run);
    run.handle(Event::CheckpointFailed { attempt, reason: "no space".into() });
    assert!(run.notices().any(|n| matches!(n, Notice::CheckpointFailed { step: Step(3), .. })));
    (0..3).for_each(|_| _ = run.step(2));
    let (next, step) = opened(&run);
    assert_eq!(step, Step(6));
    let effects = run.handle(Event::CheckpointFailed { attempt, reason: "late".into() });
    assert!(effects.is_empty(), "{effects:?}");
    run.handle(Event::CheckpointStored { attempt });
    assert_eq!(run.machine.durable(), None);
    run.handle(Event::CheckpointStored { attempt: next });
    assert_eq!(run.machine.durable(), Some(Step(6)));
}
