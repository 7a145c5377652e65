//! Scripted runs: faults at chosen steps, which do not change the mathematics.
#![expect(clippy::expect_used, reason = "tests")]

mod common;

use common::{World, text};

fn write(world: &World, script: &str) {
    std::fs::write(world.path("events.toml"), script).expect("a file");
}

/// The kinds of a run's events about a node.
fn events(world: &World, run: &str, node: &str) -> String {
    let path = world.path("runs").join(run).join("events.jsonl");
    let all = std::fs::read_to_string(path).expect("events");
    all.lines().filter(|line| line.contains(&format!("\"{node}\""))).collect::<Vec<_>>().join("\n")
}

const LONG: [&str; 4] = ["--set", "training.steps=30", "--set", "checkpoint.every=100"];

fn args<'a>(dir: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    [&["--nodes", "3", "--threads", "1", "--dir", dir], LONG.as_slice(), more].concat()
}

#[test]
fn a_script_that_kills_joins_and_stops_gives_the_same_weights() {
    let world = World::new();
    world.run_train(&args("runs/quiet", &["--quiet"]));
    write(
        &world,
        r#"
[[event]]
at_step = 3
do = "join"
[[event]]
at_step = 6
do = "kill"
node = "node-2"
[[event]]
at_step = 10
do = "stop"
node = "node-1"
for_seconds = 0.3
[[event]]
at_step = 31
do = "kill-supervisor"
"#,
    );
    let output = world.run_train(&args("runs/scripted", &["--events", "events.toml"]));
    let stderr = text(&output.stderr);
    let expected = [
        "step 3: join",
        "step 6: kill node-2",
        "node-2 ended (signal: 9 (SIGKILL))",
        "step 10: stop node-1 for 0.3 s",
        "not reached: step 31: kill the supervisor",
    ];
    for line in expected {
        assert!(stderr.contains(line), "{line} is missing in\n{stderr}");
    }
    assert_eq!(world.curve("scripted"), world.curve("quiet"));
    assert_eq!(world.digest("scripted"), world.digest("quiet"));
    assert!(events(&world, "scripted", "node-2").contains("\"lost\""));
    assert!(world.path("runs/scripted/logs/node-4.log").exists());
}

/// A majority blames the node whose replica differs; two replicas go back to what both agreed on.
#[test]
fn a_flipped_bit_is_found_blamed_and_leaves_the_run_as_it_would_be() {
    let world = World::new();
    let sets = ["--set", "checkpoint.every=4", "--set", "cluster.compare_within=4"];
    world.run_train(&args("runs/quiet", &[&sets[..], &["--quiet"]].concat()));
    write(
        &world,
        "[[event]]\nat_step = 14\ndo = \"corrupt\"\nnode = \"node-2\"\nshard = \"layer.0.dense\"\n",
    );
    for (dir, replication, blamed) in [("runs/three", "3", vec!["node-2"]), ("runs/two", "2", vec![])] {
        let replicas = format!("cluster.replication={replication}");
        let nodes = ["--nodes", replication, "--set", &replicas, "--events", "events.toml"];
        let output = world.run_train(&[&args(dir, &sets)[2..], &nodes].concat());
        let stderr = text(&output.stderr);
        assert!(stderr.contains("step 14: flip a bit of layer.0.dense on node-2"), "{stderr}");
        assert!(stderr.contains("the state of layer.0.dense is not the same on all nodes"), "{stderr}");
        let name = dir.trim_start_matches("runs/");
        let all = std::fs::read_to_string(world.path(dir).join("events.jsonl")).expect("events");
        let found: serde_json::Value = all
            .lines()
            .map(|line| serde_json::from_str::<serde_json::Value>(line).expect("JSON"))
            .find(|event| event["event"] == "replicas_differ")
            .expect("the difference is found");
        assert_eq!(found["blamed"], serde_json::json!(blamed), "{found}");
        // The bit may flip while step 15 or 16 is under way.
        assert!(found["step"].as_u64().is_some_and(|step| step <= 16 + 4 + 1), "{found}");
        assert!(all.contains("went_back_from_difference"), "{all}");
        assert_eq!(world.curve(name), world.curve("quiet"));
        assert_eq!(world.digest(name), world.digest("quiet"));
    }
}

#[test]
fn with_respawn_a_killed_node_restarts_under_its_name() {
    let world = World::new();
    write(&world, "[[event]]\nat_step = 3\ndo = \"kill\"\nnode = \"node-2\"\n");
    let output = world.run_train(&args("runs/r", &["--events", "events.toml", "--respawn"]));
    let stderr = text(&output.stderr);
    assert!(stderr.contains("node-2 ended (signal: 9 (SIGKILL)): restarting"), "{stderr}");
    let events = events(&world, "r", "node-2");
    assert!(events.contains("lost"), "{events}");
    assert_eq!(events.matches("\"event\":\"joined\"").count(), 2, "{events}\n{stderr}\n{}", world.logs());
}

#[test]
fn an_invalid_script_is_refused_before_anything_starts() {
    let world = World::new();
    write(&world, "[[event]]\nat_step = 3\ndo = \"kill\"\nnode = \"node-3\"\n");
    let args = ["train", "tiny.toml", "--nodes", "2", "--dir", "runs/r", "--events", "events.toml"];
    assert_eq!(
        world.fails(&args),
        "volary: events.toml, event 1: \"node-3\": expected node-1 to node-2, the nodes at step 3"
    );
    assert!(!world.path("runs/r").exists());
}
