//! A process's traces, from the spans that it makes to where they are kept and exported.
//!
//! Spans end on the threads that train; there they are only put into a bounded queue. One thread of its own takes them
//! out, hands them to whoever keeps them with the run, and exports them to a collector if there is one. What does not find room is dropped
//! and counted; a collector that cannot be reached is one warning.

use crate::export::{Export, Target};
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

/// Whose traces they are.
#[derive(Clone, Debug)]
pub struct Identity {
    /// The run's name.
    pub run: String,
    /// `supervisor`, or the node's name.
    pub process: String,
    /// The node's device; none for a supervisor.
    pub device: Option<String>,
}

/// What becomes of the spans that are kept with the run. Called on the pipeline's own thread; returns how many were dropped.
pub type Keep = Box<dyn FnMut(Vec<SpanRecord>) -> u64 + Send>;

/// What became of the spans so far.
#[derive(Debug, Default)]
pub struct SpanCounts {
    /// Handed to whoever keeps them with the run.
    pub kept: AtomicU64,
    /// Taken by a collector.
    pub exported: AtomicU64,
    /// Dropped for want of room, or since the collector could not be reached.
    pub dropped: AtomicU64,
}

enum Word {
    Span(Box<SpanData>),
    /// Spans of another process, to be kept.
    Records(Vec<SpanRecord>),
    Flush(oneshot::Sender<()>),
}

/// The traces of this process.
#[derive(Clone, Debug)]
pub struct Pipeline {
    sdk: SdkTracer,
    words: mpsc::Sender<Word>,
    counts: Arc<SpanCounts>,
    // Its spans' context is gone with it.
    _provider: SdkTracerProvider,
}

#[derive(Debug)]
struct Queue {
    words: mpsc::Sender<Word>,
    counts: Arc<SpanCounts>,
}

impl SpanProcessor for Queue {
    fn on_start(&self, _: &mut Span, _: &Context) {}

    fn on_end(&self, span: SpanData) {
        if self.words.try_send(Word::Span(Box::new(span))).is_err() {
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
    /// Starts the thread. Spans are exported where the options or the standard `OTEL_*` variables name a collector.
    ///
    /// # Errors
    /// When the thread does not start.
    pub fn start(options: &TelemetryOptions, identity: &Identity, keep: Keep) -> std::io::Result<Self> {
        let (words, queue) = mpsc::channel(QUEUE_SPANS);
        let counts = Arc::new(SpanCounts::default());
        let resource = resource(identity);
        let provider = SdkTracerProvider::builder()
            .with_span_processor(Queue { words: words.clone(), counts: Arc::clone(&counts) })
            .with_resource(resource.clone())
            .build();
        let target = Target::of(options);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (process, own) = (identity.process.clone(), Arc::clone(&counts));
        std::thread::Builder::new().name("telemetry".into()).spawn(move || {
            runtime.block_on(async {
                // The exporter needs the runtime from its first moment.
                let exporter = target.and_then(|target| target.exporter(&resource));
                Worker {
                    process,
                    keep,
                    export: exporter.map(|e| Export::new(e, Arc::clone(&own))),
                    counts: own,
                }
                .run(queue)
                .await;
            });
        })?;
        let sdk = provider.tracer("volary");
        Ok(Self { sdk, words, counts, _provider: provider })
    }

    /// What makes this process's traces.
    #[must_use]
    pub fn tracer(&self) -> Tracer {
        Tracer::new(self.sdk.clone())
    }

    /// The tracer for a `tracing` layer.
    #[must_use]
    pub fn sdk_tracer(&self) -> SdkTracer {
        self.sdk.clone()
    }

    /// Keeps another process's spans with the run.
    pub fn keep(&self, records: Vec<SpanRecord>) {
        let count = records.len() as u64;
        if self.words.try_send(Word::Records(records)).is_err() {
            self.counts.dropped.fetch_add(count, Ordering::Relaxed);
        }
    }

    /// Spans that were kept, as far as the pipeline knew, were lost after all.
    pub fn lost(&self, count: u64) {
        self.counts.kept.fetch_sub(count, Ordering::Relaxed);
        self.counts.dropped.fetch_add(count, Ordering::Relaxed);
    }

    /// What became of the spans so far.
    #[must_use]
    pub fn counts(&self) -> Arc<SpanCounts> {
        Arc::clone(&self.counts)
    }

    /// Waits until all spans that have ended are kept and exported, but not for long.
    pub async fn flush(&self) {
        let (sender, done) = oneshot::channel();
        if self.words.try_send(Word::Flush(sender)).is_ok() {
            // Whoever is late is late; the process ends all the same.
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
    // One name for all processes, unless the environment says another.
    if std::env::var_os("OTEL_SERVICE_NAME").is_some() {
        builder.build()
    } else {
        builder.with_service_name("volary").build()
    }
}

struct Worker {
    process: String,
    keep: Keep,
    export: Option<Export>,
    counts: Arc<SpanCounts>,
}

impl Worker {
    /// Until nobody makes spans any more.
    async fn run(mut self, mut queue: mpsc::Receiver<Word>) {
        let mut words = Vec::new();
        loop {
            if let Some(export) = self.export.as_mut().filter(|export| export.is_busy()) {
                // The collector's answer is looked at, and what waits is sent, also when nothing new comes.
                let more = tokio::time::timeout(BATCH_WAIT, queue.recv_many(&mut words, QUEUE_SPANS)).await;
                match more {
                    Ok(0) => return,
                    Ok(_) => {}
                    Err(_) => {
                        export.send(false).await;
                        continue;
                    }
                }
            } else if queue.recv_many(&mut words, QUEUE_SPANS).await == 0 {
                return;
            }
            let (mut records, mut flushed) = (Vec::new(), Vec::new());
            for word in words.drain(..) {
                match word {
                    Word::Span(span) => {
                        records.push(SpanRecord::new(&self.process, &span));
                        if let Some(export) = &mut self.export {
                            export.put(*span);
                        }
                    }
                    Word::Records(more) => records.extend(more),
                    Word::Flush(done) => flushed.push(done),
                }
            }
            self.keep_with_run(records);
            if let Some(export) = &mut self.export {
                export.send(!flushed.is_empty()).await;
            }
            if flushed.is_empty() {
                // More of the same step is on its way.
                tokio::time::sleep(BATCH_WAIT).await;
            }
            for done in flushed {
                // Whoever waited may have given up.
                let _ = done.send(());
            }
        }
    }

    fn keep_with_run(&mut self, records: Vec<SpanRecord>) {
        if records.is_empty() {
            return;
        }
        let count = records.len() as u64;
        let dropped = (self.keep)(records).min(count);
        self.counts.kept.fetch_add(count - dropped, Ordering::Relaxed);
        self.counts.dropped.fetch_add(dropped, Ordering::Relaxed);
    }
}
