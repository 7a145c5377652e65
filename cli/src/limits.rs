//! All bounds of the commands: waits, retries, queues, and the sizes of files and pages.

use std::ops::RangeInclusive;
use std::time::Duration;

/// Bytes of a run's name.
pub const RUN_NAME_BYTES_MAX: usize = 100;
/// Bytes of a label of an access token.
pub const LABEL_BYTES_MAX: usize = 256;
/// A size in bytes, or a duration in seconds, on the command line or in a file.
pub const QUANTITY_MAX: f64 = 1e18;
/// A duration in seconds: longer ones are cut to some 300 years.
pub const DURATION_SECONDS_MAX: f64 = 1e10;
/// The lifetime of a node's certificate, in milliseconds: up to ten years.
pub const CERTIFICATE_LIFETIME_MS: RangeInclusive<u64> = 1_000..=315_360_000_000;
/// The time without any packet after which a node counts as lost, in milliseconds.
pub const NODE_TIMEOUT_MS: RangeInclusive<u64> = 100..=10_000;

/// The exit status of a supervisor that cannot go on for now, as on a full disk: sysexits' EX_TEMPFAIL. Its
/// nodes wait for its restart.
pub const HALTED_STATUS: u8 = 75;
/// The exit status of a command that a signal ended before its work was done, as of a shell's command that
/// died of SIGINT.
pub const INTERRUPTED_STATUS: u8 = 130;
/// The interval between two looks for a signal while work is done on another thread.
pub const SIGNAL_POLL: Duration = Duration::from_millis(50);
/// The wait before the restart of such a supervisor, times the restarts so far.
pub const HALTED_PAUSE: Duration = Duration::from_secs(1);
/// Restarts of a supervisor that died, in `volary train`.
pub const SUPERVISOR_RESTARTS_MAX: u32 = 16;
/// The longest wait for a supervisor to listen.
pub const LISTEN_MAX: Duration = Duration::from_secs(60);
/// The interval between two looks for a supervisor that listens.
pub const LISTEN_POLL: Duration = Duration::from_millis(10);
/// The longest wait for a supervisor to end; it is killed after that.
pub const SUPERVISOR_END_MAX: Duration = Duration::from_secs(10);
/// The longest wait for a node to end after its supervisor; it holds nothing that must be kept.
pub const NODE_END_MAX: Duration = Duration::from_secs(2);
/// The interval between two looks at a process that should end.
pub const END_POLL: Duration = Duration::from_millis(20);
/// The longest wait for the last checkpoint of a supervisor that will be restarted.
pub const LAST_CHECKPOINT_MAX: Duration = Duration::from_secs(240);

/// Restarts of one node that died, with `--respawn`.
pub const NODE_RESTARTS_MAX: u32 = 100;
/// The shortest time between two starts of one node.
pub const NODE_START_INTERVAL: Duration = Duration::from_secs(1);
/// The time after the end of a node until it counts as gone: at the end of a run all nodes end shortly before
/// the supervisor.
pub const NODE_GONE_AFTER: Duration = Duration::from_secs(1);
/// The time without any node until a run is given up, for the same reason.
pub const DESERTED_AFTER: Duration = Duration::from_secs(1);

/// The interval between two looks at a run on this machine.
pub const RUN_POLL: Duration = Duration::from_millis(50);
/// The same while an event of the script is due at a step or a time.
pub const RUN_POLL_SCRIPTED: Duration = Duration::from_millis(5);
/// The interval between two progress lines where there is no terminal.
pub const PROGRESS_INTERVAL: Duration = Duration::from_secs(10);
/// The interval between two pictures of the spinner before the first step.
pub const SPINNER_INTERVAL: Duration = Duration::from_millis(200);
/// The interval between two looks at a node that drains.
pub const DRAIN_POLL: Duration = Duration::from_millis(500);
/// The interval between two looks at a process that is leaving.
pub const LEAVE_POLL: Duration = Duration::from_millis(100);

/// Events of a script. The fault commands to one node fit into its pipe, whether or not it reads them.
pub const SCRIPT_EVENTS_MAX: usize = 1000;
/// Bytes of a line on the standard input of a child process.
pub const LINE_BYTES_MAX: u64 = 1024;
/// Fault commands and signals that a node queues.
pub const COMMANDS_AHEAD: usize = 16;

