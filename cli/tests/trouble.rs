//! Faults and membership changes on real processes: the losses and the weights equal those of an undisturbed
//! run on one node, bit for bit. `VOLARY_CHAOS=n` plays n random scripts instead of one; `VOLARY_CHAOS_SEED`
//! is the first seed.
#![expect(clippy::expect_used, reason = "tests")]

mod common;

use common::{Guard, World, signal, text, until, volary};
use parking_lot::{Mutex, MutexGuard};
use std::sync::LazyLock;
use std::time::Duration;
use volary_core::random::{Purpose, Stream};

const LONG: Duration = Duration::from_secs(120);
const STEPS: u64 = 60;

type Outcome = (Vec<(u64, u64, u64, u64)>, String);

/// The undisturbed run on one node.
static QUIET: LazyLock<Outcome> = LazyLock::new(|| quiet("training.steps=60"));

fn quiet(steps: &str) -> Outcome {
    let world = World::new();
    world.run_train(&["--set", steps, "--nodes", "1", "--dir", "runs/q", "--quiet"]);
    (world.curve("q"), world.digest("q"))
}

/// One cluster at a time: with several on two cores, a timeout of two seconds would not only catch faults.
static ALONE: Mutex<()> = parking_lot::const_mutex(());

fn alone() -> MutexGuard<'static, ()> {
    ALONE.lock()
}

/// Settings other than the defaults of these tests: three nodes, two replicas, a checkpoint at step 50.
#[derive(Default)]
struct Cluster {
    nodes: u32,
    replication: u32,
    checkpoint_every: u64,
    /// How long the others must wait to learn of the fault, in seconds: the silence after which a link is
    /// dead.
    silence: f64,
    /// More arguments of `volary train`.
    more: &'static [&'static str],
}

/// No fault that shows itself stalls the run for longer, in seconds, beside two ordinary steps.
const STALL_MAX: f64 = 1.0;
/// `cluster.node_timeout_ms`, in seconds.
const NODE_SILENCE: f64 = 2.0;
/// A silent link between two nodes is given up after so many seconds.
const PEER_SILENCE: f64 = 5.0;

/// Plays a script; the run must succeed, equal the undisturbed one, and stall no longer than its bound: in
/// two of three tries, since other processes may have the machine meanwhile. Returns its events.
fn play(cluster: Cluster, script: &str) -> String {
    let most = STALL_MAX + cluster.silence;
    let (events, stall) = play_once(&cluster, script);
    if stall > most {
        let mut stalls = [stall, play_once(&cluster, script).1, play_once(&cluster, script).1];
        stalls.sort_by(f64::total_cmp);
        assert!(
            stalls[1] <= most,
            "stalls of {stalls:.2?} s, at most {most} s were expected\n{script}\n{events}"
        );
    }
    events
}

/// The events of one try, and the longest time for one step, in seconds, without that of two ordinary ones.
fn play_once(cluster: &Cluster, script: &str) -> (String, f64) {
    let or = |value: u64, default: u64| if value == 0 { default } else { value }.to_string();
    let world = World::new();
    std::fs::write(world.path("events.toml"), script).expect("a file");
    let nodes = or(cluster.nodes.into(), 3);
    let replication = format!("cluster.replication={}", or(cluster.replication.into(), 2));
    let every = format!("checkpoint.every={}", or(cluster.checkpoint_every, 50));
    let args = ["--nodes", &nodes, "--threads", "1", "--dir", "runs/r", "--events", "events.toml"];
    let set = ["--set", "training.steps=60", "--set", &replication, "--set", &every, "--quiet"];
    // Benchmarks on a busy machine would move lanes.
    let equal = ["--set", "cluster.measure=false"];
    world.run_train(&[args.as_slice(), &set, &equal, cluster.more].concat());
    let events = std::fs::read_to_string(world.path("runs/r/events.jsonl")).expect("events");
    let outcome = (world.curve("r"), world.digest("r"));
    assert!(outcome == *QUIET, "differs from the undisturbed run\n{script}\n{events}\n{}", world.logs());
    let mut seconds: Vec<f64> = world.metrics("r").iter().filter_map(|l| l["seconds"].as_f64()).collect();
    seconds.sort_by(f64::total_cmp);
    (events, seconds[seconds.len() - 1] - 2.0 * seconds[seconds.len() / 2])
}

fn event(step: u64, what: &str, rest: &str) -> String {
    format!("[[event]]\nat_step = {step}\ndo = \"{what}\"\n{rest}\n")
}

fn on(step: u64, what: &str, node: u32) -> String {
    event(step, what, &format!("node = \"node-{node}\""))
}

fn count(events: &str, kind: &str) -> usize {
    events.matches(&format!("\"event\":\"{kind}\"")).count()
}

#[test]
fn a_killed_node_loses_no_committed_step() {
    let _alone = alone();
    let events = play(Cluster::default(), &on(10, "kill", 2));
    assert_eq!((count(&events, "lost"), count(&events, "went_back")), (1, 0), "{events}");
    assert_eq!(count(&events, "recovered"), 1, "{events}");
    assert!(events.contains("\"steps_lost\":0"), "{events}");
}

