//! Numbers that are not finite: skipped steps, broken runs, and the data that they leave out.

use super::*;

/// One node trains; gradients of the steps whose data is in `bad` are not finite.
struct Poisoned {
    run: Harness,
    bad: std::ops::RangeInclusive<u64>,
    /// The data of every step that was begun, in order.
    data: Vec<(u64, u64)>,
}

impl Poisoned {
    fn new(on_nan: OnNan, bad: std::ops::RangeInclusive<u64>) -> Self {
        let mut settings = settings(1);
        settings.training.on_nan = on_nan;
        settings.training.steps = 12;
        let mut run = Self { run: Harness::new(settings, Restored::default()), bad, data: Vec::new() };
        run.run.join(1, ResidentState::default());
        run.follow();
        run
    }

    /// Does what the last effects ask for, until a step is in flight or the run is over.
    fn follow(&mut self) {
        let mut effects = self.run.effects.clone();
        while !effects.is_empty() {
            let mut next = Vec::new();
            for effect in effects {
                let event = match effect {
                    Effect::Send { message: NodeCommand::Assign(assignment), .. } => {
                        let epoch = assignment.layout.placement.epoch;
                        Event::Reported { node: id(1), message: NodeReport::Ready { epoch } }
                    }
                    Effect::Send { message: NodeCommand::Begin { step, data, .. }, .. } => {
                        self.data.push((step.0, data.0));
                        continue;
                    }
                    Effect::OpenCheckpoint { attempt, .. } => Event::CheckpointStored { attempt },
                    Effect::VerifyCheckpoint { step } => Event::CheckpointVerified { intact: Some(step) },
                    _ => continue,
                };
                next.extend(self.run.machine.handle(event));
            }
            self.run.effects.extend(next.iter().cloned());
            effects = next;
        }
    }

    /// Runs the step in flight.
    fn step(&mut self) {
        let (_, data) = *self.data.last().expect("a step in flight");
        let finite = !self.bad.contains(&data);
        let mut report = self.run.prepared(1);
        if let NodeReport::Prepared { norms, .. } = &mut report {
            norms.iter_mut().for_each(|(_, norm)| norm.finite = finite);
        }
        self.run.report(1, report);
        self.follow();
    }

    fn until_over(&mut self) {
        for _ in 0..100 {
            if self.run.machine.activity() == Activity::Done {
                return;
            }
            self.step();
        }
        panic!("the run does not end");
    }
}

#[test]
fn a_broken_run_goes_back_and_past_the_data_that_broke_it() {
    // Two steps in a row may be skipped, and checkpoints are of steps 3 and 6.
    let mut run = Poisoned::new(OnNan::GoBack, 8..=9);
    run.until_over();
    assert!(!run.run.is_fatal());
    let before: Vec<_> = (1..=9).map(|step| (step, step)).collect();
    // Back to step 6, and past the data of steps 7 to 9.
    let after: Vec<_> = (7..=12).map(|step| (step, step + 3)).collect();
    assert_eq!(run.data, [before, after].concat());
}

#[test]
fn the_way_back_is_told_and_begins_a_new_timeline() {
    let mut run = Poisoned::new(OnNan::GoBack, 4..=5);
    let timeline = run.run.machine.timeline;
    for _ in 0..5 {
        run.step();
    }
    let (from, to, data) = (Step(5), Step(3), Step(6));
    let told = |notice: &&Notice| matches!(notice, Notice::WentBackFromNan { .. });
    let Some(Notice::WentBackFromNan { reason, .. }) = run.run.notices().find(told) else {
        panic!("not told")
    };
    assert!(reason.contains("2 steps in a row"), "{reason}");
    let expected = Notice::WentBackFromNan { from, to, data, reason: reason.clone() };
    assert!(run.run.notices().any(|notice| *notice == expected));
    assert_ne!(run.run.machine.timeline, timeline);
    let is_persisted = |effect: &Effect| match effect {
        Effect::GoBack { step: Step(3), state } => state.data_skips.data_step(Step(4)) == data,
        _ => false,
    };
    assert!(run.run.effects.iter().any(is_persisted), "the data is not part of the durable state");
}

#[test]
fn single_skipped_steps_change_nothing_else() {
    let mut run = Poisoned::new(OnNan::GoBack, 5..=5);
    run.until_over();
    assert!(!run.run.is_fatal());
    assert_eq!(run.data, (1..=12).map(|step| (step, step)).collect::<Vec<_>>());
}

#[test]
fn a_run_that_breaks_again_and_again_ends_with_an_error() {
    let mut run = Poisoned::new(OnNan::GoBack, 4..=u64::MAX);
    run.until_over();
    let reasons = run.run.effects.iter().filter_map(|effect| match effect {
        Effect::Fatal { reason } => Some(reason.clone()),
        _ => None,
    });
    let reasons: Vec<_> = reasons.collect();
    assert!(
        reasons[0].contains("broken again, after 3 returns") && reasons[0].contains("step 3"),
        "{reasons:?}"
    );
}

#[test]
fn the_policies_stop_and_skip_end_with_an_error_too() {
    let mut run = Poisoned::new(OnNan::Stop, 4..=u64::MAX);
    run.until_over();
    assert!(run.run.is_fatal());
    assert_eq!(run.run.machine.committed(), Step(5), "two steps were skipped");
    let mut run = Poisoned::new(OnNan::Skip, 4..=u64::MAX);
    run.until_over();
    assert!(run.run.is_fatal());
    assert_eq!(run.run.machine.committed(), Step(12), "all steps were run");
    let mut run = Poisoned::new(OnNan::Skip, 4..=9);
    run.until_over();
    assert!(!run.run.is_fatal(), "the run recovered");
}

#[test]
fn no_checkpoint_is_begun_while_steps_are_skipped() {
    let mut run = Poisoned::new(OnNan::Skip, 6..=6);
    for _ in 0..6 {
        run.step();
    }
    assert_eq!(run.run.machine.durable(), Some(Step(3)));
    let passed = |notice: &Notice| matches!(notice, Notice::CheckpointPassed { step: Step(6), .. });
    assert!(run.run.notices().any(passed));
}

#[test]
fn weights_that_are_not_finite_fail_the_checkpoint_and_break_the_run() {
    for (on_nan, is_over) in [(OnNan::GoBack, false), (OnNan::Skip, true), (OnNan::Stop, true)] {
        let mut run = Harness::new(settings(1), Restored::default());
        run.machine.settings.training.on_nan = on_nan;
        run.join(1, ResidentState::default());
        run.all_ready();
        for _ in 0..3 {
            run.step(1);
        }
        run.report(1, NodeReport::WeightsNotFinite { step: Step(3), shard: ShardId::Embedding });
        assert!(run.notices().any(|notice| matches!(notice, Notice::CheckpointFailed { .. })));
        assert_eq!(run.machine.durable(), None, "poisoned weights count as a checkpoint");
        run.step(1);
        assert_eq!(run.is_fatal(), is_over, "{on_nan:?}");
        assert_eq!(run.machine.committed(), Step(if is_over { 4 } else { 0 }), "{on_nan:?}");
    }
}

#[test]
fn a_restarted_supervisor_counts_the_steps_that_were_skipped_before() {
    let members = vec![id(1)];
    let persistent = PersistentState { epoch: Epoch(1), members, ..PersistentState::default() };
    let update = Update { apply: false, ..update() };
    let last = Some(LastCommit { epoch: Epoch(1), step: Step(4), update });
    let restored = Restored { last, skipped_in_a_row: 2, persistent, ..Restored::default() };
    let run = Harness::new(settings(1), restored);
    assert!(run.machine.broken().is_some());
}
