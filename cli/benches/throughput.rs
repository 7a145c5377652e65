//! Training throughput, memory and start time of the quickstart model. Rounds are interleaved, so that other
//! load on the machine affects all arms. `cargo bench -p volary-cli --bench throughput`.
#![expect(clippy::expect_used, reason = "a benchmark")]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use volary_cli::config::Config;
use volary_core::{Lane, Step};
use volary_data::Dataset;
use volary_model::device::{self, Device};
use volary_model::reference::Reference;

const ROUNDS: usize = 3;
const STEPS: u64 = 16;
/// Steps that are not counted, with cold caches.
const WARM: usize = 3;

fn main() {
    let config_path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/quickstart.toml");
    let folder = tempfile::tempdir().expect("a folder");
    let config = Config::load(&config_path, &[]).expect("the quickstart");
    let tokens = config.training.tokens_per_step() as f64;
    println!("preparing data, then {ROUNDS} rounds of {STEPS} steps of {tokens} tokens");
    run(&config_path, folder.path(), "warm", &["--nodes", "1", "--threads", "2"]);
    let data = folder.path().join("warm/data");
    let arms: [(&str, &[&str]); 4] = [
        ("--nodes 1 --threads 2", &["--nodes", "1", "--threads", "2"]),
        ("--nodes 2 --threads 1", &["--nodes", "2", "--threads", "1", "--set", "cluster.replication=1"]),
        ("--nodes 2 --threads 1, replication 2", &["--nodes", "2", "--threads", "1"]),
        ("--nodes 3 --threads 1, replication 2", &["--nodes", "3", "--threads", "1"]),
    ];
    let mut speeds: Vec<Vec<f64>> = vec![Vec::new(); arms.len()];
    let (mut by_lane, mut whole) = (Vec::new(), Vec::new());
    let (mut starts, mut memory) = (Vec::new(), (0, 0));
    for round in 0..ROUNDS {
        by_lane.push(tokens / reference_seconds(&config, &data, false));
        whole.push(tokens / reference_seconds(&config, &data, true));
        for (index, (name, args)) in arms.iter().enumerate() {
            let outcome = run(&config_path, folder.path(), &format!("r{round}-{index}"), args);
            println!("round {round}: {name}: {:.0} tokens/s", tokens / outcome.step_seconds);
            speeds[index].push(tokens / outcome.step_seconds);
            starts.push(outcome.start_seconds);
            memory = (memory.0.max(outcome.node_kib), memory.1.max(outcome.supervisor_kib));
        }
    }
    let (by_lane, whole) = (median(by_lane), median(whole));
    println!("plain loop, 2 threads: {by_lane:.0} tokens/s lane by lane, {whole:.0} tokens/s as one batch");
    let speeds: Vec<f64> = speeds.into_iter().map(median).collect();
    for ((name, _), speed) in arms.iter().zip(&speeds) {
        println!(
            "{name}: {speed:.0} tokens/s, {:.2} of the faster plain loop, {:.2} of --nodes 1 --threads 2",
            speed / by_lane.max(whole),
            speed / speeds[0]
        );
    }
    println!(
        "replication 2 instead of 1 on 2 nodes: steps {:.1} % longer",
        (speeds[1] / speeds[2] - 1.0) * 100.0
    );
    println!("start to first committed step on prepared data: {:.2} s (median)", median(starts));
    println!("peak memory: largest node {} MB, supervisor {} MB", memory.0 / 1000, memory.1 / 1000);
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Seconds of one step of the plain loop over the reference model on two libtorch threads.
fn reference_seconds(config: &Config, data: &Path, whole: bool) -> f64 {
    let t = &config.training;
    let dataset = Dataset::open(data, t.sequence_length, t.sequences_per_lane, t.lanes, config.run.seed)
        .expect("the data");
    device::set_threads(2);
    let mut model = Reference::initial(&config.model, t, config.run.seed, Device::Cpu).expect("a model");
    let mut seconds = Vec::new();
    for step in 1..=6 {
        let mut lanes: Vec<Vec<u32>> =
            Lane::first(t.lanes).map(|lane| dataset.lane(Step(step), lane).expect("tokens")).collect();
        if whole {
            lanes = vec![lanes.concat()];
        }
        let start = Instant::now();
        model.step(&lanes, volary_core::Step(step)).expect("a step");
        seconds.push(start.elapsed().as_secs_f64());
    }
    median(seconds.split_off(2))
}

struct Outcome {
    step_seconds: f64,
    start_seconds: f64,
    node_kib: u64,
    supervisor_kib: u64,
}

/// One short run of the real binary.
fn run(config: &Path, folder: &Path, name: &str, args: &[&str]) -> Outcome {
    let dir = folder.join(name);
    let steps = format!("training.steps={STEPS}");
    let start = Instant::now();
    let mut command = Command::new(env!("CARGO_BIN_EXE_volary"));
    command.arg("train").arg(config).arg("--dir").arg(&dir).args(["--quiet", "--set", &steps]);
    command.args(["--set", "validation.rounds=0", "--set", "checkpoint.every=0"]).args(args);
    let mut child = command.stdin(Stdio::null()).spawn().expect("the binary");
    let metrics = dir.join("metrics.jsonl");
    while lines(&metrics).is_empty() && child.try_wait().expect("a status").is_none() {
        std::thread::sleep(Duration::from_millis(5));
    }
    let start_seconds = start.elapsed().as_secs_f64();
    let (mut node_kib, mut supervisor_kib) = (0, 0);
    while child.try_wait().expect("a status").is_none() {
        let (node, supervisor) = peak_memory(&child);
        (node_kib, supervisor_kib) = (node_kib.max(node), supervisor_kib.max(supervisor));
        std::thread::sleep(Duration::from_millis(50));
    }
    let seconds: Vec<f64> =
        lines(&metrics).iter().map(|line| line["seconds"].as_f64().expect("seconds")).collect();
    assert_eq!(seconds.len(), STEPS as usize, "the run was cut short");
    Outcome { step_seconds: median(seconds[WARM..].to_vec()), start_seconds, node_kib, supervisor_kib }
}

fn lines(path: &Path) -> Vec<serde_json::Value> {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

/// Peak resident memory of the largest node and of the supervisor among a run's children, in KiB.
fn peak_memory(parent: &Child) -> (u64, u64) {
    let (mut node, mut supervisor) = (0, 0);
    let pid = parent.id();
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    for child in children.split_whitespace() {
        let path = PathBuf::from("/proc").join(child);
        let command = std::fs::read_to_string(path.join("cmdline")).unwrap_or_default();
        let status = std::fs::read_to_string(path.join("status")).unwrap_or_default();
        let peak = status
            .lines()
            .find_map(|line| line.strip_prefix("VmHWM:")?.split_whitespace().next()?.parse().ok());
        let peak: u64 = peak.unwrap_or(0);
        if command.split('\0').any(|arg| arg == "supervisor") {
            supervisor = supervisor.max(peak);
        } else {
            node = node.max(peak);
        }
    }
    (node, supervisor)
}
