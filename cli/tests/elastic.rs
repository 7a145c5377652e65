//! Elasticity does not change the mathematics: the same bits on any number of nodes, with kills and
//! resumptions.
#![expect(clippy::expect_used, clippy::unwrap_used, reason = "tests")]

mod common;

use common::{Guard, World, alive, lines, signal, text, until, volary};
use std::time::Duration;
use volary_core::{LayerId, LayerRange};

const LONG: Duration = Duration::from_secs(120);

#[test]
fn one_two_three_and_five_nodes_give_the_same_losses_and_weights_to_the_bit() {
    let world = World::new();
    for nodes in ["1", "2", "3", "5"] {
        world.run_train(&["--nodes", nodes, "--dir", &format!("runs/n{nodes}"), "--quiet", "--threads", "1"]);
    }
    let (curve, digest) = (world.curve("n1"), world.digest("n1"));
    assert_eq!(curve.iter().map(|point| point.0).collect::<Vec<_>>(), (1..=6).collect::<Vec<_>>());
    for nodes in ["2", "3", "5"] {
        assert_eq!(world.curve(&format!("n{nodes}")), curve, "{nodes} nodes");
        assert_eq!(world.digest(&format!("n{nodes}")), digest, "{nodes} nodes");
        assert_eq!(world.metrics(&format!("n{nodes}"))[0]["nodes"].to_string(), nodes);
    }
    // Nor do sums over several nodes change them,
    let tree =
        ["--nodes", "5", "--dir", "runs/tree", "--quiet", "--threads", "1", "--set", "cluster.fan_in=2"];
    world.run_train(&tree);
    assert_eq!((world.curve("tree"), world.digest("tree")), (curve.clone(), digest.clone()));
    // nor replication and threads.
    world.run_train(&[
        "--nodes",
        "3",
        "--dir",
        "runs/other",
        "--quiet",
        "--threads",
        "2",
        "--set",
        "cluster.replication=1",
    ]);
    assert_eq!((world.curve("other"), world.digest("other")), (curve, digest));
}

#[test]
fn adamw_and_dropped_tokens_give_the_same_bits_on_any_number_of_nodes() {
    let world = World::new();
    let set = [
        "--set",
        "training.optimizer={ kind = \"adamw\" }",
        "--set",
        "model.capacity={ factor = 1.0 }",
        "--set",
        "model.second_expert=random",
        "--set",
        "training.clip_norm=0.5",
        "--quiet",
    ];
    for nodes in ["1", "3"] {
        let dir = format!("runs/n{nodes}");
        let mut args = vec!["--nodes", nodes, "--dir", &dir];
        args.extend(set);
        world.run_train(&args);
    }
    assert_eq!(world.curve("n1"), world.curve("n3"));
    assert_eq!(world.digest("n1"), world.digest("n3"));
    assert!(world.metrics("n1").iter().any(|line| line["dropped"].as_u64().unwrap() > 0));
}

#[test]
fn after_sigkill_of_all_processes_a_resumed_run_equals_an_undisturbed_one() {
    let world = World::new();
    let long = ["--set", "training.steps=60", "--set", "checkpoint.every=8", "--quiet"];
    let args = |dir| [&["--nodes", "2", "--dir", dir], long.as_slice()].concat();
    world.run_train(&args("runs/quiet"));
    let mut train = Guard::start(&mut world.train(&args("runs/killed")));
    let metrics = world.path("runs/killed/metrics.jsonl");
    until("a step", LONG, || lines(&metrics) >= 1);
    let pids = status_pids(&world, "runs/killed");
    until("a checkpoint and some more steps", LONG, || lines(&metrics) >= 11);
    // First the process that would restart the supervisor.
    let all = [vec![u64::from(train.0.id())], pids].concat();
    all.iter().for_each(|&pid| signal(pid as u32, "-9"));
    let _ = train.wait(LONG);
    until("all are dead", LONG, || !all.iter().any(|&pid| alive(pid)));
    assert!(lines(&metrics) < 60, "killed before its end");
    world.run_train(&[args("runs/killed"), vec!["--resume"]].concat());
    assert_eq!(world.curve("killed"), world.curve("quiet"));
    assert_eq!(world.digest("killed"), world.digest("quiet"));
}

/// The planner's costs of the tiny model, from which the memory limits of the nodes follow.
fn tiny_costs(world: &World) -> volary_core::costs::Costs {
    let config = volary_cli::config::Config::load(&world.path("tiny.toml"), &[]).expect("a configuration");
    volary_core::costs::Costs::new(&config.model, &config.training)
}

