//! Predicted and measured steps of the quickstart model on nodes with one, half and a quarter of a CPU, and
//! over slow links; and the same nodes with even shares of lanes and experts.
//! `cargo bench -p volary-cli --bench placement`, as root, on Linux with the cpu cgroup and /dev/net/tun.
#![expect(clippy::expect_used, reason = "a benchmark")]

mod link;
mod share;

use link::{ENDS, Shape, SlowLink};
use share::Share;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const BINARY: &str = env!("CARGO_BIN_EXE_volary");
const STEPS: usize = 34;
/// Steps that are not measured: the planner is still learning the nodes' speeds.
const WARM: usize = 22;
/// The slow links: megabits per second, and delay in milliseconds, each way.
const LINKS: [(f64, f64); 6] =
    [(400.0, 0.0), (100.0, 0.0), (40.0, 0.0), (400.0, 5.0), (400.0, 20.0), (100.0, 10.0)];

/// A process; dropping it kills the process.
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
    // `PLACEMENT_KEEP=1` keeps the folders of the runs, with their traces.
    if std::env::var_os("PLACEMENT_KEEP").is_some() {
        folder.disable_cleanup(true);
        println!("runs are kept in {}", folder.path().display());
    }
    println!("{:<40}{:>12}{:>12}{:>8}   lanes of the nodes", "nodes", "predicted", "measured", "ratio");
    unequal_cpus(folder.path());
    slow_links(folder.path());
}

/// Whether a case is selected: `PLACEMENT=2,even,l1` runs only these.
fn is_selected(case: &str) -> bool {
    let only = std::env::var("PLACEMENT").unwrap_or_default();
    only.is_empty() || only.split(',').any(|one| one == case)
}

/// Nodes with one, half and a quarter of a CPU, planned and with even shares.
fn unequal_cpus(folder: &Path) {
    let shares: [(&str, &[f64]); 4] = [
        ("one CPU", &[1.0]),
        ("one CPU, half", &[1.0, 0.5]),
        ("one CPU, a quarter", &[1.0, 0.25]),
        ("one CPU, half, a quarter", &[1.0, 0.5, 0.25]),
    ];
    let mut planned = 0.0;
    for (number, (name, shares)) in shares.into_iter().enumerate() {
        if is_selected(&number.to_string())
            && let Some(outcome) = run(folder, &format!("s{number}"), shares, None, &[])
        {
            print(name, &outcome);
            planned = outcome.measured_ms;
        }
    }
    let even = ["cluster.measure=false", "cluster.rebalance=false"];
    if is_selected("even")
        && let Some(outcome) = run(folder, "even", &[1.0, 0.5, 0.25], None, &even)
    {
        println!(
            "{:<40}{:>24.0}{:>8}   {}",
            "the same with even shares", outcome.measured_ms, "", outcome.lanes
        );
        println!("planned instead of even: {:.2} times the throughput", outcome.measured_ms / planned);
    }
}

/// Two nodes over slow links.
fn slow_links(folder: &Path) {
    for (number, (megabits, delay_ms)) in LINKS.into_iter().enumerate() {
        let case = format!("l{number}");
        if !is_selected(&case) {
            continue;
        }
        let name = format!("two CPUs, {megabits} Mbit/s, {delay_ms} ms each way");
        match run(folder, &case, &[1.0, 1.0], Some(Shape { megabits, delay_ms }), &[]) {
            Some(outcome) => print(&name, &outcome),
            None => println!("{name}: cannot create slow links on this machine"),
        }
    }
    // With one replica of each expert, nothing has to cross a slow link: one node does all the work.
    let shape = Shape { megabits: 40.0, delay_ms: 0.0 };
    let once = ["cluster.replication=1"];
    if is_selected("once")
        && let Some(outcome) = run(folder, "once", &[1.0, 1.0], Some(shape), &once)
    {
        print("two CPUs, 40 Mbit/s, one replica", &outcome);
    }
}

fn print(name: &str, Outcome { predicted_ms, measured_ms, lanes }: &Outcome) {
    let ratio = predicted_ms / measured_ms;
    println!("{name:<40}{predicted_ms:>9.0} ms{measured_ms:>9.0} ms{ratio:>8.2}   {lanes}");
}

