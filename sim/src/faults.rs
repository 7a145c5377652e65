//! What goes wrong.

use crate::world::{Happening, NetworkFaults, SILENCE_MS, World};
use volary_core::NodeId;
use volary_core::machine::{Event, Notice};
use volary_core::random::{Purpose, Stream};

/// Something that goes wrong, or that people do.
#[derive(Clone, Debug)]
pub enum Fault {
    /// A process ends at once.
    Kill(NodeId),
    /// A process stops for so many milliseconds and goes on.
    Freeze(NodeId, u64),
    /// Nothing passes to or from a node for so many milliseconds.
    Partition(NodeId, u64),
    /// Nothing passes between two nodes for so many milliseconds.
    Cut(NodeId, NodeId, u64),
    /// A new node joins.
    Join,
    /// A node of this name starts again.
    Respawn(NodeId),
    /// Somebody asks a node to leave.
    Drain(NodeId),
    /// The supervisor's process ends after so many more effects, and starts again.
    KillSupervisor(u64),
    /// Everything ends but the disk.
    KillEverything,
    /// A node works at this speed from now on; 1 is ordinary.
    Slow(NodeId, f64),
    /// Somebody asks the run to write a checkpoint and end.
    Stop,
    /// The network changes.
    NetworkFaults(NetworkFaults),
}

impl World {
    pub(crate) fn inject(&mut self, fault: Fault) {
        if self.traced {
            eprintln!("{:>7} !! {fault:?}", self.now);
        }
        match fault {
            Fault::Kill(node) => self.kill(&node),
            Fault::Freeze(node, ms) => {
                let until = self.now + ms;
                self.hold_up(&node, ms, |known| known.frozen_until = known.frozen_until.max(until));
            }
            Fault::Partition(node, ms) => {
                let until = self.now + ms;
                self.hold_up(&node, ms, |known| known.cut_until = known.cut_until.max(until));
            }
            Fault::Cut(a, b, ms) => {
                self.cuts.insert((a, b), self.now + ms);
            }
            Fault::Join => self.join(None),
            Fault::Respawn(node) => {
                if !self.nodes.contains_key(&node) {
                    self.join(Some(node));
                }
            }
            Fault::Drain(node) => self.event(Event::DrainRequested { node }),
            Fault::KillSupervisor(effects) => self.dies_after = Some(effects),
            Fault::KillEverything => {
                self.alive().iter().for_each(|node| self.kill(node));
                self.supervisor_dies();
            }
            Fault::Slow(node, speed) => {
                if let Some(node) = self.nodes.get_mut(&node) {
                    node.speed = speed;
                }
            }
            Fault::Stop => self.event(Event::StopRequested),
            Fault::NetworkFaults(weather) => {
                self.network = weather;
                self.lossy |= weather.drop > 0.0;
            }
        }
    }

    fn kill(&mut self, id: &NodeId) {
        let Some(node) = self.nodes.remove(id) else { return };
        if let Some(session) = node.session {
            self.after(1, SILENCE_MS, Happening::LinkEnds { node: id.clone(), session });
        }
    }

    /// A node that is not heard; beyond the limit both ends give their link up.
    fn hold_up(&mut self, id: &NodeId, ms: u64, how: impl FnOnce(&mut crate::node::Node)) {
        let Some(node) = self.nodes.get_mut(id) else { return };
        how(node);
        if let (Some(session), true) = (node.session, ms > SILENCE_MS) {
            let at = self.now + SILENCE_MS;
            self.put(at, Happening::LinkEnds { node: id.clone(), session });
            self.put(at, Happening::LinkEndsForNode { node: id.clone(), session });
        }
    }
}

/// Which kinds of fault a schedule has.
#[derive(Clone, Copy, Debug)]
pub struct Kinds {
    /// Nodes die, start again, join.
    pub nodes: bool,
    /// The supervisor dies.
    pub supervisor: bool,
    /// Processes stop for a while, links break.
    pub hangs: bool,
    /// Messages are lost, come twice, come late.
    pub weather: bool,
    /// Nodes are drained.
    pub drains: bool,
}

impl Kinds {
    /// Everything.
    pub const ALL: Self = Self { nodes: true, supervisor: true, hangs: true, weather: true, drains: true };
}

/// Lets `faults` random things happen within `ms` milliseconds, plays the run to its end, and returns the world. The
/// run must end: when the faults are over, somebody joins if nobody is left, and as many as there were when too few are.
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
    world.inject(Fault::NetworkFaults(NetworkFaults::default()));
    world.run_until(ms + 10_000);
    if world.alive().is_empty() {
        world.inject(Fault::Join);
    }
    world.run_until(ms + 60_000);
    let placed_or_not = |n: &&Notice| matches!(n, Notice::NoRoom { .. } | Notice::Placed { .. });
    if matches!(world.notices.iter().rev().find(placed_or_not), Some(Notice::NoRoom { .. })) {
        (world.alive().len()..world.settings.cluster.nodes).for_each(|_| world.inject(Fault::Join));
    }
    let end = world.now() + 1_200_000;
    world.run_until(end);
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
        8 if kinds.drains && alive.len() > 1 => pick(random).map(Fault::Drain),
        9 if kinds.weather => {
            let share = |random: &mut Stream| random.next_f64() * 0.1;
            Some(Fault::NetworkFaults(NetworkFaults {
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
