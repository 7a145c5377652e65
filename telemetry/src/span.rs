//! Spans: where new ones go, the spans themselves, and how long work waited and took.
//!
//! Whether a step is traced is decided once, by the supervisor. Where it is not, a [`Scope`] is empty, and everything
//! below costs a comparison: no span is made, no clock is read.

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

/// The identity of a span, as it crosses processes: W3C trace context in binary.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SpanIdentity {
    /// The trace.
    pub trace_id: [u8; 16],
    /// The span.
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

/// Makes traces; one that makes none is [`Tracer::default`].
#[derive(Clone, Debug, Default)]
pub struct Tracer(Option<SdkTracer>);

impl Tracer {
    pub(crate) fn new(tracer: SdkTracer) -> Self {
        Self(Some(tracer))
    }

    /// The beginning of a trace, which may have begun before now.
    #[must_use]
    pub fn root(&self, name: &'static str, began: Option<SystemTime>) -> Span {
        let Some(tracer) = &self.0 else { return Span::none() };
        Span::start(tracer, &Context::new(), name, SpanKind::Internal, began)
    }

    /// Where the spans below another process's span go.
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

/// Where new spans go: below a span, or nowhere.
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

    /// Whether spans go anywhere.
    #[must_use]
    pub fn is_traced(&self) -> bool {
        self.0.is_some()
    }

    /// A span that begins now.
    #[must_use]
    pub fn span(&self, name: &'static str) -> Span {
        self.span_of(name, SpanKind::Internal)
    }

    /// A span of a kind that begins now.
    #[must_use]
    pub fn span_of(&self, name: &'static str, kind: SpanKind) -> Span {
        match &self.0 {
            Some(inner) => Span::start(&inner.tracer, &inner.parent, name, kind, None),
            None => Span::none(),
        }
    }

    /// A span that began before now.
    #[must_use]
    pub fn span_since(&self, name: &'static str, began: SystemTime) -> Span {
        match &self.0 {
            Some(inner) => Span::start(&inner.tracer, &inner.parent, name, SpanKind::Internal, Some(began)),
            None => Span::none(),
        }
    }

    /// Runs blocking work with this scope in force, so that what only speaks `tracing` has its spans here.
    pub fn enter<T>(&self, work: impl FnOnce() -> T) -> T {
        let _guard = self.0.as_ref().map(|inner| inner.parent.clone().attach());
        work()
    }
}

/// A span, or nothing; it ends when it is dropped.
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
        // The standard sampler of the environment may say no.
        if !span.is_recording() {
            return Self::none();
        }
        Self(Some(Box::new(Live { tracer: tracer.clone(), span, meter: None })))
    }

    /// Whether it is recorded: what is costly to say need not be said otherwise.
    #[must_use]
    pub fn is_recorded(&self) -> bool {
        self.0.is_some()
    }

    /// Says something about it.
    pub fn set(&mut self, key: &'static str, value: impl Into<Value>) {
        if let Some(live) = &mut self.0 {
            live.span.set_attribute(KeyValue::new(key, value));
        }
    }

    /// As [`Span::set`], for a span that has just begun.
    #[must_use]
    pub fn with(mut self, key: &'static str, value: impl Into<Value>) -> Self {
        self.set(key, value);
        self
    }

    /// Says something that is a list.
    pub fn set_list(&mut self, key: &'static str, values: impl IntoIterator<Item = String>) {
        if let Some(live) = &mut self.0 {
            let values = values.into_iter().map(StringValue::from).collect();
            live.span.set_attribute(KeyValue::new(key, Value::Array(Array::String(values))));
        }
    }

    /// Something that happened in it, now.
    pub fn event(&mut self, name: &'static str, key: &'static str, value: impl Into<Value>) {
        if let Some(live) = &mut self.0 {
            live.span.add_event(name, vec![KeyValue::new(key, value)]);
        }
    }

    /// Another span that it has to do with, in another trace.
    pub fn link(&mut self, other: SpanIdentity) {
        let context = other.context(false);
        if let Some(live) = &mut self.0
            && context.is_valid()
        {
            let Link { span_context, attributes, .. } = Link::with_context(context);
            live.span.add_link(span_context, attributes);
        }
    }

    /// It did not come to its end.
    pub fn fail(&mut self, reason: &str) {
        if let Some(live) = &mut self.0 {
            live.span.set_status(Status::error(reason.to_owned()));
        }
    }

    /// Where the spans below it go.
    #[must_use]
    pub fn scope(&self) -> Scope {
        match &self.0 {
            Some(live) => Scope::below(live.tracer.clone(), live.span.span_context().clone()),
            None => Scope::default(),
        }
    }

    /// Its identity for the wire; all zero when it is not recorded.
    #[must_use]
    pub fn identity(&self) -> SpanIdentity {
        self.0.as_ref().map(|live| SpanIdentity::from(live.span.span_context())).unwrap_or_default()
    }

    /// What measures the work done for it: it ends up in `volary.queue_us` and `volary.compute_us`.
    #[must_use]
    pub fn meter(&mut self) -> Meter {
        Meter(self.0.as_mut().map(|live| Arc::clone(live.meter.get_or_insert_default())))
    }

    /// Ends it at another time than now.
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

/// How long the jobs of a span waited for the device, the longest of them, and how long they took on it, added up: several may run
/// at once.
#[derive(Clone, Debug, Default)]
pub struct Meter(Option<Arc<Measured>>);

#[derive(Debug, Default)]
struct Measured {
    queue_ns: AtomicU64,
    compute_ns: AtomicU64,
}

impl Meter {
    /// Takes a job that was queued at one time and began at another, and has just ended.
    pub fn add(&self, queued: Instant, began: Instant) {
        if let Some(measured) = &self.0 {
            let ns = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
            measured.queue_ns.fetch_max(ns(began.saturating_duration_since(queued)), Ordering::Relaxed);
            measured.compute_ns.fetch_add(ns(began.elapsed()), Ordering::Relaxed);
        }
    }
}
