//! Observability of a run: traces, metrics, TensorBoard files.
//!
//! | module | contents |
//! | --- | --- |
//! | [`span`] | spans and their scopes; both empty where a step is not traced |
//! | [`pipeline`] | ended spans, to the collector and the run's trace store, without blocking training |
//! | `collector`, `export` | the collector by environment and options; export to it over OTLP |
//! | [`layer`] | spans of the `tracing` crate within a trace |
//! | [`record`], [`store`] | a span in its stored form, and the bounded directory of traces |
//! | [`render`] | a trace as a tree, a file for Perfetto, a web page; the paths of sampled tokens |
//! | [`metrics`] | OpenMetrics of supervisor and node |
//! | [`tensorboard`] | event files for TensorBoard |
//! | [`limits`] | every bound |
//!
//! The crates below the actors only use `tracing`; [`layer`] puts their spans into the trace that is active
//! on the thread.

mod collector;
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

pub use collector::{InvalidVariable, check_environment};
pub use pipeline::{Identity, Pipeline, SpanCounts, StoreSpans};
pub use record::SpanRecord;
pub use span::{Meter, Scope, Span, SpanIdentity, SpanKind, Tracer};
pub use store::{Trace, TraceStore};
