//! Every bound of the storage, in one place.

use std::time::Duration;

/// Bytes of a record in the database. sled puts up to sixteen values into a page, and moves a page larger
/// than a quarter of a segment to a file of its own, which it never syncs; sixteen records of this size stay
/// below that.
pub const RECORD_BYTES_MAX: usize = 120 * 1024;
/// Bytes of a segment of the database. A quarter of it holds sixteen of the largest records, as many as sled
/// puts into one page. It must never change: sled opens a database only with its original segment size.
pub const SEGMENT_BYTES: usize = 8 * 1024 * 1024;
/// Bytes of the database's cache.
pub const CACHE_BYTES: u64 = 8 * 1024 * 1024;
/// Wait for the lock of a database that was just closed: sled's last thread releases it with a delay.
pub const DATABASE_LOCK_MAX: Duration = Duration::from_secs(2);
/// Interval of attempts to get that lock.
pub const DATABASE_LOCK_RETRY: Duration = Duration::from_millis(20);
/// Committed steps that the journal keeps, at least, for readers of the run's recent past.
pub const JOURNAL_STEPS_KEPT: u64 = 4_096;
/// Steps that are removed from the journal in one transaction.
pub const PRUNED_AT_ONCE_MAX: usize = 1_024;
/// Shards in one record of the catalogue: each takes about forty bytes, and a record has
/// [`RECORD_BYTES_MAX`].
pub const SHARDS_PER_RECORD: usize = 2_000;
/// Attempts to lock a run that somebody only looks at.
pub const LOCK_ATTEMPTS_MAX: u32 = 3;
/// Attempts to read the holder of a locked run: it writes its name just after it has locked.
pub const HOLDER_READS_MAX: u32 = 20;
/// Interval of these attempts.
pub const HOLDER_READ_RETRY: Duration = Duration::from_millis(10);
/// Blobs on their way to or from an object store at the same time.
pub const BLOBS_IN_FLIGHT: usize = 2;
/// Bytes of a file beside the blobs in an object store that is read into memory: a manifest or a tokenizer.
pub const SMALL_OBJECT_BYTES_MAX: u64 = 256 << 20;
/// Bytes of each read when the last line of a file is searched.
pub const TAIL_BYTES: u64 = 64 * 1024;
