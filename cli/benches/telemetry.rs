//! The cost of tracing on the quickstart with three nodes, without traces, with the default and with every
//! step traced, all exported to a receiver on this machine: `cargo bench -p volary-cli --bench telemetry`.
#![expect(clippy::expect_used, reason = "a benchmark")]

#[path = "../tests/common/mod.rs"]
mod common;

use common::collector::Collector;
use std::path::Path;
use std::process::{Command, Stdio};

const ROUNDS: usize = 3;
const STEPS: usize = 60;
/// The first steps, which fetch shards and warm up caches.
const SKIPPED: usize = 5;
const ARMS: [u64; 3] = [0, 50, 1];

fn main() {
    let folder = tempfile::tempdir().expect("a folder");
    let collector = Collector::grpc();
    let mut steps: [Vec<f64>; ARMS.len()] = Default::default();
    run(folder.path(), "warm", 0, &collector);
    for round in 0..ROUNDS {
        for (arm, every) in ARMS.into_iter().enumerate() {
            let seconds = run(folder.path(), &format!("{every}-{round}"), every, &collector);
            println!("round {round}, sample_every = {every}: {:.3} s per step", median(seconds.clone()));
            steps[arm].extend(seconds);
        }
    }
    let all =
        steps.map(|seconds| (median(seconds.clone()), seconds.iter().sum::<f64>() / seconds.len() as f64));
    for (every, (median, mean)) in ARMS.into_iter().zip(all) {
        let (more_median, more_mean) = (100.0 * (median / all[0].0 - 1.0), 100.0 * (mean / all[0].1 - 1.0));
        println!(
            "sample_every = {every}: median {median:.3} s ({more_median:+.1} %), mean {mean:.3} s ({more_mean:+.1} %)"
        );
    }
    println!("{} spans received", collector.spans().len());
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn run(folder: &Path, name: &str, every: u64, collector: &Collector) -> Vec<f64> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace");
    let dir = folder.join(name);
    let cache = format!("data.cache=\"{}\"", folder.join("cache").display());
    let status = Command::new(env!("CARGO_BIN_EXE_volary"))
        .current_dir(root)
        .args(["train", "examples/quickstart.toml", "--nodes", "3", "--threads", "1", "--quiet", "--dir"])
        .arg(&dir)
        .args(["--set", &cache, "--set", &format!("training.steps={STEPS}"), "--set", "validation.rounds=0"])
        .args(["--set", &format!("telemetry.sample_every={every}"), "--set", "checkpoint.every=0"])
        .env("OTEL_EXPORTER_OTLP_ENDPOINT", &collector.endpoint)
        .stdout(Stdio::null())
        .status()
        .expect("the binary");
    assert!(status.success());
    let text = std::fs::read_to_string(dir.join("metrics.jsonl")).expect("metrics");
    let seconds = text
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok()?["seconds"].as_f64());
    seconds.skip(SKIPPED).collect()
}
