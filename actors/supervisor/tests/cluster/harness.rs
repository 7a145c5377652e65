//! A whole cluster of real actors in one process: a supervisor and nodes on a memory network, with a fake
//! backend.
//!
//! Each process has a runtime of its own, so that a kill ends all of its tasks at once, as `kill -9` does:
//! no message is sent and no file is written any more.

use crate::process::{Process, runtime};
use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use tokio::sync::{mpsc, oneshot};
use volary_core::Step;
use volary_core::architecture::{Architecture, presets};
use volary_core::machine::Settings;
use volary_core::options::{
    CheckpointOptions, ClusterOptions, TelemetryOptions, TrainingOptions, ValidationOptions,
};
use volary_data::{DataOptions, Dataset, SourceOptions};
use volary_node::testing::{FakeCompute, FakeDevice};
use volary_node::{NodeEnd, NodeOptions, run_node};
use volary_protocol::RunInfo;
use volary_protocol::operator::{OperatorReply, OperatorRequest, Status};
use volary_storage::{CheckpointReader, Digest, RunDir};
use volary_supervisor::{Door, RunEnd, SupervisorHandle, SupervisorOptions};
use volary_telemetry::metrics::{NodeMetrics, SupervisorMetrics};
use volary_transport::{AccessToken, memory};

/// The longest wait of a test for anything.
pub(crate) const LONG: Duration = Duration::from_secs(20);
const SEED: u64 = 11;
const VOCABULARY: usize = 300;

/// The settings of a small run: four layers of which two have four experts, six lanes in groups of two.
pub(crate) fn settings(steps: u64, nodes: usize) -> Settings {
    let mut architecture: Architecture = presets().swap_remove(1).architecture;
    (architecture.layers, architecture.experts, architecture.hidden) = (4, 4, 3);
    architecture.vocabulary = VOCABULARY;
    Settings {
        architecture,
        training: TrainingOptions {
            lanes: 6,
            lane_group: 2,
            sequences_per_lane: 1,
            sequence_length: 8,
            ..TrainingOptions::new(steps)
        },
        cluster: ClusterOptions {
            nodes,
            node_timeout_ms: 500,
            step_timeout_ms: 5_000,
            measure: false,
            ..ClusterOptions::default()
        },
        checkpoint: CheckpointOptions { every: 0, keep: 3, store: None },
        validation: ValidationOptions { every: 4, rounds: 2 },
        stay: false,
    }
}

/// The tokens of all runs, prepared once.
fn corpus() -> &'static Path {
    static CORPUS: OnceLock<TempDir> = OnceLock::new();
    let folder = CORPUS.get_or_init(|| {
        let folder = tempfile::tempdir().expect("a folder");
        let texts = folder.path().join("texts");
        std::fs::create_dir(&texts).expect("a folder");
        for number in 0..40 {
            let text =
                format!("lane {number} sends {} tokens to expert {} and back. ", number * 7, number % 5);
            std::fs::write(texts.join(format!("{number}.txt")), text.repeat(8)).expect("a file");
        }
        let options = DataOptions {
            vocabulary: VOCABULARY,
            validation_fraction: 0.1,
            cache: Some(folder.path().join("cache")),
            sources: vec![SourceOptions::new("texts", texts.display().to_string())],
            ..DataOptions::default()
        };
        volary_data::prepare(&options, 8, &folder.path().join("data"), &mut |_| {}).expect("tokens");
        folder
    });
    folder.path()
}

/// A node process.
pub(crate) struct Node {
    pub(crate) device: FakeDevice,
    process: Process,
    leave: mpsc::Sender<()>,
    end: oneshot::Receiver<Result<NodeEnd, String>>,
    address: SocketAddr,
}

/// The supervisor's process.
struct SupervisorProcess {
    process: Process,
    handle: SupervisorHandle,
    end: oneshot::Receiver<RunEnd>,
    address: SocketAddr,
}

/// A cluster on a memory network.
pub(crate) struct Cluster {
    network: memory::Network,
    folder: TempDir,
    settings: Settings,
    supervisor: Option<SupervisorProcess>,
    pub(crate) nodes: BTreeMap<String, Node>,
    named: u16,
    /// Memory of every node, in bytes.
    memory_bytes: u64,
}

impl Cluster {
    /// A supervisor and as many nodes, `node-1` and so on, as the settings ask for.
    pub(crate) fn start(settings: Settings) -> Self {
        Self::with_memory(settings, u64::MAX)
    }

    /// [`Cluster::start`] with nodes of so much memory, in bytes.
    pub(crate) fn with_memory(settings: Settings, memory_bytes: u64) -> Self {
        let mut cluster = Self {
            network: memory::Network::new(),
            folder: tempfile::tempdir().expect("a folder"),
            settings,
            supervisor: None,
            nodes: BTreeMap::new(),
            named: 0,
            memory_bytes,
        };
        cluster.start_supervisor();
        for _ in 0..cluster.settings.cluster.nodes {
            cluster.join();
        }
        cluster
    }