#[test]
fn a_model_that_fits_no_node_runs_in_stages_with_the_same_bits() {
    let world = World::new();
    let costs = tiny_costs(&world);
    // Room for half of the layers, and for two replicas of all experts on four nodes; not for all layers.
    let half = LayerId(costs.layers() / 2);
    let all = costs.all_layers();
    let [front, back] = [LayerRange { end: half, ..all }, LayerRange { start: half, ..all }];
    let experts = costs.moe_layers.len() * costs.experts;
    let room = costs.stage_bytes(front, 2).max(costs.stage_bytes(back, 2))
        + (experts as u64 * 2).div_ceil(3) * costs.expert_bytes;
    assert!(room < costs.stage_bytes(all, 2), "{costs:?}");
    let steps = ["--set", "training.steps=30", "--set", "checkpoint.every=100", "--threads", "1", "--quiet"];
    world.run_train(&[&["--nodes", "1", "--dir", "runs/whole"], steps.as_slice()].concat());
    let memory = room.to_string();
    std::fs::write(
        world.path("events.toml"),
        "[[event]]\nat_step = 8\ndo = \"kill\"\nnode = \"node-2\"\n[[event]]\nat_step = 14\ndo = \"join\"\n",
    )
    .expect("a file");
    let more = ["--memory", &memory, "--zones", "a,b", "--events", "events.toml"];
    world.run_train(&[&["--nodes", "4", "--dir", "runs/spread"], more.as_slice(), &steps].concat());
    assert_eq!(world.curve("spread"), world.curve("whole"));
    assert_eq!(world.digest("spread"), world.digest("whole"));
    let events = std::fs::read_to_string(world.path("runs/spread/events.jsonl")).expect("events");
    assert!(events.contains("\"stages\":2"), "{events}");
    assert!(events.contains("\"lost\"") && !events.contains("went_back"), "{events}");
}

#[test]
fn a_node_without_room_for_layers_hosts_experts_with_the_same_bits() {
    let world = World::new();
    let costs = tiny_costs(&world);
    let few = costs.expert_bytes * 3;
    let steps = ["--threads", "1", "--quiet"];
    world.run_train(&[&["--nodes", "1", "--dir", "runs/whole"], steps.as_slice()].concat());
    // In the second run a node has no room for anything: it is a member without shards.
    for (run, memory) in [("host", format!("1GiB,{few}")), ("spare", "1GiB,1".to_owned())] {
        let dir = format!("runs/{run}");
        world.run_train(&[&["--nodes", "2", "--dir", &dir, "--memory", &memory], steps.as_slice()].concat());
        assert_eq!(world.curve(run), world.curve("whole"), "{run}");
        assert_eq!(world.digest(run), world.digest("whole"), "{run}");
        let events = std::fs::read_to_string(world.path(&format!("{dir}/events.jsonl"))).expect("events");
        assert!(events.contains("\"experts_only\":1"), "{events}");
    }
}

/// The process numbers of the supervisor and the nodes.
fn status_pids(world: &World, dir: &str) -> Vec<u64> {
    let output = volary()
        .current_dir(world.dir.path())
        .args(["status", "--dir", dir, "--json"])
        .output()
        .expect("status");
    assert!(output.status.success(), "{}", text(&output.stderr));
    let status: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let nodes = status["nodes"].as_array().unwrap().iter().map(|node| node["pid"].as_u64().unwrap());
    std::iter::once(status["supervisor"]["pid"].as_u64().unwrap()).chain(nodes).collect()
}

#[test]
fn a_killed_node_loses_no_committed_step_and_gives_the_same_bits() {
    let world = World::new();
    let long = ["--set", "training.steps=60", "--set", "checkpoint.every=100", "--quiet"];
    let args = |dir| [&["--nodes", "3", "--dir", dir], long.as_slice()].concat();
    world.run_train(&args("runs/quiet"));
    let mut train = Guard::start(&mut world.train(&args("runs/killed")));
    let metrics = world.path("runs/killed/metrics.jsonl");
    until("a step", LONG, || lines(&metrics) >= 1);
    let victim = status_pids(&world, "runs/killed")[2];
    signal(victim as u32, "-9");
    assert!(train.wait(LONG).success(), "{}", world.logs());
    assert_eq!(world.curve("killed"), world.curve("quiet"));
    assert_eq!(world.digest("killed"), world.digest("quiet"));
    let events = std::fs::read_to_string(world.path("runs/killed/events.jsonl")).unwrap();
    assert!(events.contains("\"lost\"") && !events.contains("went_back"), "{events}");
}

#[test]
fn an_interrupt_writes_a_checkpoint_and_ends_all_processes() {
    let world = World::new();
    let mut train =
        Guard::start(&mut world.train(&["--set", "training.steps=100000", "--dir", "runs/r", "--quiet"]));
    let metrics = world.path("runs/r/metrics.jsonl");
    until("two steps", LONG, || lines(&metrics) >= 2);
    let pids = status_pids(&world, "runs/r");
    signal(train.0.id(), "-INT");
    assert!(train.wait(LONG).success(), "{}", world.logs());
    until("all have ended", LONG, || !pids.iter().any(|&pid| alive(pid)));
    let last = world.curve("r").last().unwrap().0;
    assert!(
        world.digest("r").ends_with(&format!("step {last}")),
        "the checkpoint is of the last committed step"
    );
}

#[test]
fn no_process_outlives_a_killed_parent() {
    let world = World::new();
    let mut train =
        Guard::start(&mut world.train(&["--set", "training.steps=100000", "--dir", "runs/r", "--quiet"]));
    let metrics = world.path("runs/r/metrics.jsonl");
    until("a step", LONG, || lines(&metrics) >= 1);
    let pids = status_pids(&world, "runs/r");
    assert_eq!(pids.len(), 3);
    signal(train.0.id(), "-9");
    let _ = train.wait(LONG);
    until("all have ended", LONG, || !pids.iter().any(|&pid| alive(pid)));
}
