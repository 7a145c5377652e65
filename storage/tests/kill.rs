//! A crash at any point loses no acknowledged write and leaves the run consistent.
//!
//! The test executes itself as a child, which commits steps and writes checkpoints on a disk that aborts the
//! process at a random operation, possibly in the middle of a write, or at a random time inside sled.

#![allow(clippy::unwrap_used, reason = "a failure here is the test's failure")]

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;
use std::process::{Command, abort};
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use volary_core::{Epoch, ExpertId, LayerId, ShardId, Step, Timeline};
use volary_storage::{
    BlobStore, CheckpointReader, Checkpoints, Digest, Disk, JsonLines, RealDisk, RunDir, Store,
};

const DIR: &str = "VOLARY_KILL_DIR";
const SEED: &str = "VOLARY_KILL_SEED";
const CRASHES: u64 = 20;
const EVERY: u64 = 3;

/// Aborts at its `crash_at`-th operation.
struct CrashingDisk {
    done: AtomicU64,
    crash_at: u64,
}

impl CrashingDisk {
    fn is_crash(&self) -> bool {
        self.done.fetch_add(1, Ordering::SeqCst) + 1 == self.crash_at
    }

    fn maybe_crash(&self) {
        if self.is_crash() {
            abort();
        }
    }
}

impl Disk for CrashingDisk {
    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        RealDisk.read(path)
    }

    fn sync_file(&self, path: &Path) -> io::Result<()> {
        self.maybe_crash();
        RealDisk.sync_file(path)
    }

    fn write(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        if self.is_crash() {
            File::create(path)?.write_all(&bytes[..bytes.len() / 3])?;
            abort();
        }
        RealDisk.write(path, bytes)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.maybe_crash();
        RealDisk.rename(from, to)
    }

    fn sync_folder(&self, path: &Path) -> io::Result<()> {
        self.maybe_crash();
        RealDisk.sync_folder(path)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.maybe_crash();
        RealDisk.remove(path)
    }
}

fn value(step: Step) -> (Step, String) {
    (step, format!("commit of step {step}"))
}

fn shards() -> Vec<ShardId> {
    (0..6)
        .map(|expert| ShardId::Expert { layer: LayerId(1), expert: ExpertId(expert) })
        .chain([ShardId::Embedding])
        .collect()
}

fn bytes_of(shard: ShardId, step: Step) -> Vec<u8> {
    format!("{shard} at {step}").repeat(2000).into_bytes()
}