    pub(crate) fn dir(&self) -> RunDir {
        RunDir::create(self.folder.path().join("run")).expect("a run directory")
    }

    /// Starts the supervisor, on the state that is there.
    pub(crate) fn start_supervisor(&mut self) {
        self.start_supervisor_after(Duration::ZERO);
    }

    /// Starts a supervisor that takes so long before it admits anybody.
    pub(crate) fn start_supervisor_after(&mut self, delay: Duration) {
        let Settings { architecture, training, cluster, .. } = &self.settings;
        let run = RunInfo {
            run: "test".into(),
            seed: SEED,
            architecture: architecture.clone(),
            training: training.clone(),
            node_timeout_ms: cluster.node_timeout_ms,
            supervisor_timeout_ms: cluster.supervisor_timeout_ms,
            measure: cluster.measure,
            telemetry: TelemetryOptions { sample_every: 0, ..TelemetryOptions::default() },
        };
        let options = SupervisorOptions {
            network: self.network.handle(),
            run,
            settings: self.settings.clone(),
            dir: self.dir(),
            config_hash: Digest::of(b"test"),
            listen: (Ipv4Addr::LOCALHOST, 9_000).into(),
            metrics: Arc::new(SupervisorMetrics::new()),
            identity: None,
            certificate_lifetime: Duration::from_secs(3_600),
            nodes_are_gone: false,
            may_go_back: false,
        };
        let lanes = training.lanes;
        let data = corpus().join("data");
        let dataset =
            Dataset::open(&data, training.sequence_length, training.sequences_per_lane, lanes, SEED);
        let runtime = runtime();
        let started = runtime.block_on(async {
            let door = Door::open(options)?;
            tokio::time::sleep(delay).await;
            door.start(dataset.expect("tokens")).await
        });
        let supervisor = started.expect("a supervisor");
        let (handle, address) = (supervisor.handle(), supervisor.address());
        let (sender, end) = oneshot::channel();
        runtime.spawn(async move {
            drop(sender.send(supervisor.ended(std::future::pending()).await));
        });
        let process = Process::drive(runtime);
        self.supervisor = Some(SupervisorProcess { process, handle, end, address });
    }

    /// Starts a node under the next name.
    pub(crate) fn join(&mut self) -> String {
        self.named += 1;
        let name = format!("node-{}", self.named);
        self.start_node(&name, FakeDevice::default());
        name
    }

    /// Starts a node under the next name that announces an address where it does not listen.
    pub(crate) fn join_hidden(&mut self) -> String {
        self.named += 1;
        let name = format!("node-{}", self.named);
        self.start_process(&name, FakeDevice::default(), Some((Ipv4Addr::LOCALHOST, 9).into()));
        name
    }

    /// Starts a node process with a name and a device.
    pub(crate) fn start_node(&mut self, name: &str, device: FakeDevice) {
        self.start_process(name, device, None);
    }

    fn start_process(&mut self, name: &str, device: FakeDevice, advertise: Option<SocketAddr>) {
        let number: u16 = name.trim_start_matches("node-").parse().expect("a number");
        let address: SocketAddr = (Ipv4Addr::LOCALHOST, 10_000 + number).into();
        let token = self.dir().identity().join("node.token");
        let token: AccessToken =
            std::fs::read_to_string(token).expect("a token").trim().parse().expect("a token");
        let options = NodeOptions {
            network: self.network.handle(),
            supervisor: vec![(Ipv4Addr::LOCALHOST, 9_000).into()],
            supervisor_host: None,
            token,
            name: Some(name.to_owned()),
            listen: Some(address),
            advertise,
            device: "fake".into(),
            threads: 1,
            memory_bytes: self.memory_bytes,
            zone: String::new(),
            prepare_thread: || {},
            metrics: Arc::new(NodeMetrics::default()),
            http: None,
            faults: None,
        };
        let fake = device.clone();
        let make = move |run: &RunInfo| {
            let Architecture { hidden, experts, .. } = run.architecture;
            Ok(FakeCompute::new(hidden, experts, run.training.sequence_length, run.seed, fake))
        };
        let (leave, asked) = mpsc::channel(4);
        let (sender, end) = oneshot::channel();
        let runtime = runtime();
        runtime.spawn(async move {
            let ended = run_node(options, make, asked).await;
            drop(sender.send(ended.map_err(|error| error.to_string())));
        });
        let process = Process::drive(runtime);
        self.nodes.insert(name.to_owned(), Node { device, process, leave, end, address });
    }

