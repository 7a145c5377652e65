//! Every bound of this crate in one place: what is read from a source is never trusted to be small.

/// The longest document, and the longest line of a JSONL file, in bytes.
pub const MAX_DOCUMENT_BYTES: u64 = 64 << 20;

/// A text file longer than this becomes several documents, cut at line ends, in bytes.
pub const TEXT_PIECE_BYTES: usize = 1 << 20;

/// A compressed file may grow by this factor (text grows by 3 to 10); beyond it, it is taken for a bomb.
pub const MAX_EXPANSION: u64 = 200;

/// What a compressed file may grow to in any case, in bytes: tiny files may compress well without malice.
pub const EXPANSION_FLOOR_BYTES: u64 = 16 << 20;

/// The smallest vocabulary of a trained tokenizer: 256 bytes and the end of text.
pub const MIN_VOCABULARY: usize = 257;

/// The largest vocabulary of a trained tokenizer.
pub const MAX_VOCABULARY: usize = 1 << 20;

/// A document is encoded in chunks of about this many bytes, so that encoding needs little memory.
pub const ENCODE_CHUNK_BYTES: usize = 64 << 10;

/// Documents are tokenised in batches of about this many bytes.
pub const BATCH_BYTES: usize = 4 << 20;

/// The most threads that tokenise at a time.
pub const MAX_THREADS: usize = 4;

/// The number of slots in the mixture's pattern: weights hold to one part in this many.
pub const MIXTURE_PERIOD: usize = 1000;

/// The largest `tokenizer.json` and `manifest.json`, in bytes.
pub const MAX_JSON_BYTES: u64 = 256 << 20;
