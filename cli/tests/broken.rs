//! A run that is broken by numbers that are not finite says so, and ends badly.

#![expect(clippy::expect_used, reason = "tests")]

mod common;

use common::*;

/// The first update makes all later gradients infinite or NaN.
const BROKEN: [&str; 4] = [
    "--set",
    "training.schedule={kind=\"cosine\",rate=1e30,floor=1e29,warmup_steps=1}",
    "--set",
    "training.max_skipped_steps=3",
];

/// What a run tells that ends with an error.
fn ends_badly(world: &World, args: &[&str]) -> String {
    let ended = world.train(&[args, &BROKEN].concat()).output().expect("the binary");
    let told = text(&ended.stderr);
    assert_eq!(ended.status.code(), Some(1), "{told}");
    told
}

fn read(world: &World, file: &str) -> String {
    std::fs::read_to_string(world.path("runs/r").join(file)).expect(file)
}

#[test]
fn a_run_that_going_back_does_not_heal_ends_with_an_error_and_no_poisoned_checkpoint() {
    let world = World::new();
    let args = ["--set", "training.steps=20", "--set", "checkpoint.every=2", "--dir", "runs/r"];
    let told = ends_badly(&world, &args);
    assert!(told.contains("went back from step 4 to 0, and on with the data of step 5"), "{told}");
    assert!(told.contains("3 steps in a row were skipped"), "{told}");
    let events = read(&world, "events.jsonl");
    assert_eq!(events.matches("\"went_back_from_nan\"").count(), 3, "{events}");
    assert!(!events.contains("\"event\":\"checkpoint\""), "{events}");
    ends_badly(&world, &[&args[..], &["--resume"]].concat());
}

#[test]
fn a_run_that_skips_all_its_steps_shows_them_and_ends_with_an_error() {
    let world = World::new();
    let skip = ["--set", "training.steps=8", "--set", "training.on_nan=\"skip\"", "--dir", "runs/r"];
    let told = ends_badly(&world, &skip);
    assert!(told.contains("step 8/8") && told.contains("7 skipped"), "{told}");
    assert_eq!(read(&world, "metrics.jsonl").matches("\"skipped\":true").count(), 7);
}
