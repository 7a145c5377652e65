//! Volary's guarantees for each fault, in simulated time.
#![expect(clippy::expect_used, reason = "tests")]

use volary_core::limits::LEARNER_GRACE_MS;
use volary_core::machine::{Notice, Settings};
use volary_core::{ExpertId, LayerId, NodeId, ShardId, Step};
use volary_sim::limits::SILENCE_MS;
use volary_sim::{Fault, World, deep_settings, room_for_half, settings};

const STEPS: u64 = 40;
/// The longest step without faults: the slowest node's work, waits and messages.
const ORDINARY_MS: u64 = 160;

fn id(number: usize) -> NodeId {
    NodeId::new(format!("n{number}"))
}

/// Without validations, so that the time between two commits is that of a step.
fn unvalidated(mut settings: Settings) -> Settings {
    settings.validation.rounds = 0;
    settings
}

fn world(seed: u64, nodes: usize, replication: usize) -> World {
    World::new(seed, unvalidated(settings(STEPS, nodes, replication)), nodes)
}

fn undisturbed() -> Vec<(Step, u64)> {
    let mut world = world(1, 1, 1);
    end(&mut world);
    world.journal()
}

fn undisturbed_deep() -> Vec<(Step, u64)> {
    let mut world = World::new(1, unvalidated(deep_settings(STEPS, 1, 1)), 1);
    end(&mut world);
    world.journal()
}

fn end(world: &mut World) {
    world.run_until(world.now() + 600_000);
    assert!(world.done, "it does not end: {:?}", world.fatal);
}

/// Injects `fault` in step 10 and plays the run to its end. Its journal must be that of a run without faults.
fn with_fault(seed: u64, nodes: usize, replication: usize, fault: Fault) -> World {
    let mut world = world(seed, nodes, replication);
    world.run_until_step(Step(9));
    world.at(world.now() + 30, fault);
    end(&mut world);
    assert_eq!(world.journal(), undisturbed(), "seed {seed}");
    world
}

fn has(world: &World, what: fn(&Notice) -> bool) -> bool {
    world.notices.iter().any(what)
}

/// The longest time between two commits.
fn longest_gap(world: &World) -> u64 {
    world.commits.windows(2).map(|pair| pair[1].1 - pair[0].1).max().unwrap_or(0)
}

fn assert_no_step_repeated(world: &World) {
    let steps: Vec<Step> = world.commits.iter().map(|(step, _)| *step).collect();
    assert_eq!(steps, Step(1).through(Step(STEPS)).collect::<Vec<_>>(), "every step is committed once");
}

#[test]
fn a_quiet_run_commits_every_step_once_at_any_number_of_nodes() {
    for (nodes, replication) in [(1, 1), (2, 1), (3, 2), (5, 3)] {
        let mut world = world(1, nodes, replication);
        end(&mut world);
        assert_no_step_repeated(&world);
        assert_eq!(world.journal(), undisturbed());
        assert!(longest_gap(&world) <= ORDINARY_MS, "{}", longest_gap(&world));
    }
}

#[test]
fn a_death_loses_no_step_and_no_step_waits_for_copies() {
    for seed in 0..200 {
        let world = with_fault(seed, 3, 2, Fault::Kill(id(2)));
        assert_no_step_repeated(&world);
        // The death is noticed after SILENCE_MS.
        assert!(longest_gap(&world) <= volary_sim::limits::SILENCE_MS + 2 * ORDINARY_MS);
        assert!(
            has(&world, |n| matches!(n, Notice::Migrated { .. })),
            "lost replicas are re-created in the background"
        );
    }
}

#[test]
fn a_join_aborts_nothing_and_costs_a_step_at_most() {
    for seed in 0..200 {
        let world = with_fault(seed, 2, 2, Fault::Join);
        assert_no_step_repeated(&world);
        assert!(!has(&world, |n| matches!(n, Notice::Aborted { .. })));
        assert!(longest_gap(&world) <= 2 * ORDINARY_MS, "seed {seed}: {}", longest_gap(&world));
        let last = world.notices.iter().rev().find_map(|notice| match notice {
            Notice::Placed { nodes, .. } => Some(nodes.clone()),
            _ => None,
        });
        assert_eq!(last, Some(vec![id(1), id(2), id(3)]));
    }
}

