//! The processes of a run on this machine: who is started, who is started again, and what a script does to them.

use crate::local::{Process, Signal};
use crate::member::Member;
use crate::rundir::{self, Contact, LISTEN_LOOK_EVERY, LISTEN_MAX};
use crate::script::{Action, node_name};
use crate::units::Size;
use anyhow::{Context, bail};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};
use volary_storage::RunDir;

/// How often a supervisor that died is started again.
pub const SUPERVISOR_RESTARTS_MAX: u32 = 16;
/// How long the supervisor may take to end.
const SUPERVISOR_END_MAX: Duration = Duration::from_secs(10);
/// How long a node may take to end once its supervisor has; it has nothing to keep.
const NODE_END_MAX: Duration = Duration::from_secs(2);
/// With this a process ends that panicked.
const PANICKED: i32 = 101;

/// What a cluster is started with.
#[derive(Clone, Debug)]
pub struct ClusterOptions {
    /// Nodes at the start.
    pub nodes: usize,
    /// Device of each node.
    pub device: String,
    /// Threads of each node.
    pub threads: usize,
    /// Memory that each node may use, by turns; what the machine has left where there is none.
    pub memory: Vec<Size>,
    /// The nodes' zones, by turns.
    pub zones: Vec<String>,
    /// Whether a node that ends unexpectedly is started again.
    pub respawn: bool,
    /// Where the page is served; wherever there is room when left out.
    pub http: Option<String>,
    /// Whether there is a page, and figures of the nodes.
    pub serves_http: bool,
    /// Whether a script disturbs the nodes' network.
    pub disturbed: bool,
    /// Whether the run went on before, with nodes that live no more.
    pub nodes_are_gone: bool,
}

/// The supervisor and the nodes.
#[derive(Debug)]
pub struct Cluster {
    options: ClusterOptions,
    dir: RunDir,
    logs: PathBuf,
    /// Where the supervisor listens, also when it is started again.
    address: String,
    page: Page,
    supervisor: Process,
    supervisor_restarts: u32,
    nodes: Vec<Member>,
    /// Nodes that stand still, and when they go on.
    stopped: Vec<(Instant, usize)>,
    /// What threads in the background have to say.
    notes: (Sender<String>, Receiver<String>),
}

impl Cluster {
    /// Starts the supervisor and, when it listens, the nodes.
    ///
    /// # Errors
    /// When one of them does not start.
    pub fn start(options: ClusterOptions, dir: &RunDir) -> anyhow::Result<Self> {
        let logs = dir.root().join("logs");
        std::fs::create_dir_all(&logs).with_context(|| logs.display().to_string())?;
        let page = Page { address: options.http.clone(), served: options.serves_http };
        let mut supervisor = start_supervisor(dir, &logs, "127.0.0.1:0", &page, options.nodes_are_gone)?;
        let Contact { address, http, .. } = wait_for_contact(&mut supervisor, dir)?;
        let mut cluster = Self {
            page: Page { address: http, ..page },
            options,
            dir: dir.clone(),
            logs,
            address,
            supervisor,
            supervisor_restarts: 0,
            nodes: Vec::new(),
            stopped: Vec::new(),
            notes: channel(),
        };
        for _ in 0..cluster.options.nodes {
            cluster.join()?;
        }
        Ok(cluster)
    }

    /// Where the page is, if there is one.
    #[must_use]
    pub fn page(&self) -> Option<&str> {
        self.page.address.as_deref()
    }

    /// Starts one more node.
    fn join(&mut self) -> anyhow::Result<()> {
        let process = self.start_node(self.nodes.len())?;
        self.nodes.push(Member::new(process));
        Ok(())
    }

