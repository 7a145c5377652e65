//! Replicas that are compared.

use super::*;
use crate::ids::ShardId;

/// A run of `nodes` nodes with a replica of every shard on each, that compares every shard within `within`
/// steps; step 1 is in flight.
fn run(nodes: usize, within: u64) -> Harness {
    let mut settings = settings(nodes);
    (settings.cluster.replication, settings.cluster.compare_within) = (nodes, within);
    settings.training.steps = 100;
    let mut run = Harness::new(settings, Restored::default());
    for node in 1..=nodes {
        run.join(node, ResidentState::default());
    }
    run.all_ready();
    run
}

/// Prepares the step in flight on all nodes; `node` reports another digest of `shard`.
fn step_with_other_state(run: &mut Harness, nodes: usize, node: usize, shard: ShardId) {
    for reporter in 1..=nodes {
        let mut message = run.prepared(reporter);
        if let (true, NodeReport::Prepared { digests, .. }) = (reporter == node, &mut message) {
            let wrong = digests.iter_mut().filter(|(at, _)| *at == shard);
            wrong.for_each(|(_, digest)| *digest = Digest::of(b"other"));
        }
        run.report(reporter, message);
    }
}

fn differing(run: &Harness) -> Vec<(ShardId, Compared, Vec<NodeId>)> {
    let found = |notice: &Notice| match notice {
        Notice::ReplicasDiffer { shard, what, blamed, .. } => Some((*shard, *what, blamed.clone())),
        _ => None,
    };
    run.notices().filter_map(found).collect()
}

/// The step to which the last effects go back.
fn went_back(run: &Harness) -> Option<Step> {
    run.effects.iter().find_map(|effect| match effect {
        Effect::GoBack { step, .. } => Some(*step),
        _ => None,
    })
}

/// Stores the checkpoint that is being written.
fn store_checkpoint(run: &mut Harness) {
    let attempt = run.machine.checkpoint.as_ref().expect("a checkpoint").attempt;
    run.handle(Event::CheckpointStored { attempt });
}

#[test]
fn every_shard_has_its_turn_within_the_steps_that_are_asked_for() {
    for within in [1, 2, 3, 7, 16, 1_000] {
        let mut run = run(2, within);
        let mut seen = BTreeSet::new();
        for _ in 0..within.min(40) {
            seen.extend(run.compared());
            run.step(2);
        }
        let shards = run.machine.settings.architecture.shards();
        assert_eq!(seen.len(), shards.len(), "within {within}");
    }
    assert!(super::comparison::run(2, 0).compared().is_empty());
    assert!(super::comparison::run(1, 1).compared().is_empty(), "one replica is equal to itself");
}

#[test]
fn all_shards_are_compared_in_the_last_step() {
    let mut run = run(2, 16);
    for _ in 0..99 {
        run.step(2);
    }
    assert_eq!(run.compared().len(), run.machine.settings.architecture.shards().len());
}

#[test]
fn a_checkpoint_is_agreed_on_once_every_replica_was_compared_after_it() {
    let mut run = run(2, 4);
    for _ in 0..3 {
        run.step(2);
    }
    store_checkpoint(&mut run);
    let mut agreed = Vec::new();
    for _ in 3..8 {
        run.step(2);
        let found = run.effects.iter().any(|e| *e == Effect::CheckpointAgreed { step: Step(3) });
        agreed.extend(found.then_some(run.machine.committed()));
    }
    assert_eq!(agreed, [Step(7)], "versions 3, 4, 5 and 6 were compared");
}

/// M-6: a majority blames the replica that differs; where the last comparison was a step ago, no step has met
/// it, and nothing else is undone.
#[test]
fn a_replica_that_differs_from_the_majority_is_fenced_before_it_is_used() {
    let mut run = run(3, 1);
    run.step(3);
    run.step(3);
    step_with_other_state(&mut run, 3, 2, ShardId::Embedding);
    assert_eq!(differing(&run), [(ShardId::Embedding, Compared::State, vec![id(2)])]);
    assert!(run.effects.iter().any(|e| matches!(e, Effect::Fence { node, .. } if *node == id(2))));
    assert_eq!((run.machine.committed(), went_back(&run)), (Step(2), None));
    run.all_ready();
    run.step(3);
    assert_eq!(run.machine.committed(), Step(3), "the others go on");
}

/// M-6: steps since the last comparison may have met the difference.
#[test]
fn a_difference_of_unknown_age_goes_back_to_the_checkpoint_that_all_agreed_on() {
    let mut run = run(3, 4);
    for _ in 0..7 {
        run.step(3);
        if run.machine.committed() == Step(3) {
            store_checkpoint(&mut run);
        }
    }
    store_checkpoint(&mut run);
    assert_eq!(run.machine.durable(), Some(Step(6)), "it is newer than the last comparison of all shards");
    let shard = run.compared()[0];
    step_with_other_state(&mut run, 3, 3, shard);
    assert_eq!(differing(&run), [(shard, Compared::State, vec![id(3)])]);
    assert_eq!((went_back(&run), run.machine.durable()), (Some(Step(3)), Some(Step(3))));
    run.handle(Event::CheckpointVerified { intact: Some(Step(3)) });
    let loaded = run.effects.iter().any(|effect| match effect {
        Effect::Send { message: NodeCommand::Assign(assignment), .. } => {
            assignment.shards.iter().all(|(_, source)| *source == Source::Checkpoint(Step(3)))
        }
        _ => false,
    });
    assert!(loaded && !run.machine.placement().is_member(&id(3)), "{:?}", run.effects);
}

