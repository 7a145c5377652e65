//! Random schedules of all faults. In each, the journal is that of a run without faults, every copy of every
//! shard is correct and fits into its node's memory after every change (checked by the world), and the run
//! ends once the faults stop.
//!
//! Each of these mutations of the machine or the agent fails at least one test here, in `scenarios.rs` or in
//! `core`: a commit without one member; a commit sent before it is journaled; no
//! roll-forward of a missed commit; prepared gradients dropped on an abort; dead nodes kept as holders; no
//! going back; an epoch that is not persisted; state of any timeline accepted; stale versions kept; shards of
//! an aborted placement used; no replay, or a replay with a gap; no fencing; a `Prepared` of any epoch
//! accepted.
//!
//! These mutations are *not* caught, because a second guard exists or these schedules do not reach them: a
//! node that accepts a `Commit` of any epoch (it must still match the prepared step) or keeps a step prepared
//! after its commit; a roll-forward of any attempt (the supervisor does not accept the state of such a node);
//! a supervisor that accepts a `Ready` or `Learned` of any epoch; a rollback without a new timeline; a
//! suspension that never ends (the runs end without the node).
#![expect(clippy::expect_used, reason = "tests")]

use std::panic::{AssertUnwindSafe, catch_unwind};
use volary_core::machine::{Notice, Settings};
use volary_core::profile::Profile;
use volary_core::{NodeId, Step};
use volary_sim::{Kinds, World, deep_settings, room_for_half, schedule, settings};

const STEPS: u64 = 30;

fn undisturbed(settings: Settings) -> Vec<(Step, u64)> {
    let mut world = World::new(1, settings, 1);
    world.run_until(600_000);
    assert!(world.done, "{world:?}");
    world.journal()
}

/// The cluster of a seed.
#[derive(Clone, Copy)]
struct Cluster {
    settings: fn(u64) -> Settings,
    profiles: fn(&NodeId) -> Profile,
}

impl Cluster {
    /// The same run on one node.
    fn alone(&self) -> Settings {
        let mut settings = (self.settings)(0);
        settings.cluster.nodes = 1;
        settings
    }
}

const ALIKE: Cluster = Cluster { settings: cluster, profiles: |_| Profile::relative(1.0) };
/// Nodes in two zones, none with room for more than half of the layers.
const SPREAD: Cluster = Cluster { settings: deep_cluster, profiles: room_for_half };

/// Every other node is behind a slow link, so that leaving it out pays.
const FAR: Cluster = Cluster {
    settings: cluster,
    profiles: |node| {
        let far = node.0[1..].parse::<usize>().is_ok_and(|number| number % 2 == 0);
        let (bandwidth, round_trip_s) = if far { (1e6, 0.05) } else { (1e9, 1e-4) };
        Profile { bandwidth, round_trip_s, ..Profile::relative(1.0) }
    },
};

fn play(seed: u64, kinds: Kinds, Cluster { settings, profiles }: Cluster) -> World {
    let settings = settings(seed);
    let nodes = settings.cluster.nodes;
    schedule(seed, World::with_profiles(seed, settings, nodes, profiles), kinds, 14, 6_000)
}

fn cluster(seed: u64) -> Settings {
    let mut settings = settings(STEPS, 2 + (seed % 3) as usize, 1 + (seed / 3 % 3) as usize);
    settings.checkpoint.every = [3, 5, 100][(seed / 9 % 3) as usize];
    settings
}

fn deep_cluster(seed: u64) -> Settings {
    let mut settings = deep_settings(STEPS, 4 + (seed % 3) as usize, 1 + (seed / 3 % 2) as usize);
    settings.checkpoint.every = [3, 5, 100][(seed / 9 % 3) as usize];
    settings
}

/// Plays many seeds. A failure names its seed.
fn all(seeds: std::ops::Range<u64>, kinds: Kinds) -> Vec<World> {
    all_of(seeds, kinds, ALIKE)
}

fn all_of(seeds: std::ops::Range<u64>, kinds: Kinds, cluster: Cluster) -> Vec<World> {
    let expected = undisturbed(cluster.alone());
    let mut failed = Vec::new();
    let mut worlds = Vec::new();
    for seed in seeds {
        match catch_unwind(AssertUnwindSafe(|| play(seed, kinds, cluster))) {
            Ok(world) if !world.done => failed.push((seed, format!("it does not end: {:?}", world.fatal))),
            Ok(world) if world.journal() != expected => failed.push((seed, "another journal".into())),
            Ok(world) => worlds.push(world),
            Err(panic) => {
                let text = panic.downcast_ref::<String>().cloned();
                failed.push((seed, text.unwrap_or_else(|| "a panic".into())));
            }
        }
    }
    assert!(failed.is_empty(), "{} seeds failed: {:#?}", failed.len(), &failed[..failed.len().min(5)]);
    worlds
}

