//! A bit that flips in one replica: it is found, blamed and healed, and the run is that without it.
#![expect(clippy::expect_used, reason = "tests")]

use volary_core::machine::{Compared, Notice};
use volary_core::random::{Purpose, Stream};
use volary_core::{NodeId, ShardId, Step};
use volary_sim::{Fault, World, settings};

const STEPS: u64 = 40;

fn world(seed: u64, nodes: usize, replication: usize, within: u64) -> World {
    let mut settings = settings(STEPS, nodes, replication);
    settings.cluster.compare_within = within;
    World::new(seed, settings, nodes)
}

fn undisturbed() -> Vec<(Step, u64)> {
    let mut world = world(1, 1, 1, 16);
    end(&mut world);
    world.journal()
}

fn end(world: &mut World) {
    world.run_until(world.now() + 600_000);
    assert!(world.done, "it does not end: {:?}", world.fatal);
}

/// A corrupted copy, and the step after which it is.
struct Corruption {
    node: NodeId,
    shard: ShardId,
    after: Step,
}

/// Corrupts a copy of a shard with several holders in a random step.
fn corrupt(world: &mut World, stream: &mut Stream) -> Corruption {
    let after = Step(2 + stream.next_u64() % (STEPS - 4));
    world.run_until_step(after);
    let placement = world.placement().expect("a supervisor");
    let mut shards = settings(STEPS, 1, 1).architecture.shards();
    shards.retain(|shard| placement.holders_unordered(*shard).len() > 1);
    let shard = shards[stream.next_u64() as usize % shards.len()];
    let holders = placement.holders(shard);
    let node = holders[stream.next_u64() as usize % holders.len()].clone();
    world.at(world.now() + stream.next_u64() % 100, Fault::Corrupt(node.clone(), shard));
    Corruption { node, shard, after }
}

/// The differences that were found: step, shard and blamed nodes.
fn found(world: &World) -> Vec<(Step, ShardId, Vec<NodeId>)> {
    let found = |notice: &Notice| match notice {
        Notice::ReplicasDiffer { step, shard, what: Compared::State, blamed, .. } => {
            Some((*step, *shard, blamed.clone()))
        }
        _ => None,
    };
    world.notices.iter().filter_map(found).collect()
}

#[test]
fn a_corrupted_replica_is_found_in_time_blamed_and_leaves_no_trace() {
    for seed in 0..300 {
        let mut stream = Stream::new(seed, Purpose::Faults, &[1]);
        let within = [1, 4, 16][seed as usize % 3];
        let replication = 2 + seed as usize % 2;
        let mut world = world(seed, 4, replication, within);
        let Corruption { node, shard, after } = corrupt(&mut world, &mut stream);
        end(&mut world);
        let found = found(&world);
        let what = format!("seed {seed}: {node}, {shard}, after step {after}, {found:?}");
        assert_eq!(found.len(), 1, "{what}");
        assert_eq!(found[0].1, shard, "{what}");
        // It may flip in the step after, behind that step's comparison.
        assert!(found[0].0.0 <= after.0 + 2 + within, "{what}");
        let most =
            world.notices.iter().filter(|n| matches!(n, Notice::Fenced { node: at, .. } if *at == node));
        let blamed = if found[0].2.is_empty() { vec![] } else { vec![node.clone()] };
        assert_eq!((&found[0].2, most.count()), (&blamed, blamed.len()), "{what}");
        assert!(replication == 2 || !blamed.is_empty() || !shard.is_expert(), "{what}");
        assert_eq!(world.journal(), undisturbed(), "{what}");
        assert!(world.is_checkpoint_right(), "{what}");
    }
}

/// The corruption meets a checkpoint, a death or a new node.
#[test]
fn a_corrupted_replica_leaves_no_trace_while_nodes_come_and_go() {
    for seed in 0..300 {
        let mut stream = Stream::new(seed, Purpose::Faults, &[2]);
        let mut world = world(seed, 4, 3, 4);
        let Corruption { node, shard, after } = corrupt(&mut world, &mut stream);
        let others: Vec<NodeId> = world.alive().into_iter().filter(|other| *other != node).collect();
        let other = others[stream.next_u64() as usize % others.len()].clone();
        let fault = match stream.next_u64() % 4 {
            0 => Fault::Kill(other),
            1 => Fault::Join,
            2 => Fault::Drain(other),
            _ => Fault::KillSupervisor(stream.next_u64() % 60),
        };
        let what = format!("seed {seed}: {node}, {shard}, after step {after}, {fault:?}");
        world.at(world.now() + stream.next_u64() % 400, fault);
        end(&mut world);
        assert_eq!(world.journal(), undisturbed(), "{what}, {:?}", found(&world));
        assert!(world.is_checkpoint_right(), "{what}");
    }
}
