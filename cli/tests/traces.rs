//! The traces of a run, at a receiver of the OpenTelemetry protocol and in the run's directory.
#![allow(clippy::expect_used, clippy::unwrap_used, reason = "tests")]

mod common;

use common::collector::{Collector, Received};
use common::{World, text, volary};
use opentelemetry_proto::tonic::trace::v1::span::SpanKind;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};
use volary_core::options::TelemetryOptions;
use volary_core::{Lane, Step};
use volary_data::Dataset;
use volary_telemetry::limits::{BATCH_SPANS, QUEUE_SPANS};
use volary_telemetry::{Identity, Pipeline};

/// Three equal nodes, whatever the machine measures: each has lanes and experts.
const THREE: [&str; 9] = [
    "--nodes",
    "3",
    "--threads",
    "1",
    "--quiet",
    "--set",
    "cluster.measure=false",
    "--set",
    "cluster.rebalance=false",
];

fn traced(world: &World, collector: &Collector, protocol: &str, args: &[&str]) {
    let mut command = world.train(&[&THREE, args].concat());
    command.env("OTEL_EXPORTER_OTLP_ENDPOINT", &collector.endpoint);
    command.env("OTEL_EXPORTER_OTLP_PROTOCOL", protocol);
    let output = command.output().expect("the binary");
    assert!(output.status.success(), "{}\n{}", text(&output.stderr), world.logs());
}

/// The children of a span, in the order of their starts.
fn children<'a>(all: &'a [Received], parent: &Received) -> Vec<&'a Received> {
    let is_child = |one: &&Received| {
        one.span.parent_span_id == parent.span.span_id && one.span.trace_id == parent.span.trace_id
    };
    let mut found: Vec<&Received> = all.iter().filter(is_child).collect();
    found.sort_by_key(|one| one.span.start_time_unix_nano);
    found
}

/// The time covered by the spans, in nanoseconds.
fn covered(spans: &[&Received]) -> u64 {
    let (mut total, mut until) = (0, 0);
    for one in spans {
        let (start, end) = (one.span.start_time_unix_nano.max(until), one.span.end_time_unix_nano);
        total += end.saturating_sub(start);
        until = until.max(end);
    }
    total
}

fn the_step<'a>(all: &'a [Received], step: &str) -> &'a Received {
    let is_it = |one: &&Received| one.is("step") && one.get("volary.step").as_deref() == Some(step);
    all.iter().find(is_it).unwrap_or_else(|| panic!("step {step} was not traced"))
}

/// The tree of a step: lanes, layers, experts, sums, commit, over all processes.
#[test]
fn a_step_of_three_nodes_is_one_tree_at_a_real_receiver() {
    let world = World::new();
    let collector = Collector::grpc();
    let options = ["--set", "telemetry.sample_every=2", "--set", "telemetry.spans_per_step=4000"];
    traced(&world, &collector, "grpc", &options);
    let all = collector.spans();
    every_parent_is_there(&all);
    every_process_identifies_itself(&all);
    let step = the_step(&all, "4");
    assert_eq!((step.node(), step.get("volary.sampling_reason").as_deref()), ("supervisor", Some("sampled")));
    // The first placement is a cluster change, and the step after it is traced.
    assert_eq!(the_step(&all, "1").get("volary.sampling_reason").as_deref(), Some("the cluster changed"));
    let below = children(&all, step);
    let count = |name: &str| below.iter().filter(|one| one.is(name)).count();
    assert_eq!((count("lane"), count("reduce"), count("commit"), count("apply")), (6, 3, 1, 3));
    let lanes: BTreeSet<_> =
        below.iter().filter(|one| one.is("lane")).filter_map(|one| one.get("volary.lane")).collect();
    assert_eq!(lanes.len(), 6);
    for lane in below.iter().filter(|one| one.is("lane")) {
        a_lane_is_the_sum_of_its_parts(&all, lane);
    }
    experts_hang_below_the_dispatch_that_called_them(&all);
    tokens_have_their_experts(&all);
    tokens_are_those_of_the_data(&all, &world);
    commits_and_checkpoints_show_the_disk(&all);
}

