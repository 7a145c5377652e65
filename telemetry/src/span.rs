//! Spans, their scopes, and meters of queueing and compute time.
//!
//! The supervisor decides once whether a step is traced. If it is not, a [`Scope`] is empty and each call
//! costs one comparison: no span is created, no clock is read.

use opentelemetry::trace::{
    Link, Span as _, SpanContext, SpanId, Status, TraceContextExt, TraceFlags, TraceId, TraceState,
    Tracer as _,
};
use opentelemetry::{Array, Context, KeyValue, StringValue, Value};
use opentelemetry_sdk::trace::{SdkTracer, Span as SdkSpan};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

pub use opentelemetry::trace::SpanKind;

/// The identity of a span for other processes: W3C trace context in binary.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SpanIdentity {
    /// The trace identifier.
    pub trace_id: [u8; 16],
    /// The span identifier.
    pub span_id: [u8; 8],
    /// Bit 0: sampled.
    pub flags: u8,
}

impl SpanIdentity {
    fn context(self, is_remote: bool) -> SpanContext {
        SpanContext::new(
            TraceId::from_bytes(self.trace_id),
            SpanId::from_bytes(self.span_id),
            TraceFlags::new(self.flags),
            is_remote,
            TraceState::NONE,
        )
    }
}

impl From<&SpanContext> for SpanIdentity {
    fn from(context: &SpanContext) -> Self {
        Self {
            trace_id: context.trace_id().to_bytes(),
            span_id: context.span_id().to_bytes(),
            flags: context.trace_flags().to_u8(),
        }
    }
}

/// Starts traces. [`Tracer::default`] starts none.
#[derive(Clone, Debug, Default)]
pub struct Tracer(Option<SdkTracer>);

impl Tracer {
    pub(crate) fn new(tracer: SdkTracer) -> Self {
        Self(Some(tracer))
    }

    /// Starts a trace with its root span, at `began` or now.
    #[must_use]
    pub fn root(&self, name: &'static str, began: Option<SystemTime>) -> Span {
        let Some(tracer) = &self.0 else { return Span::none() };
        Span::start(tracer, &Context::new(), name, SpanKind::Internal, began)
    }

    /// The scope below a span of another process.
    #[must_use]
    pub fn remote(&self, identity: SpanIdentity) -> Scope {
        let context = identity.context(true);
        match &self.0 {
            Some(tracer) if context.is_valid() && context.is_sampled() => {
                Scope::below(tracer.clone(), context)
            }
            _ => Scope::default(),
        }
    }
}

/// The parent of new spans, or none: then no spans are created.
#[derive(Clone, Debug, Default)]
pub struct Scope(Option<Arc<Inner>>);

#[derive(Debug)]
struct Inner {
    tracer: SdkTracer,
    parent: Context,
}

impl Scope {
    fn below(tracer: SdkTracer, context: SpanContext) -> Self {
        Self(Some(Arc::new(Inner { tracer, parent: Context::new().with_remote_span_context(context) })))
    }

    /// Whether spans are created.
    #[must_use]
    pub fn is_traced(&self) -> bool {
        self.0.is_some()
    }

    /// Starts an internal span.
    #[must_use]
    pub fn span(&self, name: &'static str) -> Span {
        self.span_of(name, SpanKind::Internal)
    }

    /// Starts a span of a given kind.
    #[must_use]
    pub fn span_of(&self, name: &'static str, kind: SpanKind) -> Span {
        match &self.0 {
            Some(inner) => Span::start(&inner.tracer, &inner.parent, name, kind, None),
            None => Span::none(),
        }
    }

    /// Starts an internal span at an earlier time.
    #[must_use]
    pub fn span_since(&self, name: &'static str, began: SystemTime) -> Span {
        match &self.0 {
            Some(inner) => Span::start(&inner.tracer, &inner.parent, name, SpanKind::Internal, Some(began)),
            None => Span::none(),
        }
    }

    /// Runs blocking work within this scope: spans of the `tracing` crate become its children.
    pub fn enter<T>(&self, work: impl FnOnce() -> T) -> T {
        let _guard = self.0.as_ref().map(|inner| inner.parent.clone().attach());
        work()
    }
}

/// A span, recorded or not. It ends when it is dropped.
#[derive(Debug)]
pub struct Span(Option<Box<Live>>);

#[derive(Debug)]
struct Live {
    tracer: SdkTracer,
    span: SdkSpan,
    meter: Option<Arc<Measured>>,
}

impl Span {
    /// A span that is not recorded.
    #[must_use]
    pub fn none() -> Self {
        Self(None)
    }

