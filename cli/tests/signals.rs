//! Signals and refused starts: any phase ends soon, what was begun is removed, and a start that was refused
//! does not stand in the way of the next one.

mod common;

use common::*;
use std::time::{Duration, Instant};

const LONG: Duration = Duration::from_secs(120);
/// Any phase ends this soon after a signal; the bound is 2 s, and the rest is for a busy machine.
const SOON: Duration = Duration::from_secs(10);

#[test]
fn a_supervisor_without_nodes_ends_at_the_first_signal_and_stays_startable() {
    for (signal_name, stay) in [("-INT", false), ("-TERM", true), ("-HUP", false)] {
        let world = World::new();
        let mut command = volary();
        command.current_dir(world.dir.path());
        command.args(["supervisor", "tiny.toml", "--listen", "127.0.0.1:0", "--no-http", "--dir", "runs/r"]);
        if stay {
            command.arg("--stay");
        }
        let mut supervisor = Guard::start(&mut command);
        until("its contact", LONG, || world.path("runs/r/supervisor.json").exists());
        let start = Instant::now();
        signal(supervisor.0.id(), signal_name);
        assert!(supervisor.wait(SOON).success(), "{signal_name}");
        assert!(start.elapsed() < SOON);
        assert!(!world.path("runs/r/supervisor.json").exists());
    }
}

#[test]
fn a_refused_start_leaves_no_directory_and_a_cut_off_one_is_no_run() {
    let world = World::new();
    std::fs::write(world.path("short.txt"), "too short").unwrap();
    let short = ["--set", "data.sources=[{name=\"short\",path=\"short.txt\"}]", "--dir", "runs/t"];
    let refused = world.train(&short).output().unwrap();
    assert_eq!(refused.status.code(), Some(1), "{}", stderr_of(&refused));
    assert!(!world.path("runs/t").exists());
    // A start that was killed has left its configuration and no step.
    std::fs::create_dir_all(world.path("runs/t/state")).unwrap();
    std::fs::write(world.path("runs/t/config.toml"), "not = \"a run\"").unwrap();
    let done = world.train(&["--set", "training.steps=2", "--dir", "runs/t", "--quiet"]).output().unwrap();
    assert!(done.status.success(), "{}", stderr_of(&done));
    let again = world.train(&["--dir", "runs/t"]).output().unwrap();
    assert!(stderr_of(&again).contains("already holds a run"), "{}", stderr_of(&again));
}

#[test]
fn a_run_that_has_lost_its_journal_but_not_its_checkpoints_is_not_overwritten() {
    let world = World::new();
    let args = ["--set", "training.steps=3", "--dir", "runs/r", "--quiet"];
    let trained = world.train(&args).output().unwrap();
    assert!(trained.status.success(), "{}", stderr_of(&trained));
    let digest = world.digest("r");
    std::fs::remove_dir_all(world.path("runs/r/state")).unwrap();
    std::fs::create_dir(world.path("runs/r/state")).unwrap();
    let other = world.train(&["--set", "run.seed=6", "--dir", "runs/r"]).output().unwrap();
    assert!(stderr_of(&other).contains("already holds a run"), "{}", stderr_of(&other));
    assert_eq!(world.digest("r"), digest);
}

#[test]
fn a_resumed_run_names_the_key_that_differs_and_knows_its_text() {
    let world = World::new();
    let args = ["--set", "training.steps=2", "--dir", "runs/r", "--quiet"];
    let trained = world.train(&args).output().unwrap();
    assert!(trained.status.success(), "{}", stderr_of(&trained));
    let refused = |extra: &[&str]| {
        let output = world.train(&[&args[..], &["--resume"], extra].concat()).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{extra:?}");
        stderr_of(&output)
    };
    let error = refused(&["--set", "data.validation_fraction=0.25"]);
    assert!(error.contains("data.validation_fraction was") && error.contains("now 0.25"), "{error}");
    let error = refused(&["--strict"]);
    assert!(error.contains("data.strict was false, now true"), "{error}");
    // Its tokens are gone, and the source has changed meanwhile.
    std::fs::remove_dir_all(world.path("runs/r/data")).unwrap();
    std::fs::write(world.path("corpus/0.txt"), "another text altogether").unwrap();
    let error = refused(&[]);
    assert!(error.contains("was trained on other data"), "{error}");
    // The refusal holds: nothing of the other text is left to be taken without a look.
    assert!(refused(&[]).contains("was trained on other data"));
}

fn stderr_of(output: &std::process::Output) -> String {
    text(&output.stderr)
}