#[test]
fn without_a_majority_no_node_is_blamed_and_the_run_ends_when_going_back_does_not_help() {
    let mut run = run(2, 1);
    for attempt in 0..=3 {
        step_with_other_state(&mut run, 2, 1, ShardId::Embedding);
        assert_eq!(differing(&run), [(ShardId::Embedding, Compared::State, vec![])]);
        assert_eq!(run.is_fatal(), attempt == 3);
        if attempt < 3 {
            assert_eq!(went_back(&run), Some(Step(0)));
            run.all_ready();
        }
    }
    let why =
        |effect: &Effect| matches!(effect, Effect::Fatal { reason } if reason.contains("n1 and n2 compute"));
    assert!(run.effects.iter().any(why), "{:?}", run.effects);
}

#[test]
fn a_step_with_unlike_gradients_is_not_committed_and_runs_without_the_node_that_differs() {
    for (nodes, blamed) in [(3, vec![id(1)]), (2, vec![])] {
        let mut run = run(nodes, 16);
        let shard = ShardId::Embedding;
        for node in 1..=nodes {
            let mut message = run.prepared(node);
            if let (1, NodeReport::Prepared { norms, .. }) = (node, &mut message) {
                norms.iter_mut().find(|(at, _)| *at == shard).expect("held").1.squared += f64::EPSILON;
            }
            run.report(node, message);
        }
        assert_eq!(differing(&run), [(shard, Compared::Gradient, blamed)]);
        assert_eq!(run.machine.committed(), Step(0));
        let left = run.machine.placement().members.len();
        assert_eq!(left, nodes - 1, "the step runs again with other owners");
    }
}

#[test]
fn a_copy_is_compared_before_a_placement_uses_it() {
    let mut run = run(2, 16);
    run.join(3, ResidentState::default());
    run.step(2);
    run.learn_all();
    assert!(run.machine.placement().is_learning(&id(3)));
    // The step in flight began before the copies were there.
    run.step(2);
    let message = run.prepared(3);
    run.report(3, message);
    let compared: BTreeSet<ShardId> = run.compared().into_iter().collect();
    let copied: Vec<ShardId> = run.machine.comparison.new_copies.iter().map(|(shard, _)| *shard).collect();
    assert!(!copied.is_empty() && copied.iter().all(|shard| compared.contains(shard)));
    assert!(!run.machine.placement().is_member(&id(3)));
    step_with_other_state(&mut run, 3, 3, copied[0]);
    assert!(run.effects.iter().any(|e| matches!(e, Effect::Fence { node, .. } if *node == id(3))));
    assert_eq!(run.machine.committed(), Step(3), "the members' step is committed");
}

#[test]
fn a_member_that_does_not_report_what_is_compared_commits_nothing() {
    let mut run = run(2, 1);
    let mut message = run.prepared(1);
    if let NodeReport::Prepared { digests, .. } = &mut message {
        digests.pop();
    }
    run.report(1, message);
    let aborted =
        |notice: &Notice| matches!(notice, Notice::Aborted { reason, .. } if reason.contains("content"));
    assert!(run.notices().any(aborted), "{:?}", run.effects);
}

#[test]
fn a_node_of_another_arithmetic_kind_is_told_of_once() {
    let mut run = Harness::new(settings(1), Restored::default());
    let mut told = Vec::new();
    for (number, kind) in [(1, None), (2, Some("a")), (3, Some("a")), (4, Some("b")), (5, Some("b"))] {
        let arithmetic = kind.map(|kind: &str| Digest::of(kind.as_bytes()));
        let profile = Box::new(Profile { arithmetic, ..Profile::relative(1.0) });
        let node = id(number);
        run.handle(Event::Joined { node, profile, address: String::new(), held: ResidentState::default() });
        told.extend(run.notices().filter_map(|notice| match notice {
            Notice::ArithmeticMixed { kinds } => Some((number, kinds.clone())),
            _ => None,
        }));
    }
    let [(4, kinds)] = told.as_slice() else { panic!("{told:?}") };
    let mut kinds = kinds.clone();
    kinds.sort();
    assert_eq!(kinds, [vec![id(2), id(3)], vec![id(4)]]);
}

/// What a node has stored cannot be compared once it is gone.
#[test]
fn a_checkpoint_is_not_agreed_on_when_a_node_that_stored_a_part_has_left_before() {
    let mut run = run(3, 4);
    for _ in 0..3 {
        run.step(3);
    }
    let senders = run.machine.checkpoint.as_ref().expect("a checkpoint").senders.clone();
    store_checkpoint(&mut run);
    let sender = senders.first().expect("a sender").clone();
    run.handle(Event::Lost { node: sender, cause: LossCause::Ended, reason: "killed".into() });
    for _ in 0..12 {
        run.all_ready();
        run.step(3);
        assert!(!run.effects.iter().any(|effect| *effect == Effect::CheckpointAgreed { step: Step(3) }));
    }
    assert!(run.machine.committed() >= Step(8), "the others go on");
}

#[test]
fn a_restarted_supervisor_goes_back_to_the_checkpoint_that_was_agreed_on() {
    let mut settings = settings(2);
    (settings.cluster.compare_within, settings.training.steps) = (1, 100);
    let (durable, agreed) = (Some(Step(6)), Some(Step(3)));
    let mut run = Harness::new(settings, Restored { durable, agreed, ..Restored::default() });
    for node in 1..=2 {
        run.join(node, ResidentState::default());
    }
    run.handle(Event::CheckpointVerified { intact: durable });
    run.all_ready();
    step_with_other_state(&mut run, 2, 1, ShardId::Embedding);
    assert_eq!((went_back(&run), run.machine.durable()), (agreed, agreed));
}
