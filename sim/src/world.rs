//! The simulated cluster: time, processes, and the queue of events.

use crate::disk::Disk;
use crate::event::Event;
use crate::fault::{Fault, NetworkFaults};
use crate::limits::TICK_MS;
use crate::node::Node;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use volary_core::machine::{self, Machine, Notice, Settings};
use volary_core::placement::Placement;
use volary_core::profile::Profile;
use volary_core::random::{Purpose, Stream};
use volary_core::{NodeId, ShardId, Step, agent};

/// A cluster in simulated time.
///
/// ```
/// use volary_sim::{Fault, World, settings};
/// use volary_core::{NodeId, Step};
///
/// // Twenty steps on three nodes with two replicas of each expert; one node dies after the ninth.
/// let mut world = World::new(1, settings(20, 3, 2), 3);
/// world.run_until_step(Step(9));
/// world.at(world.now() + 30, Fault::Kill(NodeId::new("n2")));
/// world.run_until(600_000);
/// assert!(world.done);
/// let steps: Vec<Step> = world.commits.iter().map(|(step, _)| *step).collect();
/// assert!(steps.into_iter().eq(Step(1).through(Step(20))), "every step is committed once");
/// ```
#[derive(Debug)]
pub struct World {
    pub(crate) now: u64,
    queue: BTreeMap<(u64, u64), Event>,
    sequence: u64,
    pub(crate) random: Stream,
    pub(crate) settings: Settings,
    /// The profile that each node declares.
    pub(crate) profiles: fn(&NodeId) -> Profile,
    pub(crate) machine: Option<Machine>,
    /// The number of the supervisor's process.
    pub(crate) life: u64,
    /// Effects until the supervisor dies.
    pub(crate) effects_until_death: Option<u64>,
    pub(crate) sessions: BTreeMap<NodeId, u64>,
    /// The shards that the supervisor knows of on each node.
    pub(crate) reported: BTreeMap<NodeId, BTreeSet<ShardId>>,
    pub(crate) disk: Disk,
    pub(crate) nodes: BTreeMap<NodeId, Node>,
    pub(crate) cuts: BTreeMap<(NodeId, NodeId), u64>,
    /// Nodes that reach the supervisor, and that no other node reaches.
    pub(crate) hidden: BTreeSet<NodeId>,
    pub(crate) network: NetworkFaults,
    /// Whether messages could ever be lost.
    pub(crate) lossy: bool,
    /// The version of the first corrupted copy.
    pub(crate) corrupted_at: Option<Step>,
    processes: u64,
    named: u64,
    /// Whether the run has ended well.
    pub done: bool,
    /// The reason why the run could not go on.
    pub fatal: Option<String>,
    /// The supervisor's notices.
    pub notices: Vec<Notice>,
    /// The committed steps, each with its time in milliseconds.
    pub commits: Vec<(Step, u64)>,
    /// Nodes that were released.
    pub left: BTreeSet<NodeId>,
    /// Whether events are printed, to look at a failed seed.
    pub traced: bool,
}

impl World {
    /// A supervisor and `nodes` equal nodes, `n1` to `nN`, that are about to join.
    #[must_use]
    pub fn new(seed: u64, settings: Settings, nodes: usize) -> Self {
        Self::with_profiles(seed, settings, nodes, |_| Profile::relative(1.0))
    }

    /// [`World::new`] with nodes that differ in their profiles.
    #[must_use]
    pub fn with_profiles(
        seed: u64,
        settings: Settings,
        nodes: usize,
        profiles: fn(&NodeId) -> Profile,
    ) -> Self {
        let mut world = Self {
            now: 0,
            queue: BTreeMap::new(),
            sequence: 0,
            random: Stream::new(seed, Purpose::Faults, &[1]),
            settings,
            profiles,
            machine: None,
            life: 0,
            effects_until_death: None,
            sessions: BTreeMap::new(),
            reported: BTreeMap::new(),
            disk: Disk::default(),
            nodes: BTreeMap::new(),
            cuts: BTreeMap::new(),
            hidden: BTreeSet::new(),
            network: NetworkFaults::default(),
            lossy: false,
            corrupted_at: None,
            processes: 0,
            named: 0,
            done: false,
            fatal: None,
            notices: Vec::new(),
            commits: Vec::new(),
            left: BTreeSet::new(),
            traced: std::env::var_os("VOLARY_TRACE").is_some(),
        };
        world.start_supervisor();
        for _ in 0..nodes {
            _ = world.join(None);
        }
        world
    }

    /// The committed steps and the bits of their losses.
    #[must_use]
    pub fn journal(&self) -> Vec<(Step, u64)> {
        self.disk.journal.iter().map(|(step, record)| (*step, record.loss.to_bits())).collect()
    }

    /// The last durable checkpoint.
    #[must_use]
    pub fn durable(&self) -> Option<Step> {
        self.disk.durable
    }

