//! What Volary lets people see.
//!
//! | file | what |
//! | --- | --- |
//! | [`span`] | spans and where they go; nothing, where a step is not traced |
//! | [`pipeline`] | from the span's end to the collector and to the run's own traces, never in the way of training |
//! | `export` | the way to a collector |
//! | [`record`], [`store`] | a span as it is kept, and the bounded folder of traces |
//! | [`render`] | a trace as a tree, as a file for Perfetto, as a page |
//! | [`metrics`] | OpenMetrics of supervisor and node |
//! | [`tensorboard`] | event files for TensorBoard |
//!
//! Other crates make no traces by themselves: what lies below the actors speaks `tracing`, and [`layer`] brings it into a trace
//! where one is under way.

mod export;
pub mod layer;
pub mod limits;
pub mod metrics;
pub mod pipeline;
pub mod record;
pub mod render;
pub mod span;
pub mod store;
pub mod tensorboard;

pub use pipeline::{Identity, Keep, Pipeline, SpanCounts};
pub use record::SpanRecord;
pub use span::{Meter, Scope, Span, SpanIdentity, SpanKind, Tracer};
pub use store::{Trace, TraceStore};
