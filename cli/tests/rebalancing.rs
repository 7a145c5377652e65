//! Measured loads and speeds move shards and lanes between real processes, and change no bit.
#![expect(clippy::expect_used, reason = "tests")]

mod common;

use common::{Guard, World, until};
use parking_lot::{Mutex, MutexGuard};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// One cluster at a time: a neighbour would change the speeds.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock()
}

fn events(world: &World, run: &str) -> Vec<Value> {
    let path = world.path("runs").join(run).join("events.jsonl");
    let all = std::fs::read_to_string(path).unwrap_or_default();
    // The last line may be half written.
    all.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

fn named<'a>(events: &'a [Value], name: &'a str) -> impl Iterator<Item = &'a Value> {
    events.iter().filter(move |event| event["event"] == name)
}

/// Text that is nearly all one word: one pair of experts gets nearly all tokens of a layer.
#[test]
fn a_hot_expert_gains_replicas_within_32_steps_and_no_bit_changes() {
    let _alone = alone();
    let world = World::new();
    std::fs::create_dir_all(world.path("hot")).expect("a folder");
    for number in 0..100 {
        let text = format!("{}{number}.\n", "router ".repeat(400));
        std::fs::write(world.path(&format!("hot/{number}.txt")), text).expect("a file");
    }
    let sources = format!(
        "data.sources=[{{ name = \"hot\", path = \"{}\", weight = 0.98 }}, {{ name = \"words\", path = \"{}\", weight = 0.02 }}]",
        world.path("hot").display(),
        world.path("corpus").display()
    );
    let set = ["--set", &sources, "--set", "training.steps=40", "--set", "training.aux_loss=0.0"];
    let set =
        [&set[..], &["--set", "cluster.replication=1", "--nodes", "3", "--threads", "1", "--quiet"]].concat();
    world.run_train(&[&set[..], &["--dir", "runs/still", "--set", "cluster.rebalance=false"]].concat());
    world.run_train(&[&set[..], &["--dir", "runs/hot"]].concat());
    let events = events(&world, "hot");
    let gains: Vec<&Value> = named(&events, "rebalancing")
        .filter(|event| event["reason"].as_str().is_some_and(|reason| reason.contains("its even share")))
        .collect();
    let first = gains.first().unwrap_or_else(|| panic!("no expert is hot: {events:?}"));
    assert!(first["step"].as_u64().is_some_and(|step| step <= 32), "{first}");
    let migrated = named(&events, "migrated").next().unwrap_or_else(|| panic!("{events:?}"));
    assert!(migrated["step"].as_u64().is_some_and(|step| step <= 40), "{migrated}");
    assert_eq!(world.curve("hot"), world.curve("still"));
    assert_eq!(world.digest("hot"), world.digest("still"));
}

/// The lanes of a node in each placement.
fn lanes_of(events: &[Value], node: &str) -> Vec<(u64, u64)> {
    let lanes = |placed: &Value| {
        let place = placed["nodes"].as_array()?.iter().position(|name| name == node)?;
        Some((placed["step"].as_u64()?, placed["lanes"][place].as_u64()?))
    };
    named(events, "placed").filter_map(lanes).collect()
}

fn try_signal(pid: u32, signal: Signal) {
    let pid = Pid::from_raw(pid as i32).expect("a pid");
    let _ = kill_process(pid, signal);
}

/// Makes a process run at an eighth of its speed, so that it is the slower one beside other work as well. The
/// slices are short: with longer ones, a process that waits in between would run at full speed at times. On
/// a loaded machine they last longer than asked, and it stands still for as much longer.
fn hold_back(pid: u32, ended: &AtomicBool) {
    while !ended.load(Ordering::Relaxed) {
        // It may have ended by itself.
        try_signal(pid, Signal::CONT);
        let running = Instant::now();
        std::thread::sleep(Duration::from_micros(500));
        try_signal(pid, Signal::STOP);
        std::thread::sleep(7 * running.elapsed());
    }
    try_signal(pid, Signal::CONT);
}

/// A number of a node's status.
fn status_of(run: &std::path::Path, node: &str, key: &str) -> Option<u64> {
    let output = common::volary().args(["status", "--json", "--dir"]).arg(run).output().ok()?;
    let status: Value = serde_json::from_slice(&output.stdout).ok()?;
    status["nodes"].as_array()?.iter().find(|found| found["name"] == node)?[key].as_u64()
}

/// The median speed over some steps, in tokens per second.
fn speed_over(metrics: &[Value], steps: std::ops::Range<u64>) -> f64 {
    let is_inside = |line: &&Value| line["step"].as_u64().is_some_and(|step| steps.contains(&step));
    let inside = metrics.iter().filter(is_inside);
    let mut speeds: Vec<f64> = inside.filter_map(|line| line["tokens_per_second"].as_f64()).collect();
    speeds.sort_by(f64::total_cmp);
    speeds[speeds.len() / 2]
}

/// What it loses depends on its speed: lanes, or experts, or all experts for the dense layers of more lanes.
/// Steps are shorter afterwards in any case.
#[test]
fn a_node_that_becomes_slow_loses_lanes_or_shards_within_32_steps_and_no_bit_changes() {
    let _alone = alone();
    let world = World::new();
    let set = [
        "--set",
        "training.steps=48",
        // One copy of each expert, so that a node can hold fewer of them.
        "--set",
        "cluster.replication=1",
        "--set",
        "training.sequence_length=96",
        // Large enough that a node computes most of the time: what it waits for does not make it slow.
        "--set",
        "model.hidden=96",
        "--set",
        "model.feed_forward=384",
        // Both nodes start with the same lanes.
        "--set",
        "cluster.measure=false",
        "--set",
        "checkpoint.every=1000",
    ];
    let set = [&set[..], &["--nodes", "2", "--threads", "1", "--quiet"]].concat();
    world.run_train(&[&set[..], &["--dir", "runs/quiet"]].concat());
    let mut run = Guard::start(&mut world.train(&[&set[..], &["--dir", "runs/slow"]].concat()));
    let metrics = world.path("runs/slow/metrics.jsonl");
    until("two steps", Duration::from_secs(60), || metrics.exists() && common::lines(&metrics) >= 2);
    let status = |key| status_of(&world.path("runs/slow"), "node-2", key);
    let pid = status("pid").and_then(|pid| u32::try_from(pid).ok()).expect("node-2 runs");
    let shards = status("shards").expect("node-2 has shards");
    let began = common::lines(&metrics) as u64;
    let mut later = shards;
    let ended = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| hold_back(pid, &ended));
        until("32 steps", Duration::from_secs(240), || common::lines(&metrics) as u64 >= began + 32);
        later = status("shards").unwrap_or(0);
        assert!(run.wait(Duration::from_secs(120)).success());
        ended.store(true, Ordering::Relaxed);
    });
    let events = events(&world, "slow");
    let lanes = lanes_of(&events, "node-2");
    let (_, first) = *lanes.first().expect("a placement");
    let moved = lanes.iter().find(|(step, _)| (began..=began + 32).contains(step));
    let (moved, _) = moved.unwrap_or_else(|| panic!("nothing moves from step {began}: {lanes:?}"));
    let (last, lanes_at_end) = lanes.last().expect("a placement");
    assert!(*lanes_at_end < first || later < shards, "{lanes:?}; {shards} shards, then {later}");
    let metrics = world.metrics("slow");
    let [before, after] = [began..moved + 1, last + 2..49].map(|steps| speed_over(&metrics, steps));
    assert!(after > before, "{before} tokens/s when it became slow, {after} at the end: {lanes:?}");
    assert_eq!(world.curve("slow"), world.curve("quiet"));
    assert_eq!(world.digest("slow"), world.digest("quiet"));
}

