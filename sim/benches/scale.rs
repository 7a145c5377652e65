//! The supervisor's machine, its planner and its store with up to 10,000 nodes: all join at once, then every
//! second step four nodes die and four join. Nodes answer at once. `cargo bench -p volary-sim --bench scale`.
#![expect(clippy::expect_used, reason = "a benchmark")]

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;
use std::sync::Arc;
use std::time::Instant;
use tempfile::TempDir;
use volary_core::architecture::presets;
use volary_core::machine::{Effect, Event, LossCause, Machine, Restored, Settings};
use volary_core::messages::{LaneReport, NodeCommand, NodeReport, Norm, ResidentState};
use volary_core::options::{CheckpointOptions, ClusterOptions, OnNan, TrainingOptions, ValidationOptions};
use volary_core::profile::Profile;
use volary_core::random::{Purpose, Stream};
use volary_core::{Digest, Epoch, NodeId, ShardId};
use volary_protocol::layout::{LayoutSender, Patches};
use volary_storage::{RunDir, Store};

const SIZES: [usize; 4] = [300, 1_000, 3_000, 10_000];
const ROUNDS: u64 = 3;
/// Deaths in a round, the same for all sizes, so that the cost of one is comparable.
const DEATHS: usize = 4;

fn main() {
    if let Ok(nodes) = std::env::var("VOLARY_NODES") {
        return play(nodes.parse().expect("a number"));
    }
    println!(
        "{:>7}{:>10}{:>14}{:>14}{:>14}{:>10}{:>16}{:>16}{:>10}",
        "nodes",
        "events",
        "us per event",
        "ms per death",
        "s all join",
        "s store",
        "MB all join",
        "MB 4 for 4",
        "peak MB"
    );
    // A process for each size, so that its peak memory is its own.
    for nodes in SIZES {
        let program = std::env::current_exe().expect("a program");
        let status =
            Command::new(program).env("VOLARY_NODES", nodes.to_string()).status().expect("a process");
        assert!(status.success());
    }
}

fn settings(nodes: usize) -> Settings {
    let mut architecture = presets().swap_remove(1).architecture;
    architecture.layers = 4;
    Settings {
        architecture,
        training: TrainingOptions {
            steps: 1_000_000,
            lanes: nodes as u32,
            lane_group: 4,
            sequences_per_lane: 1,
            sequence_length: 1024,
            optimizer: Default::default(),
            schedule: Default::default(),
            clip_norm: None,
            aux_loss: 0.01,
            on_nan: OnNan::GoBack,
            max_skipped_steps: 10,
            z_loss: 0.0,
        },
        cluster: ClusterOptions { nodes, replication: 2, ..ClusterOptions::default() },
        checkpoint: CheckpointOptions { every: 0, keep: 1, store: None },
        validation: ValidationOptions { every: 0, rounds: 0 },
        stay: false,
    }
}

/// The machine with nodes that answer at once.
struct Cluster {
    machine: Machine,
    alive: BTreeSet<NodeId>,
    events: u64,
    deaths: Vec<f64>,
    /// Seconds in the machine, and in the store.
    machine_s: f64,
    store_s: f64,
    store: Store,
    _folder: TempDir,
    /// Bytes of assignments and their layouts, and the placements that they are of.
    assigned_bytes: usize,
    placements: BTreeSet<Epoch>,
    /// The stream to each node, and what they share.
    streams: BTreeMap<NodeId, LayoutSender>,
    patches: Arc<Patches>,
    shards: Vec<ShardId>,
    next: usize,
    /// Commands that are not carried out yet.
    pending: Vec<Effect>,
}

impl Cluster {
    fn handle(&mut self, event: Event) -> Vec<Effect> {
        self.events += 1;
        let death = matches!(event, Event::Lost { .. });
        let start = Instant::now();
        let effects = self.machine.handle(event);
        let seconds = start.elapsed().as_secs_f64();
        self.machine_s += seconds;
        self.deaths.extend(death.then_some(seconds));
        for effect in &effects {
            if let Effect::Persist(state) = effect {
                let start = Instant::now();
                volary_supervisor::persist(&self.store, state.clone()).expect("a state on disk");
                self.store_s += start.elapsed().as_secs_f64();
            }
            if let Effect::Send { node, message: message @ NodeCommand::Assign(assignment) } = effect {
                self.placements.insert(assignment.layout.placement.epoch);
                let stream = LayoutSender::new(Arc::clone(&self.patches));
                let patch = self.streams.entry(node.clone()).or_insert(stream).patch(assignment);
                let size = |bytes: postcard::Result<Vec<u8>>| bytes.expect("a message").len();
                self.assigned_bytes += size(postcard::to_stdvec(&patch.expect("a patch")));
                self.assigned_bytes += size(postcard::to_stdvec(message));
            }
        }
        effects
    }

    fn megabytes_per_placement(&self) -> f64 {
        self.assigned_bytes as f64 / self.placements.len() as f64 / 1e6
    }

    /// Begins new counts.
    fn forget(&mut self) {
        (self.machine_s, self.store_s, self.assigned_bytes) = (0.0, 0.0, 0);
        self.placements.clear();
    }

