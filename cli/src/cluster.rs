//! The processes of a run on this machine: their starts and restarts, and the actions of a script on them.

use crate::limits::{
    HALTED_PAUSE, HALTED_STATUS, LISTEN_MAX, LISTEN_POLL, NODE_END_MAX, SUPERVISOR_END_MAX,
    SUPERVISOR_RESTARTS_MAX,
};
use crate::node_process::NodeProcess;
use crate::output;
use crate::process::{Process, Signal};
use crate::rundir::{self, Contact};
use crate::script::{Action, node_name};
use crate::signals::{Interrupted, Interrupts};
use crate::units::Size;
use anyhow::{Context, bail};
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};
use volary_storage::RunDir;
use volary_transport::AccessRole;

/// The exit status of a process that panicked.
const PANICKED: i32 = 101;

/// The settings of a cluster on this machine.
#[derive(Clone, Debug)]
pub struct LaunchOptions {
    /// Nodes at the start.
    pub nodes: usize,
    /// The devices of the nodes, assigned round-robin.
    pub devices: Vec<String>,
    /// The threads of each node; if absent, the cores are divided among nodes on the CPU, and a node on a GPU
    /// has one.
    pub threads: Option<usize>,
    /// The memory limits of the nodes, assigned round-robin; what the machine has free if empty.
    pub memory: Vec<Size>,
    /// The zones of the nodes, assigned round-robin.
    pub zones: Vec<String>,
    /// Whether a node that dies restarts.
    pub respawn: bool,
    /// The address of the dashboard; by default any free port of this machine.
    pub http: Option<String>,
    /// Whether the dashboard and the nodes' metrics are served.
    pub serves_http: bool,
    /// Whether the script injects faults into nodes.
    pub injects_faults: bool,
    /// What the supervisor is told of the state that it finds.
    pub starting: Starting,
}

/// What a supervisor is told of the state that it finds.
#[derive(Clone, Copy, Debug, Default)]
pub struct Starting {
    /// No node of the run is alive.
    pub nodes_are_gone: bool,
    /// The run may go back past a damaged checkpoint.
    pub may_go_back: bool,
}

/// The supervisor and the nodes.
#[derive(Debug)]
pub struct Cluster {
    options: LaunchOptions,
    dir: RunDir,
    logs: PathBuf,
    /// The supervisor's address, which a restart keeps.
    address: String,
    dashboard: Dashboard,
    supervisor: Process,
    supervisor_restarts: u32,
    nodes: Vec<NodeProcess>,
    /// Suspended nodes by their index, and the times at which they continue.
    suspended: Vec<(Instant, usize)>,
    /// Notes of background threads.
    notes: (Sender<String>, Receiver<String>),
}

impl Cluster {
    /// Starts the supervisor and, as soon as it listens, the nodes.
    ///
    /// # Errors
    /// When one of them does not start.
    pub fn start(options: LaunchOptions, dir: &RunDir, interrupts: &Interrupts) -> anyhow::Result<Self> {
        let logs = dir.root().join("logs");
        std::fs::create_dir_all(&logs).with_context(|| logs.display().to_string())?;
        let dashboard = Dashboard { address: options.http.clone(), served: options.serves_http };
        let mut supervisor = start_supervisor(dir, &logs, "127.0.0.1:0", &dashboard, options.starting)?;
        let Contact { address, http, .. } = wait_for_contact(&mut supervisor, dir, interrupts)?;
        let mut cluster = Self {
            dashboard: Dashboard { address: http, ..dashboard },
            options,
            dir: dir.clone(),
            logs,
            address,
            supervisor,
            supervisor_restarts: 0,
            nodes: Vec::new(),
            suspended: Vec::new(),
            notes: channel(),
        };
        for _ in 0..cluster.options.nodes {
            cluster.join()?;
        }
        Ok(cluster)
    }

    /// The address of the dashboard, if it is served.
    #[must_use]
    pub fn dashboard(&self) -> Option<&str> {
        self.dashboard.address.as_deref()
    }

    /// Starts one more node.
    fn join(&mut self) -> anyhow::Result<()> {
        let process = self.start_node(self.nodes.len())?;
        self.nodes.push(NodeProcess::new(process));
        Ok(())
    }

    /// Starts the node with an index, from 0; the first one is `node-1`.
    fn start_node(&self, index: usize) -> anyhow::Result<Process> {
        fn round_robin<T>(all: &[T], index: usize) -> Option<&T> {
            all.get(index % all.len().max(1))
        }
        let name = &node_name(index + 1);
        let memory = round_robin(&self.options.memory, index).map(|size| format!("--memory={}", size.0));
        let zone = round_robin(&self.options.zones, index).map(|zone| format!("--zone={zone}"));
        let device = round_robin(&self.options.devices, index).map_or("cpu", String::as_str);
        let threads = self.threads(device).map(|threads| format!("--threads={threads}"));
        let machine: Vec<&str> = memory.iter().chain(&zone).chain(&threads).map(String::as_str).collect();
        let token = rundir::token_file(&self.dir, AccessRole::Node);
        let join = ["-v", "node", "--tethered", "--join", &self.address, "--name", name];
        let device = ["--device", device, "--token-file"];
        let faults: &[&str] = if self.options.injects_faults { &["--inject-faults"] } else { &[] };
        let http: &[&str] = if self.dashboard.served { &[] } else { &["--no-http"] };
        let words = [faults, http, &machine, &join[2..], &device].concat();
        let words = join[..2].iter().chain(&words).map(OsStr::new).chain([token.as_os_str()]);
        Process::start(name, &self.logs, &words.collect::<Vec<_>>())
    }