/// A small generator (SplitMix64), so that a failed seed can be repeated.
fn mix(seed: u64) -> u64 {
    let mut x = seed.wrapping_add(0x9E37_79B9_7F4A_7C15);
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

/// The child: it works until it crashes, and writes down each acknowledged operation.
#[test]
fn child() {
    let (Ok(dir), Ok(seed)) = (std::env::var(DIR), std::env::var(SEED)) else { return };
    let random = mix(seed.parse().unwrap());
    let by_operation = random.is_multiple_of(2);
    let crash_at = if by_operation { random / 2 % 120 + 1 } else { u64::MAX };
    if !by_operation {
        thread::spawn(move || {
            thread::sleep(Duration::from_micros(random / 2 % 150_000));
            abort();
        });
    }
    work(&RunDir::open(&dir).unwrap(), CrashingDisk { done: AtomicU64::new(0), crash_at });
}

fn work(dir: &RunDir, disk: CrashingDisk) {
    let mut acknowledged = File::options().append(true).open(dir.root().join("acknowledged")).unwrap();
    let store = Store::open(dir).unwrap();
    let blobs = BlobStore::open_on(dir.blobs(), disk).unwrap();
    let checkpoints = Checkpoints::open(dir, store.clone(), blobs).unwrap();
    let mut lines = JsonLines::open(dir.metrics()).unwrap();
    let start = store.last_committed().unwrap().unwrap_or_default().next();
    for step in start.through(start + 10_000) {
        store.commit(step, &value(step)).unwrap();
        writeln!(acknowledged, "commit {step}").unwrap();
        lines.append(&serde_json::json!({"step": step, "loss": 1.0})).unwrap();
        if step.is_multiple_of(EVERY) {
            checkpoint(&checkpoints, step);
            writeln!(acknowledged, "checkpoint {step}").unwrap();
            checkpoints.retain(2, &[]).unwrap();
        }
    }
}

fn checkpoint<D: Disk>(checkpoints: &Checkpoints<D>, step: Step) {
    let pending = checkpoints.begin((step, Timeline(0), Epoch(1)), Digest::of(b"config"), shards());
    for shard in shards() {
        pending.add(shard, &bytes_of(shard, step)).unwrap();
    }
    pending.complete().unwrap();
}

/// The last acknowledged step of a kind.
fn last(acknowledged: &str, kind: &str) -> Step {
    let steps =
        acknowledged.lines().filter_map(|line| line.strip_prefix(kind)?.trim().parse().ok().map(Step));
    steps.max().unwrap_or_default()
}

#[test]
fn a_crash_at_any_point_loses_no_acknowledged_write() {
    let temp = tempfile::tempdir().unwrap();
    let dir = RunDir::create(temp.path()).unwrap();
    File::create(dir.root().join("acknowledged")).unwrap();
    let base = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64;
    for seed in base..base + CRASHES {
        let mut child = Command::new(std::env::current_exe().unwrap());
        child.args(["child", "--exact", "--nocapture"]).env(DIR, dir.root()).env(SEED, seed.to_string());
        let output = child.output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        println!("seed {seed}: {}", output.status);
        // It must have aborted, not failed.
        assert!(!output.status.success() && !stderr.contains("panicked"), "seed {seed}: {stderr}");
        check(&dir, seed);
    }
    let acknowledged = fs::read_to_string(dir.root().join("acknowledged")).unwrap();
    println!("{CRASHES} crashes: {} acknowledged operations intact", acknowledged.lines().count());
    assert!(last(&acknowledged, "checkpoint") > Step(0), "no child wrote a checkpoint");
}

fn check(dir: &RunDir, seed: u64) {
    let acknowledged = fs::read_to_string(dir.root().join("acknowledged")).unwrap();
    // Readers first: they must find a consistent state before the writer reopens the run.
    let reader = CheckpointReader::open(dir).unwrap();
    for step in reader.steps().unwrap() {
        reader.verify(step).unwrap_or_else(|e| panic!("seed {seed}: manifest of step {step}: {e}"));
    }
    let store = Store::open(dir).unwrap_or_else(|e| panic!("seed {seed}: {e}"));
    let commits = last(&acknowledged, "commit");
    assert!(store.last_committed().unwrap().unwrap_or_default() >= commits, "seed {seed}: a commit is lost");
    for (at, item) in (1..).map(Step).zip(store.committed_range::<(Step, String)>(Step(0))) {
        assert_eq!(item.unwrap(), (at, value(at)), "seed {seed}");
    }
    let blobs = BlobStore::open(dir.blobs()).unwrap();
    let checkpoints = Checkpoints::open(dir, store, blobs).unwrap();
    for step in checkpoints.steps().unwrap() {
        checkpoints.verify(step).unwrap_or_else(|e| panic!("seed {seed}: checkpoint {step}: {e}"));
    }
    let newest = checkpoints.latest().unwrap().map_or(Step(0), |record| record.step);
    assert!(newest >= last(&acknowledged, "checkpoint"), "seed {seed}: a checkpoint is lost");
    drop(JsonLines::open(dir.metrics()).unwrap());
    let metrics = fs::read_to_string(dir.metrics()).unwrap();
    assert!(metrics.lines().all(|line| serde_json::from_str::<serde_json::Value>(line).is_ok()));
}
