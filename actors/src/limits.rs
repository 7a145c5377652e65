//! Every bound of the actors, in one place.

use std::time::Duration;

/// The longest that one actor waits for another's answer, or a node for a peer's.
pub(crate) const CALL_MAX: Duration = Duration::from_secs(600);
/// The longest that a frame of a step that has not begun here yet waits for it.
pub(crate) const EARLY_MAX: Duration = Duration::from_secs(60);
/// Jobs that wait for a node's device executor.
pub(crate) const JOBS_MAX: usize = 1 << 16;
/// The longest that the supervisor waits for a new node's first words.
pub(crate) const HELLO_MAX: Duration = Duration::from_secs(5);
/// Bytes of checkpoints' shards that the supervisor has in memory at a time, off the wire and not on the disk yet.
pub(crate) const CHECKPOINT_BYTES_AHEAD: u32 = 256 << 20;
/// Events that `status` shows.
pub(crate) const STATUS_EVENTS: usize = 20;
/// Frames of one peer that are being answered, or wait for their step, at a time.
pub(crate) const ANSWERS_MAX: usize = 1024;
/// How often the supervisor's state machine hears of time.
pub(crate) const TICK: Duration = Duration::from_millis(100);
/// How often a node tells its supervisor about its links.
pub(crate) const LINKS_EVERY: Duration = Duration::from_secs(2);
/// The longest that a node waits for the answer to its first words.
pub(crate) const WELCOME_MAX: Duration = Duration::from_secs(10);
/// Milliseconds without a sign of life after which a node gives a link up, where the other end does not ask for less.
pub(crate) const IDLE_MS: u64 = 10_000;
/// Time between two attempts of a node to reach its supervisor at first.
pub(crate) const DIAL_PAUSE: Duration = Duration::from_millis(100);
/// The same where somebody is there and refuses for now.
pub(crate) const REFUSED_PAUSE: Duration = Duration::from_secs(1);
/// How long a node tries to reach its supervisor at first.
pub(crate) const DIAL_MAX: Duration = Duration::from_secs(20);
/// Batches of spans that wait for the link to the supervisor.
pub(crate) const SPAN_BATCHES_AHEAD: usize = 64;
/// Spans in one word to the supervisor.
pub(crate) const SPANS_PER_WORD: usize = 256;
/// What the supervisor's events keeps for a listener that is slow.
pub(crate) const EVENTS_AHEAD: usize = 1024;
/// Bytes of one measurement of a link.
pub(crate) const PROBE_BYTES: usize = 1 << 20;
/// The longest that a measurement of a link may take.
pub(crate) const PROBE_MAX: Duration = Duration::from_secs(10);
/// How long a node measures each kind of its computations, unless one call takes longer.
pub(crate) const MEASURE: Duration = Duration::from_millis(80);
/// How long frames of a node that this one does not know yet wait for the placement that names it.
pub(crate) const STRANGER_MAX: Duration = Duration::from_secs(10);
/// How often it is looked whether it is known.
pub(crate) const STRANGER_LOOK_EVERY: Duration = Duration::from_millis(20);