    /// The threads of a node on a device, if they are not what the node itself would choose.
    fn threads(&self, device: &str) -> Option<usize> {
        let is_cpu = device == "cpu" || device == "auto" && volary_model::device::cuda_devices() == 0;
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        self.options.threads.or_else(|| is_cpu.then(|| (cores / self.options.nodes).max(1)))
    }

    /// What the supervisor tells a person since the last call.
    #[must_use]
    pub fn alerts(&self) -> Vec<String> {
        self.supervisor.output_lines()
    }

    /// The supervisor's exit status, if it has ended.
    pub fn supervisor_exit_status(&mut self) -> Option<ExitStatus> {
        self.supervisor.exit_status()
    }

    /// Restarts a supervisor that died, at the address that the nodes know. Returns a note.
    ///
    /// # Errors
    /// When it ended by itself, died too often, or does not start.
    pub fn restart_supervisor(&mut self, status: ExitStatus) -> anyhow::Result<String> {
        let halted = status.code() == Some(HALTED_STATUS.into());
        if !is_death(status) && !halted {
            bail!("{}", self.supervisor.last_error());
        }
        if halted {
            std::thread::sleep(HALTED_PAUSE * self.supervisor_restarts);
        }
        if self.supervisor_restarts == SUPERVISOR_RESTARTS_MAX {
            bail!(
                "the supervisor died ({status}) after {SUPERVISOR_RESTARTS_MAX} restarts; its log is {}",
                self.supervisor.log.display()
            );
        }
        self.supervisor_restarts += 1;
        let starting = Starting { nodes_are_gone: false, ..self.options.starting };
        self.supervisor = start_supervisor(&self.dir, &self.logs, &self.address, &self.dashboard, starting)?;
        Ok(format!("the supervisor ended ({status}): restarted at {}", self.address))
    }

    /// Performs an action of a script. Returns a note if that is not possible.
    ///
    /// # Errors
    /// When a node that joins does not start.
    pub fn perform(&mut self, action: &Action) -> anyhow::Result<Option<String>> {
        let performed = match action {
            Action::Join {} => self.join().map(|()| true)?,
            Action::KillSupervisor {} => self.supervisor.signal(Signal::KILL),
            Action::Kill { node } => self.node(node).is_some_and(|node| node.process.signal(Signal::KILL)),
            Action::Stop { node, for_seconds } => self.suspend(node, *for_seconds),
            Action::Drain { node } => {
                drain(self.dir.root(), node, self.notes.0.clone());
                true
            }
            Action::Corrupt { .. } | Action::Partition { .. } | Action::Cut { .. } | Action::Lose { .. } => {
                self.inject_fault(action)
            }
        };
        Ok((!performed).then(|| format!("cannot {action}: the process has ended")))
    }

    /// Kills a node whose machine is taken away.
    pub fn take_away(&mut self, name: &str) {
        if let Some(node) = self.node(name) {
            node.take_away();
        }
    }

    fn node(&mut self, name: &str) -> Option<&mut NodeProcess> {
        self.nodes.iter_mut().find(|node| node.process.name == name)
    }

    /// Suspends a node; [`Cluster::poll`] lets it continue.
    fn suspend(&mut self, name: &str, for_seconds: f64) -> bool {
        let Some(index) = self.nodes.iter().position(|node| node.process.name == name) else { return false };
        let suspended = self.nodes[index].process.signal(Signal::STOP);
        if suspended {
            self.suspended.push((Instant::now() + Duration::from_secs_f64(for_seconds), index));
        }
        suspended
    }

    fn inject_fault(&mut self, action: &Action) -> bool {
        let Some((name, fault)) = action.node_fault() else { return false };
        self.node(name).is_some_and(|node| node.process.send_line(&fault.to_string()).is_ok())
    }

    /// Restarts nodes and lets suspended ones continue when it is time. Returns notes about changes.
    ///
    /// # Errors
    /// When a node does not restart.
    pub fn poll(&mut self) -> anyhow::Result<Vec<String>> {
        self.continue_nodes(|due| due <= Instant::now());
        let mut notes: Vec<String> = self.notes.1.try_iter().collect();
        for index in 0..self.nodes.len() {
            if self.nodes[index].is_restart_due() {
                let process = self.start_node(index)?;
                self.nodes[index].restarted(process);
            }
            notes.extend(self.nodes[index].poll(self.options.respawn));
        }
        Ok(notes)
    }

