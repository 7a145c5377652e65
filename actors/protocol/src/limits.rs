//! Bounds of the protocol.

/// Spans in one message to the supervisor.
pub const SPANS_PER_MESSAGE: usize = 256;
/// Bytes of one bandwidth probe.
pub const PROBE_BYTES: usize = 1 << 20;
/// The longest reason in a refusal, in bytes; longer ones are cut.
pub const REASON_BYTES_MAX: usize = 4096;
