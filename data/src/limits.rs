//! Every bound of this crate. The size of an input is never trusted.

use std::time::Duration;

/// The longest document, and the longest line of a JSONL file, in bytes.
pub const MAX_DOCUMENT_BYTES: u64 = 64 << 20;

/// A longer text file is cut at line ends into several documents, in bytes.
pub const TEXT_PIECE_BYTES: usize = 1 << 20;

/// The largest expansion factor of a compressed file (text expands by 3 to 10).
pub const MAX_EXPANSION: u64 = 200;

/// The expansion that every compressed file may reach, in bytes: tiny files may compress well without malice.
pub const EXPANSION_FLOOR_BYTES: u64 = 16 << 20;

/// The read buffer of a file and of a decompressor, in bytes.
pub const READ_BUFFER_BYTES: usize = 64 << 10;

/// The write buffer of a token file, in bytes.
pub const WRITE_BUFFER_BYTES: usize = 1 << 20;

/// The smallest vocabulary of a trained tokenizer: 256 bytes and the end of text.
pub const MIN_VOCABULARY: usize = 257;

/// The largest vocabulary of a trained tokenizer.
pub const MAX_VOCABULARY: usize = 1 << 20;

/// A document is encoded in chunks of about this many bytes, which bounds the memory of encoding.
pub const ENCODE_CHUNK_BYTES: usize = 64 << 10;

/// Documents are tokenized in batches of about this many bytes.
pub const BATCH_BYTES: usize = 4 << 20;

/// The largest number of tokenizing threads.
pub const MAX_THREADS: usize = 4;

/// The number of slots in the mixture's pattern: weights are exact to one part in this many.
pub const MIXTURE_PERIOD: usize = 1000;

/// The largest share of tokens to hold out for validation.
pub const MAX_VALIDATION_FRACTION: f64 = 0.5;

/// Documents are candidates for validation while their ranks are within this many times the requested share
/// of all ranks.
pub const MAX_CANDIDATE_SHARES: f64 = 8.0;

/// A source whose held-out documents exceed the requested share by this factor is split by position instead.
pub const MAX_HELD_OUT_SHARES: f64 = 4.0;

/// The longest name of a source, in bytes.
pub const MAX_SOURCE_NAME_BYTES: usize = 100;

/// The largest `tokenizer.json` and `manifest.json`, in bytes.
pub const MAX_JSON_BYTES: u64 = 256 << 20;

/// The largest manifest of a source, in bytes.
pub const MAX_FILE_MANIFEST_BYTES: u64 = 64 << 20;

/// The number of field or column names that an error lists.
pub const MAX_LISTED_NAMES: usize = 20;

/// A partial folder that no process has touched for this long belongs to a process that died.
pub const ABANDONED_AFTER: Duration = Duration::from_secs(24 * 3600);
