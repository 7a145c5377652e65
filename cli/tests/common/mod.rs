//! A test bed for the real binary: a corpus, a configuration, and processes that end with the test.
#![allow(
    dead_code,
    unreachable_pub,
    clippy::expect_used,
    clippy::unwrap_used,
    reason = "tests; not every file uses everything"
)]

pub mod collector;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// The binary under test.
pub fn volary() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_volary"));
    command.stdin(Stdio::null());
    // The user's own list of runs stays as it is.
    command.env("XDG_STATE_HOME", std::env::temp_dir().join("volary-tests"));
    command
}

/// A folder with a corpus and a configuration.
pub struct World {
    pub dir: TempDir,
}

const WORDS: [&str; 24] = [
    "the", "lane", "runs", "a", "step", "and", "every", "expert", "adds", "its", "share", "of", "tokens",
    "to", "shard", "node", "router", "sends", "them", "over", "quick", "links", "while", "training",
];

impl World {
    pub fn new() -> Self {
        let world = Self { dir: TempDir::new().expect("a folder") };
        let mut state = 12345u64;
        let mut text = String::new();
        for number in 0..400 {
            for _ in 0..60 {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                text.push_str(WORDS[(state >> 33) as usize % WORDS.len()]);
                text.push(' ');
            }
            text.push_str(&format!("{number}.\n"));
            std::fs::create_dir_all(world.path("corpus")).expect("a folder");
            std::fs::write(world.path(&format!("corpus/{number}.txt")), &text).expect("a file");
            text.clear();
        }
        std::fs::write(world.path("tiny.toml"), world.config()).expect("a file");
        world
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn config(&self) -> String {
        format!(
            r#"
[run]
name = "tiny"
seed = 5
[data]
vocabulary = 320
cache = "{cache}"
validation_fraction = 0.05
sources = [{{ name = "words", path = "{corpus}", weight = 1.0 }}]
[model]
vocabulary = 320
hidden = 32
layers = 4
heads = 2
head_dim = 16
feed_forward = 64
experts = 6
[training]
steps = 6
lanes = 6
lane_group = 2
sequences_per_lane = 2
sequence_length = 24
[cluster]
nodes = 2
[checkpoint]
every = 3
[validation]
rounds = 1
"#,
            cache = self.path("cache").display(),
            corpus = self.path("corpus").display()
        )
    }

    /// `volary train` in this world, with runs under `runs/`.
    pub fn train(&self, args: &[&str]) -> Command {
        let mut command = volary();
        command.current_dir(self.dir.path()).args(["train", "tiny.toml"]).args(args);
        command
    }

    pub fn run_train(&self, args: &[&str]) -> Output {
        let output = self.train(args).output().expect("the binary");
        assert!(output.status.success(), "train {args:?}: {}\n{}", text(&output.stderr), self.logs());
        output
    }

    /// The logs of all processes of all runs, for the message of a failure.
    pub fn logs(&self) -> String {
        let mut all = String::new();
        for run in std::fs::read_dir(self.path("runs")).into_iter().flatten().flatten() {
            for log in std::fs::read_dir(run.path().join("logs")).into_iter().flatten().flatten() {
                let text = std::fs::read_to_string(log.path()).unwrap_or_default();
                all.push_str(&format!("--- {}\n{text}", log.path().display()));
            }
        }
        all
    }

    pub fn metrics(&self, run: &str) -> Vec<serde_json::Value> {
        let text =
            std::fs::read_to_string(self.path("runs").join(run).join("metrics.jsonl")).expect("metrics");
        text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
    }

    /// Steps with the bits of their losses and norms.
    pub fn curve(&self, run: &str) -> Vec<(u64, u64, u64, u64)> {
        let bits = |line: &serde_json::Value, key: &str| line[key].as_f64().expect("a number").to_bits();
        let lines = self.metrics(run);
        lines
            .iter()
            .map(|l| {
                (l["step"].as_u64().unwrap(), bits(l, "loss"), bits(l, "aux_loss"), bits(l, "grad_norm"))
            })
            .collect()
    }

    /// The last line of `volary digest`.
    pub fn digest(&self, run: &str) -> String {
        let output = volary().arg("digest").arg(self.path("runs").join(run)).output().expect("the binary");
        assert!(output.status.success(), "{}", text(&output.stderr));
        text(&output.stdout).lines().last().expect("a line").to_owned()
    }

    /// The one line of an error.
    pub fn fails(&self, args: &[&str]) -> String {
        let output = volary().current_dir(self.dir.path()).args(args).output().expect("the binary");
        let error = text(&output.stderr);
        assert!(!output.status.success(), "{args:?} succeeded: {}", text(&output.stdout));
        assert!(!error.contains("panicked"), "{error}");
        error.lines().last().unwrap_or_default().to_owned()
    }
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// A child process; dropping it kills it.
pub struct Guard(pub Child);

impl Drop for Guard {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Guard {
    pub fn start(command: &mut Command) -> Self {
        Self(command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("the binary"))
    }

    /// What an ended process wrote to standard error.
    pub fn stderr(&mut self) -> String {
        let mut text = String::new();
        if let Some(stderr) = &mut self.0.stderr {
            std::io::Read::read_to_string(stderr, &mut text).expect("text");
        }
        text
    }

    pub fn wait(&mut self, most: Duration) -> std::process::ExitStatus {
        let mut status = None;
        until("a process ends", most, || {
            status = self.0.try_wait().expect("a status");
            status.is_some()
        });
        status.expect("a status")
    }
}

/// Waits until a condition is true.
pub fn until(what: &str, most: Duration, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < most, "{what}: not within {most:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

pub fn alive(pid: u64) -> bool {
    // A zombie is dead.
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.trim_start().starts_with('Z'))
}

pub fn signal(pid: u32, name: &str) {
    let status = Command::new("kill").args([name, &pid.to_string()]).status().expect("kill");
    assert!(status.success());
}

/// A free port of localhost.
pub fn free_port() -> std::net::SocketAddr {
    std::net::TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a port")
}

pub fn lines(path: &Path) -> usize {
    std::fs::read_to_string(path).map_or(0, |text| text.lines().count())
}

/// A Python that can import these modules: that of `VOLARY_PYTHON`, or the one on the PATH. `None`, with a
/// message, where there is none.
pub fn python_with(modules: &str) -> Option<String> {
    let named = std::env::var("VOLARY_PYTHON").unwrap_or_else(|_| "python3".into());
    let import = format!("import {modules}");
    let check = Command::new(&named).args(["-c", &import]).output();
    if check.is_ok_and(|output| output.status.success()) {
        return Some(named);
    }
    println!("skipped: no Python with {modules}; set VOLARY_PYTHON to one");
    None
}