#[test]
fn a_drain_aborts_nothing_and_costs_a_step_at_most() {
    for seed in 0..200 {
        let world = with_fault(seed, 3, 1, Fault::Drain(id(2)));
        assert_no_step_repeated(&world);
        assert!(!has(&world, |n| matches!(n, Notice::Aborted { .. } | Notice::WentBack { .. })));
        assert!(world.left.contains(&id(2)));
        assert!(longest_gap(&world) <= 2 * ORDINARY_MS, "seed {seed}: {}", longest_gap(&world));
    }
}

#[test]
fn when_the_last_copy_dies_the_run_goes_back_to_its_checkpoint() {
    for seed in 0..200 {
        let world = with_fault(seed, 3, 1, Fault::Kill(id(1)));
        let back = world.notices.iter().find_map(|notice| match notice {
            Notice::WentBack { from, to, .. } => Some((*from, *to)),
            _ => None,
        });
        let (from, to) = back.expect("a notice");
        assert!(to.is_multiple_of(5) && (from - to) <= 10, "from {from} to {to}");
    }
}

/// The supervisor dies after each of its effects in a few steps.
#[test]
fn a_supervisor_that_dies_anywhere_resumes_where_it_was() {
    for effects in 0..120 {
        let world = with_fault(effects, 3, 2, Fault::KillSupervisor(effects));
        assert_no_step_repeated(&world);
        assert!(!has(&world, |n| matches!(n, Notice::WentBack { .. })));
    }
}

#[test]
fn when_all_processes_die_the_run_resumes_from_the_last_checkpoint() {
    for seed in 0..100 {
        let mut world = world(seed, 3, 2);
        world.run_until_step(Step(12));
        world.at(world.now(), Fault::KillEverything);
        world.at(world.now() + 1_000, Fault::Join);
        end(&mut world);
        assert_eq!(world.journal(), undisturbed());
    }
}

#[test]
fn a_stop_writes_a_checkpoint_of_the_last_committed_step() {
    for seed in 0..100 {
        let mut world = world(seed, 3, 2);
        world.run_until_step(Step(12));
        world.at(world.now() + seed, Fault::Stop);
        end(&mut world);
        let last = world.journal().last().map(|(step, _)| *step);
        assert_eq!(world.durable(), last, "seed {seed}");
        assert_eq!(world.journal(), undisturbed()[..last.unwrap_or_default().0 as usize]);
    }
}

#[test]
fn a_node_that_hangs_is_lost_and_rejoins_without_state() {
    for seed in 0..100 {
        let world = with_fault(seed, 3, 2, Fault::Freeze(id(2), 3_000));
        assert_no_step_repeated(&world);
        assert!(has(&world, |n| matches!(n, Notice::Lost { .. })));
        assert!(!has(&world, |n| matches!(n, Notice::Returned { .. })), "its old state is not used");
    }
}

#[test]
fn of_two_nodes_that_cannot_reach_each_other_one_is_fenced() {
    for seed in 0..100 {
        let world = with_fault(seed, 3, 2, Fault::Cut(id(1), id(2), 60_000));
        assert_no_step_repeated(&world);
        let fenced = world.notices.iter().filter(|notice| matches!(notice, Notice::Fenced { .. })).count();
        assert!(fenced >= 1, "seed {seed}");
    }
}

