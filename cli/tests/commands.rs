//! The commands, with valid and invalid input.
#![expect(clippy::expect_used, clippy::unwrap_used, reason = "tests")]

mod common;

use common::{Guard, World, lines, signal, text, until, volary};
use std::time::Duration;

const LONG: Duration = Duration::from_secs(120);

fn address(world: &World, run: &str) -> String {
    let path = world.path(run).join("supervisor.json");
    let mut address = None;
    until("the supervisor listens", LONG, || {
        let text = std::fs::read_to_string(&path).unwrap_or_default();
        address = serde_json::from_str::<serde_json::Value>(&text).ok();
        address.is_some()
    });
    address.unwrap()["address"].as_str().unwrap().to_owned()
}

fn here(world: &World, args: &[&str]) -> std::process::Output {
    volary().current_dir(world.dir.path()).args(args).output().expect("the binary")
}

#[test]
fn separate_processes_equal_train_and_answer_status_checkpoint_and_stop() {
    let world = World::new();
    let set = ["--set", "training.steps=100000", "--set", "checkpoint.every=0"];
    let mut supervisor = volary();
    supervisor.current_dir(world.dir.path()).args([
        "supervisor",
        "tiny.toml",
        "--listen",
        "127.0.0.1:0",
        "--dir",
        "runs/hand",
    ]);
    let mut supervisor = Guard::start(supervisor.args(set));
    let address = address(&world, "runs/hand");
    let node = |name: &str| {
        let mut node = volary();
        node.current_dir(world.dir.path()).args([
            "node",
            "--join",
            &address,
            "--name",
            name,
            "--threads",
            "1",
            "--device",
            "cpu",
        ]);
        Guard::start(&mut node)
    };
    let mut nodes = [node("left"), node("right")];
    until("steps", LONG, || lines(&world.path("runs/hand/metrics.jsonl")) >= 2);

    let status = here(&world, &["status", "--dir", "runs/hand", "--json"]);
    let status: serde_json::Value = serde_json::from_slice(&status.stdout).expect("JSON");
    assert_eq!(status["run"], "tiny");
    assert_eq!(status["nodes"].as_array().unwrap().len(), 2);
    assert_eq!(status["nodes"][0]["name"], "left");
    assert_eq!(status["shards"].as_array().unwrap().len(), 1 + 4 + 2 + 12);
    let plain = text(&here(&world, &["status", "--supervisor", &address]).stdout);
    assert!(plain.contains("left: member on cpu"), "{plain}");

    let checkpoint = text(&here(&world, &["checkpoint", "--dir", "runs/hand"]).stdout);
    let step: u64 = checkpoint.trim().rsplit(' ').next().unwrap().parse().expect("a step");
    assert!(here(&world, &["digest", "runs/hand", "--step", &step.to_string()]).status.success());

    let stop = here(&world, &["stop", "--dir", "runs/hand"]);
    assert!(text(&stop.stdout).starts_with("stopped, durable at step"), "{}", text(&stop.stderr));
    assert!(supervisor.wait(LONG).success());
    assert!(nodes.iter_mut().all(|node| node.wait(LONG).success()));

    // The same steps with `train`, on another number of nodes.
    let last = world.curve("hand").last().unwrap().0;
    let steps = format!("training.steps={last}");
    world.run_train(&["--nodes", "1", "--set", &steps, "--dir", "runs/train", "--quiet"]);
    assert_eq!(world.curve("train"), world.curve("hand"));
    assert_eq!(world.digest("train"), world.digest("hand"));
}

#[test]
fn train_prints_its_result_and_generate_continues_a_prompt() {
    let world = World::new();
    let output = text(&world.run_train(&["--nodes", "2"]).stdout);
    for expected in ["done: step 6, loss", "validation loss", "checkpoint: step 6", "a sample:", "try next:"]
    {
        assert!(output.contains(expected), "{output}");
    }
    let generate = |seed: &str| {
        let args =
            ["generate", "--run", "runs/tiny", "--prompt", "the lane", "--max-tokens", "8", "--seed", seed];
        let output = here(&world, &args);
        assert!(output.status.success(), "{}", text(&output.stderr));
        text(&output.stdout)
    };
    assert!(generate("1").starts_with("the lane"));
    assert_eq!(generate("1"), generate("1"));
    assert_ne!(generate("1"), generate("2"));
    // A second run with the same name gets a number.
    world.run_train(&["--nodes", "1", "--quiet"]);
    assert!(world.path("runs/tiny-2/metrics.jsonl").exists());
    let first = &world.metrics("tiny")[0];
    for key in [
        "step",
        "epoch",
        "loss",
        "aux_loss",
        "grad_norm",
        "lr",
        "tokens",
        "seconds",
        "tokens_per_second",
        "nodes",
        "skipped",
    ] {
        assert!(!first[key].is_null(), "metrics.jsonl has {key}");
    }
}

