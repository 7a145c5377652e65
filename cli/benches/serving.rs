//! Tokens per second of a server of completions, alone and with many clients at once, on the quickstart's
//! model after a few steps, in the family that transformers can load, beside `generate` there (in batches of
//! as many prompts; skipped without a Python that has it). `cargo bench -p volary-cli --bench serving`.
#![expect(clippy::expect_used, reason = "a benchmark")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Instant;

const ROUNDS: usize = 3;
/// New tokens of each request.
const TOKENS: usize = 64;
/// Requests of each measurement for each client, and the most of all clients together.
const REQUESTS: (usize, usize) = (16, 128);
const CLIENTS: [usize; 3] = [1, 8, 64];
const PROMPT: &str = "pub fn new(";

fn main() {
    let config = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/quickstart.toml");
    let folder = tempfile::tempdir().expect("a folder");
    let run = folder.path().join("run");
    let mut train = Command::new(env!("CARGO_BIN_EXE_volary"));
    train.arg("train").arg(&config).arg("--dir").arg(&run).args(["--quiet", "--nodes", "1"]);
    train.args(["--set", "training.steps=20", "--set", "validation.rounds=0"]).stdout(Stdio::null());
    train.args(["--set", "model.family=\"qwen3_moe\"", "--set", "training.schedule.rate=0.02"]);
    assert!(train.status().expect("the binary").success());
    let exported = folder.path().join("exported");
    let mut export = Command::new(env!("CARGO_BIN_EXE_volary"));
    export.args(["export", "--format", "hf"]).arg(&run).arg(&exported).stdout(Stdio::null());
    assert!(export.status().expect("the binary").success());
    let server = Server::start(&run);
    let mut other = Transformers::start(&exported);
    let mut speeds: Vec<Vec<f64>> = vec![Vec::new(); CLIENTS.len()];
    let mut others = speeds.clone();
    for round in 0..ROUNDS {
        for (index, clients) in CLIENTS.into_iter().enumerate() {
            let speed = server.tokens_per_second(clients);
            println!("round {round}: {clients} clients: {speed:.0} tokens/s");
            speeds[index].push(speed);
            if let Some(other) = &mut other {
                let speed = other.tokens_per_second(clients);
                println!("round {round}: transformers, batches of {clients}: {speed:.0} tokens/s");
                others[index].push(speed);
            }
        }
    }
    let speeds: Vec<f64> = speeds.into_iter().map(median).collect();
    for (clients, speed) in CLIENTS.iter().zip(&speeds) {
        println!("{clients} clients: {speed:.0} tokens/s, {:.2} of one client", speed / speeds[0]);
    }
    for ((clients, speed), others) in CLIENTS.iter().zip(&speeds).zip(others).filter(|(_, o)| !o.is_empty()) {
        let other = median(others);
        println!("{clients}: transformers {other:.0} tokens/s, the server {:.2} of it", speed / other);
    }
}

/// `generate` of transformers, in a process of its own.
struct Transformers {
    process: Child,
    answers: BufReader<ChildStdout>,
}

impl Transformers {
    fn start(folder: &Path) -> Option<Self> {
        let python = std::env::var("VOLARY_PYTHON").unwrap_or_else(|_| "python3".into());
        let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/serving.py");
        let mut command = Command::new(python);
        command.arg(program).arg(folder).args([PROMPT, &TOKENS.to_string()]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut process = command.spawn().ok()?;
        let mut answers = BufReader::new(process.stdout.take()?);
        let mut line = String::new();
        answers.read_line(&mut line).ok()?;
        if line.trim() != "ready" {
            println!("skipped: no Python with torch and transformers; set VOLARY_PYTHON to one");
            return None;
        }
        Some(Self { process, answers })
    }

    fn tokens_per_second(&mut self, batch: usize) -> f64 {
        let input = self.process.stdin.as_mut().expect("a pipe");
        writeln!(input, "{batch} {}", requests(batch)).expect("sent");
        let mut line = String::new();
        self.answers.read_line(&mut line).expect("an answer");
        line.trim().parse().expect("a number")
    }
}

impl Drop for Transformers {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn requests(clients: usize) -> usize {
    (REQUESTS.0 * clients).min(REQUESTS.1)
}

struct Server {
    process: Child,
    address: String,
}

impl Server {
    fn start(run: &Path) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_volary"));
        command.args(["serve", "--http", "127.0.0.1:0", "--parallel", "64", "--run"]).arg(run);
        let mut process = command.stdout(Stdio::piped()).spawn().expect("the binary");
        let mut line = String::new();
        let output = process.stdout.take().expect("a pipe");
        BufReader::new(output).read_line(&mut line).expect("a line");
        let address = line.split("http://").nth(1).and_then(|rest| rest.split('/').next());
        Self { process, address: address.expect("an address").to_owned() }
    }

    /// The new tokens of all requests by so many clients, per second.
    fn tokens_per_second(&self, clients: usize) -> f64 {
        let began = Instant::now();
        let tokens: usize = std::thread::scope(|scope| {
            let client = |client| {
                let requests = (client..requests(clients)).step_by(clients);
                scope.spawn(move || requests.map(|seed| self.complete(seed)).sum::<usize>())
            };
            let clients: Vec<_> = (0..clients).map(client).collect();
            clients.into_iter().map(|client| client.join().expect("a client")).sum()
        });
        tokens as f64 / began.elapsed().as_secs_f64()
    }

    /// The new tokens of one request.
    fn complete(&self, seed: usize) -> usize {
        let body = serde_json::json!({ "prompt": PROMPT, "max_tokens": TOKENS, "seed": seed }).to_string();
        let mut stream = TcpStream::connect(&self.address).expect("a connection");
        let length = body.len();
        let head = format!("POST /v1/completions HTTP/1.0\r\nContent-Length: {length}\r\n\r\n");
        stream.write_all((head + &body).as_bytes()).expect("sent");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("an answer");
        let body = answer.split("\r\n\r\n").nth(1).expect("a body");
        let answer: serde_json::Value = serde_json::from_str(body).expect("JSON");
        answer["usage"]["completion_tokens"].as_u64().expect("a number") as usize
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
