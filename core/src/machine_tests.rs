//! The machine played through: quiet runs, deaths at every point, joins, lost shards, and random schedules of all.
//!
//! Tried by hand, and caught here: committing when one member of several has prepared (`a_step_is_committed_only...`,
//! schedules); journalling after telling (`a_commit_is_journalled...`); accepting another epoch's word (`another_epochs...`);
//! keeping a dead node among the holders (schedules: a shard is fetched from a dead peer); not going back when the
//! last copy is gone (schedules: the wait for a shard never ends).

use super::*;
use crate::architecture::presets;
use crate::messages::Source;
use crate::options::{CheckpointOptions, ClusterOptions, TrainingOptions, ValidationOptions};
use crate::random::{Purpose, Stream};
use crate::schedule::Schedule;

fn settings(steps: u64, nodes: usize, replication: usize) -> Settings {
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
        cluster: ClusterOptions { nodes, replication, ..ClusterOptions::default() },
        checkpoint: CheckpointOptions { every: 3, keep: 2 },
        validation: ValidationOptions { every: 0, rounds: 0 },
    }
}

/// What a node remembers between messages, as far as the protocol goes.
#[derive(Clone, Default)]
struct Replica {
    epoch: Epoch,
    held: BTreeSet<ShardId>,
    versions: BTreeMap<ShardId, Step>,
}

/// A cluster without a network: nodes answer at once or when the schedule says so, in the order of each link.
struct Cluster {
    machine: Machine,
    alive: BTreeMap<NodeId, Replica>,
    /// Words on their way to the supervisor, in the order of each node's stream.
    inbox: BTreeMap<NodeId, std::collections::VecDeque<FromNode>>,
    journal: Vec<(Step, f64)>,
    checkpoint: Option<(Step, BTreeSet<ShardId>, BTreeSet<ShardId>)>,
    durable: Step,
    done: bool,
    fatal: Option<String>,
    notices: Vec<Notice>,
    began: Vec<Step>,
}

fn lane_loss(step: Step, lane: Lane) -> f64 {
    Stream::new(9, Purpose::Faults, &[step, lane.into()]).next_f64()
}

impl Cluster {
    fn new(settings: Settings) -> Self {
        Self {
            machine: Machine::new(settings, None, 0),
            alive: BTreeMap::new(),
            inbox: BTreeMap::new(),
            journal: Vec::new(),
            checkpoint: None,
            durable: 0,
            done: false,
            fatal: None,
            notices: Vec::new(),
            began: Vec::new(),
        }
    }

    fn join(&mut self, name: &str) {
        let node = NodeId::new(name);
        self.alive.insert(node.clone(), Replica::default());
        self.event(Event::Joined { node, capacity: 1.0, address: format!("{name}:1") });
    }

    fn kill(&mut self, node: &NodeId) {
        self.alive.remove(node);
        self.inbox.remove(node);
        self.event(Event::Lost { node: node.clone(), reason: "killed".into() });
    }

    fn event(&mut self, event: Event) {
        for effect in self.machine.handle(event) {
            self.carry_out(effect);
        }
    }

    fn carry_out(&mut self, effect: Effect) {
        match effect {
            Effect::Send { node, message } => self.deliver(&node, message),
            Effect::Journal(committed) => {
                // M-1: once, in order.
                assert_eq!(committed.step, self.journal.last().map_or(0, |(step, _)| *step) + 1);
                self.journal.push((committed.step, committed.loss));
            }
            Effect::OpenCheckpoint { step, shards, .. } => {
                self.checkpoint = Some((step, shards.into_iter().collect(), BTreeSet::new()));
            }
            Effect::DropCheckpoint { step } => {
                self.checkpoint.take_if(|(open, ..)| *open == step);
            }
            Effect::GoBack { step } => {
                assert_eq!(step, self.durable, "M-4");
                self.journal.retain(|(committed, _)| *committed <= step);
            }
            Effect::Notice(notice) => self.notices.push(notice),
            Effect::Done => self.done = true,
            Effect::Fatal { reason } => self.fatal = Some(reason),
            Effect::Validated { .. } => {}
        }
    }