    fn start(
        tracer: &SdkTracer,
        parent: &Context,
        name: &'static str,
        kind: SpanKind,
        began: Option<SystemTime>,
    ) -> Self {
        let mut builder = tracer.span_builder(name).with_kind(kind);
        if let Some(began) = began {
            builder = builder.with_start_time(began);
        }
        let span = builder.start_with_context(tracer, parent);
        // The sampler of the environment may decline.
        if !span.is_recording() {
            return Self::none();
        }
        Self(Some(Box::new(Live { tracer: tracer.clone(), span, meter: None })))
    }

    /// Whether it is recorded. If not, costly attributes need not be computed.
    #[must_use]
    pub fn is_recorded(&self) -> bool {
        self.0.is_some()
    }

    /// Sets an attribute.
    pub fn set(&mut self, key: &'static str, value: impl Into<Value>) {
        if let Some(live) = &mut self.0 {
            live.span.set_attribute(KeyValue::new(key, value));
        }
    }

    /// [`Span::set`] as a builder.
    #[must_use]
    pub fn with(mut self, key: &'static str, value: impl Into<Value>) -> Self {
        self.set(key, value);
        self
    }

    /// Sets a list attribute.
    pub fn set_list(&mut self, key: &'static str, values: impl IntoIterator<Item = String>) {
        if let Some(live) = &mut self.0 {
            let values = values.into_iter().map(StringValue::from).collect();
            live.span.set_attribute(KeyValue::new(key, Value::Array(Array::String(values))));
        }
    }

    /// Adds an event with one attribute, now.
    pub fn event(&mut self, name: &'static str, key: &'static str, value: impl Into<Value>) {
        if let Some(live) = &mut self.0 {
            live.span.add_event(name, vec![KeyValue::new(key, value)]);
        }
    }

    /// Links a span of another trace.
    pub fn link(&mut self, other: SpanIdentity) {
        let context = other.context(false);
        if let Some(live) = &mut self.0
            && context.is_valid()
        {
            let Link { span_context, attributes, .. } = Link::with_context(context);
            live.span.add_link(span_context, attributes);
        }
    }

    /// Sets the status to an error.
    pub fn fail(&mut self, reason: &str) {
        if let Some(live) = &mut self.0 {
            live.span.set_status(Status::error(reason.to_owned()));
        }
    }

    /// The scope of its children.
    #[must_use]
    pub fn scope(&self) -> Scope {
        match &self.0 {
            Some(live) => Scope::below(live.tracer.clone(), live.span.span_context().clone()),
            None => Scope::default(),
        }
    }

    /// Its identity for other processes; all zeros when it is not recorded.
    #[must_use]
    pub fn identity(&self) -> SpanIdentity {
        self.0.as_ref().map(|live| SpanIdentity::from(live.span.span_context())).unwrap_or_default()
    }

    /// A meter of its device jobs, for the attributes `volary.queue_us` and `volary.compute_us`.
    #[must_use]
    pub fn meter(&mut self) -> Meter {
        Meter(self.0.as_mut().map(|live| Arc::clone(live.meter.get_or_insert_default())))
    }

    /// Ends it at a given time.
    pub fn end_at(mut self, when: SystemTime) {
        if let Some(live) = self.0.take() {
            live.end(Some(when));
        }
    }
}

impl Live {
    fn end(mut self: Box<Self>, when: Option<SystemTime>) {
        if let Some(measured) = self.meter.take() {
            let us = |ns: &AtomicU64| (ns.load(Ordering::Relaxed) / 1000).try_into().unwrap_or(i64::MAX);
            let (queue, compute): (i64, i64) = (us(&measured.queue_ns), us(&measured.compute_ns));
            self.span.set_attribute(KeyValue::new("volary.queue_us", queue));
            self.span.set_attribute(KeyValue::new("volary.compute_us", compute));
        }
        match when {
            Some(when) => self.span.end_with_timestamp(when),
            None => self.span.end(),
        }
    }
}

impl Drop for Span {
    fn drop(&mut self) {
        if let Some(live) = self.0.take() {
            live.end(None);
        }
    }
}

/// The device times of a span's jobs: the longest queueing time, and the total compute time; jobs may run in
/// parallel.
#[derive(Clone, Debug, Default)]
pub struct Meter(Option<Arc<Measured>>);

#[derive(Debug, Default)]
struct Measured {
    queue_ns: AtomicU64,
    compute_ns: AtomicU64,
}

impl Meter {
    /// Adds a job that has just ended, with the times at which it was queued and started.
    pub fn add(&self, queued: Instant, began: Instant) {
        if let Some(measured) = &self.0 {
            let ns = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
            measured.queue_ns.fetch_max(ns(began.saturating_duration_since(queued)), Ordering::Relaxed);
            measured.compute_ns.fetch_add(ns(began.elapsed()), Ordering::Relaxed);
        }
    }
}
