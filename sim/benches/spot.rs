//! Recorded spot markets at the size of the paper's cluster, in simulated time: GLaM 1.7B/64E on up to 128
//! nodes of eight accelerators. The supervisor's machine and the planner are the real ones; nodes compute as
//! fast as the planner predicts, and copy at the speed of their links. A checkpoint-and-restart system with
//! the same costs stops at every change of the cluster, loads its last checkpoint on what there is, and goes
//! on. `cargo bench -p volary-sim --bench spot`.
#![expect(clippy::expect_used, reason = "a benchmark")]

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use volary_core::architecture::{Architecture, presets};
use volary_core::machine::{Effect, Event, LossCause, Machine, Notice, Restored, Settings};
use volary_core::messages::{LaneReport, NodeCommand, NodeReport, Norm, ResidentState, Source};
use volary_core::options::{CheckpointOptions, ClusterOptions, TrainingOptions, ValidationOptions};
use volary_core::planner::{self, Member, Request};
use volary_core::profile::{Profile, Rate};
use volary_core::random::{Purpose, Stream};
use volary_core::{Epoch, NodeId, ShardId};

/// Nodes at the most instances of a trace.
const NODES: usize = 128;
/// Operations per second of a node: eight accelerators at 40 % of 312 teraflop/s.
const FLOPS: f64 = 8.0 * 0.4 * 312e12;
const MEMORY: u64 = 640 << 30;
/// Bytes per second of a node's link, and of the store of checkpoints.
const LINK: f64 = 50e9;
const STORE: f64 = 50e9;
/// Seconds from an instance to a node that can be placed, and of a restart of all processes.
const START_S: f64 = 60.0;
/// Silence after which a dead node is noticed.
const SILENCE_S: f64 = 2.0;
/// Seconds between two checkpoints.
const CHECKPOINT_S: f64 = 600.0;
/// The part of a trace that is played.
const PLAYED_S: f64 = 8.0 * 3_600.0;
/// A node is drained this long before its end, which the provider has announced two minutes before.
const LEAVING_S: f64 = 30.0;
/// The notice of the provider.
const NOTICE_S: f64 = 120.0;

const TRACES: [(&str, &str, f64); 2] = [
    ("g4dn", include_str!("../../examples/spot/aws-g4dn-xlarge-us-east-1c-2020-11-20.csv"), 1.0),
    ("p2", include_str!("../../examples/spot/aws-p2-xlarge-2020-11-20.csv"), 3_600.0),
];

fn main() {
    println!(
        "{:>6}{:>8}{:>9}{:>9}{:>10}{:>10}{:>12}{:>12}",
        "trace", "notice", "hours", "changes", "goodput", "restart", "steps lost", "stall s"
    );
    for (name, text, unit) in TRACES {
        for notice in [true, false] {
            let trace = Trace::parse(text, unit);
            let mut quiet = Quiet::default();
            let played = Cluster::new(&trace, notice).play(&mut quiet);
            let restart = restarts(&trace, notice, &mut quiet);
            println!(
                "{name:>6}{:>8}{:>9.1}{:>9}{:>10.3}{:>10.3}{:>12}{:>12.0}",
                if notice { "120 s" } else { "none" },
                trace.end() / 3_600.0,
                trace.points.iter().filter(|(time, _)| *time <= trace.end()).count(),
                played.steps / played.possible,
                restart / played.possible,
                played.lost,
                played.stall_s
            );
        }
    }
}

/// The instances over time, from the first one on.
struct Trace {
    points: Vec<(f64, usize)>,
    /// Nodes of one instance.
    nodes: usize,
}

impl Trace {
    fn parse(text: &str, unit: f64) -> Self {
        let number = |word: &str| word.trim().parse::<f64>().expect("a number");
        let lines = text.lines().filter_map(|line| line.split_once(','));
        let all: Vec<(f64, usize)> =
            lines.map(|(time, count)| (number(time) * unit, number(count) as usize)).collect();
        let first = all.iter().position(|(_, count)| *count > 0).expect("an instance");
        let start = all[first].0;
        let mut points: Vec<(f64, usize)> = Vec::new();
        for (time, count) in &all[first..] {
            points.pop_if(|(at, _)| *at == time - start);
            if points.last().is_none_or(|(_, before)| before != count) {
                points.push((time - start, *count));
            }
        }
        let most = all.iter().map(|(_, count)| *count).max().unwrap_or(1);
        Self { points, nodes: NODES / most }
    }