    fn join(&mut self) -> Vec<Effect> {
        let node = NodeId::new(format!("node-{}", self.next));
        let mut profile = Profile::relative(1.0 + (self.next % 7) as f64 / 10.0);
        profile.zone = format!("zone-{}", self.next % 12);
        self.next += 1;
        self.alive.insert(node.clone());
        // Addresses as a cluster's pods have them: in no order.
        let place = Stream::new(self.next as u64, Purpose::Faults, &[1]).next_f64() * 65536.0;
        let address = format!("10.0.{}.{}:7100", place as u32 / 256, place as u32 % 256);
        self.handle(Event::Joined {
            node,
            profile: Box::new(profile),
            address,
            held: ResidentState::default(),
        })
    }

    /// All nodes carry out the machine's commands until `steps` more steps are committed.
    fn run(&mut self, more: Vec<Effect>, steps: u64) {
        let mut effects = std::mem::take(&mut self.pending);
        effects.extend(more);
        let until = self.machine.committed() + steps;
        while !effects.is_empty() && self.machine.committed() < until {
            let mut answers = Vec::new();
            for effect in effects.drain(..) {
                if let Effect::Send { node, message } = effect
                    && self.alive.contains(&node)
                {
                    let replies = self.answers(&node, message);
                    answers.extend(replies.into_iter().map(|message| (node.clone(), message)));
                }
            }
            for (node, message) in answers {
                let more = self.handle(Event::Reported { node, message });
                effects.extend(more);
            }
        }
        self.pending = effects;
    }

    fn answers(&self, node: &NodeId, message: NodeCommand) -> Vec<NodeReport> {
        let mut answers = Vec::new();
        match message {
            NodeCommand::Assign(assignment) => {
                let epoch = assignment.layout.placement.epoch;
                answers.push(NodeReport::Ready { epoch });
                if !assignment.learn.is_empty() {
                    let shards = assignment.learn.iter().map(|(shard, _)| *shard).collect();
                    answers.push(NodeReport::Learned { epoch, version: assignment.version, shards });
                }
            }
            NodeCommand::Begin { epoch, step, lanes, compare, .. } => {
                let placement = self.machine.placement();
                let kept = self.shards.iter().filter(|shard| placement.holds_or_learns(node, **shard));
                let norms = kept.map(|&shard| (shard, Norm { squared: 1.0, finite: true })).collect();
                let holds = |shard: &ShardId| placement.holds_or_learns(node, *shard);
                let equal = compare.into_iter().filter(holds);
                let digests = equal.map(|shard| (shard, Digest([0; 32]))).collect();
                let lanes = lanes.into_iter().map(|(lane, _)| (lane, LaneReport::default())).collect();
                answers.push(NodeReport::Prepared { epoch, step, norms, digests, lanes, speed: Some(1.0) });
            }
            _ => {}
        }
        answers
    }
}

fn play(nodes: usize) {
    let settings = settings(nodes);
    let shards = settings.architecture.shards();
    let machine = Machine::new(settings, Restored::default());
    let (alive, deaths) = (BTreeSet::new(), Vec::new());
    let folder = tempfile::tempdir().expect("a folder");
    let run = RunDir::create(folder.path().join("run")).expect("a run");
    let mut cluster = Cluster {
        machine,
        alive,
        events: 0,
        deaths,
        machine_s: 0.0,
        store_s: 0.0,
        store: Store::open(&run).expect("a store"),
        _folder: folder,
        assigned_bytes: 0,
        streams: BTreeMap::new(),
        patches: Arc::default(),
        placements: BTreeSet::new(),
        shards,
        next: 0,
        pending: Vec::new(),
    };
    let start = Instant::now();
    let mut effects = Vec::new();
    for _ in 0..nodes {
        effects.extend(cluster.join());
    }
    cluster.run(effects, 6);
    assert_eq!(cluster.machine.placement().members.len(), nodes, "all nodes are members");
    let joined = (cluster.machine_s, cluster.store_s, cluster.megabytes_per_placement());
    cluster.forget();
    let mut random = Stream::new(1, Purpose::Faults, &[nodes as u64]);
    for _ in 0..ROUNDS {
        let mut effects = Vec::new();
        for _ in 0..DEATHS {
            let place = random.below(cluster.alive.len() as u64) as usize;
            let victim = cluster.alive.iter().nth(place).cloned().expect("a node");
            cluster.alive.remove(&victim);
            effects =
                cluster.handle(Event::Lost { node: victim, cause: LossCause::Ended, reason: "churn".into() });
            effects.extend(cluster.join());
        }
        cluster.run(effects, 2);
    }
    let seconds = start.elapsed().as_secs_f64();
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux");
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("a peak");
    let kib: f64 = peak.split_whitespace().next().and_then(|n| n.parse().ok()).expect("a number");
    let death = cluster.deaths.iter().sum::<f64>() / cluster.deaths.len() as f64;
    println!(
        "{nodes:>7}{:>10}{:>14.1}{:>14.2}{:>14.2}{:>10.2}{:>16.1}{:>16.1}{:>10.0}",
        cluster.events,
        seconds * 1e6 / cluster.events as f64,
        death * 1e3,
        joined.0,
        joined.1,
        joined.2,
        cluster.megabytes_per_placement(),
        kib / 1024.0
    );
}
