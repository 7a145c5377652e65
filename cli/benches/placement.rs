//! The planner against reality: the quickstart model on processes that get one, half or a quarter of a CPU, and over links that
//! are held to a rate, with the step that was predicted beside the one that was measured; then the same nodes with lanes and
//! experts shared evenly. `cargo bench -p volary-cli --bench placement`, as root, on Linux with the cpu cgroup and tc.
#![expect(clippy::expect_used, reason = "a benchmark")]

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const STEPS: usize = 34;
/// Steps after which the others are measured.
const WARM: usize = 22;
const NAMESPACE: &str = "volary-bench";
/// The two ends of the slow link.
const ENDS: [&str; 2] = ["10.213.7.1", "10.213.7.2"];

/// A process that is killed when this is dropped.
struct Guard(Child);

impl Drop for Guard {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A share of one CPU, as a control group of version 1 or 2.
struct Share(PathBuf);

impl Share {
    fn new(name: &str, share: f64) -> Option<Self> {
        let old = Path::new("/sys/fs/cgroup/cpu");
        let folder = if old.exists() { old } else { Path::new("/sys/fs/cgroup") }.join(name);
        std::fs::create_dir_all(&folder).ok()?;
        // A short period: a step of a quarter of a second must not see its edges.
        let (period, quota) = (10_000, (share * 10_000.0) as u64);
        let set = if old.exists() {
            std::fs::write(folder.join("cpu.cfs_period_us"), period.to_string())
                .and_then(|()| std::fs::write(folder.join("cpu.cfs_quota_us"), quota.to_string()))
        } else {
            std::fs::write(folder.join("cpu.max"), format!("{quota} {period}"))
        };
        set.ok().map(|()| Self(folder))
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir(&self.0);
    }
}

fn tc(words: &str) -> bool {
    let mut words = words.split_whitespace();
    let status = Command::new(words.next().expect("a program")).args(words).stderr(Stdio::null()).status();
    status.is_ok_and(|status| status.success())
}

/// A network namespace at the other end of a link that carries so many megabits per second each way.
struct SlowLink;

impl SlowLink {
    fn new(megabits: u32) -> Option<Self> {
        // What a run that was killed left behind.
        drop(Self);
        let limit = format!("root tbf rate {megabits}mbit burst 64kb latency 100ms");
        let made = tc(&format!("ip netns add {NAMESPACE}"))
            && tc(&format!("ip link add vol0 type veth peer name vol1 netns {NAMESPACE}"))
            && tc(&format!("ip addr add {}/24 dev vol0", ENDS[0]))
            && tc("ip link set vol0 up")
            && tc(&format!("ip -n {NAMESPACE} addr add {}/24 dev vol1", ENDS[1]))
            && tc(&format!("ip -n {NAMESPACE} link set vol1 up"))
            && tc(&format!("ip -n {NAMESPACE} link set lo up"))
            && tc(&format!("tc qdisc add dev vol0 {limit}"))
            && tc(&format!("tc -n {NAMESPACE} qdisc add dev vol1 {limit}"));
        made.then_some(Self)
    }
}

impl Drop for SlowLink {
    fn drop(&mut self) {
        tc("ip link del vol0");
        tc(&format!("ip netns del {NAMESPACE}"));
    }
}

struct Outcome {
    predicted_ms: f64,
    measured_ms: f64,
    lanes: String,
}

fn main() {
    let folder = tempfile::tempdir().expect("a folder");
    // `PLACEMENT=2,n100`: only these.
    let only = std::env::var("PLACEMENT").unwrap_or_default();
    let wanted = |case: &str| only.is_empty() || only.split(',').any(|one| one == case);
    println!("{:<34}{:>12}{:>12}{:>8}   lanes of the nodes", "nodes", "predicted", "measured", "ratio");
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
            "{:<34}{:>24.0}{:>8}   {}",
            "the same, shared evenly", outcome.measured_ms, "", outcome.lanes
        );
        println!("planned against even: {:.2} times the throughput", outcome.measured_ms / planned);
    }
    for megabits in [400, 100, 40] {
        if !wanted(&format!("n{megabits}")) {
            continue;
        }
        let name = format!("two CPUs, a link of {megabits} Mbit/s");
        match run(folder.path(), &format!("n{megabits}"), &[1.0, 1.0], Some(megabits), &[]) {
            Some(outcome) => print(&name, &outcome),
            None => println!("{name}: this machine makes no slow links"),
        }
    }
}

fn print(name: &str, Outcome { predicted_ms, measured_ms, lanes }: &Outcome) {
    let ratio = predicted_ms / measured_ms;
    println!("{name:<34}{predicted_ms:>9.0} ms{measured_ms:>9.0} ms{ratio:>8.2}   {lanes}");
}

/// One run; the last node is at the other end of the slow link, if there is one.
fn run(folder: &Path, name: &str, shares: &[f64], megabits: Option<u32>, set: &[&str]) -> Option<Outcome> {
    let link = match megabits {
        Some(megabits) => Some(SlowLink::new(megabits)?),
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
    let quiet = |command: &mut Command| {
        let log = std::fs::File::create(folder.join("log")).expect("a log");
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
        let way = if there { format!("ip netns exec {NAMESPACE} ") } else { String::new() };
        let join = format!(
            "echo $$ > {}/cgroup.procs && exec {way}{binary} node --join {address} --no-http --device cpu --threads 1 --name node-{} --token-file {}",
            group.0.display(),
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