    fn end(&self) -> f64 {
        self.points.last().map_or(0.0, |(time, _)| time.min(PLAYED_S))
    }
}

fn architecture() -> Architecture {
    let preset = presets().into_iter().find(|preset| preset.name == "1.7b-64e");
    preset.expect("the paper's model").architecture
}

fn settings() -> Settings {
    let architecture = architecture();
    let training = TrainingOptions {
        lanes: 512,
        lane_group: 4,
        sequences_per_lane: 2,
        sequence_length: 1_024,
        ..TrainingOptions::new(1_000_000)
    };
    Settings {
        architecture,
        training,
        // What is compared takes no time here.
        cluster: ClusterOptions {
            nodes: 10,
            compare_within: 0,
            gather_timeout_ms: u64::MAX,
            rebalance_bytes: 1 << 40,
            ..ClusterOptions::default()
        },
        checkpoint: CheckpointOptions { every: 0, keep: 2, store: None },
        validation: ValidationOptions { every: 0, rounds: 0 },
        stay: true,
    }
}

fn profile(zone: usize) -> Profile {
    Profile {
        dense: Rate::even(FLOPS),
        expert: Rate::even(FLOPS),
        memory_bytes: MEMORY,
        zone: format!("instance-{zone}"),
        bandwidth: LINK,
        round_trip_s: 5e-4,
        threads: 8,
        ..Profile::relative(1.0)
    }
}

/// Bytes of a shard's weights with Adafactor's state, as they are sent.
fn bytes(architecture: &Architecture, shard: ShardId) -> f64 {
    4.0 * architecture.shard_parameters(shard) as f64
}

/// Seconds of a step with a number of instances, undisturbed; infinite where the model does not fit.
#[derive(Default)]
struct Quiet(BTreeMap<usize, f64>);

impl Quiet {
    fn step_s(&mut self, instances: usize, nodes: usize) -> f64 {
        *self.0.entry(instances).or_insert_with(|| {
            let settings = settings();
            let member = |number: usize| Member {
                node: NodeId::new(format!("n{number}")),
                profile: profile(number / nodes),
            };
            let members: Vec<Member> = (0..instances * nodes).map(member).collect();
            if members.is_empty() {
                return f64::INFINITY;
            }
            let request = Request {
                epoch: Epoch(1),
                members: &members,
                architecture: &settings.architecture,
                training: &settings.training,
                replication: settings.cluster.replication,
                fan_in: settings.cluster.fan_in,
                extra_replicas: &BTreeMap::new(),
                moves_max: usize::MAX,
                previous: None,
            };
            planner::plan(&request).map_or(f64::INFINITY, |plan| plan.prediction.step_s)
        })
    }
}

/// Steps of a system that stops at every change and restarts from its last checkpoint.
fn restarts(trace: &Trace, notice: bool, quiet: &mut Quiet) -> f64 {
    let all = architecture();
    let load_s = all.shards().into_iter().map(|shard| bytes(&all, shard)).sum::<f64>() / STORE;
    let (mut steps, mut saved) = (0.0f64, 0.0f64);
    for pair in trace.points.windows(2) {
        let ((from, count), (until, after)) = (pair[0], pair[1]);
        let (from, until) = (from.min(trace.end()), until.min(trace.end()));
        let step_s = quiet.step_s(count, trace.nodes);
        let works = (until - from - START_S - load_s).max(0.0);
        if step_s.is_finite() {
            let checkpoints = (works / CHECKPOINT_S).floor() * CHECKPOINT_S;
            saved = steps + (checkpoints / step_s).floor();
            steps += (works / step_s).floor();
        }
        // A last checkpoint within the notice; new instances are no surprise either.
        if notice && load_s <= NOTICE_S || after > count {
            saved = steps;
        }
        steps = saved;
    }
    steps
}

/// What happened in a replay.
struct Played {
    steps: f64,
    /// Steps of undisturbed runs on the nodes that there were.
    possible: f64,
    lost: u64,
    stall_s: f64,
}

/// What happens at a time.
enum Happening {
    Instances(usize),
    Notice(usize),
    Joined(NodeId),
    Died(NodeId),
    Report(NodeId, Box<NodeReport>),
    Learned(NodeId, Epoch, Vec<ShardId>),
    Stored(u64),
    Verified(Option<volary_core::Step>),
    Tick,
    Checkpoint,
}

