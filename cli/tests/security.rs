//! Authentication and authorization on real processes, and a run that continues whatever unauthenticated
//! peers send.
#![expect(clippy::expect_used, reason = "tests")]

mod common;

use common::{Guard, World, lines, text, until, volary};
use std::io::{Read, Write};
use std::net::{TcpStream, UdpSocket};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

const LONG: Duration = Duration::from_secs(120);

struct Running {
    world: World,
    contact: serde_json::Value,
    _train: Guard,
}

fn running(more: &[&str]) -> Running {
    let world = World::new();
    let args =
        ["--nodes", "1", "--threads", "1", "--dir", "runs/r", "--quiet", "--set", "training.steps=100000"];
    let train = Guard::start(&mut world.train(&[&args[..], more].concat()));
    until("steps", LONG, || lines(&world.path("runs/r/metrics.jsonl")) >= 2);
    let contact = std::fs::read_to_string(world.path("runs/r/supervisor.json")).expect("a contact");
    Running { contact: serde_json::from_str(&contact).expect("JSON"), world, _train: train }
}

impl Running {
    fn address(&self) -> &str {
        self.contact["address"].as_str().expect("an address")
    }

    fn dashboard(&self) -> &str {
        self.contact["http"].as_str().expect("a dashboard")
    }

    fn token_command(&self, args: &[&str]) -> (bool, String) {
        let mut command = volary();
        command.current_dir(self.world.dir.path()).arg("token").args(args).args(["--dir", "runs/r"]);
        let output = command.output().expect("the binary");
        (output.status.success(), (text(&output.stdout) + &text(&output.stderr)).trim().to_owned())
    }

    fn create(&self, args: &[&str]) -> String {
        let (good, token) = self.token_command(&[&["create"], args].concat());
        assert!(good && token.starts_with("volary1."), "{token}");
        token
    }

    fn node(&self, name: &str, token: &str) -> Command {
        let mut command = volary();
        command.args(["node", "--no-http", "--device", "cpu", "--threads", "1", "--name", name]);
        command.args(["--join", self.address()]).env("VOLARY_TOKEN", token);
        command
    }

    fn nodes(&self) -> Vec<(String, String)> {
        let mut command = volary();
        command.current_dir(self.world.dir.path()).args(["status", "--dir", "runs/r", "--json"]);
        let output = command.output().expect("the binary");
        let status: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
        let text = |node: &serde_json::Value, key: &str| node[key].as_str().unwrap_or_default().to_owned();
        let nodes = status["nodes"].as_array().cloned().unwrap_or_default();
        nodes.iter().map(|node| (text(node, "name"), text(node, "zone"))).collect()
    }

    fn refusals(&self) -> f64 {
        let mut stream = TcpStream::connect(self.dashboard()).expect("a connection");
        stream.set_read_timeout(Some(Duration::from_secs(10))).expect("a timeout");
        let request =
            format!("GET /metrics HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n\r\n", self.dashboard());
        stream.write_all(request.as_bytes()).expect("a request");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("metrics");
        let line = answer.lines().find(|line| line.starts_with("volary_refusals_total "));
        line.and_then(|line| line.split_whitespace().nth(1)?.parse().ok()).expect("a count")
    }

    fn steps(&self) -> usize {
        lines(&self.world.path("runs/r/metrics.jsonl"))
    }

    fn check_progress(&self) {
        let before = self.steps();
        until("more steps", LONG, || self.steps() >= before + 3);
    }
}

#[test]
fn access_tokens_admit_as_many_nodes_for_as_long_as_they_allow() {
    let running = running(&[]);
    let once = running.create(&["--uses", "1", "--ttl", "1h", "--labels", "zone=rack-9,owner=lab"]);
    let _first = Guard::start(&mut running.node("first", &once));
    until("the node has joined", LONG, || running.nodes().contains(&("first".into(), "rack-9".into())));
    let second = running.node("second", &once).output().expect("the binary");
    assert!(!second.status.success() && text(&second.stderr).contains("has no uses left"), "{second:?}");
    let (_, list) = running.token_command(&["list"]);
    let id = once.split('.').nth(2).expect("an id");
    let line = list.lines().find(|line| line.contains(id)).expect("the access token");
    assert!(line.contains("0 uses left") && line.contains("zone=rack-9,owner=lab"), "{line}");
    assert!(!list.contains(once.rsplit('.').next().expect("a secret")), "secrets are not listed");

    let revoked = running.create(&[]);
    let (good, output) = running.token_command(&["revoke", revoked.split('.').nth(2).expect("an id")]);
    assert!(good, "{output}");
    let third = running.node("third", &revoked).output().expect("the binary");
    assert!(!third.status.success() && text(&third.stderr).contains("revoked"), "{third:?}");
    let short = running.create(&["--ttl", "1ms"]);
    let fourth = running.node("fourth", &short).output().expect("the binary");
    assert!(!fourth.status.success() && text(&fourth.stderr).contains("expired"), "{fourth:?}");
    // A viewer's access token does not admit a node.
    let viewer = running.create(&["--role", "viewer"]);
    assert!(!running.node("fifth", &viewer).output().expect("the binary").status.success());
    for bad in [["create", "--ttl", "soon"], ["create", "--uses", "0"], ["create", "--labels", "x"]] {
        let (good, output) = running.token_command(&bad);
        assert!(!good && output.contains("error: invalid value"), "{output}");
    }
}