#[test]
fn plan_prints_the_papers_numbers_as_text_and_json() {
    let world = World::new();
    let json = here(&world, &["plan", "--preset", "64b-64e", "--json"]);
    let plan: serde_json::Value = serde_json::from_slice(&json.stdout).expect("JSON");
    assert_eq!(plan["activated_parameters"].as_u64().unwrap() / 100_000_000, 966);
    assert_eq!((plan["parameters"].as_u64().unwrap() + 500_000_000) / 1_000_000_000, 1162);
    // The paper's 180 GFLOPs per token for GLaM: two per activated parameter.
    assert!((180_000_000_000u64..200_000_000_000).contains(&plan["flops_per_token"].as_u64().unwrap()));
    let plain = text(&here(&world, &["plan", "--preset", "1.7b-64e"]).stdout);
    assert!(plain.contains("1.879B") && plain.contains("the paper prints 27B"), "{plain}");
    assert!(here(&world, &["plan", "tiny.toml"]).status.success());
    assert!(world.fails(&["plan", "--preset", "9b"]).contains("expected one of 0.1b, "));
}

#[test]
fn a_reader_that_closes_early_is_not_an_error() {
    let mut child = volary()
        .args(["plan", "--preset", "64b-64e", "--json"])
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success() && output.stderr.is_empty(), "{}", text(&output.stderr));
}

#[test]
fn invalid_input_is_one_clear_line() {
    let world = World::new();
    let set = |assignment: &str| world.fails(&["train", "tiny.toml", "--quiet", "--set", assignment]);
    assert!(world.fails(&["train", "none.toml"]).contains("none.toml"));
    assert!(set("training.stepz=3").contains("did you mean `steps`"));
    let source = |path: &str| set(&format!("data.sources=[{{ name = \"s\", path = \"{path}\" }}]"));
    assert!(source("/no/such/file.txt").contains("/no/such/file.txt"));
    std::fs::write(world.path("empty.txt"), "").unwrap();
    assert!(source("empty.txt").contains("empty"), "{}", source("empty.txt"));
    std::fs::write(world.path("short.txt"), "a few words").unwrap();
    assert!(source("short.txt").contains("sequence"), "{}", source("short.txt"));
    std::fs::write(world.path("broken.jsonl"), "{\"text\": \"fine\"}\n{\"text\": \n").unwrap();
    let sources = "data.sources=[{ name = \"s\", path = \"broken.jsonl\" }]";
    let broken = world.fails(&["train", "tiny.toml", "--quiet", "--strict", "--set", sources]);
    assert!(broken.contains("broken.jsonl") && broken.contains('2'), "{broken}");
    std::fs::write(world.path("latin.txt"), b"caf\xe9 ".repeat(4000)).unwrap();
    let strict = world.fails(&[
        "train",
        "tiny.toml",
        "--quiet",
        "--strict",
        "--set",
        "data.sources=[{ name = \"s\", path = \"latin.txt\" }]",
    ]);
    assert!(strict.contains("latin.txt") && strict.contains("UTF-8"), "{strict}");
    assert!(world.fails(&["train", "tiny.toml", "--quiet", "--dir", "/proc/none"]).contains("/proc/none"));
    assert!(world.fails(&["train", "tiny.toml", "--quiet", "--device", "cuda:7"]).contains("cuda:7"));
    assert!(world.fails(&["node", "--join", "127.0.0.1:1"]).contains("no access token"));
    assert!(world.fails(&["status"]).contains("no supervisor is running"));
    assert!(world.fails(&["digest", "runs/none"]).contains("runs/none"));
    assert!(world.fails(&["generate", "--run", "runs/none", "--prompt", "x"]).contains("runs/none"));
}

#[test]
fn a_model_that_does_not_fit_is_refused_with_its_size() {
    let world = World::new();
    let error = world.fails(&[
        "train",
        "tiny.toml",
        "--quiet",
        "--set",
        "model.hidden=16384",
        "--set",
        "model.feed_forward=65536",
        "--set",
        "model.experts=512",
    ]);
    assert!(error.contains("does not fit") && error.contains("GiB"), "{error}");
}

#[test]
fn a_directory_in_use_a_port_in_use_and_a_wrong_access_token_are_refused() {
    let world = World::new();
    let mut train =
        Guard::start(&mut world.train(&["--set", "training.steps=100000", "--dir", "runs/r", "--quiet"]));
    let address = address(&world, "runs/r");
    let held =
        world.fails(&["supervisor", "runs/r/config.toml", "--listen", "127.0.0.1:0", "--dir", "runs/r"]);
    assert!(held.contains("held") && held.contains("process"), "{held}");
    let resumed = world.fails(&["train", "tiny.toml", "--dir", "runs/r", "--resume"]);
    assert!(resumed.contains("in use by a live supervisor"), "{resumed}");
    let port = world.fails(&["supervisor", "tiny.toml", "--listen", &address, "--dir", "runs/other"]);
    assert!(port.contains(&address) && port.contains("in use"), "{port}");
    let token = std::fs::read_to_string(world.path("runs/r/identity/node.token")).unwrap();
    let (start, secret) = token.trim().rsplit_once('.').unwrap();
    let wrong: String = secret.chars().rev().collect();
    std::fs::write(world.path("wrong.token"), format!("{start}.{wrong}")).unwrap();
    let refused =
        world.fails(&["node", "--join", &address, "--token-file", "wrong.token", "--device", "cpu"]);
    assert!(refused.contains("token"), "{refused}");
    std::fs::write(world.path("garbage.token"), "hello").unwrap();
    let garbage =
        world.fails(&["node", "--join", &address, "--token-file", "garbage.token", "--device", "cpu"]);
    assert!(garbage.contains("access token"), "{garbage}");
    // The run continues regardless.
    let before = lines(&world.path("runs/r/metrics.jsonl"));
    until("the run continues", LONG, || lines(&world.path("runs/r/metrics.jsonl")) > before);
    signal(train.0.id(), "-INT");
    assert!(train.wait(LONG).success());
}

