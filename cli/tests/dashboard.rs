//! The dashboard, its commands, and the metrics, over HTTP and in a real browser.
#![allow(clippy::expect_used, clippy::unwrap_used, reason = "tests")]

mod common;

use common::{Guard, World, until};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::Command;
use std::time::Duration;

/// A run that lasts until the test ends, and the address of its dashboard.
struct Watched {
    world: World,
    dashboard: String,
    _run: Guard,
}

const STEPS_SEEN: u64 = 6;

fn watched(nodes: &str) -> Watched {
    let world = World::new();
    let args = ["--nodes", nodes, "--threads", "1", "--quiet", "--set", "training.steps=100000"];
    let more = ["--set", "telemetry.sample_every=2", "--set", "checkpoint.every=0"];
    let run = Guard::start(&mut world.train(&[&args[..], &more].concat()));
    let mut dashboard = None;
    until("the run continues", Duration::from_secs(60), || {
        let contact = std::fs::read_to_string(world.path("runs/tiny/supervisor.json")).unwrap_or_default();
        let contact: serde_json::Value = serde_json::from_str(&contact).unwrap_or_default();
        dashboard = contact["http"].as_str().map(str::to_owned);
        common::lines(&world.path("runs/tiny/metrics.jsonl")) as u64 >= STEPS_SEEN
    });
    Watched { world, dashboard: dashboard.expect("a dashboard"), _run: run }
}

impl Watched {
    /// An access token of the run's directory.
    fn token(&self, name: &str) -> String {
        let path = self.world.path(&format!("runs/tiny/identity/{name}.token"));
        std::fs::read_to_string(path).expect("a token").trim().to_owned()
    }
}

fn ask(address: &str, method: &str, path: &str, token: Option<&str>) -> (u16, String) {
    send(address, method, path, token, "")
}

fn send(address: &str, method: &str, path: &str, token: Option<&str>, body: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(address).expect("a connection");
    stream.set_read_timeout(Some(Duration::from_secs(30))).expect("a timeout");
    let token = token.map(|token| format!("Authorization: Bearer {token}\r\n")).unwrap_or_default();
    let length = body.len();
    let head = format!(
        "{method} {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\nContent-Length: {length}\r\n{token}\r\n"
    );
    stream.write_all(format!("{head}{body}").as_bytes()).expect("a request");
    let mut reader = BufReader::new(stream);
    let mut line = || {
        let mut line = String::new();
        reader.read_line(&mut line).expect("a line");
        line
    };
    let code = line().split_whitespace().nth(1).and_then(|code| code.parse().ok()).expect("a code");
    let mut length = None;
    loop {
        let line = line().to_lowercase();
        if line.trim().is_empty() {
            break;
        }
        length = line.strip_prefix("content-length:").map(|n| n.trim().parse().expect("a length")).or(length);
    }
    // Some servers keep the connection open in spite of the header.
    let mut body = String::new();
    reader.take(length.unwrap_or(u64::MAX)).read_to_string(&mut body).expect("a body");
    (code, body)
}

fn json(watched: &Watched, path: &str) -> serde_json::Value {
    let (code, body) = ask(&watched.dashboard, "GET", path, Some(&watched.token("viewer")));
    assert_eq!(code, 200, "{path}: {body}");
    serde_json::from_str(&body).expect("JSON")
}

#[test]
fn supervisor_and_nodes_serve_metrics() {
    let watched = watched("2");
    let value = |text: &str, name: &str| {
        let line = text.lines().find(|line| line.starts_with(&format!("{name} ")));
        let number = line.and_then(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok());
        number.unwrap_or_else(|| panic!("{name} in\n{text}"))
    };
    let (code, metrics) = ask(&watched.dashboard, "GET", "/metrics", None);
    assert_eq!(code, 200);
    assert!(value(&metrics, "volary_step") >= STEPS_SEEN as f64);
    assert!(value(&metrics, "volary_loss") > 0.0 && value(&metrics, "volary_store_bytes") > 0.0);
    let entropy = value(&metrics, "volary_gate_entropy");
    assert!(entropy > 0.0 && entropy <= 6f64.ln(), "{entropy}");
    // 6 lanes of 2 sequences of 24 tokens, to 2 experts each, in each layer.
    let assignments: f64 = metrics
        .lines()
        .filter_map(|line| {
            line.strip_prefix("volary_expert_tokens_total{layer=\"0\"")?
                .rsplit_once(' ')?
                .1
                .parse::<f64>()
                .ok()
        })
        .sum();
    assert_eq!(assignments, 2.0 * value(&metrics, "volary_tokens_total"));
    assert!(
        metrics.contains("volary_journal_write_seconds_count")
            && metrics.contains("volary_events_total{event=\"joined\"} 2")
    );
    let status = json(&watched, "/api/status");
    for node in status["nodes"].as_array().expect("nodes") {
        let address = node["http"].as_str().expect("an address");
        assert_eq!(ask(address, "GET", "/health", None), (200, "ok\n".to_owned()));
        let metrics = ask(address, "GET", "/metrics", None).1;
        for phase in ["forward", "backward", "reduce", "apply", "commit"] {
            assert!(value(&metrics, &format!("volary_node_phase_seconds_count{{phase=\"{phase}\"}}")) > 0.0);
        }
        assert!(value(&metrics, "volary_executor_busy_seconds_total") > 0.0);
        assert!(metrics.contains("volary_link_bytes_total{"), "{metrics}");
        assert_eq!(value(&metrics, "volary_spans_dropped_total"), 0.0);
    }
}

