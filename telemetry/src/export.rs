//! The way from the pipeline to a collector, over the OpenTelemetry protocol. A collector that fails is left alone for a while; what
//! comes meanwhile is dropped and counted.

use crate::limits::{BATCH_SPANS, EXPORT_MAX, EXPORT_REST, QUEUE_SPANS};
use crate::pipeline::SpanCounts;
use opentelemetry_otlp::tonic_types::transport::ClientTlsConfig;
use opentelemetry_otlp::{Protocol, WithExportConfig, WithTonicConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{SpanData, SpanExporter};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;
use volary_core::options::{OtlpProtocol, TelemetryOptions};

/// Where spans are exported to.
pub(crate) struct Target {
    endpoint: Option<String>,
    protocol: OtlpProtocol,
    /// Whether the collector is spoken to over TLS.
    secure: bool,
}

impl Target {
    pub(crate) fn of(options: &TelemetryOptions) -> Option<Self> {
        let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        let off = variable("OTEL_SDK_DISABLED").is_some_and(|value| value.eq_ignore_ascii_case("true"))
            || variable("OTEL_TRACES_EXPORTER").is_some_and(|value| value == "none");
        let named = variable("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
            .or_else(|| variable("OTEL_EXPORTER_OTLP_ENDPOINT"));
        if off || (named.is_none() && options.endpoint.is_none()) {
            return None;
        }
        let protocol = variable("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL")
            .or_else(|| variable("OTEL_EXPORTER_OTLP_PROTOCOL"));
        let protocol = match protocol.as_deref() {
            None => options.protocol,
            Some("grpc") => OtlpProtocol::Grpc,
            Some("http/protobuf") => OtlpProtocol::HttpProtobuf,
            Some(other) => {
                tracing::warn!(protocol = other, "traces are not exported: expected grpc or http/protobuf");
                return None;
            }
        };
        // The exporter itself reads the variables when nothing is given.
        let endpoint = if named.is_some() { None } else { options.endpoint.clone() };
        let url = named.as_ref().or(options.endpoint.as_ref());
        let secure = url.is_some_and(|url| url.starts_with("https://"));
        Some(Self { endpoint, protocol, secure })
    }

    pub(crate) fn exporter(self, resource: &Resource) -> Option<opentelemetry_otlp::SpanExporter> {
        let built = match self.protocol {
            OtlpProtocol::Grpc => {
                let mut builder =
                    opentelemetry_otlp::SpanExporter::builder().with_tonic().with_timeout(EXPORT_MAX);
                if self.secure {
                    let trusted = ClientTlsConfig::new().with_enabled_roots();
                    builder = builder.with_tls_config(trusted);
                }
                if let Some(endpoint) = self.endpoint {
                    builder = builder.with_endpoint(endpoint);
                }
                builder.build()
            }
            OtlpProtocol::HttpProtobuf => {
                let mut builder = opentelemetry_otlp::SpanExporter::builder()
                    .with_http()
                    .with_protocol(Protocol::HttpBinary)
                    .with_timeout(EXPORT_MAX);
                if let Some(endpoint) = self.endpoint {
                    let endpoint = endpoint.trim_end_matches('/');
                    let path = if endpoint.ends_with("/v1/traces") { "" } else { "/v1/traces" };
                    builder = builder.with_endpoint(format!("{endpoint}{path}"));
                }
                builder.build()
            }
        };
        let built = built.inspect_err(|error| tracing::warn!(%error, "traces are not exported"));
        built.ok().map(|mut exporter| {
            exporter.set_resource(resource);
            exporter
        })
    }
}

/// The way to a collector.
pub(crate) struct Export {
    exporter: Arc<opentelemetry_otlp::SpanExporter>,
    waiting: Vec<SpanData>,
    /// A request that is under way: whether it failed, and how many spans it holds.
    under_way: Option<tokio::task::JoinHandle<(Result<(), String>, u64)>>,
    /// After a failure the collector is left alone until then.
    rests_until: Option<Instant>,
    failing: bool,
    counts: Arc<SpanCounts>,
}

impl Export {
    pub(crate) fn new(exporter: opentelemetry_otlp::SpanExporter, counts: Arc<SpanCounts>) -> Self {
        let exporter = Arc::new(exporter);
        Self { exporter, waiting: Vec::new(), under_way: None, rests_until: None, failing: false, counts }
    }

    pub(crate) fn is_busy(&self) -> bool {
        self.under_way.is_some() || !self.waiting.is_empty()
    }

    fn drop_spans(&self, count: u64) {
        self.counts.dropped.fetch_add(count, Ordering::Relaxed);
    }

    pub(crate) fn put(&mut self, span: SpanData) {
        if self.waiting.len() < QUEUE_SPANS {
            self.waiting.push(span);
        } else {
            self.drop_spans(1);
        }
    }

    /// Sends what waits, without waiting for the collector unless `all` must be gone.
    pub(crate) async fn send(&mut self, all: bool) {
        loop {
            if let Some(task) = self.under_way.take_if(|task| all || task.is_finished()) {
                let (done, count) = task.await.unwrap_or_else(|error| (Err(error.to_string()), 0));
                self.on_answer(done, count);
            }
            if self.rests_until.is_some_and(|until| Instant::now() < until) {
                let count = self.waiting.len() as u64;
                self.waiting.clear();
                self.drop_spans(count);
            }
            if self.under_way.is_some() || self.waiting.is_empty() {
                return;
            }
            let rest = self.waiting.split_off(self.waiting.len().min(BATCH_SPANS));
            let batch = std::mem::replace(&mut self.waiting, rest);
            let (exporter, count) = (Arc::clone(&self.exporter), batch.len() as u64);
            self.under_way = Some(tokio::spawn(async move {
                let sent = tokio::time::timeout(EXPORT_MAX, exporter.export(batch)).await;
                let done = match sent {
                    Ok(done) => done.map_err(|error| error.to_string()),
                    Err(_) => Err(format!("no answer within {} s", EXPORT_MAX.as_secs())),
                };
                (done, count)
            }));
        }
    }

    fn on_answer(&mut self, done: Result<(), String>, count: u64) {
        match done {
            Ok(()) => {
                self.counts.exported.fetch_add(count, Ordering::Relaxed);
                self.rests_until = None;
                if std::mem::take(&mut self.failing) {
                    tracing::info!("the collector takes traces again");
                }
            }
            Err(reason) => {
                self.drop_spans(count);
                self.rests_until = Some(Instant::now() + EXPORT_REST);
                if !std::mem::replace(&mut self.failing, true) {
                    tracing::warn!(
                        reason,
                        "the collector does not take traces; training goes on without them"
                    );
                }
            }
        }
    }
}
