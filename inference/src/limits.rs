//! The bounds of the inference crate.

/// Requests that wait for a free slot of a generator.
pub const WAITING_REQUESTS: usize = 1024;
/// New tokens of all sequences in one pass of the model.
pub const TOKENS_PER_PASS: usize = 512;
/// Strings that end one continuation.
pub const STOP_STRINGS: usize = 16;
/// Tokens before a new one with which it is decoded: a decoder may drop a space at the start of a text.
pub const DECODED_BEFORE: usize = 8;
/// Sequences that are evaluated side by side.
pub const EVALUATED_SEQUENCES: usize = 16;
/// The length of a line of a task file, in bytes.
pub const TASK_LINE_BYTES: usize = 16 << 20;
/// Examples before a question.
pub const SHOTS: usize = 64;
