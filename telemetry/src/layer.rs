//! Puts spans of the `tracing` crate into the trace that is active on the thread.

use opentelemetry::Context;
use opentelemetry::trace::TraceContextExt;
use opentelemetry_sdk::trace::SdkTracer;
use std::sync::OnceLock;
use tracing::subscriber::Interest;
use tracing::{Metadata, Subscriber};
use tracing_opentelemetry::OpenTelemetryLayer;
use tracing_subscriber::filter::DynFilterFn;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::{Layer, reload};

/// The target of `tracing` spans that belong to traces.
pub const TARGET: &str = "volary::trace";

type Install = Box<dyn Fn(SdkTracer) + Send + Sync>;

static INSTALL: OnceLock<Install> = OnceLock::new();

/// The layer for the process's subscriber. It is inactive until [`install`] sets its tracer: the log starts
/// before the run is known.
pub fn layer<S>() -> impl Layer<S>
where
    S: Subscriber + for<'span> LookupSpan<'span> + Send + Sync,
{
    let (layer, handle) = reload::Layer::new(None::<OpenTelemetryLayer<S, SdkTracer>>);
    let install = move |tracer: SdkTracer| {
        let layer = tracing_opentelemetry::layer()
            .with_tracer(tracer)
            .with_location(false)
            .with_threads(false)
            .with_tracked_inactivity(false);
        // It fails only without a subscriber, which lives as long as the process.
        let _ = handle.reload(Some(layer));
    };
    // A second layer, in a test process, does not replace the first.
    let _ = INSTALL.set(Box::new(install));
    let is_ours = |metadata: &Metadata<'_>| metadata.target() == TARGET;
    // Without an active trace, a span would start one.
    let filter = DynFilterFn::new(move |metadata, _| {
        is_ours(metadata) && Context::map_current(|context| context.span().span_context().is_sampled())
    });
    layer.with_filter(filter.with_callsite_filter(move |metadata| {
        if is_ours(metadata) { Interest::sometimes() } else { Interest::never() }
    }))
}

/// Sets the tracer of the layer.
pub fn install(tracer: SdkTracer) {
    if let Some(install) = INSTALL.get() {
        install(tracer);
    }
}