    /// Whether no corrupted copy is in the last durable checkpoint.
    #[must_use]
    pub fn is_checkpoint_right(&self) -> bool {
        self.disk.durable.is_some_and(|step| !self.disk.bad.contains(&step))
    }

    /// The supervisor's placement, while its process lives.
    #[must_use]
    pub fn placement(&self) -> Option<&Placement> {
        self.machine.as_ref().map(Machine::placement)
    }

    /// Milliseconds since the beginning.
    #[must_use]
    pub fn now(&self) -> u64 {
        self.now
    }

    /// The names of the nodes that are alive.
    #[must_use]
    pub fn alive(&self) -> Vec<NodeId> {
        self.nodes.keys().cloned().collect()
    }

    /// Schedules a fault.
    pub fn at(&mut self, time: u64, fault: Fault) {
        self.put(time, Event::Fault(fault));
    }

    /// Plays until the run ends, or until a time in milliseconds.
    pub fn run_until(&mut self, time: u64) {
        while !self.done && self.fatal.is_none() {
            let Some((&(at, _), _)) = self.queue.first_key_value() else { return };
            if at > time {
                self.now = time;
                return;
            }
            let Some(((at, _), event)) = self.queue.pop_first() else { return };
            self.now = at;
            if self.traced && !event.is_routine() {
                eprintln!("{at:>7} {event}");
            }
            self.dispatch(event);
        }
    }

    /// Plays until a step is committed, the run ends, or ten minutes have passed.
    pub fn run_until_step(&mut self, step: Step) {
        let limit = self.now + 600_000;
        while self.disk.last_step() < step && self.now < limit && !self.done && self.fatal.is_none() {
            self.run_until(self.now + 1);
        }
    }

    /// Puts an event into the queue.
    pub(crate) fn put(&mut self, at: u64, event: Event) {
        let sequence = self.next_sequence();
        self.queue.insert((at.max(self.now), sequence), event);
    }

    /// Puts an event into the queue after a random delay from `least` to `most` milliseconds.
    pub(crate) fn after(&mut self, least: u64, most: u64, event: Event) {
        let at = self.now + least + self.random.below(most - least + 1);
        self.put(at, event);
    }

    /// A number that is never used twice: for the order of events, and for sessions.
    pub(crate) fn next_sequence(&mut self) -> u64 {
        self.sequence += 1;
        self.sequence
    }

    /// Starts a node that joins, under a new name unless one is given. Returns its name.
    pub(crate) fn join(&mut self, name: Option<NodeId>) -> NodeId {
        let node = name.unwrap_or_else(|| {
            loop {
                self.named += 1;
                let fresh = NodeId::new(format!("n{}", self.named));
                if !self.nodes.contains_key(&fresh) && !self.sessions.contains_key(&fresh) {
                    return fresh;
                }
            }
        });
        self.processes += 1;
        self.nodes.insert(
            node.clone(),
            Node::new(node.clone(), self.processes, Arc::new(self.settings.architecture.clone())),
        );
        let process = self.processes;
        self.after(1, 50, Event::Dial { node: node.clone(), process });
        node
    }

    fn dispatch(&mut self, event: Event) {
        if let Some(until) = self.delayed_until(&event) {
            return self.put(until, event);
        }
        match event {
            Event::ToSupervisor { node, session, message } => self.on_report(node, session, message),
            Event::ToNode { node, session, message } => {
                if self.nodes.get(&node).is_some_and(|n| n.session == Some(session)) {
                    self.node_event(&node, agent::Event::Command(message));
                }
            }
            Event::CheckpointShards { node, session, step, shards } => {
                if self.is_linked(&node, session) {
                    self.shards_for_checkpoint(step, shards);
                }
            }
            Event::LinkEnds { node, session } => self.on_link_ended(node, session),
            Event::LinkEndsForNode { node, session } => self.on_link_ended_for_node(node, session),
            Event::Dial { node, process } => self.dial(node, process),
            Event::Agent { node, process, event } => {
                if self.nodes.get(&node).is_some_and(|n| n.process == process) {
                    self.node_event(&node, event);
                }
            }
            Event::Work { node, process, epoch, step, since } => {
                self.work(&node, process, epoch, step, since)
            }
            Event::ReadCopy { node, process, epoch, shard, from } => {
                self.read_copy(&node, process, epoch, shard, &from)
            }
            Event::Stored { life, attempt, step } => self.stored(life, attempt, step),
            Event::Verified { life, step } => {
                if self.life == life {
                    self.machine_event(machine::Event::CheckpointVerified { intact: Some(step) });
                }
            }
            Event::Tick { life } => {
                if self.life == life && self.machine.is_some() {
                    self.machine_event(machine::Event::Tick { ms: TICK_MS });
                    self.put(self.now + TICK_MS, Event::Tick { life });
                }
            }
            Event::SupervisorStarts => self.start_supervisor(),
            Event::Fault(fault) => self.inject(fault),
        }
    }
}