/// The machine and its nodes in simulated time.
struct Cluster<'a> {
    trace: &'a Trace,
    machine: Machine,
    shards: Vec<ShardId>,
    architecture: Architecture,
    now: f64,
    queue: BinaryHeap<Reverse<(u64, u64)>>,
    happenings: BTreeMap<u64, Happening>,
    count: u64,
    /// The nodes of each instance, and the instances that will end.
    instances: BTreeMap<usize, Vec<NodeId>>,
    noticed: BTreeSet<usize>,
    alive: BTreeSet<NodeId>,
    next: usize,
    stream: Stream,
    step_s: (Epoch, f64),
    lost: u64,
    last_commit: f64,
    stall_s: f64,
}

impl<'a> Cluster<'a> {
    fn new(trace: &'a Trace, notice: bool) -> Self {
        let settings = settings();
        let architecture = settings.architecture.clone();
        let mut cluster = Self {
            trace,
            shards: architecture.shards(),
            architecture,
            machine: Machine::new(settings, Restored::default()),
            now: 0.0,
            queue: BinaryHeap::new(),
            happenings: BTreeMap::new(),
            count: 0,
            instances: BTreeMap::new(),
            noticed: BTreeSet::new(),
            alive: BTreeSet::new(),
            next: 0,
            stream: Stream::new(7, Purpose::Faults, &[]),
            step_s: (Epoch(0), 0.0),
            lost: 0,
            last_commit: 0.0,
            stall_s: 0.0,
        };
        let mut before = 0;
        for &(time, count) in &trace.points {
            if notice && count < before {
                cluster.after(time - LEAVING_S, Happening::Notice(before - count));
            }
            cluster.after(time, Happening::Instances(count));
            before = count;
        }
        cluster.after(1.0, Happening::Tick);
        cluster.after(CHECKPOINT_S, Happening::Checkpoint);
        cluster
    }

    /// Something happens in some seconds.
    fn after(&mut self, seconds: f64, happening: Happening) {
        let at = ((self.now + seconds.max(0.0)) * 1e6) as u64;
        self.count += 1;
        self.queue.push(Reverse((at, self.count)));
        self.happenings.insert(self.count, happening);
    }

    fn play(mut self, quiet: &mut Quiet) -> Played {
        let mut possible = 0.0;
        while let Some(Reverse((at, number))) = self.queue.pop() {
            let now = at as f64 / 1e6;
            if now > self.trace.end() {
                break;
            }
            let rate = 1.0 / quiet.step_s(self.instances.len(), self.trace.nodes);
            possible += (now - self.now) * rate;
            if rate == 0.0 {
                self.last_commit = now;
            }
            self.stall_s = self.stall_s.max(now - self.last_commit);
            self.now = now;
            let happening = self.happenings.remove(&number).expect("it is queued");
            self.happen(happening);
        }
        let steps = self.machine.committed().0 as f64;
        Played { steps, possible, lost: self.lost, stall_s: self.stall_s }
    }

    fn happen(&mut self, happening: Happening) {
        match happening {
            Happening::Instances(count) => self.resize(count),
            Happening::Notice(count) => self.give_notice(count),
            Happening::Joined(node) => {
                let of = |(_, nodes): &(&usize, &Vec<NodeId>)| nodes.contains(&node);
                // A node whose end is announced before it has joined does not join.
                let zone = self.instances.iter().find(of).map(|(zone, _)| *zone);
                if let Some(zone) = zone.filter(|zone| !self.noticed.contains(zone)) {
                    let profile = Box::new(profile(zone));
                    let held = ResidentState::default();
                    self.handle(Event::Joined { node, profile, address: String::new(), held });
                }
            }
            Happening::Died(node) => {
                let reason = "its instance was taken away".into();
                self.handle(Event::Lost { node, cause: LossCause::Ended, reason });
            }
            Happening::Report(node, message) => {
                if self.alive.contains(&node) {
                    self.handle(Event::Reported { node, message: *message });
                }
            }
            Happening::Learned(node, epoch, shards) => {
                if self.alive.contains(&node) {
                    let version = self.machine.committed();
                    self.handle(Event::Reported {
                        node,
                        message: NodeReport::Learned { epoch, version, shards },
                    });
                }
            }
            Happening::Stored(attempt) => self.handle(Event::CheckpointStored { attempt }),
            Happening::Verified(intact) => self.handle(Event::CheckpointVerified { intact }),
            Happening::Tick => {
                self.after(1.0, Happening::Tick);
                self.handle(Event::Tick { ms: 1_000 });
            }
            Happening::Checkpoint => {
                self.after(CHECKPOINT_S, Happening::Checkpoint);
                self.handle(Event::CheckpointRequested);
            }
        }
    }

