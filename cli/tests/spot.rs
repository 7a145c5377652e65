//! A recorded spot market on real processes: the report is written, nothing is lost with notice, and the bits
//! are those of a quiet run.
#![expect(clippy::expect_used, reason = "tests")]

mod common;

use common::{World, text};
use serde_json::Value;

/// Nodes come and go twice, once all of them.
const TRACE: &str = "0,0\n100,4\n140,2\n170,0\n200,2\n230,4\n260,2\n300,4\n330,4\n";

#[test]
fn a_trace_of_spot_instances_is_played_through_zero_nodes_and_changes_no_bit() {
    let world = World::new();
    std::fs::write(world.path("trace.csv"), TRACE).expect("a file");
    let set =
        ["--set", "training.steps=500", "--set", "checkpoint.every=100", "--nodes", "2", "--threads", "1"];
    world.run_train(&[&set[..], &["--dir", "runs/quiet", "--quiet"]].concat());
    for (run, notice) in [("noticed", &["--notice", "1"][..]), ("killed", &[])] {
        let dir = format!("runs/{run}");
        let spot = ["--dir", &dir, "--spot-trace", "trace.csv", "--speedup", "25"];
        let output = world.run_train(&[&set[..], &spot, notice].concat());
        let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
        assert!(stdout.contains("goodput: ") && stdout.contains("worst stall"), "{stdout}");
        for stage in ["measuring 2 nodes", "measuring 1 nodes", "the trace has 0 nodes", "the trace is over"]
        {
            assert!(stderr.contains(stage), "{stage}: {stderr}");
        }
        let json = std::fs::read_to_string(world.path(&dir).join("spot.json")).expect("a report");
        let report: Value = serde_json::from_str(&json).expect("JSON");
        assert!(report["committed"].as_f64().is_some_and(|committed| committed > 0.0), "{report}");
        assert!(report["node_seconds"].as_f64().is_some_and(|seconds| seconds > 5.0), "{report}");
        if !notice.is_empty() {
            assert_eq!(report["lost_steps"], 0, "{stderr}");
        }
        let svg = std::fs::read_to_string(world.path(&dir).join("spot.svg")).expect("a picture");
        assert!(svg.contains("available nodes"));
        assert_eq!(world.curve(run), world.curve("quiet"), "{stderr}");
        assert_eq!(world.digest(run), world.digest("quiet"), "{stderr}");
    }
}

#[test]
fn options_that_do_not_fit_are_one_clear_error() {
    let world = World::new();
    std::fs::write(world.path("trace.csv"), TRACE).expect("a file");
    std::fs::write(world.path("bad.csv"), "0,1\n5,x\n").expect("a file");
    for (args, expected) in [
        (&["--spot-trace", "none.csv"][..], "trace none.csv"),
        (&["--spot-trace", "bad.csv"], "line 2: expected a time and a number of instances"),
        (&["--spot-trace", "trace.csv", "--speedup", "0"], "--speedup 0: expected a positive number"),
        (&["--spot-trace", "trace.csv", "--notice=-1"], "--notice -1: expected a number of seconds"),
        (&["--spot-trace", "trace.csv", "--speedup", "0.0000001"], "raise --speedup"),
        (&["--speedup", "2"], "--spot-trace"),
    ] {
        let error = world.fails(&[&["train", "tiny.toml"], args].concat());
        let all = volary_error(&world, args);
        assert!(error.contains(expected) || all.contains(expected), "{args:?}: {all}");
        assert!(!world.path("runs").exists(), "{args:?}");
    }
}

fn volary_error(world: &World, args: &[&str]) -> String {
    text(&world.train(args).output().expect("the binary").stderr)
}
