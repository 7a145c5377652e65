//! A process's spans, from their end to their storage and export.
//!
//! Spans end on the threads that train; there they only enter a bounded queue. A separate thread stores them
//! with the run and exports them to a collector if one is configured. Spans beyond the queue are dropped and
//! counted; an unreachable collector causes a single warning.

use crate::collector::Target;
use crate::export::Export;
use crate::limits::{BATCH_WAIT, FLUSH_MAX, QUEUE_SPANS};
use crate::record::SpanRecord;
use crate::span::Tracer;
use opentelemetry::trace::TracerProvider as _;
use opentelemetry::{Context, KeyValue};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::{SdkTracer, SdkTracerProvider, Span, SpanData, SpanProcessor};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use volary_core::options::TelemetryOptions;

/// The process of the traces.
#[derive(Clone, Debug)]
pub struct Identity {
    /// The run's name.
    pub run: String,
    /// `supervisor`, or a node's name.
    pub process: String,
    /// The node's device; `None` for a supervisor.
    pub device: Option<String>,
}

/// Stores spans with the run. Called on the pipeline's thread; returns the number of dropped spans.
pub type StoreSpans = Box<dyn FnMut(Vec<SpanRecord>) -> u64 + Send>;

/// Spans by their outcome.
#[derive(Debug, Default)]
pub struct SpanCounts {
    /// Stored with the run.
    pub stored: AtomicU64,
    /// Exported to a collector.
    pub exported: AtomicU64,
    /// Dropped because a queue was full, a bound was exceeded or the collector failed.
    pub dropped: AtomicU64,
}

enum Message {
    Span(Box<SpanData>),
    /// Spans of another process.
    Records(Vec<SpanRecord>),
    Flush(oneshot::Sender<()>),
}

/// The spans of this process.
///
/// ```
/// use std::sync::mpsc;
/// use volary_core::options::TelemetryOptions;
/// use volary_telemetry::{Identity, Pipeline};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> std::io::Result<()> {
/// let (sender, stored) = mpsc::channel();
/// let store = Box::new(move |records: Vec<_>| {
///     records.into_iter().for_each(|record| sender.send(record).expect("a receiver"));
///     0
/// });
/// let identity = Identity { run: "demo".into(), process: "node-1".into(), device: None };
/// let pipeline = Pipeline::start(&TelemetryOptions::default(), &identity, store)?;
///
/// let step = pipeline.tracer().root("step", None).with("volary.step", 7i64);
/// drop(step.scope().span("lane"));
/// drop(step);
/// pipeline.flush().await;
/// let names: Vec<String> = stored.try_iter().map(|record| record.name).collect();
/// assert_eq!(names, ["lane", "step"]);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Pipeline {
    sdk: SdkTracer,
    messages: mpsc::Sender<Message>,
    counts: Arc<SpanCounts>,
    // The tracer works only while its provider exists.
    _provider: SdkTracerProvider,
}

#[derive(Debug)]
struct Queue {
    messages: mpsc::Sender<Message>,
    counts: Arc<SpanCounts>,
}

impl SpanProcessor for Queue {
    fn on_start(&self, _: &mut Span, _: &Context) {}