/// The receiver of a lost frame waits and reports no suspect; the sender fails without an acknowledgment.
#[test]
fn frames_that_are_lost_one_way_are_reported_by_their_sender_and_cost_no_step() {
    for seed in 0..100 {
        let world = with_fault(seed, 3, 2, Fault::Mute(id(1), id(2), 60_000));
        assert_no_step_repeated(&world);
        let reason = world.notices.iter().find_map(|notice| match notice {
            Notice::Aborted { reason, .. } => Some(reason.as_str()),
            _ => None,
        });
        assert_eq!(reason, Some("n1: n2 cannot be reached"), "seed {seed}");
        assert!(!has(&world, |n| matches!(n, Notice::WentBack { .. })), "seed {seed}");
        let gap = longest_gap(&world);
        assert!(gap < 3 * SILENCE_MS, "seed {seed}: {gap} ms without a step");
    }
}

/// With one replica of each shard no node can be fenced: the run waits for the network, and then continues.
#[test]
fn the_run_waits_for_two_indispensable_nodes_that_cannot_reach_each_other() {
    for seed in 0..50 {
        let world = with_fault(seed, 2, 1, Fault::Cut(id(1), id(2), 30_000));
        assert_no_step_repeated(&world);
        assert!(
            !has(&world, |n| matches!(n, Notice::Fenced { .. } | Notice::WentBack { .. })),
            "seed {seed}"
        );
        let aborted = world.notices.iter().filter(|n| matches!(n, Notice::Aborted { .. })).count();
        assert!((2..=30).contains(&aborted), "seed {seed}: {aborted} attempts");
    }
    let mut world = world(1, 2, 1);
    world.run_until_step(Step(9));
    world.at(world.now() + 30, Fault::Cut(id(1), id(2), 10_000_000));
    world.run_until(world.now() + 600_000);
    let reason = world.fatal.expect("it gives up");
    assert!(reason.contains("cannot be reached"), "{reason}");
}

#[test]
fn a_slow_node_gets_fewer_lanes_and_a_hot_expert_more_replicas() {
    let mut world = world(7, 3, 1);
    world.run_until_step(Step(1));
    world.at(world.now(), Fault::Slow(id(3), 0.25));
    end(&mut world);
    assert_eq!(world.journal(), undisturbed());
    assert_no_step_repeated(&world);
    let reasons: Vec<&String> = world
        .notices
        .iter()
        .filter_map(|notice| match notice {
            Notice::Rebalancing { reason, .. } => Some(reason),
            _ => None,
        })
        .collect();
    assert!(reasons.iter().any(|reason| reason.contains("measured speeds")), "{reasons:?}");
    assert!(reasons.iter().any(|reason| reason.contains("replicas")), "{reasons:?}");
    let placement = world.placement().expect("a supervisor");
    let lanes = |node| placement.lanes_of(&id(node)).len();
    assert!(lanes(3) < lanes(1) && lanes(3) < lanes(2), "{placement:?}");
    let hot = ShardId::Expert { layer: LayerId(0), expert: ExpertId(1) };
    assert!(placement.holders(hot).len() > 1, "{placement:?}");
    assert!(reasons.len() <= 4, "placements do not oscillate: {reasons:?}");
}

#[test]
fn a_newcomer_that_no_node_reaches_delays_no_step_by_more_than_its_grace() {
    for seed in 0..100 {
        let world = with_fault(seed, 2, 2, Fault::JoinHidden);
        assert_no_step_repeated(&world);
        assert!(!has(&world, |n| matches!(n, Notice::Aborted { .. })), "seed {seed}");
        let limit = 2 * ORDINARY_MS + LEARNER_GRACE_MS + volary_sim::limits::TICK_MS;
        assert!(longest_gap(&world) <= limit, "seed {seed}: {}", longest_gap(&world));
        assert!(has(&world, |n| matches!(n, Notice::Fenced { .. })), "seed {seed}");
    }
}

