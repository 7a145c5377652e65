//! Limits of the machine and names of runs: what runs out is named, and a probe is answered beside any number
//! of idle connections.
#![expect(clippy::expect_used, reason = "tests")]

mod common;

use common::{Guard, World, text, until, volary};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

const LONG: Duration = Duration::from_secs(120);
/// A probe's usual timeout is a second; the rest is for a busy machine.
const SOON: Duration = Duration::from_secs(10);

struct Waiting {
    world: World,
    supervisor: Guard,
    contact: serde_json::Value,
}

/// A supervisor that waits for nodes.
fn waiting(more: &[&str]) -> Waiting {
    let world = World::new();
    let mut command = volary();
    command.current_dir(world.dir.path());
    command.args(["supervisor", "tiny.toml", "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0"]);
    command.args(["--dir", "runs/r"]).args(more);
    let supervisor = Guard::start(&mut command);
    let contact = world.path("runs/r/supervisor.json");
    until("its contact", LONG, || contact.exists());
    let contact = serde_json::from_slice(&std::fs::read(contact).expect("the contact")).expect("JSON");
    Waiting { world, supervisor, contact }
}

fn probe(address: &str) -> String {
    let mut stream = TcpStream::connect(address).expect("a connection");
    stream.set_read_timeout(Some(SOON)).expect("a timeout");
    stream.write_all(b"GET /health HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").expect("a request");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer");
    answer
}

#[test]
fn a_probe_is_answered_beside_hundreds_of_idle_connections() {
    let waiting = waiting(&[]);
    let http = waiting.contact["http"].as_str().expect("an address");
    let idle: Vec<_> = (0..300).map(|_| TcpStream::connect(http).expect("a connection")).collect();
    let start = Instant::now();
    let answer = probe(http);
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert!(start.elapsed() < SOON);
    drop(idle);
}

#[test]
fn a_node_finds_the_token_of_a_run_elsewhere_on_this_machine_or_says_where_it_looked() {
    let Waiting { world, mut supervisor, contact } =
        waiting(&["--set", "training.steps=2", "--set", "cluster.nodes=1"]);
    let elsewhere = tempfile::tempdir().expect("a folder");
    let join = |address: &str| {
        let mut command = volary();
        command.current_dir(elsewhere.path());
        command.args(["node", "--join", address, "--threads", "1", "--device", "cpu", "--no-http"]);
        command
    };
    let node = join(contact["address"].as_str().expect("an address")).output().expect("the binary");
    assert!(node.status.success(), "{}\n{}", text(&node.stderr), world.logs());
    assert!(supervisor.wait(LONG).success());
    let unknown = join("127.0.0.1:9").output().expect("the binary");
    let told = text(&unknown.stderr);
    assert!(!unknown.status.success() && told.contains("looked in runs/ and "), "{told}");
}

#[test]
fn a_node_joins_by_a_name_of_which_only_one_address_answers() {
    use std::net::ToSocketAddrs;
    let Waiting { world, mut supervisor, contact } =
        waiting(&["--set", "training.steps=2", "--set", "cluster.nodes=1"]);
    let address: std::net::SocketAddr =
        contact["address"].as_str().expect("an address").parse().expect("one");
    // Of the addresses of this name, the supervisor listens on that of IPv4 only.
    let name = format!("localhost:{}", address.port());
    if name.to_socket_addrs().expect("addresses").count() < 2 {
        eprintln!("skipped in part: localhost has one address here");
    }
    let mut node = volary();
    node.current_dir(world.dir.path());
    node.args(["node", "--join", &name, "--threads", "1", "--device", "cpu", "--no-http"]);
    let node = node.output().expect("the binary");
    assert!(node.status.success(), "{}", text(&node.stderr));
    assert!(supervisor.wait(LONG).success());
}

#[test]
fn a_low_limit_of_open_files_is_said_at_the_start() {
    let world = World::new();
    let binary = env!("CARGO_BIN_EXE_volary");
    let script = format!("ulimit -n 100; exec {binary} train tiny.toml --set training.steps=2 --dir runs/r");
    let mut command = std::process::Command::new("sh");
    let output = command.current_dir(world.dir.path()).args(["-c", &script]).output().expect("a shell");
    let told = text(&output.stderr);
    assert!(output.status.success() && told.contains("only 100 files (ulimit -n)"), "{told}");
}