    fn on_end(&self, span: SpanData) {
        if self.messages.try_send(Message::Span(Box::new(span))).is_err() {
            self.counts.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn force_flush(&self) -> OTelSdkResult {
        Ok(())
    }

    fn shutdown_with_timeout(&self, _: Duration) -> OTelSdkResult {
        Ok(())
    }
}

impl Pipeline {
    /// Starts the thread. Spans are exported if the options or the standard `OTEL_*` variables configure a
    /// collector.
    ///
    /// # Errors
    /// When the thread does not start.
    pub fn start(
        options: &TelemetryOptions,
        identity: &Identity,
        store: StoreSpans,
    ) -> std::io::Result<Self> {
        let (messages, queue) = mpsc::channel(QUEUE_SPANS);
        let counts = Arc::new(SpanCounts::default());
        let resource = resource(identity);
        let provider = SdkTracerProvider::builder()
            .with_span_processor(Queue { messages: messages.clone(), counts: Arc::clone(&counts) })
            .with_resource(resource.clone())
            .build();
        let target = Target::from_environment(options);
        let target = target.inspect_err(|error| tracing::warn!(%error, "traces are not exported"));
        let target = target.ok().flatten();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (process, totals) = (identity.process.clone(), Arc::clone(&counts));
        std::thread::Builder::new().name("telemetry".into()).spawn(move || {
            runtime.block_on(async {
                // The exporter must be created within the runtime.
                let exporter = target.and_then(|target| target.exporter(&resource));
                Worker {
                    process,
                    store,
                    export: exporter.map(|e| Export::new(e, Arc::clone(&totals))),
                    counts: totals,
                }
                .run(queue)
                .await;
            });
        })?;
        let sdk = provider.tracer("volary");
        Ok(Self { sdk, messages, counts, _provider: provider })
    }

    /// The tracer of this process.
    #[must_use]
    pub fn tracer(&self) -> Tracer {
        Tracer::new(self.sdk.clone())
    }

    /// The tracer for [`crate::layer::install`].
    #[must_use]
    pub fn sdk_tracer(&self) -> SdkTracer {
        self.sdk.clone()
    }

    /// Stores another process's spans with the run.
    pub fn store(&self, records: Vec<SpanRecord>) {
        let count = records.len() as u64;
        if self.messages.try_send(Message::Records(records)).is_err() {
            self.counts.dropped.fetch_add(count, Ordering::Relaxed);
        }
    }

    /// Recounts stored spans as dropped, when they were lost later.
    pub fn count_lost(&self, count: u64) {
        self.counts.stored.fetch_sub(count, Ordering::Relaxed);
        self.counts.dropped.fetch_add(count, Ordering::Relaxed);
    }

    /// The totals of spans by their outcome.
    #[must_use]
    pub fn counts(&self) -> Arc<SpanCounts> {
        Arc::clone(&self.counts)
    }

    /// Waits until all ended spans are stored and exported, at most [`FLUSH_MAX`].
    pub async fn flush(&self) {
        let (sender, done) = oneshot::channel();
        if self.messages.try_send(Message::Flush(sender)).is_ok() {
            // After a timeout the process ends all the same.
            let _ = tokio::time::timeout(FLUSH_MAX, done).await;
        }
    }
}

fn resource(identity: &Identity) -> Resource {
    let instance = format!("{}/{}/{}", identity.run, identity.process, std::process::id());
    let mut attributes = vec![
        KeyValue::new("service.instance.id", instance),
        KeyValue::new("service.version", env!("CARGO_PKG_VERSION")),
        KeyValue::new("process.pid", i64::from(std::process::id())),
        KeyValue::new("volary.run", identity.run.clone()),
        KeyValue::new("volary.node", identity.process.clone()),
    ];
    attributes.extend(identity.device.as_ref().map(|device| KeyValue::new("volary.device", device.clone())));
    let builder = Resource::builder().with_attributes(attributes);
    // One name for all processes, unless the environment sets another.
    if std::env::var_os("OTEL_SERVICE_NAME").is_some() {
        builder.build()
    } else {
        builder.with_service_name("volary").build()
    }
}

struct Worker {
    process: String,
    store: StoreSpans,
    export: Option<Export>,
    counts: Arc<SpanCounts>,
}

impl Worker {
    /// Runs until the last tracer is dropped.
    async fn run(mut self, mut queue: mpsc::Receiver<Message>) {
        let mut messages = Vec::new();
        loop {
            if let Some(export) = self.export.as_mut().filter(|export| export.is_busy()) {
                // Without new spans, the export still handles answers and sends its queue.
                let more =
                    tokio::time::timeout(BATCH_WAIT, queue.recv_many(&mut messages, QUEUE_SPANS)).await;
                match more {
                    Ok(0) => return,
                    Ok(_) => {}
                    Err(_) => {
                        export.send(false).await;
                        continue;
                    }
                }
            } else if queue.recv_many(&mut messages, QUEUE_SPANS).await == 0 {
                return;
            }
            let (mut records, mut flushed) = (Vec::new(), Vec::new());
            for message in messages.drain(..) {
                match message {
                    Message::Span(span) => {
                        records.push(SpanRecord::new(&self.process, &span));
                        if let Some(export) = &mut self.export {
                            export.push(*span);
                        }
                    }
                    Message::Records(more) => records.extend(more),
                    Message::Flush(done) => flushed.push(done),
                }
            }
            self.store_with_run(records);
            if let Some(export) = &mut self.export {
                export.send(!flushed.is_empty()).await;
            }
            if flushed.is_empty() {
                // Further spans of the same step follow shortly.
                tokio::time::sleep(BATCH_WAIT).await;
            }
            for done in flushed {
                // The caller may have timed out.
                let _ = done.send(());
            }
        }
    }

    fn store_with_run(&mut self, records: Vec<SpanRecord>) {
        if records.is_empty() {
            return;
        }
        let count = records.len() as u64;
        let dropped = (self.store)(records).min(count);
        self.counts.stored.fetch_add(count - dropped, Ordering::Relaxed);
        self.counts.dropped.fetch_add(dropped, Ordering::Relaxed);
    }
}