    fn deliver(&mut self, node: &NodeId, message: ToNode) {
        let committed = self.journal.last().map_or(0, |(step, _)| *step);
        let peers = self.alive.clone();
        let Some(replica) = self.alive.get_mut(node) else { return };
        let answer = match message {
            ToNode::Assign(assignment) => {
                replica.epoch = assignment.placement.epoch;
                assert_eq!(assignment.version, committed);
                replica.held = assignment.shards.iter().map(|(shard, _)| *shard).collect();
                for (shard, source) in assignment.shards {
                    let version = match source {
                        Source::Initial => 0,
                        Source::Held => replica.versions[&shard],
                        Source::Checkpoint(step) => {
                            assert_eq!(step, self.durable);
                            step
                        }
                        Source::Peer(peer) => match peers.get(&peer) {
                            Some(peer) => peer.versions[&shard],
                            None => panic!("{shard} is to be fetched from {peer}, which is dead"),
                        },
                    };
                    assert_eq!(version, assignment.version, "{node} has {shard} at another version");
                    replica.versions.insert(shard, version);
                }
                Some(FromNode::Ready { epoch: replica.epoch })
            }
            ToNode::Begin { epoch, step, lanes, .. } if epoch == replica.epoch => {
                self.began.push(step);
                // What others hold now is let go when the epoch begins, not before: a peer may still have asked for it.
                replica.versions.retain(|shard, _| replica.held.contains(shard));
                let report = |lane| LaneReport { loss: lane_loss(step, lane), ..LaneReport::default() };
                let norm = |shard: &ShardId| (*shard, Norm { squared: step as f64, finite: true });
                Some(FromNode::Prepared {
                    epoch,
                    step,
                    norms: replica.versions.keys().map(norm).collect(),
                    lanes: lanes.into_iter().map(|(lane, _)| (lane, report(lane))).collect(),
                })
            }
            ToNode::Commit { epoch, step, .. } if epoch == replica.epoch => {
                assert!(committed >= step, "M-2: told before it was journalled");
                for version in replica.versions.values_mut() {
                    assert_eq!(*version + 1, step);
                    *version = step;
                }
                Some(FromNode::Applied { epoch, step })
            }
            ToNode::Checkpoint { step, shards, .. } => {
                if let Some((open, wanted, here)) = &mut self.checkpoint
                    && *open == step
                {
                    here.extend(shards);
                    if here == wanted {
                        self.checkpoint = None;
                        self.inbox
                            .entry(NodeId::new("disk"))
                            .or_default()
                            .push_back(FromNode::Applied { epoch: 0, step });
                    }
                }
                None
            }
            _ => None,
        };
        if let Some(answer) = answer {
            self.inbox.entry(node.clone()).or_default().push_back(answer);
        }
    }

    /// Lets one word through; `pick` chooses whose.
    fn turn(&mut self, pick: u64) -> bool {
        let waiting: Vec<NodeId> =
            self.inbox.iter().filter(|(_, words)| !words.is_empty()).map(|(node, _)| node.clone()).collect();
        if waiting.is_empty() {
            return false;
        }
        let node = waiting[(pick % waiting.len() as u64) as usize].clone();
        let Some(message) = self.inbox.get_mut(&node).and_then(std::collections::VecDeque::pop_front) else {
            return false;
        };
        if let (true, FromNode::Applied { step, .. }) = (node.0 == "disk", &message) {
            self.event(Event::CheckpointStored { step: *step });
            self.durable = self.machine.durable().unwrap_or(0);
        } else {
            self.event(Event::Said { node, message });
        }
        true
    }

    fn run_out(&mut self) {
        while !self.done && self.turn(0) {}
    }
}

fn quiet(steps: u64) -> Vec<(Step, f64)> {
    let mut cluster = Cluster::new(settings(steps, 1, 1));
    cluster.join("a");
    cluster.run_out();
    assert!(cluster.done);
    cluster.journal
}

#[test]
fn a_quiet_run_commits_every_step_once_and_ends_durable() {
    let mut cluster = Cluster::new(settings(7, 3, 2));
    ["a", "b", "c"].into_iter().for_each(|name| cluster.join(name));
    cluster.run_out();
    assert!(cluster.done);
    assert_eq!(cluster.durable, 7);
    assert_eq!(cluster.journal, quiet(7), "the losses are those of one node, to the bit");
}

