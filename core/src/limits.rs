//! Every bound of the core: sizes in options, queues, retries, waits and names.

/// The largest dimension of a model: vocabulary, widths, heads, layers.
pub const DIMENSION_MAX: usize = 1 << 24;
/// Layers of a model.
pub const LAYERS_MAX: usize = 1 << 12;
/// Experts of a layer.
pub const EXPERTS_MAX: usize = 1 << 15;
/// Steps of a run.
pub const STEPS_MAX: u64 = u64::MAX >> 16;
/// Lanes of a run, and lanes of a group.
pub const LANES_MAX: u64 = 1 << 16;
/// Sequences of a lane.
pub const SEQUENCES_MAX: u64 = 1 << 16;
/// Tokens of a sequence.
pub const SEQUENCE_LENGTH_MAX: u64 = 1 << 20;
/// Tokens of each lane in a trace.
pub const TRACED_TOKENS_MAX: usize = 64;
/// Spans of a traced step.
pub const SPANS_MAX: usize = 4_000;
/// Traces kept with a run.
pub const TRACES_MAX: usize = 10_000;

/// Shards that a node copies at a time in the background: enough to hide round trips, few enough to bound
/// memory.
pub const COPIES_IN_FLIGHT_MAX: usize = 4;
/// Bytes of summed gradients that a node keeps for shards that are being copied. When more steps pass than
/// fit, the node repeats its request.
pub const STASH_BYTES_MAX: u64 = 1 << 30;
/// Steps whose gradients are kept for a shard, however large it is.
pub const STASH_MIN: usize = 4;
/// Steps whose gradients are kept for a shard, however small it is.
pub const STASH_STEPS_MAX: usize = 1_024;
/// Requests for one shard before a node gives up copying it.
pub const COPY_ATTEMPTS_MAX: u32 = 8;
/// Nodes that a learner is given as sources of one shard.
pub const COPY_SOURCES_MAX: usize = 8;

/// Attempts at one step, or at its checkpoint, before the run gives up.
pub const ATTEMPTS_MAX: u32 = 16;
/// Immediate attempts at a step while an indispensable node is unreachable; each later one waits for the
/// network.
pub const IMMEDIATE_ATTEMPTS_MAX: u32 = 4;

/// Attempts at a step that follow each other at once; later ones wait.
pub const PROMPT_ATTEMPTS_MAX: u32 = 3;
/// The wait before the first attempt that waits, in milliseconds; each later one is twice as long.
pub const RETRY_MS: u64 = 250;
/// The longest wait between two attempts at a step or at the last checkpoint, in milliseconds.
pub const RETRY_MAX_MS: u64 = 10_000;
/// How long a commit waits for learners, at least, once all members are prepared, in milliseconds; and at
/// most as long again as the members took.
pub const LEARNER_GRACE_MS: u64 = 500;
/// Commits in one placement that a learner may miss before it is fenced.
pub const LEARNER_MISSES_MAX: u32 = 3;

/// Reports of unreachable nodes within one step that fence a node. A single report may be a death that is
/// about to be noticed anyway.
pub const REPORTS_MAX: u32 = 2;
/// Failures of one node within one step, of any kind, that fence it if it is dispensable.
pub const FAILURES_MAX: u32 = 3;
/// The first suspension of a fenced node, in milliseconds; each later one is twice as long.
pub const SUSPENSION_MS: u64 = 5_000;
/// Doublings of a suspension.
pub const SUSPENSION_DOUBLINGS_MAX: u32 = 6;
/// The longest suspension, in milliseconds.
pub const SUSPENSION_MAX_MS: u64 = 300_000;
/// The pause in placement changes after a failed background copy, in milliseconds.
pub const PAUSE_MS: u64 = 5_000;

/// The longest name of a zone, in bytes.
pub const ZONE_MAX: usize = 128;

/// Returns to one checkpoint after which a run that breaks again ends.
pub const RETURNS_MAX: usize = 3;