fn every_parent_is_there(all: &[Received]) {
    let known: BTreeSet<_> = all.iter().map(|one| (&one.span.trace_id, &one.span.span_id)).collect();
    assert_eq!(known.len(), all.len(), "no span comes twice");
    for one in all.iter().filter(|one| !one.span.parent_span_id.is_empty()) {
        let parent = (&one.span.trace_id, &one.span.parent_span_id);
        assert!(known.contains(&parent), "{} of {} has no parent", one.span.name, one.node());
    }
}

fn every_process_identifies_itself(all: &[Received]) {
    let mut instances = BTreeMap::new();
    for one in all {
        assert_eq!(one.resource["service.name"], "volary");
        assert_eq!(one.resource["volary.run"], "tiny");
        let instance = &one.resource["service.instance.id"];
        assert_eq!(instances.entry(one.node()).or_insert(instance), &instance);
        assert_eq!(one.resource.contains_key("volary.device"), one.node() != "supervisor");
    }
    assert_eq!(instances.keys().copied().collect::<Vec<_>>(), ["node-1", "node-2", "node-3", "supervisor"]);
    assert_eq!(instances.values().collect::<BTreeSet<_>>().len(), 4);
}

fn a_lane_is_the_sum_of_its_parts(all: &[Received], lane: &Received) {
    let parts = children(all, lane);
    // Tokens overlap the spans of their dispatch.
    let parts: Vec<&Received> = parts.into_iter().filter(|one| !one.is("token")).collect();
    let names: Vec<&str> = parts.iter().map(|one| one.span.name.as_str()).collect();
    let count = |name: &str| names.iter().filter(|other| **other == name).count();
    // Four layers, two of them with experts.
    for (name, times) in
        [("dense.forward", 4), ("dense.backward", 4), ("router.gate", 2), ("router.combine", 2)]
    {
        assert_eq!(count(name), times, "{name} in {names:?}");
    }
    assert_eq!((count("router.gate.backward"), count("dense.loss"), count("dense.embed")), (2, 1, 1));
    for layer in ["0", "2"] {
        let sent = parts
            .iter()
            .filter(|one| one.is("router.dispatch") && one.get("volary.layer").as_deref() == Some(layer));
        let rows =
            sent.filter_map(|one| one.get("messaging.batch.message_count")?.parse::<u64>().ok()).sum::<u64>();
        assert_eq!(rows, 2 * 48, "every token of the lane goes to two experts");
    }
    for part in &parts {
        assert!(part.span.start_time_unix_nano >= lane.span.start_time_unix_nano, "{}", part.span.name);
        assert!(part.span.end_time_unix_nano <= lane.span.end_time_unix_nano, "{}", part.span.name);
        if part.kind() == SpanKind::Internal && !part.is("lane.wait") {
            let us = |key: &str| part.get(key).and_then(|us| us.parse::<u64>().ok()).expect("a time") * 1000;
            // Truncated to whole microseconds: never more than the span.
            assert!(us("volary.queue_us") + us("volary.compute_us") <= part.nanoseconds(), "{part:?}");
        }
    }
    // The rest is spent between actors, on a machine that may be busy with other tests.
    let share = covered(&parts) as f64 / lane.nanoseconds() as f64;
    assert!(share > 0.5, "the parts of a lane cover {share:.2} of it");
}

fn experts_hang_below_the_dispatch_that_called_them(all: &[Received]) {
    let by_id: BTreeMap<_, _> = all.iter().map(|one| (&one.span.span_id, one)).collect();
    let mut crossed = 0;
    for one in all.iter().filter(|one| one.is("expert.forward") || one.is("expert.backward")) {
        let dispatch = by_id[&one.span.parent_span_id];
        assert!(dispatch.span.name.starts_with("router.dispatch"), "{}", dispatch.span.name);
        assert_eq!((dispatch.kind(), one.kind()), (SpanKind::Producer, SpanKind::Consumer));
        assert_eq!(dispatch.get("volary.target_node").as_deref(), Some(one.node()));
        let rows = "messaging.batch.message_count";
        assert_eq!(
            (dispatch.get(rows), dispatch.get("volary.layer")),
            (one.get(rows), one.get("volary.layer"))
        );
        let remote = dispatch.node() != one.node();
        assert_eq!(dispatch.get("volary.wire_us").is_some(), remote);
        crossed += usize::from(remote);
    }
    assert!(crossed > 0, "no batch went to another node");
}

