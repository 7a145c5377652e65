//! Bounds of the protocol.

/// Spans in one message to the supervisor.
pub const SPANS_PER_MESSAGE: usize = 256;
/// Bytes of one bandwidth probe.
pub const PROBE_BYTES: usize = 1 << 20;
/// Bytes of a number of up to 32 bits in a message, at most.
pub const VARINT_BYTES: u64 = 5;
/// Bytes of one lane's tokens in a message, at most.
pub const LANE_BYTES_MAX: u64 = 4 << 20;
/// Tokens in one message, apart from those of its last lane. With a lane of [`LANE_BYTES_MAX`], they stay
/// within a control message.
pub const TOKENS_PER_MESSAGE: usize = 2 << 20;
/// The longest reason in a refusal, in bytes; longer ones are cut.
pub const REASON_BYTES_MAX: usize = 4096;

/// The longest encoded layout, in bytes: more than that of 100,000 nodes.
pub const LAYOUT_BYTES_MAX: usize = 8 << 20;
/// zstd's level for patches of layouts: one is made for a whole cluster.
pub const PATCH_LEVEL: i32 = 12;
/// The logarithm of zstd's window: it covers a layout and the one before.
pub const PATCH_WINDOW_LOG: u32 = 24;
/// Patches that are kept for streams that need the same one: nodes that were there before, nodes that join,
/// and some that are behind.
pub const PATCHES_KEPT: usize = 8;
