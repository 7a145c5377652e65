//! The simulated timeouts, and the bounds of traces.

/// Silence after which both ends give up a link, in milliseconds.
pub const SILENCE_MS: u64 = 2_000;
/// Time between two attempts of a node to reach its supervisor, in milliseconds.
pub const REDIAL_MS: u64 = 100;
/// Time between two ticks of the supervisor, in milliseconds.
pub const TICK_MS: u64 = 100;
/// Time that a supervisor takes to restart, in milliseconds.
pub const RESTART_MS: u64 = 400;
/// The longest that the supervisor takes to read a checkpoint, in milliseconds.
pub const VERIFY_MS: u64 = 3_000;
/// Time between two looks at a run whose faults are over, in milliseconds.
pub const END_CHECK_MS: u64 = 60_000;
/// The number of these looks, after which the run must have ended.
pub const END_CHECKS: u64 = 20;

/// The longest line of a trace, in characters.
pub const TRACE_CHARS_MAX: usize = 400;