fn tokens_have_their_experts(all: &[Received]) {
    let tokens: Vec<&Received> = all.iter().filter(|one| one.is("token")).collect();
    assert!(!tokens.is_empty());
    let by_id: BTreeMap<_, _> = all.iter().map(|one| (&one.span.span_id, one)).collect();
    for token in tokens {
        let number = |key: &str| {
            token
                .get(key)
                .and_then(|value| value.parse::<f64>().ok())
                .unwrap_or_else(|| panic!("{key}: {token:?}"))
        };
        assert!(token.get("volary.token.text").is_some_and(|text| !text.is_empty()));
        assert!(number("volary.token.position") < 48.0);
        assert!((number("volary.gate.first") + number("volary.gate.second") - 1.0).abs() < 1e-4, "{token:?}");
        assert!(number("volary.gate.first") >= number("volary.gate.second"));
        assert!(number("volary.expert.first") < 6.0 && number("volary.expert.second") < 6.0);
        let lane = by_id[&token.span.parent_span_id];
        assert_eq!(lane.get("volary.lane"), token.get("volary.lane"));
        // The lane dispatched to the nodes of its experts, in its layer.
        for which in ["first", "second"] {
            let node = token.get(&format!("volary.expert.{which}_node")).expect("a node");
            let is_it = |one: &&Received| {
                one.is("router.dispatch")
                    && one.get("volary.layer") == token.get("volary.layer")
                    && one.get("volary.target_node").as_ref() == Some(&node)
            };
            assert!(children(all, lane).into_iter().any(|one| is_it(&one)), "{token:?}");
        }
    }
}

/// Position, id and text of sampled tokens, compared with the run's data.
fn tokens_are_those_of_the_data(all: &[Received], world: &World) {
    let data = Dataset::open(&world.path("runs/tiny/data"), 24, 2, 6, 5).expect("the run's data");
    let steps: BTreeMap<_, u64> = all
        .iter()
        .filter(|one| one.is("step"))
        .map(|one| {
            (&one.span.trace_id, one.get("volary.step").and_then(|step| step.parse().ok()).expect("a step"))
        })
        .collect();
    for token in all.iter().filter(|one| one.is("token")) {
        let number =
            |key: &str| token.get(key).and_then(|value| value.parse::<u32>().ok()).expect("a number");
        let (lane, position) = (number("volary.lane"), number("volary.token.position") as usize);
        // Rows have 24 tokens and the target of the last one.
        let tokens = data.lane(Step(steps[&token.span.trace_id]), Lane(lane)).expect("tokens");
        let id = tokens[position / 24 * 25 + position % 24];
        assert_eq!(number("volary.token.id"), id);
        assert_eq!(token.get("volary.token.text"), Some(data.tokenizer().token(id)));
    }
}

fn commits_and_checkpoints_show_the_disk(all: &[Received]) {
    let commit = all.iter().find(|one| one.is("commit")).expect("a commit");
    assert_eq!(children(all, commit)[0].span.name, "journal.write");
    let checkpoint = all.iter().find(|one| one.is("checkpoint")).expect("a checkpoint");
    let below = children(all, checkpoint);
    assert!(below.iter().any(|one| one.is("catalogue.write")));
    assert!(below.iter().any(|one| one.is("shards.store") && one.node() != "supervisor"));
    // Embedding, 4 dense layers, 2 routers, 12 experts.
    assert_eq!(below.iter().filter(|one| one.is("shard.write")).count(), 19);
    let steps: BTreeSet<_> =
        all.iter().filter(|one| one.is("step")).map(|one| one.span.span_id.clone()).collect();
    assert!(checkpoint.span.links.iter().any(|link| steps.contains(&link.span_id)), "linked to a step");
}