    /// Starts the node in one place: the first one is `node-1`.
    fn start_node(&self, place: usize) -> anyhow::Result<Process> {
        fn turn<T>(all: &[T], place: usize) -> Option<&T> {
            all.get(place % all.len().max(1))
        }
        let name = &node_name(place + 1);
        let memory = turn(&self.options.memory, place).map(|size| format!("--memory={}", size.0));
        let zone = turn(&self.options.zones, place).map(|zone| format!("--zone={zone}"));
        let site: Vec<&str> = memory.iter().chain(&zone).map(String::as_str).collect();
        let (threads, token) =
            (self.options.threads.to_string(), rundir::node_token(&self.dir).display().to_string());
        let words = ["-v", "node", "--tethered", "--join", &self.address, "--name", name];
        let more = ["--device", &self.options.device, "--threads", &threads, "--token-file", &token];
        let hook: &[&str] = if self.options.disturbed { &["--disturbed"] } else { &[] };
        let http: &[&str] = if self.page.served { &[] } else { &["--no-http"] };
        Process::start(name, &self.logs, &[words.as_slice(), &more, hook, http, &site].concat())
    }

    /// How the supervisor ended, if it did.
    pub fn supervisor_ended(&mut self) -> Option<ExitStatus> {
        self.supervisor.ended()
    }

    /// Starts a supervisor that died, at the address where the nodes look for it. Returns what there is to say.
    ///
    /// # Errors
    /// When it did not die but ended by itself, when it died too often, or when it does not start.
    pub fn restart_supervisor(&mut self, status: ExitStatus) -> anyhow::Result<String> {
        if !died(status) {
            bail!("{}", self.supervisor.reason());
        }
        if self.supervisor_restarts == SUPERVISOR_RESTARTS_MAX {
            bail!(
                "the supervisor died ({status}) after it was started again {SUPERVISOR_RESTARTS_MAX} times; its log is {}",
                self.supervisor.log.display()
            );
        }
        self.supervisor_restarts += 1;
        self.supervisor = start_supervisor(&self.dir, &self.logs, &self.address, &self.page, false)?;
        Ok(format!("the supervisor ended ({status}): started again at {}", self.address))
    }

    /// Does what a script says. Returns what there is to say besides: that it could not be done.
    ///
    /// # Errors
    /// When a node that joins does not start.
    pub fn act(&mut self, action: &Action) -> anyhow::Result<Option<String>> {
        let done = match action {
            Action::Join {} => self.join().map(|()| true)?,
            Action::KillSupervisor {} => self.supervisor.signal(Signal::KILL),
            Action::Kill { node } => self.node(node).is_some_and(|node| node.process.signal(Signal::KILL)),
            Action::Stop { node, for_seconds } => self.stop(node, *for_seconds),
            Action::Drain { node } => {
                drain(self.dir.root(), node, self.notes.0.clone());
                true
            }
            Action::Partition { .. } | Action::Cut { .. } | Action::Lose { .. } => self.disturb(action),
        };
        Ok((!done).then(|| format!("could not {action}: the process is not there")))
    }

    fn node(&mut self, name: &str) -> Option<&mut Member> {
        self.nodes.iter_mut().find(|node| node.process.name == name)
    }

    /// Lets a node stand still; [`Cluster::look`] lets it go on.
    fn stop(&mut self, name: &str, for_seconds: f64) -> bool {
        let Some(index) = self.nodes.iter().position(|node| node.process.name == name) else { return false };
        let stopped = self.nodes[index].process.signal(Signal::STOP);
        if stopped {
            self.stopped.push((Instant::now() + Duration::from_secs_f64(for_seconds), index));
        }
        stopped
    }

    fn disturb(&mut self, action: &Action) -> bool {
        let Some((name, disturbance)) = action.disturbance() else { return false };
        self.node(name).is_some_and(|node| node.process.tell(&disturbance.to_string()).is_ok())
    }

    /// Sees to the nodes: those that ended, those that start again, those that go on. Returns what there is to say.
    ///
    /// # Errors
    /// When a node does not start again.
    pub fn look(&mut self) -> anyhow::Result<Vec<String>> {
        self.go_on(|due| due <= Instant::now());
        let mut said: Vec<String> = self.notes.1.try_iter().collect();
        for index in 0..self.nodes.len() {
            if self.nodes[index].may_start_again() {
                let process = self.start_node(index)?;
                self.nodes[index].start_again(process);
            }
            said.extend(self.nodes[index].look(self.options.respawn));
        }
        Ok(said)
    }