#[test]
fn commands_need_the_operators_access_token_and_take_effect() {
    let watched = watched("2");
    let token = |name: &str| watched.token(name);
    let post = |path: &str, token: Option<&str>| ask(&watched.dashboard, "POST", path, token);
    for bad in [None, Some("volary1.nonsense"), Some(token("node").as_str()), Some(token("viewer").as_str())]
    {
        for path in ["/api/checkpoint", "/api/drain/node-2"] {
            assert_eq!(post(path, bad).0, 401, "{path} with {bad:?}");
        }
    }
    assert_eq!(json(&watched, "/api/status")["nodes"].as_array().map(Vec::len), Some(2));
    let operator = token("operator");
    let (code, body) = post("/api/checkpoint", Some(&operator));
    assert_eq!(code, 200, "{body}");
    let (code, body) = post("/api/drain/nobody", Some(&operator));
    assert!(code == 409 && body.contains("no node nobody"), "{code} {body}");
    assert_eq!(post("/api/drain/node-2", Some(&operator)).0, 200);
    assert_eq!(json(&watched, "/api/status")["nodes"].as_array().map(Vec::len), Some(1));
    // Without an access token, only health and metrics are accessible.
    for path in ["/", "/api/status", "/api/history", "/api/stream", "/api/traces", "/trace/1"] {
        for bad in [None, Some("volary1.nonsense"), Some(token("node").as_str())] {
            assert_eq!(ask(&watched.dashboard, "GET", path, bad).0, 401, "{path} with {bad:?}");
        }
    }
    for path in ["/health", "/metrics"] {
        assert_eq!(ask(&watched.dashboard, "GET", path, None).0, 200, "{path}");
    }
    let with_token = format!("/?token={}", token("viewer"));
    assert_eq!(ask(&watched.dashboard, "GET", &with_token, None).0, 200);
    // GET changes nothing.
    assert_eq!(ask(&watched.dashboard, "GET", "/api/drain/node-1", Some(&operator)).0, 405);
}

#[test]
fn a_live_stream_has_steps_and_the_status_as_they_happen() {
    let watched = watched("1");
    let mut stream = TcpStream::connect(&watched.dashboard).expect("a connection");
    stream.set_read_timeout(Some(Duration::from_secs(30))).expect("a timeout");
    let request = format!(
        "GET /api/stream?token={} HTTP/1.1\r\nHost: {}\r\n\r\n",
        watched.token("viewer"),
        watched.dashboard
    );
    stream.write_all(request.as_bytes()).expect("a request");
    let mut seen = std::collections::BTreeMap::new();
    let mut kind = String::new();
    for line in BufReader::new(stream).lines() {
        let line = line.expect("a line");
        if let Some(name) = line.strip_prefix("event: ") {
            kind = name.to_owned();
        } else if let Some(data) = line.strip_prefix("data: ") {
            let data: serde_json::Value = serde_json::from_str(data).expect("JSON");
            assert!(data["step"].as_u64() >= Some(1), "{kind}: {data}");
            *seen.entry(kind.clone()).or_insert(0) += 1;
        }
        if seen.get("step") >= Some(&5) && seen.get("status") >= Some(&2) {
            return;
        }
    }
    panic!("the stream ended: {seen:?}");
}

/// A browser, controlled with WebDriver; it ends with the test.
struct Browser {
    driver: String,
    session: String,
    _process: Guard,
}