    /// Lets the suspended nodes continue that are due.
    fn continue_nodes(&mut self, is_due: impl Fn(Instant) -> bool) {
        let (due, later): (Vec<_>, Vec<_>) = self.suspended.iter().partition(|(until, _)| is_due(*until));
        self.suspended = later;
        for (_, index) in due {
            // A node that was suspended twice continues at the later time.
            if self.suspended.iter().all(|(_, other)| *other != index) {
                self.nodes[index].process.signal(Signal::CONT);
            }
        }
    }

    /// Whether a node is suspended.
    #[must_use]
    pub fn has_suspended_nodes(&self) -> bool {
        !self.suspended.is_empty()
    }

    /// Whether no node is left and none will restart.
    #[must_use]
    pub fn is_deserted(&self) -> bool {
        self.nodes.iter().all(NodeProcess::is_gone)
    }

    /// The last error of the first node.
    #[must_use]
    pub fn last_error(&self) -> String {
        self.nodes.first().map(|node| node.process.last_error()).unwrap_or_default()
    }

    /// Waits until all processes have ended, and kills those that take too long.
    pub fn end(&mut self) {
        self.continue_nodes(|_| true);
        self.supervisor.wait_or_kill(SUPERVISOR_END_MAX);
        for node in &mut self.nodes {
            node.process.wait_or_kill(NODE_END_MAX);
        }
    }
}

/// Whether a process was killed or panicked, instead of ending by itself.
fn is_death(status: ExitStatus) -> bool {
    status.code().is_none_or(|code| code == PANICKED)
}

/// The dashboard of a supervisor.
#[derive(Clone, Debug)]
struct Dashboard {
    address: Option<String>,
    served: bool,
}

fn start_supervisor(
    dir: &RunDir,
    logs: &Path,
    listen: &str,
    dashboard: &Dashboard,
    starting: Starting,
) -> anyhow::Result<Process> {
    // Paths are bytes.
    let config = dir.config();
    let mut args: Vec<&OsStr> = ["-v", "supervisor"].map(OsStr::new).to_vec();
    args.extend([config.as_os_str(), "--dir".as_ref(), dir.root().as_os_str()]);
    args.extend(["--listen", listen, "--tethered"].map(OsStr::new));
    match &dashboard.address {
        _ if !dashboard.served => args.push("--no-http".as_ref()),
        Some(address) => args.extend(["--http", address].map(OsStr::new)),
        None => {}
    }
    if starting.nodes_are_gone {
        args.push("--nodes-are-gone".as_ref());
    }
    if starting.may_go_back {
        args.push("--go-back".as_ref());
    }
    // The contact of an earlier supervisor must not be taken for that of the new one.
    let _ = std::fs::remove_file(dir.supervisor());
    Process::start("supervisor", logs, &args)
}

fn wait_for_contact(
    supervisor: &mut Process,
    dir: &RunDir,
    interrupts: &Interrupts,
) -> anyhow::Result<Contact> {
    let start = Instant::now();
    while start.elapsed() < LISTEN_MAX {
        if let Some(contact) = rundir::contact(dir).filter(|contact| contact.pid == supervisor.pid()) {
            return Ok(contact);
        }
        if supervisor.exit_status().is_some() {
            bail!("{}", supervisor.last_error());
        }
        if interrupts.is_interrupted() {
            return Err(Interrupted("the supervisor was starting").into());
        }
        std::thread::sleep(LISTEN_POLL);
    }
    bail!(
        "the supervisor did not listen within {} s; its log is {}",
        LISTEN_MAX.as_secs(),
        supervisor.log.display()
    )
}

/// Drains a node in the background, which takes as long as the copies to other nodes. A failure becomes a
/// note.
fn drain(dir: &Path, node: &str, notes: Sender<String>) {
    let (dir, node) = (dir.to_path_buf(), node.to_owned());
    std::thread::spawn(move || {
        rundir::wait_until_listening(&dir);
        if let Err(error) = run_drain(&dir, &node) {
            // The receiver is gone when the run has ended meanwhile.
            let _ = notes.send(format!("drain {node}: {}", output::with_causes(&error)));
        }
    });
}

/// Runs `volary drain`.
fn run_drain(dir: &Path, node: &str) -> anyhow::Result<()> {
    let program = std::env::current_exe().context("the path of this program")?;
    let mut command = Command::new(program);
    let output = command.args(["drain", node, "--dir"]).arg(dir).stdin(Stdio::null()).output()?;
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        let mut lines = stderr.lines().filter(|line| !line.trim().is_empty());
        let line = lines.clone().find_map(|line| line.strip_prefix("volary: ")).or_else(|| lines.next());
        bail!("{}", line.unwrap_or("it failed without an error"));
    }
    Ok(())
}