#[test]
fn the_run_waits_for_its_nodes_and_gives_up_after_the_limit() {
    let mut cluster = Cluster::new(settings(3, 2, 2));
    cluster.join("a");
    cluster.run_out();
    assert!(cluster.began.is_empty());
    cluster.event(Event::GatherTimeout);
    assert_eq!(cluster.fatal.as_deref(), Some("waited for 2 nodes, and 1 came"));
}

#[test]
fn a_step_is_committed_only_when_every_member_has_prepared() {
    let mut cluster = Cluster::new(settings(5, 2, 2));
    ["a", "b"].into_iter().for_each(|name| cluster.join(name));
    // Two are ready, then one of two is prepared.
    cluster.turn(0);
    cluster.turn(1);
    cluster.turn(0);
    assert!(cluster.journal.is_empty());
    cluster.turn(0);
    assert_eq!(cluster.journal.len(), 1);
}

#[test]
fn a_commit_is_journalled_before_anybody_hears_of_it() {
    let mut machine = Machine::new(settings(2, 1, 1), None, 0);
    let node = NodeId::new("a");
    machine.handle(Event::Joined { node: node.clone(), capacity: 1.0, address: String::new() });
    machine.handle(Event::Said { node: node.clone(), message: FromNode::Ready { epoch: 1 } });
    let message = FromNode::Prepared { epoch: 1, step: 1, norms: vec![], lanes: vec![] };
    let effects = machine.handle(Event::Said { node, message });
    let journal = effects.iter().position(|e| matches!(e, Effect::Journal(_))).unwrap();
    let told = effects
        .iter()
        .position(|e| matches!(e, Effect::Send { message: ToNode::Commit { .. }, .. }))
        .unwrap();
    assert!(journal < told);
}

#[test]
fn another_epochs_word_changes_nothing() {
    let mut machine = Machine::new(settings(2, 1, 1), None, 4);
    let node = NodeId::new("a");
    machine.handle(Event::Joined { node: node.clone(), capacity: 1.0, address: String::new() });
    for epoch in [0, 4, 6] {
        let ready = FromNode::Ready { epoch };
        assert!(machine.handle(Event::Said { node: node.clone(), message: ready }).is_empty());
        let failed = FromNode::Failed { epoch, reason: String::new(), fatal: true };
        assert!(machine.handle(Event::Said { node: node.clone(), message: failed }).is_empty());
    }
    assert_eq!(machine.activity(), Activity::Placing);
}

#[test]
fn a_gradient_that_is_not_finite_skips_the_update_and_the_run_goes_on() {
    let mut machine = Machine::new(settings(2, 1, 1), None, 0);
    let node = NodeId::new("a");
    machine.handle(Event::Joined { node: node.clone(), capacity: 1.0, address: String::new() });
    machine.handle(Event::Said { node: node.clone(), message: FromNode::Ready { epoch: 1 } });
    let norms = vec![(ShardId::Embedding, Norm { squared: f64::NAN, finite: false })];
    let message = FromNode::Prepared { epoch: 1, step: 1, norms, lanes: vec![] };
    let effects = machine.handle(Event::Said { node, message });
    let skipped = |e: &Effect| matches!(e, Effect::Journal(committed) if !committed.update.apply);
    assert!(effects.iter().any(skipped));
    assert_eq!(machine.committed(), 1);
}

#[test]
fn a_checkpoint_that_fails_is_told_and_the_next_one_is_written_all_the_same() {
    let mut cluster = Cluster::new(settings(9, 1, 1));
    cluster.join("a");
    let mut pick = 0;
    while cluster.journal.len() < 3 {
        assert!(cluster.turn(pick));
        pick += 1;
    }
    let message = FromNode::CheckpointFailed { step: 3, reason: "no space left".into() };
    cluster.event(Event::Said { node: NodeId::new("a"), message });
    cluster.run_out();
    assert!(cluster.notices.iter().any(|n| matches!(n, Notice::CheckpointFailed { step: 3, .. })));
    assert!(!cluster.notices.contains(&Notice::Checkpoint { step: 3 }));
    assert!(cluster.notices.contains(&Notice::Checkpoint { step: 6 }));
    assert_eq!((cluster.done, cluster.durable), (true, 9));
}