#[test]
fn two_nodes_killed_at_once_lose_nothing_with_three_replicas() {
    let _alone = alone();
    let cluster = Cluster { nodes: 4, replication: 3, ..Cluster::default() };
    let events = play(cluster, &[on(10, "kill", 2), on(10, "kill", 3)].concat());
    assert_eq!((count(&events, "lost"), count(&events, "went_back")), (2, 0), "{events}");
}

#[test]
fn a_node_killed_during_a_recovery_does_not_change_the_result() {
    let _alone = alone();
    let script = [on(10, "kill", 2), on(11, "kill", 3), event(20, "join", "")].concat();
    let events = play(Cluster::default(), &script);
    assert_eq!(count(&events, "lost"), 2, "{events}");
}

#[test]
fn a_run_whose_last_replica_dies_rolls_back_with_an_event_and_continues() {
    let _alone = alone();
    let cluster = Cluster { replication: 1, checkpoint_every: 8, ..Cluster::default() };
    let events = play(cluster, &on(21, "kill", 1));
    assert_eq!(count(&events, "went_back"), 1, "{events}");
}

#[test]
fn a_node_killed_during_a_checkpoint_does_not_change_the_result() {
    let _alone = alone();
    let cluster = Cluster { checkpoint_every: 1, ..Cluster::default() };
    let events = play(cluster, &[on(7, "kill", 3), event(12, "join", ""), on(23, "kill", 2)].concat());
    assert_eq!((count(&events, "lost"), count(&events, "went_back")), (2, 0), "{events}");
}

#[test]
fn a_node_joins_without_an_abort() {
    let _alone = alone();
    let events = play(Cluster { nodes: 2, ..Cluster::default() }, &event(5, "join", ""));
    assert_eq!(count(&events, "aborted"), 0, "{events}");
    // Where other processes slow a node down, lanes move as well, with an event of the same kind.
    let resized = events.matches("\"event\":\"resized\",\"cause\":\"node-3 joins\"").count();
    assert_eq!(resized, 1, "{events}");
}

#[test]
fn a_learner_or_its_source_killed_during_a_copy_does_not_change_the_result() {
    let _alone = alone();
    let script = [
        event(5, "join", ""),
        on(6, "kill", 4),
        event(20, "join", ""),
        event(30, "join", ""),
        on(31, "kill", 1),
    ];
    let events = play(Cluster::default(), &script.concat());
    assert_eq!(count(&events, "went_back"), 0, "{events}");
}

#[test]
fn a_drained_node_leaves_without_an_abort() {
    let _alone = alone();
    for replication in [1, 2] {
        let events = play(Cluster { replication, ..Cluster::default() }, &on(5, "drain", 2));
        assert_eq!((count(&events, "aborted"), count(&events, "left")), (0, 1), "{events}");
    }
}

#[test]
fn a_restarted_supervisor_finds_nodes_that_kept_their_state() {
    let _alone = alone();
    let script = [event(10, "kill-supervisor", ""), event(30, "kill-supervisor", "")].concat();
    let events = play(Cluster::default(), &script);
    assert_eq!((count(&events, "returned"), count(&events, "went_back")), (6, 0), "{events}");
}

#[test]
fn a_supervisor_and_a_node_killed_together_do_not_change_the_result() {
    let _alone = alone();
    // The restarted supervisor waits for the dead node's return.
    let cluster = Cluster { silence: NODE_SILENCE, ..Cluster::default() };
    let events = play(cluster, &[on(10, "kill", 2), event(10, "kill-supervisor", "")].concat());
    assert_eq!(count(&events, "went_back"), 0, "{events}");
}

#[test]
fn a_suspended_node_is_awaited_or_fenced() {
    let _alone = alone();
    let short = play(Cluster::default(), &event(10, "stop", "node = \"node-2\"\nfor_seconds = 0.7"));
    assert_eq!(count(&short, "lost"), 0, "{short}");
    let cluster = Cluster { silence: NODE_SILENCE, ..Cluster::default() };
    let long = play(cluster, &event(10, "stop", "node = \"node-2\"\nfor_seconds = 4.0"));
    // Its peers or the supervisor notice its silence first.
    assert!(count(&long, "lost") + count(&long, "fenced") >= 1, "{long}");
    assert_eq!(count(&long, "went_back"), 0, "{long}");
}

#[test]
fn a_partitioned_node_is_fenced_and_cannot_write_into_the_run() {
    let _alone = alone();
    let cluster = Cluster { silence: NODE_SILENCE, ..Cluster::default() };
    let events = play(cluster, &event(10, "partition", "node = \"node-2\"\nfor_seconds = 4.0"));
    assert_eq!(count(&events, "went_back"), 0, "{events}");
    // Its supervisor or its peers notice first.
    assert!(count(&events, "lost") + count(&events, "fenced") >= 1, "{events}");
}

