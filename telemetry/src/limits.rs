//! Every bound of the telemetry, in one place.

use std::time::Duration;

/// Spans in the queue before storage and export; more are dropped and counted.
pub const QUEUE_SPANS: usize = 8192;
/// Spans in one request to a collector.
pub const BATCH_SPANS: usize = 512;
/// Wait for further spans before a batch is stored and exported.
pub const BATCH_WAIT: Duration = Duration::from_millis(200);
/// Duration of a request to a collector.
pub const EXPORT_MAX: Duration = Duration::from_secs(5);
/// Pause after a failed request to a collector; spans are dropped and counted meanwhile.
pub const EXPORT_PAUSE: Duration = Duration::from_secs(5);
/// Duration of the last storage and export at the end of a process.
pub const FLUSH_MAX: Duration = Duration::from_secs(2);
/// Stored spans of one trace.
pub const SPANS_PER_TRACE_MAX: usize = 8192;
/// Stored bytes of one trace.
pub const TRACE_BYTES_MAX: u64 = 16 << 20;
/// Bytes of one encoded span.
pub const SPAN_BYTES_MAX: usize = 16 << 10;
/// Lower bound of the first bucket of the duration histograms, in seconds.
pub const HISTOGRAM_SECONDS_MIN: f64 = 0.0005;
/// Buckets of the duration histograms; each is twice as wide as the previous one, the last ends at 32.8 s.
pub const HISTOGRAM_BUCKETS: u16 = 17;