impl Browser {
    /// None if the machine has no chromedriver.
    fn start(world: &World) -> Option<Self> {
        let places = std::env::var_os("PATH")?;
        let program =
            std::env::split_paths(&places).map(|dir| dir.join("chromedriver")).find(|path| path.is_file())?;
        let address = common::free_port();
        let mut command = Command::new(program);
        command.arg(format!("--port={}", address.port()));
        let process = Guard::start(&mut command);
        until("the driver listens", Duration::from_secs(20), || TcpStream::connect(address).is_ok());
        let profile = format!("--user-data-dir={}", world.path("browser").display());
        let args = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", &profile];
        let options = serde_json::json!({"capabilities": {"alwaysMatch": {
            "goog:chromeOptions": {"args": args}, "goog:loggingPrefs": {"browser": "ALL"},
        }}});
        let mut browser = Self { driver: address.to_string(), session: String::new(), _process: process };
        let session = browser.command("POST", "/session", &options)["sessionId"]
            .as_str()
            .expect("a session")
            .to_owned();
        browser.session = session;
        Some(browser)
    }

    fn command(&self, method: &str, path: &str, body: &serde_json::Value) -> serde_json::Value {
        let (code, answer) = send(&self.driver, method, path, None, &body.to_string());
        let answer: serde_json::Value = serde_json::from_str(&answer).expect("JSON");
        assert_eq!(code, 200, "{path}: {answer}");
        answer["value"].clone()
    }

    fn open(&self, url: &str) {
        self.command("POST", &format!("/session/{}/url", self.session), &serde_json::json!({ "url": url }));
    }

    /// The page as its scripts have built it so far.
    fn dom(&self) -> String {
        let script = serde_json::json!({"script": "return document.documentElement.outerHTML", "args": []});
        let dom = self.command("POST", &format!("/session/{}/execute/sync", self.session), &script);
        dom.as_str().expect("a text").to_owned()
    }

    /// Errors of scripts, and violations of the page's policy.
    fn errors(&self) -> Vec<String> {
        let kind = serde_json::json!({"type": "browser"});
        let log = self.command("POST", &format!("/session/{}/se/log", self.session), &kind);
        let severe = log.as_array().into_iter().flatten().filter(|line| line["level"] == "SEVERE");
        severe.map(ToString::to_string).collect()
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // The driver would leave the browser behind when it is killed.
        if !self.session.is_empty() && !std::thread::panicking() {
            self.command("DELETE", &format!("/session/{}", self.session), &serde_json::json!({}));
        } else if let Ok(mut stream) = TcpStream::connect(&self.driver) {
            let _ = write!(
                stream,
                "DELETE /session/{} HTTP/1.1\r\nHost: {}\r\nContent-Length: 0\r\n\r\n",
                self.session, self.driver
            );
            std::thread::sleep(Duration::from_secs(1));
        }
    }
}

#[test]
fn a_browser_draws_the_dashboard_and_a_trace() {
    let watched = watched("2");
    let Some(browser) = Browser::start(&watched.world) else {
        return eprintln!("skipped: no chromedriver on this machine (make setup-tools)");
    };
    // Once with the access token; then the browser has a cookie.
    browser.open(&format!("http://{}/?token={}", watched.dashboard, watched.token("viewer")));
    let drawn = [
        "<title>tiny: step ",
        "<polyline points=",
        "class=\"mark\"",
        "class=\"cell\"",
        "node-1",
        "node-2",
        "joined",
        "tokens/s",
        "href=\"/trace/",
    ];
    until("the dashboard is drawn", Duration::from_secs(30), || {
        drawn.iter().all(|part| browser.dom().contains(part))
    });
    // 2 MoE layers of 6 experts.
    assert_eq!(browser.dom().matches("class=\"cell\"").count(), 12);
    let title =
        |dom: String| dom.split_once("<title>").map(|(_, rest)| rest[..20.min(rest.len())].to_owned());
    let before = title(browser.dom());
    until("the dashboard updates by itself", Duration::from_secs(30), || title(browser.dom()) != before);
    assert_eq!(browser.errors(), [] as [String; 0]);
    let traces = json(&watched, "/api/traces");
    // The newest may not be complete yet.
    let steps = traces.as_array().expect("traces").iter().filter(|trace| trace["name"] == "step");
    let step = steps.max_by_key(|trace| trace["spans"].as_u64()).expect("a step");
    browser.open(&format!("http://{}/trace/{}", watched.dashboard, step["id"].as_str().expect("an id")));
    let trace = browser.dom();
    assert!(trace.contains("class=\"token\" title=\"lane") && trace.contains("expert 0"), "{trace}");
    assert!(trace.matches("<rect").count() > 50, "spans are drawn: {trace}");
    assert_eq!(browser.errors(), [] as [String; 0]);
}
