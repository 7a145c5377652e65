//! The planner against reality: the quickstart model on processes that get one, half or a quarter of a CPU, and over slow links,
//! with the step that was predicted beside the one that was measured; then the same nodes with lanes and experts shared
//! evenly. `cargo bench -p volary-cli --bench placement`, as root, on Linux with the cpu cgroup and /dev/net/tun.
#![expect(clippy::expect_used, reason = "a benchmark")]

mod link;
mod share;

use link::{ENDS, Shape, SlowLink};
use share::Share;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const STEPS: usize = 34;
/// Steps after which the others are measured.
const WARM: usize = 22;
/// The slow links: megabits per second, and milliseconds of the way.
const LINKS: [(f64, f64); 6] =
    [(400.0, 0.0), (100.0, 0.0), (40.0, 0.0), (400.0, 5.0), (400.0, 20.0), (100.0, 10.0)];

/// A process that is killed when this is dropped.
struct Guard(Child);

impl Drop for Guard {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

struct Outcome {
    predicted_ms: f64,
    measured_ms: f64,
    lanes: String,
}

fn main() {
    let mut folder = tempfile::tempdir().expect("a folder");
    // The runs' own folders, traces and all, stay with `PLACEMENT_KEEP=1`.
    if std::env::var_os("PLACEMENT_KEEP").is_some() {
        folder.disable_cleanup(true);
        println!("runs are kept in {}", folder.path().display());
    }
    // `PLACEMENT=2,even,l1`: only these.
    let only = std::env::var("PLACEMENT").unwrap_or_default();
    let wanted = |case: &str| only.is_empty() || only.split(',').any(|one| one == case);
    println!("{:<40}{:>12}{:>12}{:>8}   lanes of the nodes", "nodes", "predicted", "measured", "ratio");
    let shares: [(&str, &[f64]); 4] = [
        ("one CPU", &[1.0]),
        ("one CPU, half", &[1.0, 0.5]),
        ("one CPU, a quarter", &[1.0, 0.25]),
        ("one CPU, half, a quarter", &[1.0, 0.5, 0.25]),
    ];
    let mut planned = 0.0;
    for (number, (name, shares)) in shares.into_iter().enumerate() {
        if !wanted(&number.to_string()) {
            continue;
        }
        if let Some(outcome) = run(folder.path(), &format!("s{number}"), shares, None, &[]) {
            print(name, &outcome);
            planned = outcome.measured_ms;
        }
    }
    let even = ["cluster.measure=false", "cluster.rebalance=false"];
    if wanted("even")
        && let Some(outcome) = run(folder.path(), "even", &[1.0, 0.5, 0.25], None, &even)
    {
        println!(
            "{:<40}{:>24.0}{:>8}   {}",
            "the same, shared evenly", outcome.measured_ms, "", outcome.lanes
        );
        println!("planned against even: {:.2} times the throughput", outcome.measured_ms / planned);
    }
    for (number, (megabits, delay_ms)) in LINKS.into_iter().enumerate() {
        let case = format!("l{number}");
        if !wanted(&case) {
            continue;
        }
        let name = format!("two CPUs, {megabits} Mbit/s, {delay_ms} ms each way");
        let shape = Shape { megabits, delay_ms };
        match run(folder.path(), &case, &[1.0, 1.0], Some(shape), &[]) {
            Some(outcome) => print(&name, &outcome),
            None => println!("{name}: this machine makes no slow links"),
        }
    }
    // With one copy of each expert nothing need cross a link that is slow: one node does it all.
    let shape = Shape { megabits: 40.0, delay_ms: 0.0 };
    let once = ["cluster.replication=1"];
    if wanted("once")
        && let Some(outcome) = run(folder.path(), "once", &[1.0, 1.0], Some(shape), &once)
    {
        print("two CPUs, 40 Mbit/s, one copy", &outcome);
    }
}

fn print(name: &str, Outcome { predicted_ms, measured_ms, lanes }: &Outcome) {
    let ratio = predicted_ms / measured_ms;
    println!("{name:<40}{predicted_ms:>9.0} ms{measured_ms:>9.0} ms{ratio:>8.2}   {lanes}");
}

/// One run; the last node is at the other end of the slow link, if there is one.
fn run(folder: &Path, name: &str, shares: &[f64], shape: Option<Shape>, set: &[&str]) -> Option<Outcome> {
    let link = match shape {
        Some(shape) => Some(SlowLink::new(shape)?),
        None => None,
    };
    let ip = if link.is_some() { ENDS[0] } else { "127.0.0.1" };
    let port = TcpListener::bind((ip, 0)).and_then(|l| l.local_addr()).expect("a port").port();
    let (dir, binary) = (folder.join(name), env!("CARGO_BIN_EXE_volary"));
    let config = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/quickstart.toml");
    let address = format!("{ip}:{port}");
    let mut supervisor = Command::new(binary);
    supervisor.arg("supervisor").arg(config).args(["--listen", &address, "--no-http", "--dir"]).arg(&dir);
    let steps = format!("training.steps={STEPS}");
    let nodes = format!("cluster.nodes={}", shares.len());
    let fixed = ["training.lanes=14", "validation.rounds=0", "checkpoint.every=0", &steps, &nodes];
    for set in fixed.iter().chain(set) {
        supervisor.args(["--set", set]);
    }
    // `PLACEMENT_SET=telemetry.sample_every=8`: one more setting.
    if let Ok(set) = std::env::var("PLACEMENT_SET") {
        supervisor.args(["--set", &set]);
    }
    let quiet = |command: &mut Command| {
        let log = std::fs::OpenOptions::new().append(true).create(true).open(folder.join("log"));
        let log = log.expect("a log");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        Guard(command.spawn().expect("the binary"))
    };
    let mut supervisor = quiet(&mut supervisor);
    let token = dir.join("identity/node.token");
    until("a token", || token.exists());
    let mut held = Vec::new();
    for (number, &share) in shares.iter().enumerate() {
        let group = Share::new(&format!("volary-bench-{number}"), share)?;
        let there = link.is_some() && number + 1 == shares.len();
        let way = if there { SlowLink::there() } else { String::new() };
        let join = format!(
            "echo $$ > {} && exec {way}{binary} node --join {address} --no-http --device cpu --threads 1 --name node-{} --token-file {}",
            group.door().display(),
            number + 1,
            token.display()
        );
        held.push((quiet(Command::new("sh").args(["-c", &join])), group));
    }
    let (metrics, mut commits) = (dir.join("metrics.jsonl"), Vec::new());
    let mut predicted_ms = 0.0;
    let status = loop {
        if commits.len() == STEPS - 2 && predicted_ms == 0.0 {
            predicted_ms = status(&dir);
        }
        let lines = std::fs::read_to_string(&metrics).map_or(0, |text| text.lines().count());
        commits.resize(lines.max(commits.len()), Instant::now());
        if let Some(status) = supervisor.0.try_wait().expect("a status") {
            break status;
        }
        std::thread::sleep(Duration::from_millis(1));
    };
    assert!(status.success() && commits.len() == STEPS, "{name}: {status}, {} steps", commits.len());
    // A control group goes only when nobody is in it any more.
    for (mut node, group) in held {
        let _ = node.0.wait();
        drop(group);
    }
    let mut gaps: Vec<f64> =
        commits[WARM..].windows(2).map(|pair| (pair[1] - pair[0]).as_secs_f64() * 1e3).collect();
    gaps.sort_by(f64::total_cmp);
    let text = std::fs::read_to_string(dir.join("events.jsonl")).expect("events");
    let mut events = text.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).expect("JSON"));
    let placed = events.rfind(|event| event["event"] == "placed").expect("a placement");
    let lanes = placed["lanes"]
        .as_array()
        .map(|lanes| lanes.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "));
    Some(Outcome { predicted_ms, measured_ms: gaps[gaps.len() / 2], lanes: lanes.unwrap_or_default() })
}

/// What the supervisor thinks that a step takes, by what it has seen of the nodes.
fn status(dir: &Path) -> f64 {
    let output =
        Command::new(env!("CARGO_BIN_EXE_volary")).args(["status", "--json", "--dir"]).arg(dir).output();
    let status: serde_json::Value =
        serde_json::from_slice(&output.expect("the binary").stdout).expect("JSON");
    status["predicted_step_ms"].as_f64().expect("a number")
}

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(300), "{what}: not within five minutes");
        std::thread::sleep(Duration::from_millis(10));
    }
}
