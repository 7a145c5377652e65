//! Every bound of this crate. The size of an input is never trusted.

use std::ops::RangeInclusive;
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

/// An unfinished preparation is made durable after this much text, in bytes.
pub const SAVE_BYTES: usize = 16 << 20;

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

/// The length of the token sequences by which documents are compared with held-out ones.
pub const RUN_TOKENS: usize = 16;

/// The share of the shorter document's runs that near-duplicates have in common.
pub const NEAR_DUPLICATE_SHARE: f64 = 0.5;

/// Documents with fewer common runs are no near-duplicates: common phrases are not copies.
pub const MIN_SHARED_RUNS: usize = 8;

/// The largest number of held-out runs to compare with; 16 bytes each.
pub const MAX_HELD_OUT_RUNS: usize = 4 << 20;

/// If more than this share of a source's tokens is nearly equal to held-out documents, the documents are of
/// one pattern and stay.
pub const MAX_NEAR_DUPLICATE_SHARE: f64 = 0.5;

/// The longest name of a source, in bytes.
pub const MAX_SOURCE_NAME_BYTES: usize = 100;

/// The largest `tokenizer.json` and `manifest.json`, in bytes.
pub const MAX_JSON_BYTES: u64 = 256 << 20;

/// The largest manifest of a source, in bytes.
pub const MAX_FILE_MANIFEST_BYTES: u64 = 64 << 20;

/// The number of field or column names that an error lists.
pub const MAX_LISTED_NAMES: usize = 20;

/// The number of reasons for skipped files that are counted one by one.
pub const MAX_SKIP_REASONS: usize = 20;

/// The start of a file that tells its format, in bytes.
pub const HEAD_BYTES: usize = 64 << 10;

/// A file is binary if more than this share of the bytes of its start are control characters.
pub const MAX_CONTROL_SHARE: f64 = 0.1;

/// Text with more replaced bytes than this share of its bytes gets a warning.
pub const REPLACED_WARNING_SHARE: f64 = 0.001;

/// The longest run of characters other than white space that the trainer of tokenizers sees as one, in bytes:
/// its time grows with the square of the length.
pub const MAX_TRAINED_WORD_BYTES: usize = 256;

/// A partial folder that no process has touched for this long belongs to a process that died.
pub const ABANDONED_AFTER: Duration = Duration::from_secs(24 * 3600);

/// The longest n-gram of a quality classifier, in words.
pub const MAX_NGRAM: usize = 5;

/// The logarithm to base 2 of the number of a quality classifier's buckets.
pub const BUCKET_BITS: RangeInclusive<u32> = 10..=26;

/// The largest file of a quality classifier, in bytes: that of the most buckets and a header.
pub const MAX_CLASSIFIER_BYTES: u64 = (4 << 26) + (1 << 20);

/// The most passes of a quality classifier's training.
pub const MAX_EPOCHS: u32 = 100;

/// The number of intervals of a quality classifier's calibration table.
pub const CALIBRATION_BINS: usize = 10;

/// The largest shape of the quality filter's Pareto distribution.
pub const MAX_ALPHA: f64 = 1000.0;

/// The longest n-gram by which documents are compared with each other, in words.
pub const MAX_SHINGLE_WORDS: usize = 100;

/// The longest signature of a document.
pub const MAX_PERMUTATIONS: usize = 4096;

/// The most documents that are compared with each other; 4 bytes of memory each.
pub const MAX_COMPARED_DOCUMENTS: u32 = u32::MAX;

/// The entries of a band that are in memory at a time; 16 bytes each.
pub const MAX_BUCKET_ENTRIES: usize = 16 << 20;

/// The documents of a bucket with which each of its documents is compared.
pub const MAX_COMPARED: usize = 16;

/// The clusters of duplicates that a manifest lists: the largest.
pub const MAX_LISTED_CLUSTERS: usize = 100;

/// The members of a cluster that a manifest lists.
pub const MAX_LISTED_MEMBERS: usize = 10;

/// The bad records of a source that are logged one by one.
pub const MAX_LOGGED_RECORDS: u64 = 20;