/// As a kubelet does: both get a notice, and a node that is still there is killed later.
#[test]
fn a_run_scaled_to_zero_loses_nothing_and_goes_on_with_the_next_node() {
    for seed in 0..200 {
        let mut world = world(seed, 2, 1);
        world.run_until_step(Step(9));
        world.at(world.now() + seed % 50, Fault::Drain(id(1)));
        world.at(world.now() + seed, Fault::Drain(id(2)));
        world.run_until(world.now() + 10_000);
        assert!(world.alive().is_empty(), "seed {seed}: {:?} have not left", world.alive());
        world.at(world.now() + 60_000, Fault::Join);
        end(&mut world);
        assert_eq!(world.journal(), undisturbed(), "seed {seed}");
        assert_no_step_repeated(&world);
        assert!(!has(&world, |n| matches!(n, Notice::WentBack { .. })), "seed {seed}");
    }
}

/// The sole holder of some shards lives, and dials again.
#[test]
fn a_broken_link_of_a_sole_holder_costs_no_step() {
    for seed in 0..100 {
        let world = with_fault(seed, 3, 1, Fault::Partition(id(2), 3_000));
        assert_no_step_repeated(&world);
        assert!(!has(&world, |n| matches!(n, Notice::WentBack { .. })), "seed {seed}");
        assert!(has(&world, |n| matches!(n, Notice::Returned { .. })), "seed {seed}");
    }
}

/// A checkpoint is under way at all times.
#[test]
fn a_drain_happens_while_checkpoints_are_written_at_every_step() {
    for seed in 0..100 {
        let mut settings = unvalidated(settings(STEPS, 3, 2));
        settings.checkpoint.every = 1;
        let mut world = World::new(seed, settings, 3);
        world.run_until_step(Step(9));
        world.at(world.now() + 30, Fault::Drain(id(2)));
        world.run_until_step(Step(20));
        assert!(world.left.contains(&id(2)), "seed {seed}");
        end(&mut world);
        assert_eq!(world.journal(), undisturbed(), "seed {seed}");
    }
}

fn spread(seed: u64, nodes: usize) -> World {
    let settings = unvalidated(deep_settings(STEPS, nodes, 2));
    let mut world = World::with_profiles(seed, settings, nodes, room_for_half);
    world.run_until_step(Step(9));
    let stages = world.placement().expect("a supervisor").stages.len();
    assert_eq!(stages, 2, "no node has room for all layers");
    world
}

#[test]
fn a_model_in_stages_survives_every_fault() {
    let faults = |seed: u64| match seed % 5 {
        0 => Fault::Kill(id(1 + seed as usize % 4)),
        1 => Fault::Drain(id(1 + seed as usize % 4)),
        2 => Fault::Join,
        3 => Fault::KillSupervisor(seed % 60),
        _ => Fault::Freeze(id(1 + seed as usize % 4), 3_000),
    };
    for seed in 0..200 {
        let mut world = spread(seed, 5);
        world.at(world.now() + 30, faults(seed));
        end(&mut world);
        assert_eq!(world.journal(), undisturbed_deep(), "seed {seed}");
        assert_no_step_repeated(&world);
        assert!(!has(&world, |n| matches!(n, Notice::WentBack { .. })), "seed {seed}");
        let placement = world.placement().expect("a supervisor");
        let alone = placement.stages.iter().find(|stage| stage.holders.is_empty());
        assert!(alone.is_none(), "seed {seed}: {placement:?}");
    }
}

#[test]
fn replicas_are_in_different_zones_before_and_after_a_death() {
    for seed in 0..100 {
        let mut world = spread(seed, 6);
        let apart = |world: &World, when: &str| {
            let placement = world.placement().expect("a supervisor");
            for (shard, holders) in &placement.experts {
                let mut zones: Vec<String> = holders.iter().map(|node| room_for_half(node).zone).collect();
                zones.sort();
                zones.dedup();
                assert_eq!(zones.len(), 2, "seed {seed}, {when}: {shard} on {holders:?}");
            }
        };
        apart(&world, "before");
        world.at(world.now() + 30, Fault::Kill(id(1 + seed as usize % 6)));
        end(&mut world);
        apart(&world, "after");
        assert_eq!(world.journal(), undisturbed_deep(), "seed {seed}");
    }
}
