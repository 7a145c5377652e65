//! Time, who is alive, and what is on its way between them.

use crate::faults::Fault;
use crate::node::Node;
use crate::supervisor::Disk;
use std::collections::{BTreeMap, BTreeSet};
use volary_core::architecture::presets;
use volary_core::costs::Costs;
use volary_core::machine::{self, Event, Machine, Notice, Settings};
use volary_core::messages::{NodeCommand, NodeReport};
use volary_core::options::{CheckpointOptions, ClusterOptions, TrainingOptions, ValidationOptions};
use volary_core::placement::Placement;
use volary_core::profile::Profile;
use volary_core::random::{Purpose, Stream};
use volary_core::schedule::Schedule;
use volary_core::{Epoch, LayerId, NodeId, ShardId, Step, agent};

/// Milliseconds of silence after which a link is given up.
pub const SILENCE_MS: u64 = 2_000;
/// Milliseconds between two attempts of a node to reach its supervisor.
const REDIAL_MS: u64 = 100;
/// Milliseconds between two ticks of the supervisor.
const TICK_MS: u64 = 100;
/// Milliseconds that a supervisor takes to start again.
const RESTART_MS: u64 = 400;

/// A small run: two layers, four experts, six lanes.
#[must_use]
pub fn settings(steps: u64, nodes: usize, replication: usize) -> Settings {
    let mut architecture = presets().swap_remove(1).architecture;
    (architecture.layers, architecture.experts) = (2, 4);
    Settings {
        architecture,
        training: TrainingOptions {
            steps,
            lanes: 6,
            lane_group: 2,
            sequences_per_lane: 1,
            sequence_length: 8,
            optimizer: Default::default(),
            schedule: Schedule::default(),
            clip_norm: None,
            aux_loss: 0.01,
            z_loss: 0.0,
        },
        cluster: ClusterOptions { nodes, replication, step_timeout_ms: 10_000, ..ClusterOptions::default() },
        checkpoint: CheckpointOptions { every: 5, keep: 2 },
        validation: ValidationOptions { every: 0, rounds: 0 },
    }
}

/// The same with four layers, for [`room_for_half`].
#[must_use]
pub fn deep_settings(steps: u64, nodes: usize, replication: usize) -> Settings {
    let mut settings = settings(steps, nodes, replication);
    settings.architecture.layers = 4;
    settings
}

/// A node with room for two of the four layers of [`deep_settings`] and for some experts, in one of two zones by its number.
#[must_use]
pub fn room_for_half(node: &NodeId) -> Profile {
    let settings = deep_settings(1, 1, 1);
    let costs = Costs::new(&settings.architecture, &settings.training);
    let number: usize = node.0.trim_start_matches('n').parse().unwrap_or_default();
    Profile {
        memory_bytes: costs
            .stage_bytes(LayerId::range(0..2), 2)
            .max(costs.stage_bytes(LayerId::range(2..4), 2))
            + 5 * costs.expert_bytes,
        zone: format!("zone-{}", number % 2),
        ..Profile::relative(1.0)
    }
}

/// What will happen.
#[derive(Debug)]
pub(crate) enum Happening {
    ToSupervisor { node: NodeId, session: u64, message: NodeReport },
    NodeCommand { node: NodeId, session: u64, message: NodeCommand },
    Blobs { node: NodeId, session: u64, step: Step, shards: Vec<ShardId> },
    LinkEnds { node: NodeId, session: u64 },
    LinkEndsForNode { node: NodeId, session: u64 },
    Dial { node: NodeId, process: u64 },
    Local { node: NodeId, process: u64, event: agent::Event },
    Work { node: NodeId, process: u64, epoch: Epoch, step: Step, since: u64 },
    ReadCopy { node: NodeId, process: u64, epoch: Epoch, shard: ShardId, from: Vec<NodeId> },
    Stored { life: u64, step: Step },
    Tick { life: u64 },
    SupervisorStarts,
    Fault(Fault),
}

