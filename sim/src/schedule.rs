//! Random schedules of faults.

use crate::fault::{Fault, NetworkFaults};
use crate::limits::{END_CHECK_MS, END_CHECKS};
use crate::world::World;
use volary_core::NodeId;
use volary_core::machine::Notice;
use volary_core::random::{Purpose, Stream};

/// The kinds of faults in a schedule.
#[derive(Clone, Copy, Debug)]
pub struct Kinds {
    /// Nodes die, restart, join.
    pub nodes: bool,
    /// The supervisor dies.
    pub supervisor: bool,
    /// Processes freeze, links break.
    pub hangs: bool,
    /// Messages are lost, duplicated, reordered.
    pub network: bool,
    /// Nodes are drained.
    pub drains: bool,
}

impl Kinds {
    /// All kinds.
    pub const ALL: Self = Self { nodes: true, supervisor: true, hangs: true, network: true, drains: true };
}

/// Injects up to `faults` random faults within `ms` milliseconds, and plays the run to its end. So that it
/// can end, a node joins after the faults if none is left, and as many as the run wants if the remaining ones
/// have too little memory.
#[must_use]
pub fn schedule(seed: u64, mut world: World, kinds: Kinds, faults: u64, ms: u64) -> World {
    let mut random = Stream::new(seed, Purpose::Faults, &[2]);
    let mut times: Vec<u64> = (0..faults).map(|_| 200 + random.below(ms)).collect();
    times.sort_unstable();
    for time in times {
        world.run_until(time);
        if world.done || world.fatal.is_some() {
            return world;
        }
        if let Some(fault) = draw(&mut random, &world, kinds) {
            world.inject(fault);
        }
    }
    world.inject(Fault::Network(NetworkFaults::default()));
    world.run_until(ms + 10_000);
    if world.alive().is_empty() {
        world.inject(Fault::Join);
    }
    world.run_until(ms + 60_000);
    for _ in 0..END_CHECKS {
        // Those who left in good order are followed by others, and those without room by as many as it takes.
        let (alive, nodes) = (world.alive().len(), world.settings.cluster.nodes);
        let placed_or_not = |n: &&Notice| matches!(n, Notice::NoRoom { .. } | Notice::Placed { .. });
        match world.notices.iter().rev().find(placed_or_not) {
            Some(Notice::NoRoom { .. }) => (alive..nodes).for_each(|_| world.inject(Fault::Join)),
            _ if alive == 0 => world.inject(Fault::Join),
            _ => {}
        }
        world.run_until(world.now() + END_CHECK_MS);
    }
    world
}

fn draw(random: &mut Stream, world: &World, kinds: Kinds) -> Option<Fault> {
    let alive = world.alive();
    let pick = |random: &mut Stream| {
        (!alive.is_empty()).then(|| alive[random.below(alive.len() as u64) as usize].clone())
    };
    let ms = |random: &mut Stream| 50 + random.below(6_000);
    match random.below(13) {
        0 | 1 if kinds.nodes => pick(random).map(Fault::Kill),
        2 if kinds.nodes && alive.len() < 6 => Some(Fault::Join),
        3 if kinds.nodes => {
            let name = NodeId::new(format!("n{}", 1 + random.below(4)));
            Some(Fault::Respawn(name))
        }
        4 if kinds.supervisor => Some(Fault::KillSupervisor(random.below(40))),
        5 if kinds.hangs => pick(random).map(|node| Fault::Freeze(node, ms(random))),
        6 if kinds.hangs => pick(random).map(|node| Fault::Partition(node, ms(random))),
        7 if kinds.hangs => {
            let (a, b) = (pick(random)?, pick(random)?);
            (a != b).then(|| Fault::Cut(a, b, ms(random)))
        }
        12 if kinds.hangs => {
            let (from, to) = (pick(random)?, pick(random)?);
            (from != to).then(|| Fault::Mute(from, to, ms(random)))
        }
        8 if kinds.drains && alive.len() > 1 => pick(random).map(Fault::Drain),
        9 if kinds.network => {
            let share = |random: &mut Stream| random.next_f64() * 0.1;
            Some(Fault::Network(NetworkFaults {
                drop: share(random),
                duplicate: share(random),
                reorder: share(random),
            }))
        }
        10 if kinds.hangs => pick(random).map(|node| Fault::Slow(node, 0.2 + random.next_f64())),
        11 if kinds.nodes && kinds.supervisor && random.below(8) == 0 => Some(Fault::KillEverything),
        _ => None,
    }
}
