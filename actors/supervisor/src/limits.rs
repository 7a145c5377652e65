//! Every bound of the supervisor, in one place.

use std::time::Duration;

/// The longest wait for a new node's hello.
pub(crate) const HELLO_MAX: Duration = Duration::from_secs(5);
/// How long a node that has noticed the supervisor's return may take to connect.
pub(crate) const RETURN_MARGIN: Duration = Duration::from_secs(1);
/// How long a node whose canary connection has ended may take to answer before its process counts as dead.
pub(crate) const CANARY_PING_MAX: Duration = Duration::from_millis(100);
/// How long a newcomer may take to answer at the address that it announces.
pub(crate) const DIAL_BACK_MAX: Duration = Duration::from_secs(5);
/// Messages of one node in the supervisor's mailbox; more wait in its control stream.
pub(crate) const MESSAGES_OF_NODE_MAX: usize = 64;
/// Control messages queued for one node.
pub(crate) const MESSAGES_AHEAD: usize = 256;
/// Bytes of checkpoint shards in memory at a time: received and not on disk yet.
pub(crate) const CHECKPOINT_BYTES_AHEAD: u64 = 256 << 20;
/// Events in a status.
pub(crate) const STATUS_EVENTS: usize = 20;
/// The state machine's clock tick.
pub(crate) const TICK: Duration = Duration::from_millis(100);
/// Ticks that count at most after a time in which the process did not run.
pub(crate) const TICKS_AT_ONCE_MAX: u32 = 3;
/// Events kept for a slow subscriber.
pub(crate) const EVENTS_AHEAD: usize = 1024;
/// The shortest termination notice of spot markets, in seconds.
pub(crate) const SHORT_NOTICE_S: f64 = 30.0;
/// How long a run that is complete waits for its last messages to be sent.
pub(crate) const FAREWELL_DONE: Duration = Duration::from_millis(250);
/// The same for a run that failed.
pub(crate) const FAREWELL_FAILED: Duration = Duration::from_millis(500);
/// How long a run that has ended waits until its last checkpoint is in the object store.
pub(crate) const LAST_COPY_MAX: Duration = Duration::from_secs(600);
/// The most access tokens of a run.
pub(crate) const ACCESS_TOKENS_MAX: usize = 1000;
/// Attempts to count a use of an access token against concurrent uses.
pub(crate) const USE_RACES_MAX: usize = 16;
/// A node may renew its certificate this many times within one certificate lifetime; an honest one does it
/// twice.
pub(crate) const RENEWALS_PER_LIFETIME: u32 = 4;
/// Members of a cluster in one record of the database: a name has at most 100 bytes, and a record 120 KiB.
pub(crate) const MEMBERS_PER_RECORD: usize = 1_000;