    /// Instances are told that they will end.
    fn give_notice(&mut self, count: usize) {
        for _ in 0..count {
            let staying = self.instances.keys().filter(|name| !self.noticed.contains(*name));
            let staying: Vec<usize> = staying.copied().collect();
            if staying.is_empty() {
                return;
            }
            let name = staying[self.stream.below(staying.len() as u64) as usize];
            self.noticed.insert(name);
            for node in self.instances[&name].clone() {
                self.handle(Event::DrainRequested { node });
            }
        }
    }

    fn resize(&mut self, count: usize) {
        while self.instances.len() > count {
            if self.noticed.is_empty() {
                let names: Vec<usize> = self.instances.keys().copied().collect();
                self.noticed.insert(names[self.stream.below(names.len() as u64) as usize]);
            }
            let name = self.noticed.pop_first().expect("an instance");
            for node in self.instances.remove(&name).unwrap_or_default() {
                if self.alive.remove(&node) {
                    self.after(SILENCE_S, Happening::Died(node));
                }
            }
        }
        while self.instances.len() < count {
            self.next += 1;
            let name = self.next;
            let nodes: Vec<NodeId> =
                (0..self.trace.nodes).map(|number| NodeId::new(format!("i{name}-{number}"))).collect();
            for node in &nodes {
                self.alive.insert(node.clone());
                self.after(START_S, Happening::Joined(node.clone()));
            }
            self.instances.insert(name, nodes);
        }
    }

    fn handle(&mut self, event: Event) {
        for effect in self.machine.handle(event) {
            match effect {
                Effect::Send { node, message } if self.alive.contains(&node) => self.command(node, message),
                Effect::Journal(_) => self.last_commit = self.now,
                Effect::OpenCheckpoint { attempt, senders, .. } => {
                    let all: f64 = senders.keys().map(|shard| bytes(&self.architecture, *shard)).sum();
                    self.after(all / STORE, Happening::Stored(attempt));
                }
                Effect::VerifyCheckpoint { step } => self.after(1.0, Happening::Verified(Some(step))),
                Effect::Notice(Notice::WentBack { from, to, .. }) => self.lost += from - to,
                Effect::Fence { node, reason } => panic!("{node} is fenced at {}: {reason}", self.now),
                Effect::Fatal { reason } => panic!("at {}: {reason}", self.now),
                _ => {}
            }
        }
    }

    fn command(&mut self, node: NodeId, message: NodeCommand) {
        match message {
            NodeCommand::Assign(assignment) => {
                let epoch = assignment.layout.placement.epoch;
                let of = |is: &dyn Fn(&Source) -> bool| -> f64 {
                    let shards = assignment.shards.iter().filter(|(_, source)| is(source));
                    shards.map(|(shard, _)| bytes(&self.architecture, *shard)).sum()
                };
                let copied = of(&|source| matches!(source, Source::Peer(_))) / LINK;
                let members = assignment.layout.placement.members.len() as f64;
                let loaded =
                    of(&|source| matches!(source, Source::Checkpoint(_))) / (STORE / members).min(LINK);
                self.after(
                    copied + loaded + 0.01,
                    Happening::Report(node.clone(), Box::new(NodeReport::Ready { epoch })),
                );
                let shards: Vec<ShardId> = assignment.learn.iter().map(|(shard, _)| *shard).collect();
                if !shards.is_empty() {
                    let learned: f64 = shards.iter().map(|shard| bytes(&self.architecture, *shard)).sum();
                    // Gradients use the link at the same time.
                    self.after(2.0 * learned / LINK, Happening::Learned(node, epoch, shards));
                }
            }
            NodeCommand::Begin { epoch, step, lanes, .. } => {
                if self.step_s.0 != epoch {
                    self.step_s = (epoch, self.machine.predicted_step_s());
                }
                let placement = self.machine.placement();
                let kept = self.shards.iter().filter(|shard| placement.holds_or_learns(&node, **shard));
                let report = NodeReport::Prepared {
                    epoch,
                    step,
                    norms: kept.map(|&shard| (shard, Norm { squared: 1.0, finite: true })).collect(),
                    digests: Vec::new(),
                    lanes: lanes.into_iter().map(|(lane, _)| (lane, LaneReport::default())).collect(),
                    speed: None,
                };
                self.after(self.step_s.1, Happening::Report(node, Box::new(report)));
            }
            NodeCommand::Leave { .. } => _ = self.alive.remove(&node),
            _ => {}
        }
    }
}