/// How the network treats messages.
#[derive(Clone, Copy, Debug, Default)]
pub struct NetworkFaults {
    /// Share of messages that are lost.
    pub drop: f64,
    /// Share that come twice.
    pub duplicate: f64,
    /// Share that are late, and so come out of order.
    pub reorder: f64,
}

/// A cluster.
#[derive(Debug)]
pub struct World {
    pub(crate) now: u64,
    queue: BTreeMap<(u64, u64), Happening>,
    sequence: u64,
    pub(crate) random: Stream,
    pub(crate) settings: Settings,
    /// What each node says of itself.
    profiles: fn(&NodeId) -> Profile,
    pub(crate) machine: Option<Machine>,
    /// Counts the supervisor's lives.
    pub(crate) life: u64,
    /// The supervisor dies after so many more effects.
    pub(crate) dies_after: Option<u64>,
    pub(crate) sessions: BTreeMap<NodeId, u64>,
    /// What the supervisor was told that nodes hold.
    pub(crate) reported: BTreeMap<NodeId, BTreeSet<ShardId>>,
    pub(crate) disk: Disk,
    pub(crate) nodes: BTreeMap<NodeId, Node>,
    pub(crate) cuts: BTreeMap<(NodeId, NodeId), u64>,
    pub(crate) network: NetworkFaults,
    /// Whether words were ever lost.
    pub(crate) lossy: bool,
    processes: u64,
    named: u64,
    /// Whether the run has ended well.
    pub done: bool,
    /// Why it could not go on.
    pub fatal: Option<String>,
    /// What people were told.
    pub notices: Vec<Notice>,
    /// Milliseconds at which each step was committed.
    pub commits: Vec<(Step, u64)>,
    /// Nodes that were let go.
    pub left: BTreeSet<NodeId>,
    /// Whether everything that happens is printed, for a seed that failed.
    pub traced: bool,
}

impl World {
    /// A supervisor and `nodes` nodes, `n1` to `nN`, that are about to join, all alike.
    #[must_use]
    pub fn new(seed: u64, settings: Settings, nodes: usize) -> Self {
        Self::of_unlike_nodes(seed, settings, nodes, |_| Profile::relative(1.0))
    }