    pub(crate) fn device(&self, name: &str) -> FakeDevice {
        self.nodes[name].device.clone()
    }

    /// Ends a node's process at once.
    pub(crate) fn kill(&mut self, name: &str) {
        let node = self.nodes.remove(name).expect("a node");
        let runtime = node.process.stop();
        self.network.crash(node.address);
        runtime.shutdown_background();
    }

    /// Ends the supervisor's process at once.
    pub(crate) fn kill_supervisor(&mut self) {
        let SupervisorProcess { process, handle, end, address } =
            self.supervisor.take().expect("a supervisor");
        let runtime = process.stop();
        self.network.crash(address);
        drop((handle, end));
        // The database's lock goes with the last of its tasks.
        runtime.shutdown_timeout(LONG);
    }

    /// Asks a node's process to leave, as SIGTERM does.
    pub(crate) fn ask_to_leave(&self, name: &str) {
        self.nodes[name].leave.try_send(()).expect("a request");
    }

    /// How a node's process ended.
    pub(crate) fn node_end(&mut self, name: &str) -> Result<NodeEnd, String> {
        let node = self.nodes.get_mut(name).expect("a node");
        let start = Instant::now();
        loop {
            match node.end.try_recv() {
                Ok(end) => return end,
                Err(error) => assert!(start.elapsed() < LONG, "{name} did not end: {error}"),
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    pub(crate) fn ask(&self, request: OperatorRequest) -> OperatorReply {
        let SupervisorProcess { process, handle, .. } = self.supervisor.as_ref().expect("a supervisor");
        process.block_on(handle.ask(request))
    }

    pub(crate) fn status(&self) -> Status {
        match self.ask(OperatorRequest::Status) {
            OperatorReply::Status(status) => *status,
            other => panic!("no status: {other:?}"),
        }
    }

    /// Waits until so many steps are committed.
    pub(crate) fn wait_for_step(&self, step: u64) {
        until(&format!("step {step}"), || self.lines("metrics").len() as u64 >= step);
    }

    /// Waits for the run's end, which must be good, and returns what it computed.
    pub(crate) fn finish(&mut self) -> Computed {
        let supervisor = self.supervisor.as_mut().expect("a supervisor");
        let start = Instant::now();
        let end = loop {
            match supervisor.end.try_recv() {
                Ok(end) => break end,
                Err(_) if start.elapsed() < LONG => std::thread::sleep(Duration::from_millis(1)),
                Err(_) => panic!("the run did not end:\n{}", self.lines("events").join("\n")),
            }
        };
        let events = self.lines("events").join("\n");
        assert!(matches!(end, RunEnd::Done { .. }), "{end:?}\n{events}");
        self.computed()
    }

    /// The losses of all steps and the digest of the last checkpoint.
    fn computed(&self) -> Computed {
        let value = |line: String| serde_json::from_str::<serde_json::Value>(&line).expect("JSON");
        let bits = |line: &serde_json::Value, key: &str| line[key].as_f64().expect("a number").to_bits();
        let losses = self.lines("metrics").into_iter().map(value).map(|line| {
            let step = Step(line["step"].as_u64().expect("a step"));
            (step, bits(&line, "loss"), bits(&line, "grad_norm"))
        });
        let losses = losses.collect();
        let reader = CheckpointReader::open(&self.dir()).expect("a reader");
        let step = reader.latest().expect("a list").expect("a checkpoint").step;
        let validation = self.lines("validation").into_iter().map(value).map(|line| bits(&line, "loss"));
        let validation = validation.collect();
        Computed { losses, validation, digest: reader.digest(step).expect("a digest").whole.to_string() }
    }

    /// The lines of `metrics.jsonl` or `events.jsonl`.
    pub(crate) fn lines(&self, file: &str) -> Vec<String> {
        let path = self.folder.path().join("run").join(format!("{file}.jsonl"));
        let text = std::fs::read_to_string(path).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    /// How often something happened.
    pub(crate) fn count(&self, event: &str) -> usize {
        let needle = format!("\"event\":\"{event}\"");
        self.lines("events").iter().filter(|line| line.contains(&needle)).count()
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let names: Vec<String> = self.nodes.keys().cloned().collect();
        names.iter().for_each(|name| self.kill(name));
        if let Some(supervisor) = self.supervisor.take() {
            supervisor.process.stop().shutdown_background();
        }
    }
}

/// What a run computed, bit for bit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Computed {
    /// Step, and the bits of its loss and gradient norm.
    pub(crate) losses: Vec<(Step, u64, u64)>,
    /// The bits of each validation loss.
    pub(crate) validation: Vec<u64>,
    pub(crate) digest: String,
}

/// Waits for something to become true.
pub(crate) fn until(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < LONG, "{what}: not within {LONG:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
}
