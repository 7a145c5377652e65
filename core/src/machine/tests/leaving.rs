//! Drains, and runs that all nodes leave.

use super::*;

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
        deferred.is_some_and(|(node, reason)| node == id(2) && reason.contains("MiB")),
        "{:?}",
        run.effects
    );
    let is_told = |effect: &Effect| match effect {
        Effect::Send { node, message: NodeCommand::LeaveDeferred { .. } } => *node == id(2),
        _ => false,
    };
    assert!(run.effects.iter().any(is_told), "the node does not know why it stays");
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
fn a_node_that_leaves_stays_until_the_others_have_fetched_what_only_it_holds() {
    let update = update();
    let last = Some(LastCommit { epoch: Epoch(1), step: Step(1), update });
    let members = vec![id(1), id(2), id(3)];
    let persistent = PersistentState { epoch: Epoch(1), members, ..PersistentState::default() };
    let mut run = Harness::new(settings(3), Restored { last, persistent, ..Restored::default() });
    let shards = run.machine.settings.architecture.shards();
    // No node has all dense shards of a stage, so that the next step waits for a copy.
    let (only, rest): (Vec<ShardId>, Vec<ShardId>) =
        shards.into_iter().partition(|shard| *shard == ShardId::Dense { layer: crate::ids::LayerId(0) });
    run.join(1, ResidentState { version: Step(1), shards: rest, ..ResidentState::default() });
    run.join(2, ResidentState { version: Step(1), shards: only, ..ResidentState::default() });
    run.handle(Event::DrainRequested { node: id(2) });
    run.join(3, ResidentState::default());
    assert_eq!(run.machine.placement().members, [id(1), id(3)]);
    assert_eq!(left(&run), [], "{:?}", run.effects);
    let epoch = run.machine.placement().epoch;
    run.report(1, NodeReport::Ready { epoch });
    assert_eq!(left(&run), []);
    run.report(3, NodeReport::Ready { epoch });
    assert_eq!(left(&run), [id(2)]);
}

#[test]
fn a_drain_says_how_many_bytes_the_node_holds() {
    let mut run = Harness::training(2);
    run.handle(Event::DrainRequested { node: id(2) });
    let architecture = &run.machine.settings.architecture;
    let of = |shard: &ShardId| architecture.shard_parameters(*shard) * 4;
    let placement = run.machine.placement();
    let bytes = architecture.shards().iter().filter(|shard| placement.holds(&id(2), **shard)).map(of).sum();
    let said = run.notices().find_map(|notice| match notice {
        Notice::Draining { bytes, sole_bytes, seconds, .. } => Some((*bytes, *sole_bytes, *seconds)),
        _ => None,
    });
    assert_eq!(said, Some((bytes, 0, 0.0)), "the other node has a copy of everything");
}

#[test]
fn a_drain_says_how_long_the_shards_take_that_only_the_node_holds() {
    let mut run = Harness::new(settings(1), Restored::default());
    let profile = Box::new(Profile { bandwidth: 1e6, ..Profile::relative(1.0) });
    let held = ResidentState::default();
    run.handle(Event::Joined { address: String::new(), node: id(1), profile, held });
    run.all_ready();
    run.handle(Event::DrainRequested { node: id(1) });
    let bytes = run.machine.settings.architecture.parameters() * 4;
    let said = run.notices().find_map(|notice| match notice {
        Notice::Draining { sole_bytes, seconds, .. } => Some((*sole_bytes, *seconds)),
        _ => None,
    });
    assert_eq!(said, Some((bytes, bytes as f64 / 1e6)));
}

#[test]
fn a_stop_while_the_holders_of_the_last_step_are_away_ends_the_supervisor_and_not_the_run() {
    let update = update();
    let last = LastCommit { epoch: Epoch(1), step: Step(7), update };
    let restored = Restored { durable: Some(Step(5)), last: Some(last), ..Restored::default() };
    let mut run = Harness::new(settings(2), restored);
    let effects = run.handle(Event::StopRequested);
    let [Effect::Halt { reason }] = effects else { panic!("{effects:?}") };
    assert!(reason.contains("after step 7") && reason.contains("checkpoint is of step 5"), "{reason}");
}

#[test]
fn a_stop_before_any_node_has_come_ends_a_run_that_is_durable() {
    let mut run = Harness::new(settings(2), Restored { durable: Some(Step(5)), ..Restored::default() });
    assert!(matches!(run.handle(Event::StopRequested), [Effect::Done]));
}