/// One run. With a shape, the last node is at the other end of a slow link. `None` if this machine cannot
/// create the link or the control groups.
fn run(folder: &Path, name: &str, shares: &[f64], shape: Option<Shape>, set: &[&str]) -> Option<Outcome> {
    let link = match shape {
        Some(shape) => Some(SlowLink::new(shape)?),
        None => None,
    };
    let ip = if link.is_some() { ENDS[0] } else { "127.0.0.1" };
    let port = TcpListener::bind((ip, 0)).and_then(|l| l.local_addr()).expect("a port").port();
    let (dir, address) = (folder.join(name), format!("{ip}:{port}"));
    let mut supervisor = start_supervisor(folder, &dir, &address, shares.len(), set);
    let token = dir.join("identity/node.token");
    until("an access token", || token.exists());
    let mut nodes = Vec::new();
    for (number, &share) in shares.iter().enumerate() {
        let group = Share::new(&format!("volary-bench-{number}"), share)?;
        let is_remote = link.is_some() && number + 1 == shares.len();
        let prefix = if is_remote { SlowLink::prefix() } else { String::new() };
        let join = format!(
            "echo $$ > {} && exec {prefix}{BINARY} node --join {address} --no-http --device cpu --threads 1 --name node-{} --token-file {}",
            group.processes().display(),
            number + 1,
            token.display()
        );
        nodes.push((start(folder, Command::new("sh").args(["-c", &join])), group));
    }
    let (commits, predicted_ms) = follow(&mut supervisor, &dir);
    // A control group can only be removed when it is empty.
    for (mut node, group) in nodes {
        let _ = node.0.wait();
        drop(group);
    }
    let mut gaps: Vec<f64> =
        commits[WARM..].windows(2).map(|pair| (pair[1] - pair[0]).as_secs_f64() * 1e3).collect();
    gaps.sort_by(f64::total_cmp);
    Some(Outcome { predicted_ms, measured_ms: gaps[gaps.len() / 2], lanes: lanes(&dir) })
}

/// Starts a process that logs into the folder.
fn start(folder: &Path, command: &mut Command) -> Guard {
    let log = std::fs::OpenOptions::new().append(true).create(true).open(folder.join("log"));
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log.expect("a log"));
    Guard(command.spawn().expect("the binary"))
}

fn start_supervisor(folder: &Path, dir: &Path, address: &str, nodes: usize, set: &[&str]) -> Guard {
    let config = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/quickstart.toml");
    let mut supervisor = Command::new(BINARY);
    supervisor.arg("supervisor").arg(config).args(["--listen", address, "--no-http", "--dir"]).arg(dir);
    let steps = format!("training.steps={STEPS}");
    let nodes = format!("cluster.nodes={nodes}");
    let fixed = ["training.lanes=14", "validation.rounds=0", "checkpoint.every=0", &steps, &nodes];
    for set in fixed.iter().chain(set) {
        supervisor.args(["--set", set]);
    }
    // `PLACEMENT_SET=telemetry.sample_every=8`: one more setting.
    if let Ok(set) = std::env::var("PLACEMENT_SET") {
        supervisor.args(["--set", &set]);
    }
    start(folder, &mut supervisor)
}

/// Waits for the end of a run. Returns the times of its commits, and the predicted duration of a step in
/// milliseconds.
fn follow(supervisor: &mut Guard, dir: &Path) -> (Vec<Instant>, f64) {
    let (metrics, mut commits) = (dir.join("metrics.jsonl"), Vec::new());
    let mut predicted_ms = 0.0;
    let status = loop {
        if commits.len() == STEPS - 2 && predicted_ms == 0.0 {
            predicted_ms = predicted_step_ms(dir);
        }
        let lines = std::fs::read_to_string(&metrics).map_or(0, |text| text.lines().count());
        commits.resize(lines.max(commits.len()), Instant::now());
        if let Some(status) = supervisor.0.try_wait().expect("a status") {
            break status;
        }
        std::thread::sleep(Duration::from_millis(1));
    };
    assert!(
        status.success() && commits.len() == STEPS,
        "{}: {status}, {} steps",
        dir.display(),
        commits.len()
    );
    (commits, predicted_ms)
}

/// The lanes of each node in the last placement of a run.
fn lanes(dir: &Path) -> String {
    let text = std::fs::read_to_string(dir.join("events.jsonl")).expect("events");
    let mut events = text.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).expect("JSON"));
    let placed = events.rfind(|event| event["event"] == "placed").expect("a placement");
    let lanes = placed["lanes"].as_array().into_iter().flatten();
    lanes.map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

/// The supervisor's prediction of a step, from its measurements of the nodes.
fn predicted_step_ms(dir: &Path) -> f64 {
    let output = Command::new(BINARY).args(["status", "--json", "--dir"]).arg(dir).output();
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
