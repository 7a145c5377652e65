//! The bounds of the objects crate.

use std::time::Duration;

/// The size of one part of an upload, in bytes. A smaller file is one request.
pub const PART_BYTES: usize = 8 << 20;
/// Parts of a file on their way at the same time: with their size, the memory of an upload.
pub const PARTS_IN_FLIGHT: usize = 4;
/// Repetitions of a request whose failure may pass: a lost connection, an overloaded or throttling store.
pub const RETRIES: usize = 10;
/// The time within which a request is repeated.
pub const RETRY_TIMEOUT: Duration = Duration::from_secs(60);
/// The pause before the first repetition, and the longest one; it doubles in between.
pub const BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(10));
/// The time of one request, transfer included.
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(60);
/// The time to connect.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