#[test]
fn traces_over_http_arrive_and_tracing_changes_no_bit() {
    let world = World::new();
    let collector = Collector::http();
    traced(
        &world,
        &collector,
        "http/protobuf",
        &["--set", "telemetry.sample_every=1", "--set", "telemetry.spans_per_step=1", "--dir", "runs/traced"],
    );
    world.run_train(&[&THREE[..], &["--set", "telemetry.sample_every=0", "--dir", "runs/untraced"]].concat());
    let all = collector.spans();
    assert_eq!(all.iter().filter(|one| one.is("step")).count(), 6);
    // The bound on spans leaves one complete lane in each step, another one each time.
    let whole: Vec<_> = all.iter().filter(|one| one.is("lane") && !children(&all, one).is_empty()).collect();
    assert_eq!((all.iter().filter(|one| one.is("lane")).count(), whole.len()), (36, 6));
    assert_eq!(whole.iter().filter_map(|one| one.get("volary.lane")).collect::<BTreeSet<_>>().len(), 6);
    assert_eq!(world.curve("traced"), world.curve("untraced"));
    assert_eq!(world.digest("traced"), world.digest("untraced"));
    let kept = std::fs::read_dir(world.path("runs/untraced/traces")).expect("a folder");
    let steps = kept
        .flatten()
        .filter(|file| text(&std::fs::read(file.path()).unwrap()).contains("\"name\":\"lane\""));
    assert_eq!(steps.count(), 0, "a run without sampled steps traces no lane");
}

/// Without a receiver, the run ends as usual, with one warning per process.
#[test]
fn an_unreachable_collector_is_one_warning() {
    let world = World::new();
    let unreachable = Collector::unreachable();
    traced(
        &world,
        &unreachable,
        "grpc",
        &["--set", "telemetry.sample_every=1", "--set", "training.steps=12"],
    );
    assert_eq!(world.metrics("tiny").len(), 12);
    for name in ["supervisor", "node-1", "node-2", "node-3"] {
        let log = std::fs::read_to_string(world.path(&format!("runs/tiny/logs/{name}.log"))).expect("a log");
        let warnings =
            log.lines().filter(|line| line.contains("traces are not exported; training continues")).count();
        assert_eq!(warnings, 1, "{name}: {log}");
        // The exporters' own crates log nothing.
        assert!(
            log.lines().filter(|line| line.contains(" WARN ") || line.contains(" ERROR ")).count() <= 2,
            "{log}"
        );
    }
    // The run stores its traces nevertheless.
    assert!(std::fs::read_dir(world.path("runs/tiny/traces")).expect("a folder").count() >= 12);
}

#[test]
fn a_death_is_a_recovery_linked_to_the_aborted_step() {
    let world = World::new();
    let script = "[[event]]\nat_step = 3\ndo = \"kill\"\nnode = \"node-2\"\n";
    std::fs::write(world.path("script.toml"), script).expect("a file");
    let args =
        ["--events", "script.toml", "--set", "training.steps=12", "--set", "telemetry.sample_every=1000"];
    world.run_train(&[&THREE[..], &args].concat());
    let show = |args: &[&str]| {
        let output =
            volary().arg("trace").arg(world.path("runs/tiny")).args(args).output().expect("the binary");
        assert!(output.status.success(), "{}", text(&output.stderr));
        text(&output.stdout)
    };
    let list = show(&[]);
    assert!(list.lines().any(|line| line.contains("recovery") && line.contains("detected_ms=")), "{list}");
    assert!(
        list.lines().any(|line| line.contains("membership") && line.contains("membership_change=lost")),
        "{list}"
    );
    let is_aborted = |line: &&str| line.contains("FAILED") && !line.contains("checkpoint");
    let aborted = list.lines().find(is_aborted).unwrap_or_else(|| panic!("{list}"));
    let step = aborted.split_whitespace().next().expect("a step");
    // Its second attempt is traced completely, since the cluster changed.
    let tree = show(&["--step", step]);
    assert!(
        tree.contains("sampling_reason=\"the cluster changed\"") && tree.contains("dense.forward"),
        "{tree}"
    );
    let chrome: serde_json::Value = serde_json::from_str(&show(&["--format", "chrome"])).expect("JSON");
    assert!(chrome["traceEvents"].as_array().expect("events").len() > 100);
    let page = show(&["--step", step, "--format", "html"]);
    assert!(page.starts_with("<!DOCTYPE html>") && page.contains("volary.token.text"));
    assert!(
        world.fails(&["trace", "runs/tiny", "--token", "no such token"]).contains("sampled tokens include")
    );
    assert!(world.fails(&["trace", "runs/tiny", "--step", "11"]).contains("step 11 was not traced"));
}

