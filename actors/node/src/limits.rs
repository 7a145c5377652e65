//! Every bound of a node, in one place.

use std::time::Duration;

/// The longest wait of one actor for another's reply, or of a node for a peer's.
pub(crate) const CALL_MAX: Duration = Duration::from_secs(600);
/// The longest that a frame waits for its step to begin here. The wait ends before, when its epoch is over.
pub(crate) const EARLY_MAX: Duration = CALL_MAX;
/// How long a member whose own gradients are complete waits, at least, for those of shards that it copies.
pub(crate) const LEARNED_GRACE: Duration = Duration::from_millis(250);
/// Jobs queued for the device executor.
pub(crate) const JOBS_MAX: usize = 1 << 16;
/// Frames of one peer that are being answered, or wait for their step, at a time.
pub(crate) const ANSWERS_MAX: usize = 1024;
/// Time between two reports of links to the supervisor.
pub(crate) const LINK_REPORT_INTERVAL: Duration = Duration::from_secs(2);
/// The longest wait for the supervisor's welcome.
pub(crate) const WELCOME_MAX: Duration = Duration::from_secs(10);
/// How long a supervisor whose canary connection has ended may take to answer before it counts as dead.
pub(crate) const CANARY_PING_MAX: Duration = Duration::from_millis(100);
/// Milliseconds of silence after which a node closes a link, unless the other end asks for less.
pub(crate) const IDLE_MS: u64 = 10_000;
/// Time between two attempts to reach a supervisor that does not answer.
pub(crate) const DIAL_PAUSE: Duration = Duration::from_millis(100);
/// The same where a supervisor answers and refuses for now.
pub(crate) const REFUSED_PAUSE: Duration = Duration::from_secs(1);
/// How long a node tries to reach its supervisor for the first time.
pub(crate) const DIAL_MAX: Duration = Duration::from_secs(20);
/// Time between two attempts to reach a supervisor that is starting: nodes with state return at about the
/// same time.
pub(crate) const STARTING_PAUSE: Duration = Duration::from_millis(200);
/// How long a node waits for a supervisor that says that it is starting.
pub(crate) const STARTING_MAX: Duration = Duration::from_secs(3_600);
/// Batches of spans queued for the supervisor.
pub(crate) const SPAN_BATCHES_AHEAD: usize = 64;
/// Control messages queued for the supervisor.
pub(crate) const MESSAGES_AHEAD: usize = 256;
/// The longest that a node that ends waits for its last messages to be sent.
pub(crate) const FAREWELL_MAX: Duration = Duration::from_millis(500);
/// The longest network fault of a scripted run, in seconds.
pub const FAULT_SECONDS_MAX: f64 = 3600.0;
/// Shards that are fetched at a time: enough to hide round trips, few enough to bound memory.
pub(crate) const FETCHES_AHEAD: usize = 4;
/// The longest bandwidth probe.
pub(crate) const PROBE_MAX: Duration = Duration::from_secs(10);
/// Frames of one bandwidth probe.
pub(crate) const PROBE_FRAMES: usize = 4;
/// Time spent on each kind of computation in the device benchmark, unless one call takes longer.
pub(crate) const BENCHMARK_TIME: Duration = Duration::from_millis(80);
/// The longest device benchmark by its own estimate, in seconds; a device that would take longer is
/// measured in training.
pub(crate) const BENCHMARK_SECONDS_MAX: f64 = 20.0;
/// How long frames of an unknown node wait for the placement that names it.
pub(crate) const UNKNOWN_PEER_MAX: Duration = Duration::from_secs(10);
/// Time between two checks whether an unknown node is known.
pub(crate) const UNKNOWN_PEER_POLL: Duration = Duration::from_millis(20);

/// The time for which a node waits for its name. An earlier process of that name is lost after at most
/// `cluster.node_timeout_ms`, 10 s; a live one keeps it.
pub(crate) const NAME_IN_USE_MAX: Duration = Duration::from_secs(20);

/// The pause before a background copy dials a peer again that could not be reached: one failed dial stands
/// for the copies of all shards.
pub(crate) const DIAL_AGAIN: Duration = Duration::from_secs(5);