    /// Lets the stopped nodes that are due go on.
    fn go_on(&mut self, due: impl Fn(Instant) -> bool) {
        let (now, later) = self.stopped.iter().partition(|(until, _)| due(*until));
        self.stopped = later;
        let now: Vec<(Instant, usize)> = now;
        for (_, index) in now {
            // A node that was stopped twice goes on at the later time.
            if self.stopped.iter().all(|(_, other)| *other != index) {
                self.nodes[index].process.signal(Signal::CONT);
            }
        }
    }

    /// Whether a node stands still and must go on at a time.
    #[must_use]
    pub fn is_timed(&self) -> bool {
        !self.stopped.is_empty()
    }

    /// Whether no node is left, and none will start by itself.
    #[must_use]
    pub fn is_deserted(&self) -> bool {
        self.nodes.iter().all(Member::is_gone)
    }

    /// What the first node said last.
    #[must_use]
    pub fn last_words(&self) -> String {
        self.nodes.first().map(|node| node.process.reason()).unwrap_or_default()
    }

    /// Waits until all have ended; whoever takes too long is killed.
    pub fn end(&mut self) {
        self.go_on(|_| true);
        self.supervisor.wait_or_kill(SUPERVISOR_END_MAX);
        for node in &mut self.nodes {
            node.process.wait_or_kill(NODE_END_MAX);
        }
    }
}

/// Whether a process was killed or panicked, rather than ended by itself.
fn died(status: ExitStatus) -> bool {
    status.code().is_none_or(|code| code == PANICKED)
}

/// Where a supervisor serves its page.
#[derive(Clone, Debug)]
struct Page {
    address: Option<String>,
    served: bool,
}

fn start_supervisor(
    dir: &RunDir,
    logs: &Path,
    listen: &str,
    page: &Page,
    gone: bool,
) -> anyhow::Result<Process> {
    let (config, root) = (dir.config().display().to_string(), dir.root().display().to_string());
    let mut words = vec!["-v", "supervisor", &config, "--listen", listen, "--tethered", "--dir", &root];
    match &page.address {
        _ if !page.served => words.push("--no-http"),
        Some(address) => words.extend(["--http", address]),
        None => {}
    }
    if gone {
        words.push("--nodes-are-gone");
    }
    // A contact from before would be taken for the new one's.
    let _ = std::fs::remove_file(dir.supervisor());
    Process::start("supervisor", logs, &words)
}

fn wait_for_contact(supervisor: &mut Process, dir: &RunDir) -> anyhow::Result<Contact> {
    let start = Instant::now();
    while start.elapsed() < LISTEN_MAX {
        if let Some(contact) = rundir::contact(dir).filter(|contact| contact.pid == supervisor.pid()) {
            return Ok(contact);
        }
        if supervisor.ended().is_some() {
            bail!("{}", supervisor.reason());
        }
        std::thread::sleep(LISTEN_LOOK_EVERY);
    }
    bail!(
        "the supervisor did not listen within {} s; its log is {}",
        LISTEN_MAX.as_secs(),
        supervisor.log.display()
    )
}

/// Asks the supervisor to let a node go, in the background: it takes as long as others need to take over. A failure
/// becomes a note.
fn drain(dir: &Path, node: &str, notes: Sender<String>) {
    let (dir, node) = (dir.to_path_buf(), node.to_owned());
    std::thread::spawn(move || {
        rundir::wait_until_it_listens(&dir);
        if let Err(error) = drain_now(&dir, &node) {
            // Nobody listens when the run has ended meanwhile.
            let _ = notes.send(format!("drain {node}: {error:#}"));
        }
    });
}

fn drain_now(dir: &Path, node: &str) -> anyhow::Result<()> {
    let program = std::env::current_exe().context("this program's own path")?;
    let mut command = Command::new(program);
    let output = command.args(["drain", node, "--dir"]).arg(dir).stdin(Stdio::null()).output()?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let mut lines = said.lines().filter(|line| !line.trim().is_empty());
        let line = lines.clone().find_map(|line| line.strip_prefix("volary: ")).or_else(|| lines.next());
        bail!("{}", line.unwrap_or("it said nothing"));
    }
    Ok(())
}
