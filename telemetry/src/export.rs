//! Export of spans to a collector over the OpenTelemetry protocol. After a failure, the export pauses; spans
//! are dropped and counted meanwhile.

use crate::limits::{BATCH_SPANS, EXPORT_MAX, EXPORT_PAUSE, QUEUE_SPANS};
use crate::pipeline::SpanCounts;
use opentelemetry_sdk::error::OTelSdkError;
use opentelemetry_sdk::trace::{SpanData, SpanExporter};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

/// Why a batch was not exported.
#[derive(Debug, thiserror::Error)]
enum ExportError {
    #[error(transparent)]
    Collector(#[from] OTelSdkError),
    #[error("no answer within {} s", EXPORT_MAX.as_secs())]
    Timeout,
    #[error(transparent)]
    Task(#[from] tokio::task::JoinError),
}

/// A request to the collector.
struct Request {
    task: tokio::task::JoinHandle<Result<(), ExportError>>,
    spans: u64,
}

/// The export to one collector.
pub(crate) struct Export {
    exporter: Arc<opentelemetry_otlp::SpanExporter>,
    queue: Vec<SpanData>,
    request: Option<Request>,
    /// The end of the pause after a failure.
    paused_until: Option<Instant>,
    failing: bool,
    counts: Arc<SpanCounts>,
}

impl Export {
    pub(crate) fn new(exporter: opentelemetry_otlp::SpanExporter, counts: Arc<SpanCounts>) -> Self {
        let exporter = Arc::new(exporter);
        Self { exporter, queue: Vec::new(), request: None, paused_until: None, failing: false, counts }
    }

    pub(crate) fn is_busy(&self) -> bool {
        self.request.is_some() || !self.queue.is_empty()
    }

    fn drop_spans(&self, count: u64) {
        self.counts.dropped.fetch_add(count, Ordering::Relaxed);
    }

    pub(crate) fn push(&mut self, span: SpanData) {
        if self.queue.len() < QUEUE_SPANS {
            self.queue.push(span);
        } else {
            self.drop_spans(1);
        }
    }

    /// Sends the queue in batches, one request at a time. With `flush`, it waits until all requests are
    /// answered.
    pub(crate) async fn send(&mut self, flush: bool) {
        loop {
            if let Some(request) = self.request.take_if(|request| flush || request.task.is_finished()) {
                let result = request.task.await.unwrap_or_else(|error| Err(error.into()));
                self.on_answer(result, request.spans);
            }
            if self.paused_until.is_some_and(|until| Instant::now() < until) {
                let count = self.queue.len() as u64;
                self.queue.clear();
                self.drop_spans(count);
            }
            if self.request.is_some() || self.queue.is_empty() {
                return;
            }
            let rest = self.queue.split_off(self.queue.len().min(BATCH_SPANS));
            let batch = std::mem::replace(&mut self.queue, rest);
            let (exporter, spans) = (Arc::clone(&self.exporter), batch.len() as u64);
            let task = tokio::spawn(async move {
                let sent = tokio::time::timeout(EXPORT_MAX, exporter.export(batch)).await;
                sent.map_err(|_| ExportError::Timeout)?.map_err(ExportError::from)
            });
            self.request = Some(Request { task, spans });
        }
    }

    fn on_answer(&mut self, result: Result<(), ExportError>, count: u64) {
        match result {
            Ok(()) => {
                self.counts.exported.fetch_add(count, Ordering::Relaxed);
                self.paused_until = None;
                if std::mem::take(&mut self.failing) {
                    tracing::info!("export of traces to the collector resumed");
                }
            }
            Err(error) => {
                self.drop_spans(count);
                self.paused_until = Some(Instant::now() + EXPORT_PAUSE);
                if !std::mem::replace(&mut self.failing, true) {
                    tracing::warn!(%error, "traces are not exported; training continues");
                }
            }
        }
    }
}
