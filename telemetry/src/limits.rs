//! Every bound of what people are shown, in one place.

use std::time::Duration;

/// Spans that wait to be kept and exported; what comes beyond is dropped and counted.
pub const QUEUE_SPANS: usize = 8192;
/// Spans in one request to a collector.
pub const BATCH_SPANS: usize = 512;
/// How long spans wait for others before they go out together.
pub const BATCH_WAIT: Duration = Duration::from_millis(200);
/// How long a request to a collector may take.
pub const EXPORT_MAX: Duration = Duration::from_secs(5);
/// How long a collector that failed is left alone; what comes meanwhile is dropped and counted.
pub const EXPORT_REST: Duration = Duration::from_secs(5);
/// How long the last spans may take at the end of a process.
pub const FLUSH_MAX: Duration = Duration::from_secs(2);
/// Spans of one trace that are kept with the run.
pub const SPANS_PER_TRACE_MAX: usize = 8192;
/// Bytes of one trace that are kept with the run.
pub const TRACE_BYTES_MAX: u64 = 16 << 20;
/// Bytes of one span on its way to the supervisor.
pub const SPAN_BYTES_MAX: usize = 16 << 10;
/// Attributes that one span may have.
pub const ATTRIBUTES_MAX: usize = 64;