/// Nodes of an inventory.
pub const INVENTORY_NODES_MAX: usize = 100_000;
/// Nodes of a cluster whose links `volary plan` lists one by one.
pub const PLAN_LINKS_MAX: usize = 64;
/// Links that the text of a plan shows.
pub const PLAN_LINKS_SHOWN: usize = 6;

/// The interval between two status requests of `volary top`.
pub const TOP_INTERVAL: Duration = Duration::from_secs(1);
/// Points of a curve of `volary top`.
pub const TOP_POINTS_MAX: usize = 600;
/// Layers of the load table of `volary top`.
pub const TOP_LAYERS_SHOWN: usize = 16;
/// Steps that an error of `volary trace` lists.
pub const TRACE_STEPS_SHOWN: usize = 10;
/// Token texts that an error of `volary trace` lists.
pub const TRACE_TOKENS_SHOWN: usize = 20;

/// The bounds of an HTTP server's connections.
#[derive(Clone, Copy, Debug)]
pub struct HttpBounds {
    /// Concurrent connections; a newcomer takes the place of the idlest one.
    pub in_all: usize,
    /// Concurrent connections from one address, so that one peer cannot occupy all; a newcomer takes the
    /// place of the idlest one.
    pub per_address: usize,
    /// The longest time in which a peer neither sends nor receives.
    pub idle: Duration,
}
/// Connections to the dashboard, the metrics and the probes.
pub const DASHBOARD_BOUNDS: HttpBounds =
    HttpBounds { in_all: 256, per_address: 64, idle: Duration::from_secs(60) };
/// Connections to a model: those of a proxy come from one address, and an answer may take minutes.
pub const MODEL_BOUNDS: HttpBounds =
    HttpBounds { in_all: 1024, per_address: 512, idle: Duration::from_secs(600) };
/// The body of a completion request, in bytes.
pub const REQUEST_BYTES_MAX: usize = 4 << 20;
/// The interval between two looks for a newer checkpoint.
pub const FOLLOW_POLL: Duration = Duration::from_millis(500);
/// Continuations that a server computes at a time.
pub const SERVED_SLOTS_MAX: u64 = 1024;
/// Continuations that `volary generate` computes side by side.
pub const GENERATED_SLOTS_MAX: usize = 16;
/// Completion requests that the computing thread has not looked at yet.
pub const SERVED_ORDERS_MAX: usize = 256;
/// Continuations of one completion request.
pub const CHOICES_MAX: u64 = 128;
/// The most likely tokens that are reported with each token.
pub const LOGPROBS_MAX: u64 = 20;
/// Lines of a process's standard output that wait to be shown; more are dropped.
pub const OUTPUT_LINES_AHEAD: usize = 1_000;
/// The number of open files below which a process warns: a checkpoint and links to many peers need them.
pub const OPEN_FILES_MIN: u64 = 256;
/// The pause after a failed accept.
pub const HTTP_ACCEPT_RETRY: Duration = Duration::from_millis(50);
/// Concurrent live streams of the dashboard.
pub const DASHBOARD_STREAMS_MAX: usize = 64;
/// The interval between two status messages on a live stream.
pub const DASHBOARD_STATUS_INTERVAL: Duration = Duration::from_secs(1);
/// Points of a curve of the dashboard.
pub const DASHBOARD_POINTS_MAX: usize = 2000;
/// Events of the dashboard.
pub const DASHBOARD_EVENTS_MAX: usize = 500;

/// Bytes in flight in the fuzz target of HTTP requests.
pub const FUZZ_BUFFER_BYTES: usize = 1 << 16;
/// The longest time of its server from the end of a request to the end of the response.
pub const FUZZ_RESPONSE_MAX: Duration = Duration::from_secs(5);

/// Lines of a trace of spot instances.
pub const SPOT_POINTS_MAX: usize = 100_000;
/// Steps after a change of the nodes before an undisturbed run is measured.
pub const SPOT_SETTLING_STEPS: u64 = 5;
/// The time for which an undisturbed run is measured with each number of nodes: a twentieth of the trace,
/// within these bounds.
pub const SPOT_QUIET: RangeInclusive<Duration> = Duration::from_secs(2)..=Duration::from_secs(30);
/// The time between two samples of a replayed trace.
pub const SPOT_SAMPLE: Duration = Duration::from_millis(250);
/// The longest replay.
pub const SPOT_REPLAY_MAX: Duration = Duration::from_secs(7 * 24 * 3_600);
