//! The cost of a death, a join, a drain and a supervisor restart on the quickstart model with three nodes,
//! measured by its commits: `cargo bench -p volary-cli --bench elasticity`.
#![expect(clippy::expect_used, reason = "a benchmark")]

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const ROUNDS: usize = 3;
const STEPS: usize = 30;
/// The step of the script's event.
const AT: usize = 12;

/// One run: the times of its commits, and its events with the cost of a change.
struct Run {
    commits: Vec<Instant>,
    costs: Vec<serde_json::Value>,
}

fn main() {
    let folder = tempfile::tempdir().expect("a folder");
    let kinds = [
        ("kill", "node = \"node-2\""),
        ("join", ""),
        ("drain", "node = \"node-2\""),
        ("kill-supervisor", ""),
    ];
    run(folder.path(), "warm", "");
    for (kind, rest) in kinds {
        let script = format!("[[event]]\nat_step = {AT}\ndo = \"{kind}\"\n{rest}\n");
        for round in 0..ROUNDS {
            let run = run(folder.path(), &format!("{kind}-{round}"), &script);
            print(kind, &run);
        }
    }
}

fn print(kind: &str, run: &Run) {
    let gaps: Vec<f64> = run.commits.windows(2).map(|pair| (pair[1] - pair[0]).as_secs_f64()).collect();
    let mut undisturbed = gaps[3..AT - 1].to_vec();
    undisturbed.sort_by(f64::total_cmp);
    let step = undisturbed[undisturbed.len() / 2];
    let longest = gaps[AT - 1..].iter().copied().fold(0.0, f64::max);
    println!(
        "{kind}: longest time between two commits {longest:.2} s, {:.2} times an undisturbed step ({step:.2} s)",
        longest / step
    );
    for cost in &run.costs {
        let parts: Vec<String> = cost
            .as_object()
            .expect("an object")
            .iter()
            .filter(|(key, _)| key.ends_with("_ms") && *key != "unix_ms" || *key == "steps_lost")
            .map(|(key, value)| format!("{key} {:.0}", value.as_f64().unwrap_or_default()))
            .collect();
        println!("    {}: {}", cost["event"].as_str().unwrap_or_default(), parts.join(", "));
    }
}

fn run(folder: &Path, name: &str, script: &str) -> Run {
    let config = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/quickstart.toml");
    let (dir, events) = (folder.join(name), folder.join(format!("{name}.toml")));
    let steps = format!("training.steps={STEPS}");
    let mut command = Command::new(env!("CARGO_BIN_EXE_volary"));
    command.arg("train").arg(config).args(["--nodes", "3", "--threads", "1", "--quiet", "--dir"]).arg(&dir);
    command.args(["--set", &steps, "--set", "validation.rounds=0"]);
    if !script.is_empty() {
        std::fs::write(&events, script).expect("a file");
        command.arg("--events").arg(&events);
    }
    let mut train = command.stdin(Stdio::null()).stderr(Stdio::null()).spawn().expect("the binary");
    let mut commits = Vec::new();
    let status = loop {
        let lines = std::fs::read_to_string(dir.join("metrics.jsonl")).map_or(0, |text| text.lines().count());
        commits.resize(lines.max(commits.len()), Instant::now());
        if let Some(status) = train.try_wait().expect("a status") {
            break status;
        }
        std::thread::sleep(Duration::from_millis(2));
    };
    assert!(status.success() && commits.len() == STEPS, "{name}: {status}, {} steps", commits.len());
    let text = std::fs::read_to_string(dir.join("events.jsonl")).expect("events");
    let events = text.lines().map(|line| serde_json::from_str(line).expect("JSON"));
    let is_cost = |event: &serde_json::Value| event["event"] == "recovered" || event["event"] == "resized";
    Run { commits, costs: events.filter(is_cost).collect() }
}