/// Bursts of other work are no reason to move anything back and forth.
#[test]
fn a_noisy_neighbour_makes_nothing_flap_for_300_steps() {
    let _alone = alone();
    let world = World::new();
    let set =
        ["--set", "training.steps=300", "--set", "checkpoint.every=1000", "--nodes", "2", "--threads", "1"];
    let ended = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut count = 0u64;
            while !ended.load(Ordering::Relaxed) {
                // Busy for a third of a second, then idle as long.
                let burst = Instant::now();
                while burst.elapsed() < Duration::from_millis(333) {
                    count = std::hint::black_box(count + 1);
                }
                std::thread::sleep(Duration::from_millis(333));
            }
        });
        world.run_train(&[&set[..], &["--dir", "runs/noisy", "--quiet"]].concat());
        ended.store(true, Ordering::Relaxed);
    });
    let events = events(&world, "noisy");
    let lanes = lanes_of(&events, "node-2");
    let turns = lanes
        .windows(3)
        .filter(|w| (w[0].1 < w[1].1) != (w[1].1 < w[2].1) && w[0].1 != w[1].1 && w[1].1 != w[2].1);
    assert!(turns.count() <= 1, "lanes go back and forth: {lanes:?}");
    let placements = named(&events, "placed").count();
    assert!(placements <= 6, "{placements} placements: {events:?}");
}
