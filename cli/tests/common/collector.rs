//! An OTLP receiver in the test's own process: the gRPC service of the protocol, and HTTP with binary bodies.

use axum::body::Bytes;
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::common::v1::{KeyValue, any_value::Value};
use opentelemetry_proto::tonic::trace::v1::{Span, span::SpanKind};
use prost::Message;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

/// A received span, with the attributes of its process.
#[derive(Clone, Debug)]
pub struct Received {
    pub resource: BTreeMap<String, String>,
    pub span: Span,
}

pub fn values(attributes: &[KeyValue]) -> BTreeMap<String, String> {
    let text = |value: &Value| match value {
        Value::StringValue(text) => text.clone(),
        Value::IntValue(number) => number.to_string(),
        Value::DoubleValue(number) => number.to_string(),
        Value::BoolValue(flag) => flag.to_string(),
        other => format!("{other:?}"),
    };
    let pair = |pair: &KeyValue| Some((pair.key.clone(), text(pair.value.as_ref()?.value.as_ref()?)));
    attributes.iter().filter_map(pair).collect()
}

impl Received {
    pub fn about(&self) -> BTreeMap<String, String> {
        values(&self.span.attributes)
    }

    pub fn get(&self, key: &str) -> Option<String> {
        self.about().remove(key)
    }

    pub fn node(&self) -> &str {
        &self.resource["volary.node"]
    }

    pub fn is(&self, name: &str) -> bool {
        self.span.name == name
    }

    pub fn kind(&self) -> SpanKind {
        self.span.kind()
    }

    pub fn nanoseconds(&self) -> u64 {
        self.span.end_time_unix_nano - self.span.start_time_unix_nano
    }
}

type Spans = Arc<Mutex<Vec<Received>>>;

#[derive(Clone)]
struct Service(Spans);

fn store(spans: &Spans, request: ExportTraceServiceRequest) {
    let mut spans = spans.lock().expect("no panic");
    for resource in request.resource_spans {
        let about = values(&resource.resource.unwrap_or_default().attributes);
        for span in resource.scope_spans.into_iter().flat_map(|scope| scope.spans) {
            spans.push(Received { resource: about.clone(), span });
        }
    }
}

#[tonic::async_trait]
impl TraceService for Service {
    async fn export(
        &self,
        request: tonic::Request<ExportTraceServiceRequest>,
    ) -> Result<tonic::Response<ExportTraceServiceResponse>, tonic::Status> {
        store(&self.0, request.into_inner());
        Ok(tonic::Response::new(ExportTraceServiceResponse::default()))
    }
}

/// The receiver; it ends with the test's process.
pub struct Collector {
    pub endpoint: String,
    spans: Spans,
}

impl Collector {
    fn start<F: Future<Output = ()> + Send + 'static>(serve: impl FnOnce(SocketAddr, Spans) -> F) -> Self {
        let (address, spans) = (super::free_port(), Spans::default());
        let served = serve(address, Arc::clone(&spans));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        std::thread::spawn(move || runtime.block_on(served));
        super::until("the collector listens", std::time::Duration::from_secs(10), || {
            std::net::TcpStream::connect(address).is_ok()
        });
        Self { endpoint: format!("http://{address}"), spans }
    }

    /// An endpoint without a receiver.
    pub fn unreachable() -> Self {
        Self::at(super::free_port())
    }

    /// A collector in another process.
    pub fn at(address: SocketAddr) -> Self {
        Self { endpoint: format!("http://{address}"), spans: Spans::default() }
    }

    pub fn grpc() -> Self {
        Self::start(|address, spans| async move {
            let service = TraceServiceServer::new(Service(spans));
            tonic::transport::Server::builder().add_service(service).serve(address).await.expect("gRPC");
        })
    }

    pub fn http() -> Self {
        Self::start(|address, spans| async move {
            let export = move |body: Bytes| async move {
                let request = ExportTraceServiceRequest::decode(body).expect("a request");
                store(&spans, request);
                ExportTraceServiceResponse::default().encode_to_vec()
            };
            let routes = axum::Router::new().route("/v1/traces", axum::routing::post(export));
            let listener = tokio::net::TcpListener::bind(address).await.expect("a port");
            axum::serve(listener, routes).await.expect("HTTP");
        })
    }

    pub fn spans(&self) -> Vec<Received> {
        self.spans.lock().expect("no panic").clone()
    }
}
