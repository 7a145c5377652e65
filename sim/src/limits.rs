//! The simulated timeouts, and the bounds of traces.

/// Silence after which both ends give up a link, in milliseconds.
pub const SILENCE_MS: u64 = 2_000;
/// Time between two attempts of a node to reach its supervisor, in milliseconds.
pub const REDIAL_MS: u64 = 100;
/// Time between two ticks of the supervisor, in milliseconds.
pub const TICK_MS: u64 = 100;
/// Time that a supervisor takes to restart, in milliseconds.
pub const RESTART_MS: u64 = 400;

/// The longest line of a trace, in characters.
pub const TRACE_CHARS_MAX: usize = 400;