#[test]
fn a_step_that_nothing_comes_of_is_tried_again_a_bounded_number_of_times() {
    let mut cluster = Cluster::new(settings(5, 2, 2));
    ["a", "b"].into_iter().for_each(|name| cluster.join(name));
    // Both are ready; then one says nothing any more.
    cluster.turn(0);
    cluster.turn(1);
    cluster.event(Event::Stalled);
    assert!(cluster.notices.iter().any(|n| matches!(n, Notice::Aborted { epoch: 1, step: 1, .. })));
    cluster.run_out();
    assert_eq!(cluster.journal, quiet(5), "a second try is enough");

    let mut dead = Cluster::new(settings(5, 1, 1));
    dead.join("a");
    for _ in 0..=ATTEMPTS_MAX {
        dead.event(Event::Stalled);
    }
    assert!(dead.fatal.expect("an end").contains("nothing came of step 1"));
}

#[test]
fn replicas_that_differ_are_a_loud_event() {
    let mut machine = Machine::new(settings(2, 2, 2), None, 0);
    let nodes = [NodeId::new("a"), NodeId::new("b")];
    for node in &nodes {
        machine.handle(Event::Joined { node: node.clone(), capacity: 1.0, address: String::new() });
    }
    for node in &nodes {
        machine.handle(Event::Said { node: node.clone(), message: FromNode::Ready { epoch: 1 } });
    }
    let mut effects = Vec::new();
    for (node, squared) in nodes.into_iter().zip([1.0, 1.0 + f64::EPSILON]) {
        let norms = vec![(ShardId::Embedding, Norm { squared, finite: true })];
        let message = FromNode::Prepared { epoch: 1, step: 1, norms, lanes: vec![] };
        effects = machine.handle(Event::Said { node, message });
    }
    let loud = Effect::Notice(Notice::ReplicasDiffer { step: 1, shard: ShardId::Embedding });
    assert!(effects.contains(&loud));
}

#[test]
fn when_the_last_copy_dies_the_run_goes_back_to_its_checkpoint_and_on() {
    let mut cluster = Cluster::new(settings(8, 2, 1));
    ["a", "b"].into_iter().for_each(|name| cluster.join(name));
    let mut pick = 0;
    while cluster.journal.len() < 5 {
        assert!(cluster.turn(pick));
        pick += 1;
    }
    cluster.kill(&NodeId::new("b"));
    assert!(cluster.notices.iter().any(|n| matches!(n, Notice::WentBack { from: 5, to: 3, .. })));
    cluster.run_out();
    assert!(cluster.done);
    assert_eq!(cluster.journal, quiet(8));
}

#[test]
fn a_stop_writes_a_checkpoint_of_the_last_committed_step() {
    let mut cluster = Cluster::new(settings(100, 1, 1));
    cluster.join("a");
    while cluster.journal.len() < 4 {
        assert!(cluster.turn(0));
    }
    cluster.event(Event::StopRequested);
    cluster.run_out();
    assert!(cluster.done);
    assert_eq!(cluster.durable, cluster.journal.len() as u64);
}

/// Random schedules of joins and deaths at random points, with words let through in random order. Whatever happens,
/// the journal is the quiet run's, and once the faults stop the run ends.
#[test]
fn random_schedules_of_joins_and_deaths_end_with_the_quiet_runs_journal() {
    let expected = quiet(12);
    for seed in 0..3_000 {
        let mut stream = Stream::new(seed, Purpose::Faults, &[]);
        let mut cluster = Cluster::new(settings(12, 2, 1 + stream.below(3) as usize));
        let mut named = 0;
        let mut faults = 12;
        for _ in 0..100_000 {
            if cluster.done {
                break;
            }
            if faults > 0 && stream.below(12) == 0 {
                faults -= 1;
                let names: Vec<NodeId> = cluster.alive.keys().cloned().collect();
                if stream.below(2) == 0 && names.len() > 1 {
                    cluster.kill(&names[stream.below(names.len() as u64) as usize]);
                } else if names.len() < 5 {
                    named += 1;
                    cluster.join(&format!("n{named}"));
                }
            }
            if !cluster.turn(stream.next_u64()) && faults == 0 {
                named += 1;
                cluster.join(&format!("n{named}"));
            }
        }
        assert_eq!(cluster.fatal, None, "seed {seed}");
        assert!(cluster.done, "seed {seed}: the run does not end");
        assert_eq!(cluster.journal, expected, "seed {seed}");
    }
}
