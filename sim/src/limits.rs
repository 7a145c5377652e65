//! The simulated timeouts, in milliseconds.

/// Silence after which both ends give up a link.
pub const SILENCE_MS: u64 = 2_000;
/// Time between two attempts of a node to reach its supervisor.
pub const REDIAL_MS: u64 = 100;
/// Time between two ticks of the supervisor.
pub const TICK_MS: u64 = 100;
/// Time that a supervisor takes to restart.
pub const RESTART_MS: u64 = 400;