    /// The same with nodes each of which says something else of itself.
    #[must_use]
    pub fn of_unlike_nodes(
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
            dies_after: None,
            sessions: BTreeMap::new(),
            reported: BTreeMap::new(),
            disk: Disk::default(),
            nodes: BTreeMap::new(),
            cuts: BTreeMap::new(),
            network: NetworkFaults::default(),
            lossy: false,
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
            world.join(None);
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

    /// The last placement of the supervisor, as long as it lives.
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

    /// Lets something go wrong at a time.
    pub fn at(&mut self, time: u64, fault: Fault) {
        self.put(time, Happening::Fault(fault));
    }

    /// Lets the world go on until the run has ended or the time is over.
    pub fn run_until(&mut self, time: u64) {
        while !self.done && self.fatal.is_none() {
            let Some((&(at, _), _)) = self.queue.first_key_value() else { return };
            if at > time {
                self.now = time;
                return;
            }
            let Some(((at, _), happening)) = self.queue.pop_first() else { return };
            self.now = at;
            if self.traced && !matches!(happening, Happening::Tick { .. } | Happening::Work { .. }) {
                eprintln!("{at:>7} {}", brief(&happening));
            }
            self.dispatch(happening);
        }
    }

    /// Lets the world go on until so many steps are committed.
    pub fn run_until_step(&mut self, step: Step) {
        let limit = self.now + 600_000;
        while self.disk.last_step() < step && self.now < limit && !self.done && self.fatal.is_none() {
            self.run_until(self.now + 1);
        }
    }

    pub(crate) fn put(&mut self, at: u64, happening: Happening) {
        self.sequence += 1;
        self.queue.insert((at.max(self.now), self.sequence), happening);
    }

    pub(crate) fn after(&mut self, least: u64, most: u64, happening: Happening) {
        let at = self.now + least + self.random.below(most - least + 1);
        self.put(at, happening);
    }

    fn chance(&mut self, share: f64) -> bool {
        share > 0.0 && self.random.next_f64() < share
    }

    /// A message on a control stream: in order, unless the weather is worse than QUIC lets it be.
    pub(crate) fn send(&mut self, make: impl Fn() -> Happening) {
        if self.chance(self.network.drop) {
            return;
        }
        if self.chance(self.network.duplicate) {
            self.after(5, 50, make());
        }
        if self.chance(self.network.reorder) {
            return self.after(5, 500, make());
        }
        self.put(self.now + 2, make());
    }

    /// Whether packets pass between two nodes now.
    pub(crate) fn reachable(&self, a: &NodeId, b: &NodeId) -> bool {
        let fine = |node: &NodeId| {
            self.nodes.get(node).is_some_and(|n| n.cut_until <= self.now && n.frozen_until <= self.now)
        };
        let cut = |a: &NodeId, b: &NodeId| {
            self.cuts.get(&(a.clone(), b.clone())).is_some_and(|&until| until > self.now)
        };
        fine(a) && fine(b) && !cut(a, b) && !cut(b, a)
    }

    /// A new process joins, under a new name unless one is given.
    pub(crate) fn join(&mut self, name: Option<NodeId>) {
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
        self.nodes.insert(node.clone(), Node::new(node.clone(), self.processes));
        let process = self.processes;
        self.after(1, 50, Happening::Dial { node, process });
    }

    /// The longest that a node is cut off, from now.
    fn held_up(&self, node: &NodeId) -> Option<u64> {
        let node = self.nodes.get(node)?;
        let until = node.cut_until.max(node.frozen_until);
        (until > self.now).then_some(until)
    }

    fn dispatch(&mut self, happening: Happening) {
        match happening {
            Happening::ToSupervisor { node, session, message } => {
                if let Some(until) = self.held_up(&node) {
                    // QUIC sends it again until it gives the link up.
                    return self.put(until, Happening::ToSupervisor { node, session, message });
                }
                if self.sessions.get(&node) == Some(&session) {
                    self.note_report(&node, &message);
                    self.event(Event::Reported { node, message });
                }
            }
            Happening::NodeCommand { node, session, message } => {
                if let Some(until) = self.held_up(&node) {
                    return self.put(until, Happening::NodeCommand { node, session, message });
                }
                if self.nodes.get(&node).is_some_and(|n| n.session == Some(session)) {
                    self.node_event(&node, agent::Event::Command(message));
                }
            }
            Happening::Blobs { node, session, step, shards } => {
                if let Some(until) = self.held_up(&node) {
                    return self.put(until, Happening::Blobs { node, session, step, shards });
                }
                if self.sessions.get(&node) == Some(&session) {
                    self.shards_for_checkpoint(step, shards);
                }
            }
            Happening::LinkEnds { node, session } => {
                if self.sessions.get(&node) == Some(&session) {
                    self.sessions.remove(&node);
                    self.event(Event::Lost { node, reason: "its link ended".into() });
                }
            }
            Happening::LinkEndsForNode { node, session } => self.link_ends_for_node(&node, session),
            Happening::Dial { node, process } => self.dial(node, process),
            Happening::Local { node, process, event } => {
                let Some(known) = self.nodes.get(&node).filter(|n| n.process == process) else { return };
                if known.frozen_until > self.now {
                    let until = known.frozen_until;
                    return self.put(until, Happening::Local { node, process, event });
                }
                self.node_event(&node, event);
            }
            Happening::Work { node, process, epoch, step, since } => {
                self.work(&node, process, epoch, step, since)
            }
            Happening::ReadCopy { node, process, epoch, shard, from } => {
                self.read_copy(&node, process, epoch, shard, &from)
            }
            Happening::Stored { life, step } => self.stored(life, step),
            Happening::Tick { life } => {
                if self.life == life && self.machine.is_some() {
                    self.event(Event::Tick { ms: TICK_MS });
                    self.put(self.now + TICK_MS, Happening::Tick { life });
                }
            }
            Happening::SupervisorStarts => self.start_supervisor(),
            Happening::Fault(fault) => self.inject(fault),
        }
    }

    fn start_supervisor(&mut self) {
        if self.machine.is_some() {
            return;
        }
        self.life += 1;
        self.machine = Some(Machine::new(self.settings.clone(), self.disk.restored()));
        let life = self.life;
        self.put(self.now + TICK_MS, Happening::Tick { life });
    }

    pub(crate) fn supervisor_dies(&mut self) {
        if self.machine.take().is_none() {
            return;
        }
        self.dies_after = None;
        self.disk.pending = None;
        self.sessions.clear();
        for (node, session) in
            self.nodes.iter().filter_map(|(n, s)| Some((n.clone(), s.session?))).collect::<Vec<_>>()
        {
            self.after(1, 20, Happening::LinkEndsForNode { node, session });
        }
        self.put(self.now + RESTART_MS, Happening::SupervisorStarts);
    }

    fn link_ends_for_node(&mut self, node: &NodeId, session: u64) {
        let Some(known) = self.nodes.get_mut(node).filter(|n| n.session == Some(session)) else { return };
        if known.frozen_until > self.now {
            let until = known.frozen_until;
            return self.put(until, Happening::LinkEndsForNode { node: node.clone(), session });
        }
        known.session = None;
        let process = known.process;
        self.node_event(node, agent::Event::SupervisorLost);
        self.put(self.now + REDIAL_MS, Happening::Dial { node: node.clone(), process });
    }

    /// A node comes to the supervisor, with what it holds.
    fn dial(&mut self, node: NodeId, process: u64) {
        let Some(known) = self.nodes.get(&node).filter(|n| n.process == process && n.session.is_none())
        else {
            return;
        };
        let held = known.agent.resident_state();
        if self.held_up(&node).is_some() || self.machine.is_none() {
            return self.put(self.now + REDIAL_MS, Happening::Dial { node, process });
        }
        if self.sessions.remove(&node).is_some() {
            self.event(Event::Lost { node: node.clone(), reason: "it came anew".into() });
        }
        let Some(machine) = &self.machine else {
            return self.put(self.now + REDIAL_MS, Happening::Dial { node, process });
        };
        let held = if machine.accepts_state(&held) { held } else { Default::default() };
        self.sequence += 1;
        let session = self.sequence;
        self.sessions.insert(node.clone(), session);
        if let Some(known) = self.nodes.get_mut(&node) {
            known.session = Some(session);
            if held.shards.is_empty() {
                known.start_anew();
            }
        }
        self.reported.insert(node.clone(), held.shards.iter().copied().collect());
        let profile = Box::new((self.profiles)(&node));
        self.event(Event::Joined { node, profile, address: String::new(), held });
    }

    fn note_report(&mut self, node: &NodeId, message: &NodeReport) {
        let current = self.machine.as_ref().map(|machine| machine.placement().epoch).unwrap_or_default();
        let reported = self.reported.entry(node.clone()).or_default();
        match message {
            NodeReport::Ready { epoch } if *epoch == current => {
                reported
                    .extend(self.nodes.get(node).into_iter().flat_map(|n| n.agent.resident_state().shards));
            }
            NodeReport::Learned { epoch, shards } if *epoch == current => reported.extend(shards),
            _ => {}
        }
    }

    pub(crate) fn event(&mut self, event: Event) {
        let Some(machine) = &mut self.machine else { return };
        let effects: Vec<machine::Effect> = machine.handle(event);
        for effect in effects {
            if self.dies_after == Some(0) {
                return self.supervisor_dies();
            }
            self.dies_after = self.dies_after.map(|left| left - 1);
            self.supervisor_does(effect);
        }
    }
}

/// A happening in one line that is not too long.
fn brief(happening: &Happening) -> String {
    let text = format!("{happening:?}");
    text.chars().take(400).collect()
}