#[test]
fn certificates_are_renewed_and_survive_a_supervisor_with_the_same_bits() {
    let world = World::new();
    let events = "[[event]]\nat_step = 30\ndo = \"kill-supervisor\"\n";
    std::fs::write(world.path("events.toml"), events).expect("a file");
    let args = ["--nodes", "2", "--threads", "1", "--quiet", "--set", "training.steps=60"];
    world.run_train(&[&args[..], &["--dir", "runs/quiet"]].concat());
    let short =
        ["--dir", "runs/r", "--set", "cluster.certificate_lifetime_ms=1500", "--events", "events.toml"];
    world.run_train(&[&args[..], &short].concat());
    assert_eq!((world.curve("r"), world.digest("r")), (world.curve("quiet"), world.digest("quiet")));
    let logs = world.logs();
    assert!(logs.matches("certificate renewed").count() >= 2, "{logs}");
}

#[test]
fn a_run_continues_undisturbed_whatever_unauthenticated_peers_send() {
    let running = running(&[]);
    let before = running.refusals();
    // Datagrams that are not QUIC.
    let socket = UdpSocket::bind("127.0.0.1:0").expect("a socket");
    for round in 0..2_000usize {
        let bytes: Vec<u8> = (0..1 + round % 1_300).map(|i| (i * 31 + round) as u8).collect();
        let _ = socket.send_to(&bytes, running.address());
    }
    // Access tokens of another cluster, and with an unknown id.
    let foreign = format!("volary1.{}.00000000.{}", "ab".repeat(32), "cd".repeat(32));
    let fingerprint = running.create(&[]).split('.').nth(1).expect("a fingerprint").to_owned();
    let guessed = format!("volary1.{fingerprint}.0011223344556677.{}", "cd".repeat(32));
    for token in [foreign, guessed] {
        let node = running.node("stranger", &token).output().expect("the binary");
        assert!(!node.status.success(), "{node:?}");
    }
    // HTTP: garbage, a missing body, an endless head, and more connections than are accepted.
    let send = |bytes: &[u8]| {
        let mut stream = TcpStream::connect(running.dashboard()).expect("a connection");
        let _ = stream.write_all(bytes);
        stream
    };
    let lying = format!("POST /api/checkpoint HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n", u64::MAX);
    let endless = format!("GET / HTTP/1.1\r\n{}", "X-More: yes\r\n".repeat(20_000));
    let held: Vec<TcpStream> = (0..200)
        .map(|n| match n % 4 {
            0 => send(&[0xff; 4096]),
            1 => send(lying.as_bytes()),
            2 => send(endless.as_bytes()),
            _ => send(b"GET /api/sta"),
        })
        .collect();
    running.check_progress();
    drop(held);
    assert!(running.refusals() > before, "refusals are counted");
    running.check_progress();
    let events = std::fs::read_to_string(running.world.path("runs/r/events.jsonl")).expect("events");
    assert!(!events.contains("\"lost\"") && !events.contains("\"aborted\""), "{events}");
}

fn files(folder: &Path) -> Vec<std::path::PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries.flat_map(|e| if e.path().is_dir() { files(&e.path()) } else { vec![e.path()] }).collect()
}

#[test]
fn secrets_are_readable_by_the_owner_only_and_are_in_no_log_or_event() {
    let running = running(&[]);
    let created = running.create(&[]);
    running.check_progress();
    let identity = running.world.path("runs/r/identity");
    let mut secrets = vec![created];
    for file in files(&identity) {
        let mode = std::fs::metadata(&file).expect("a file").permissions().mode() & 0o777;
        assert_eq!(mode, 0o600, "{}", file.display());
        if let Ok(text) = std::fs::read_to_string(&file) {
            secrets.push(text);
        }
    }
    assert!(secrets.len() >= 5, "a key and three access tokens");
    for file in files(&running.world.path("runs/r")).iter().filter(|file| !file.starts_with(&identity)) {
        let bytes = std::fs::read(file).unwrap_or_default();
        let content = String::from_utf8_lossy(&bytes);
        for secret in &secrets {
            let secret = secret.trim().rsplit(['.', '\n']).find(|part| part.len() >= 32).expect("a secret");
            assert!(!content.contains(secret), "{} holds a secret", file.display());
        }
    }
}

#[test]
fn an_open_dashboard_is_refused_beyond_localhost_unless_it_is_forced() {
    let world = World::new();
    let args = ["supervisor", "tiny.toml", "--listen", "127.0.0.1:0", "--dir", "runs/p"];
    let error = world.fails(&[&args[..], &["--http", "0.0.0.0:0", "--http-open"]].concat());
    assert!(error.contains("--http 0.0.0.0") && error.contains("--insecure"), "{error}");
    assert!(!world.path("runs/p/identity").exists(), "refused before anything starts");
}

#[test]
fn an_external_identity_is_created_once_and_refused_when_damaged() {
    let world = World::new();
    let output = volary().current_dir(world.dir.path()).args(["identity", "create", "--out", "id"]).output();
    assert!(output.expect("the binary").status.success());
    let again = world.fails(&["identity", "create", "--out", "id"]);
    assert!(again.contains("already holds an identity"), "{again}");
    std::fs::write(world.path("id/ca.key"), "garbage").expect("a file");
    let args = ["supervisor", "tiny.toml", "--listen", "127.0.0.1:0", "--dir", "runs/i", "--identity", "id"];
    let error = world.fails(&args);
    assert!(error.contains("the authority's key"), "{error}");
}