fn count(worlds: &[World], what: fn(&Notice) -> bool) -> usize {
    worlds.iter().flat_map(|world| &world.notices).filter(|notice| what(notice)).count()
}

#[test]
fn nodes_die_and_join() {
    let kinds = Kinds { supervisor: false, hangs: false, network: false, drains: false, ..Kinds::ALL };
    let worlds = all(0..1_000, kinds);
    assert!(
        count(&worlds, |n| matches!(n, Notice::Migrated { .. })) > 100,
        "copies are made in the background"
    );
    assert!(count(&worlds, |n| matches!(n, Notice::WentBack { .. })) > 10, "last copies are lost, too");
}

#[test]
fn the_supervisor_dies_and_restarts() {
    let kinds = Kinds { nodes: false, hangs: false, network: false, drains: false, ..Kinds::ALL };
    let worlds = all(0..1_000, kinds);
    assert_eq!(count(&worlds, |n| matches!(n, Notice::WentBack { .. })), 0, "the nodes keep the state");
    assert!(count(&worlds, |n| matches!(n, Notice::Returned { .. })) > 100);
}

#[test]
fn nodes_are_drained() {
    let kinds = Kinds { nodes: false, supervisor: false, hangs: false, network: false, ..Kinds::ALL };
    let worlds = all(0..500, kinds);
    assert_eq!(count(&worlds, |n| matches!(n, Notice::Aborted { .. } | Notice::WentBack { .. })), 0);
    assert!(count(&worlds, |n| matches!(n, Notice::Left { .. })) > 100);
}

#[test]
fn nodes_hang_and_links_break() {
    let kinds = Kinds { nodes: false, supervisor: false, network: false, drains: false, ..Kinds::ALL };
    all(0..1_000, kinds);
}

#[test]
fn messages_are_lost_duplicated_and_late() {
    let kinds = Kinds { nodes: false, supervisor: false, hangs: false, drains: false, ..Kinds::ALL };
    all(0..1_000, kinds);
}

#[test]
fn everything_at_once() {
    let worlds = all(0..3_000, Kinds::ALL);
    assert!(count(&worlds, |n| matches!(n, Notice::Fenced { .. })) > 10);
}

#[test]
fn everything_at_once_where_no_node_has_room_for_all_layers() {
    let worlds = all_of(0..1_000, Kinds::ALL, SPREAD);
    let staged = |n: &Notice| matches!(n, Notice::Placed { stages, .. } if *stages > 1);
    assert!(count(&worlds, staged) > 1_000, "stages come and go");
}

#[test]
fn everything_at_once_where_nodes_are_far_apart() {
    let worlds = all_of(0..1_000, Kinds::ALL, FAR);
    let left_out = |n: &Notice| matches!(n, Notice::Placed { lanes, .. } if lanes.contains(&0));
    assert!(count(&worlds, left_out) > 100, "nodes behind slow links are left out");
}

/// One seed, traced: `VOLARY_TRACE=116 VOLARY_KINDS=nodes,hangs`; with `VOLARY_SPREAD` no node has room for
/// all layers, with `VOLARY_FAR` some nodes are behind slow links.
#[test]
fn one_seed() {
    let Ok(seed) = std::env::var("VOLARY_TRACE") else { return };
    let named =
        std::env::var("VOLARY_KINDS").unwrap_or_else(|_| "nodes,supervisor,hangs,network,drains".into());
    let has = |kind| named.split(',').any(|name| name == kind);
    let kinds = Kinds {
        nodes: has("nodes"),
        supervisor: has("supervisor"),
        hangs: has("hangs"),
        network: has("network"),
        drains: has("drains"),
    };
    let is_set = |name| std::env::var_os(name).is_some();
    let cluster = match (is_set("VOLARY_SPREAD"), is_set("VOLARY_FAR")) {
        (true, _) => SPREAD,
        (_, true) => FAR,
        _ => ALIKE,
    };
    let world = play(seed.parse().expect("a seed"), kinds, cluster);
    assert!(world.done, "{:?}", world.fatal);
}

/// Many more seeds: `VOLARY_SOAK=seeds`.
#[test]
fn soak() {
    let Ok(seeds) = std::env::var("VOLARY_SOAK") else { return };
    let seeds = 10_000..10_000 + seeds.parse::<u64>().expect("a number of seeds");
    all(seeds.clone(), Kinds::ALL);
    all_of(seeds.clone(), Kinds::ALL, SPREAD);
    all_of(seeds, Kinds::ALL, FAR);
}
