//! Recovery from a full disk, a damaged checkpoint and an unreachable node.
#![expect(clippy::expect_used, reason = "tests")]

mod common;

use common::{Guard, World, lines, text, until, volary};
use std::process::Command;
use std::time::Duration;

const LONG: Duration = Duration::from_secs(120);
/// sysexits' EX_TEMPFAIL.
const HALTED: Option<i32> = Some(75);

/// A command in a world.
fn at(world: &World, mut command: Command, args: &[&str]) -> Guard {
    Guard::start(command.current_dir(world.dir.path()).args(args))
}

fn supervisor<'a>(address: &'a str, steps: &'a str) -> Vec<&'a str> {
    let dir = ["supervisor", "tiny.toml", "--dir", "runs/r", "--http", "127.0.0.1:0", "--listen", address];
    let set = ["--set", steps, "--set", "checkpoint.every=100", "--set", "cluster.nodes=1"];
    [&dir[..], &set].concat()
}

fn node<'a>(address: &'a str, name: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let token = ["--token-file", "runs/r/identity/node.token"];
    let args = ["node", "--join", address, "--name", name, "--threads", "1", "--device", "cpu"];
    [&args[..], &token, more].concat()
}

fn node_token(world: &World) {
    until("the access tokens", LONG, || world.path("runs/r/identity/node.token").exists());
}

#[cfg(unix)]
#[test]
fn a_supervisor_on_a_full_disk_ends_with_status_75_and_its_nodes_wait_for_the_next_one() {
    let world = World::new();
    let steps = "training.steps=300";
    world.run_train(&["--nodes", "1", "--set", steps, "--dir", "runs/quiet", "--quiet"]);
    let address = common::free_port().to_string();
    // No file grows beyond 60 KiB: the journal does after some 160 steps. The tokens are prepared already.
    let mut limited = Command::new("sh");
    let volary_with_limit = "trap '' XFSZ; ulimit -f 120; exec \"$0\" \"$@\"";
    limited.args(["-c", volary_with_limit, env!("CARGO_BIN_EXE_volary")]);
    let mut first = at(&world, limited, &supervisor(&address, steps));
    node_token(&world);
    let mut node = at(&world, volary(), &node(&address, "left", &[]));
    let halted = first.wait(LONG);
    assert_eq!(halted.code(), HALTED, "{}", first.stderr());
    let committed = lines(&world.path("runs/r/metrics.jsonl")) as u64;
    assert!((50..300).contains(&committed), "halted after step {committed}");
    let mut second = at(&world, volary(), &supervisor(&address, steps));
    assert!(second.wait(LONG).success(), "{}", second.stderr());
    assert!(node.wait(LONG).success(), "{}", node.stderr());
    let events = std::fs::read_to_string(world.path("runs/r/events.jsonl")).expect("events");
    assert!(events.contains("\"returned\"") && !events.contains("went_back"), "{events}");
    assert_eq!(world.digest("r"), world.digest("quiet"));
}

#[test]
fn a_damaged_checkpoint_is_named_and_left_alone_until_an_operator_says_go_back() {
    let world = World::new();
    world.run_train(&["--nodes", "1", "--set", "training.steps=9", "--dir", "runs/r", "--quiet"]);
    let manifest = std::fs::read_to_string(world.path("runs/r/checkpoints/step-00000009.json"));
    let manifest: serde_json::Value = serde_json::from_str(&manifest.expect("a manifest")).expect("JSON");
    let digest = manifest["checkpoint"]["shards"][3]["digest"].as_str().expect("a digest");
    let blob = world.path("runs/r/blobs").join(digest);
    let intact = std::fs::read(&blob).expect("a shard");
    let mut damaged = intact;
    damaged[100] ^= 1;
    std::fs::write(&blob, &damaged).expect("a shard");
    let resume =
        ["train", "tiny.toml", "--nodes", "2", "--set", "training.steps=12", "--dir", "runs/r", "--resume"];
    let error = world.fails(&resume);
    assert!(error.contains("step 9") && error.contains("--go-back"), "{error}");
    assert_eq!(std::fs::read(&blob).ok(), Some(damaged), "nothing is removed");
    let output = volary().current_dir(world.dir.path()).args(resume).args(["--go-back", "--quiet"]).output();
    let output = output.expect("the binary");
    assert!(output.status.success(), "{}", text(&output.stderr));
    world.run_train(&["--nodes", "1", "--set", "training.steps=12", "--dir", "runs/quiet", "--quiet"]);
    assert_eq!(world.curve("r"), world.curve("quiet"));
    assert_eq!(world.digest("r"), world.digest("quiet"));
}

#[test]
fn a_node_is_announced_where_others_reach_it_and_turned_away_where_they_do_not() {
    let world = World::new();
    let address = common::free_port().to_string();
    let mut run = at(&world, volary(), &supervisor(&address, "training.steps=100000"));
    node_token(&world);
    let everywhere = ["--listen", "0.0.0.0:0"];
    let _left = at(&world, volary(), &node(&address, "left", &everywhere));
    until("steps", LONG, || lines(&world.path("runs/r/metrics.jsonl")) >= 3);
    let events = std::fs::read_to_string(world.path("runs/r/events.jsonl")).expect("events");
    assert!(events.contains("\"address\":\"127.0.0.1:"), "{events}");
    // No process listens on this port.
    let nowhere = common::free_port().to_string();
    let error = world.fails(&node(&address, "right", &["--advertise", &nowhere]));
    assert!(error.contains(&nowhere) && error.contains("--advertise"), "{error}");
    let events = std::fs::read_to_string(world.path("runs/r/events.jsonl")).expect("events");
    assert!(!events.contains("aborted") && !events.contains("right"), "{events}");
    assert!(run.0.try_wait().expect("a status").is_none(), "the run goes on");
}
