//! Steps and commits.

use super::*;

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
    let NodeReport::Prepared { epoch, step, norms, digests, lanes, speed } = run.prepared(1) else {
        unreachable!()
    };
    for epoch in [epoch.previous(), epoch.next()] {
        let (norms, digests, lanes) = (norms.clone(), digests.clone(), lanes.clone());
        run.report(1, NodeReport::Prepared { epoch, step, norms, digests, lanes, speed });
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
    let NodeReport::Prepared { epoch, step, mut norms, digests, lanes, speed } = run.prepared(1) else {
        unreachable!()
    };
    norms[2].1.finite = false;
    let effects = run.report(1, NodeReport::Prepared { epoch, step, norms, digests, lanes, speed });
    let update = effects.iter().find_map(|effect| match effect {
        Effect::Send { message: NodeCommand::Commit { update, .. }, .. } => Some(*update),
        _ => None,
    });
    assert!(matches!(update, Some(Update { apply: false, .. })), "{update:?}");
    assert_eq!(run.machine.activity(), Activity::Training);
}

#[test]
fn a_report_that_is_not_a_nodes_own_part_commits_nothing() {
    let mut run = Harness::training(2);
    run.step(2);
    let NodeReport::Prepared { epoch, step, norms, digests, lanes, speed } = run.prepared(1) else {
        unreachable!()
    };
    let prepared =
        |norms, lanes| NodeReport::Prepared { epoch, step, norms, digests: digests.clone(), lanes, speed };
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
fn holders_are_listed_owner_first_and_with_learners_that_have_copied() {
    let mut run = Harness::training(2);
    let shard = ShardId::Embedding;
    let placed = run.machine.placement().holders(shard);
    assert_eq!((run.machine.holders(shard), placed.len()), (placed.clone(), 2));
    run.join(3, ResidentState::default());
    run.step(2);
    assert!(run.machine.placement().is_learning(&id(3)));
    assert_eq!(run.machine.holders(shard), placed, "it has not learned yet");
    let (epoch, version) = (run.machine.placement().epoch, run.machine.committed());
    run.all_ready();
    run.report(3, NodeReport::Learned { epoch, version, shards: vec![shard] });
    assert_eq!(run.machine.holders(shard), [placed, vec![id(3)]].concat());
}

#[test]
fn a_speed_that_cannot_be_is_not_recorded() {
    let mut run = Harness::training(1);
    for wrong in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        let NodeReport::Prepared { epoch, step, norms, digests, lanes, .. } = run.prepared(1) else {
            panic!("a report")
        };
        run.report(1, NodeReport::Prepared { epoch, step, norms, digests, lanes, speed: Some(wrong) });
        assert_eq!(run.machine.nodes[&id(1)].speed, None, "{wrong}");
    }
    run.step(1);
    assert_eq!(run.machine.nodes[&id(1)].speed, Some(1.0));
}

/// A node that stands still in some steps and not in others is as slow as these steps are long together.
#[test]
fn the_average_speed_is_that_of_the_average_time() {
    let mut run = Harness::training(1);
    let report = |run: &mut Harness, measured| {
        let NodeReport::Prepared { epoch, step, norms, digests, lanes, .. } = run.prepared(1) else {
            panic!("a report")
        };
        run.report(1, NodeReport::Prepared { epoch, step, norms, digests, lanes, speed: Some(measured) });
        run.machine.nodes[&id(1)].speed.expect("a speed")
    };
    for _ in 0..100 {
        report(&mut run, 10.0);
        report(&mut run, 1.0);
    }
    // Between the 1.8 lanes per second of the times' mean and the weight of the newest time.
    let speed = report(&mut run, 10.0);
    assert!((1.5..2.2).contains(&speed), "{speed}");
}