#[test]
fn one_of_two_nodes_that_cannot_reach_each_other_is_fenced() {
    let _alone = alone();
    let rest = "node = \"node-2\"\npeer = \"node-3\"\nfor_seconds = 30.0";
    let cluster = Cluster { silence: PEER_SILENCE, ..Cluster::default() };
    let events = play(cluster, &event(10, "cut", rest));
    assert_eq!(count(&events, "went_back"), 0, "{events}");
    assert!(count(&events, "fenced") >= 1, "{events}");
}

#[test]
fn the_loss_of_a_third_of_the_packets_does_not_change_the_result() {
    let _alone = alone();
    // Packets are lost for three seconds, and no node is fenced.
    let cluster = Cluster { silence: 3.0, ..Cluster::default() };
    let events = play(cluster, &event(5, "lose", "node = \"node-2\"\nfraction = 0.3\nfor_seconds = 3.0"));
    assert_eq!(count(&events, "went_back"), 0, "{events}");
}

#[test]
fn drain_and_sigterm_wait_until_the_node_has_left() {
    let _alone = alone();
    let world = World::new();
    // So many that all commands come before the end.
    let steps = "training.steps=300";
    let args = ["--nodes", "4", "--dir", "runs/r", "--set", steps, "--quiet", "--threads", "1"];
    let mut train = Guard::start(&mut world.train(&args));
    until("a step", LONG, || common::lines(&world.path("runs/r/metrics.jsonl")) >= 1);
    let status = status(&world);
    let pid = |name: &str| {
        let nodes = status["nodes"].as_array().expect("nodes");
        let node = nodes.iter().find(|node| node["name"] == name).expect("the node");
        node["pid"].as_u64().expect("a pid")
    };
    for (path, kind) in [("run", "a string"), ("epoch", "a number"), ("step", "a number")] {
        assert!(!status[path].is_null(), "{path}: expected {kind} in {status}");
    }
    for key in ["pid", "address"] {
        assert!(!status["supervisor"][key].is_null(), "supervisor.{key} in {status}");
    }
    for key in ["name", "pid", "state", "device", "capacity", "shards", "lanes", "links"] {
        assert!(
            status["nodes"].as_array().expect("nodes").iter().all(|n| !n[key].is_null()),
            "{key}: {status}"
        );
    }
    for key in ["name", "version", "replicas"] {
        let shards = status["shards"].as_array().expect("shards");
        assert!(!shards.is_empty() && shards.iter().all(|s| !s[key].is_null()), "{key}: {status}");
    }
    let drained = volary()
        .current_dir(world.dir.path())
        .args(["drain", "node-2", "--dir", "runs/r"])
        .output()
        .expect("the binary");
    assert!(drained.status.success(), "{}", text(&drained.stderr));
    assert!(!common::alive(pid("node-2")) || !text(&drained.stdout).is_empty());
    let unknown = world.fails(&["drain", "node-9", "--dir", "runs/r"]);
    assert!(unknown.contains("node-9"), "{unknown}");
    signal(pid("node-3") as u32, "-TERM");
    assert!(train.wait(LONG).success(), "{}", world.logs());
    let events = std::fs::read_to_string(world.path("runs/r/events.jsonl")).expect("events");
    assert_eq!((count(&events, "left"), count(&events, "aborted")), (2, 0), "{events}");
    assert!((world.curve("r"), world.digest("r")) == quiet(steps), "{events}");
}

fn status(world: &World) -> serde_json::Value {
    let output = volary()
        .current_dir(world.dir.path())
        .args(["status", "--dir", "runs/r", "--json"])
        .output()
        .expect("status");
    assert!(output.status.success(), "{}", text(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("JSON")
}

/// A script of six random events; killed nodes restart.
fn random_script(seed: u64) -> String {
    let mut random = Stream::new(seed, Purpose::Faults, &[]);
    let mut steps: Vec<u64> = (0..6).map(|_| 2 + random.below(STEPS - 12)).collect();
    steps.sort_unstable();
    let draw = |step: u64| {
        let node = 1 + random.below(3) as u32;
        let seconds = |random: &mut Stream| {
            format!("node = \"node-{node}\"\nfor_seconds = {:.2}", 0.1 + 3.0 * random.next_f64())
        };
        match random.below(7) {
            0 | 1 => on(step, "kill", node),
            2 => event(step, "stop", &seconds(&mut random)),
            3 => event(step, "kill-supervisor", ""),
            4 => event(step, "join", ""),
            5 => event(step, "partition", &seconds(&mut random)),
            _ => event(step, "lose", &format!("fraction = 0.2\n{}", seconds(&mut random))),
        }
    };
    steps.into_iter().map(draw).collect()
}

#[test]
fn random_trouble_does_not_change_the_result() {
    let _alone = alone();
    let number = |name: &str| std::env::var(name).ok().and_then(|value| value.parse().ok());
    let first: u64 = number("VOLARY_CHAOS_SEED").unwrap_or(1);
    for seed in first..first + number("VOLARY_CHAOS").unwrap_or(1) {
        let script = random_script(seed);
        println!("VOLARY_CHAOS_SEED={seed}\n{script}");
        // Faults may follow each other before anybody has recovered.
        let silence = f64::INFINITY;
        play(Cluster { checkpoint_every: 10, silence, more: &["--respawn"], ..Cluster::default() }, &script);
    }
}