/// Values that would freeze, poison or break a run: one line with the key, before anything starts.
#[test]
fn values_that_would_ruin_a_run_are_refused_in_one_line() {
    let world = World::new();
    let schedule = |rest: &str| format!("training.schedule={{ kind = \"linear\", {rest} }}");
    let cases = [
        ("training.clip_norm", "training.clip_norm=0".to_owned()),
        ("training.clip_norm", "training.clip_norm=inf".to_owned()),
        ("training.schedule.rate", schedule("rate = -1.0")),
        ("training.schedule.rate", schedule("rate = nan")),
        ("training.schedule.warmup_steps", schedule("rate = 0.1, warmup_steps = 1000")),
        ("training.schedule.floor", schedule("rate = 0.1, floor = 0.2")),
        ("training.optimizer.beta2", "training.optimizer={ kind = \"adamw\", beta2 = 1.0 }".to_owned()),
        (
            "training.optimizer.clip_threshold",
            "training.optimizer={ kind = \"adafactor\", clip_threshold = 0 }".into(),
        ),
    ];
    for (key, set) in cases {
        let output = here(&world, &["train", "tiny.toml", "--dir", "runs/bad", "--set", &set]);
        let error = text(&output.stderr);
        assert!(!output.status.success(), "{set}");
        assert!(
            error.lines().count() == 1 && error.contains(key) && error.contains("expected"),
            "{set}: {error}"
        );
        assert!(!world.path("runs/bad").exists(), "{set}: nothing is begun");
    }
    let general = "training.optimizer={ kind = \"adafactor\", decay = \"general\" }";
    assert!(here(&world, &["plan", "tiny.toml", "--set", general]).status.success());
}

/// Every configuration that trains also ends well: summary, sample, and `generate`.
#[test]
fn a_model_that_drops_tokens_trains_and_generates() {
    let world = World::new();
    let set = ["--set", "model.capacity={ factor = 1.0 }", "--set", "model.second_expert=\"random\""];
    let output = text(&world.run_train(&[&["--nodes", "2"], &set[..]].concat()).stdout);
    assert!(output.contains("done: step 6") && output.contains("a sample:"), "{output}");
    let generated =
        here(&world, &["generate", "--run", "runs/tiny", "--prompt", "the lane", "--max-tokens", "4"]);
    assert!(generated.status.success(), "{}", text(&generated.stderr));
}

#[test]
fn a_new_configuration_is_one_that_fits_and_trains() {
    let world = World::new();
    let init = here(&world, &["init", "--size", "400k", "--data", "corpus"]);
    assert!(init.status.success(), "{}", text(&init.stderr));
    let config = text(&init.stdout);
    assert!(config.contains("name = \"corpus\"") && config.contains("[data.duplicates]"), "{config}");
    std::fs::write(world.path("new.toml"), config).expect("a file");
    let cache = format!("data.cache=\"{}\"", world.path("cache").display());
    let shorter =
        ["training.steps=12", "training.lanes=2", "training.sequence_length=16", "validation.rounds=1"];
    let mut args =
        vec!["train", "new.toml", "--threads", "1", "--dir", "runs/new", "--quiet", "--set", &cache];
    args.extend(shorter.iter().flat_map(|set| ["--set", set]));
    let run = here(&world, &args);
    assert!(run.status.success(), "{}", text(&run.stderr));
    assert_eq!(world.metrics("new").len(), 12);
}

#[test]
fn a_new_configuration_for_a_preset_needs_machines_that_hold_it() {
    let world = World::new();
    let example = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/cluster.toml");
    let example = example.to_str().expect("a path");
    let init = here(&world, &["init", "--preset", "0.1b-64e", "--inventory", example]);
    assert!(init.status.success(), "{}", text(&init.stderr));
    std::fs::write(world.path("new.toml"), &init.stdout).expect("a file");
    let plan = here(&world, &["plan", "new.toml", "--inventory", example, "--json"]);
    let plan: serde_json::Value = serde_json::from_slice(&plan.stdout).expect("JSON");
    assert_eq!(plan["cluster"]["fits"], true);
    assert!(plan["parameters"].as_u64().is_some_and(|parameters| parameters > 1_900_000_000), "{plan}");
    let error = world.fails(&["init", "--preset", "64b-64e"]);
    assert!(error.contains("does not fit") && error.contains("--size"), "{error}");
    assert!(world.fails(&["init", "--preset", "2b"]).contains("expected one of 0.1b"));
}