fn pipeline(endpoint: Option<String>, store: volary_telemetry::StoreSpans) -> Pipeline {
    let options = TelemetryOptions { endpoint, ..TelemetryOptions::default() };
    let identity = Identity { run: "tiny".into(), process: "node-1".into(), device: None };
    Pipeline::start(&options, &identity, store).expect("a thread")
}

#[test]
fn more_spans_than_one_request_holds_arrive_without_a_flush() {
    let collector = Collector::grpc();
    let pipeline = pipeline(Some(collector.endpoint.clone()), Box::new(|_| 0));
    let tracer = pipeline.tracer();
    let count = 4 * BATCH_SPANS + 7;
    (0..count).for_each(|_| drop(tracer.root("step", None)));
    let counts = pipeline.counts();
    common::until("all spans come", Duration::from_secs(20), || {
        counts.exported.load(Relaxed) == count as u64
    });
    assert_eq!((collector.spans().len(), counts.dropped.load(Relaxed)), (count, 0));
}

/// Creating spans never waits for storing them, and every span is accounted for.
#[test]
fn a_burst_beyond_the_queue_is_dropped_and_counted_without_waiting() {
    let slow = |_| {
        std::thread::sleep(Duration::from_secs(3));
        0
    };
    let pipeline = pipeline(None, Box::new(slow));
    let tracer = pipeline.tracer();
    let (began, count) = (Instant::now(), 5 * QUEUE_SPANS);
    (0..count).for_each(|_| drop(tracer.root("step", None)));
    assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
    let counts = pipeline.counts();
    assert!(counts.dropped.load(Relaxed) >= 2 * QUEUE_SPANS as u64);
    common::until("every span is accounted for", Duration::from_secs(30), || {
        counts.stored.load(Relaxed) + counts.dropped.load(Relaxed) == count as u64
    });
}

/// rotel, a third-party collector, if `make setup-tools` installed it.
fn rotel() -> Option<PathBuf> {
    let tools = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.tools/lib");
    let pythons = std::fs::read_dir(tools).ok()?.flatten();
    pythons.map(|python| python.path().join("site-packages/rotel/rotel-agent")).find(|path| path.is_file())
}

#[test]
fn a_third_party_collector_accepts_the_traces() {
    let Some(program) = rotel() else {
        return eprintln!("skipped: no trace collector on this machine (make setup-tools)");
    };
    let world = World::new();
    let (grpc, http) = (common::free_port(), common::free_port());
    let out = world.path("collector.txt");
    let collector = Command::new(program)
        .args([
            "start",
            "--exporter",
            "blackhole",
            "--debug-log",
            "traces",
            "--debug-log-verbosity",
            "detailed",
        ])
        .args(["--otlp-grpc-endpoint", &grpc.to_string(), "--otlp-http-endpoint", &http.to_string()])
        .stdin(Stdio::null())
        .stdout(std::fs::File::create(&out).expect("a file"))
        .stderr(std::fs::File::create(world.path("collector.err")).expect("a file"))
        .spawn()
        .expect("the collector");
    let _guard = common::Guard(collector);
    common::until("the collector listens", Duration::from_secs(20), || {
        std::net::TcpStream::connect(grpc).is_ok()
    });
    let endpoint = Collector::at(grpc);
    traced(&world, &endpoint, "grpc", &["--set", "telemetry.sample_every=2"]);
    let printed = || {
        std::fs::read_to_string(&out).unwrap_or_default()
            + &std::fs::read_to_string(world.path("collector.err")).unwrap_or_default()
    };
    common::until("the collector prints the spans", Duration::from_secs(20), || {
        ["expert.forward", "router.dispatch", "volary.token.text"].iter().all(|name| printed().contains(name))
    });
}
