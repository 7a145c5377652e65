//! The stored form of a span: one JSON object per line.

use opentelemetry::trace::{SpanId, Status};
use opentelemetry::{KeyValue, Value};
use opentelemetry_sdk::trace::SpanData;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::time::{SystemTime, UNIX_EPOCH};

/// The attributes of a span or event.
pub type Attributes = BTreeMap<String, serde_json::Value>;

/// The stored form of a span.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SpanRecord {
    /// The trace identifier, 32 hexadecimal digits.
    pub trace: String,
    /// The span identifier, 16 hexadecimal digits.
    pub span: String,
    /// The identifier of the parent span.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<String>,
    /// The name of the operation.
    pub name: String,
    /// `internal`, `producer` or `consumer`.
    pub kind: String,
    /// The process: `supervisor` or a node's name.
    pub process: String,
    /// The start, in nanoseconds since 1970.
    pub start_ns: u64,
    /// The duration in nanoseconds.
    pub duration_ns: u64,
    /// The attributes.
    #[serde(default)]
    pub attributes: Attributes,
    /// The events.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub events: Vec<EventRecord>,
    /// Links to spans of other traces, as `TRACE/SPAN`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub links: Vec<String>,
    /// The reason of a failure.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// An event in a span.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EventRecord {
    /// The name.
    pub name: String,
    /// The time, in nanoseconds since 1970.
    pub at_ns: u64,
    /// The attributes.
    #[serde(default)]
    pub attributes: Attributes,
}

fn nanoseconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).ok().and_then(|d| d.as_nanos().try_into().ok()).unwrap_or(0)
}

fn json(value: &Value) -> serde_json::Value {
    match value {
        Value::Bool(value) => (*value).into(),
        Value::I64(value) => (*value).into(),
        Value::F64(value) => (*value).into(),
        Value::String(value) => value.as_str().into(),
        Value::Array(opentelemetry::Array::String(values)) => {
            values.iter().map(|value| value.as_str()).collect::<Vec<_>>().into()
        }
        other => other.to_string().into(),
    }
}

fn attributes(pairs: &[KeyValue]) -> Attributes {
    pairs.iter().map(|pair| (pair.key.to_string(), json(&pair.value))).collect()
}

impl SpanRecord {
    pub(crate) fn new(process: &str, data: &SpanData) -> Self {
        let (start_ns, end_ns) = (nanoseconds(data.start_time), nanoseconds(data.end_time));
        let event = |event: &opentelemetry::trace::Event| EventRecord {
            name: event.name.to_string(),
            at_ns: nanoseconds(event.timestamp),
            attributes: attributes(&event.attributes),
        };
        Self {
            trace: data.span_context.trace_id().to_string(),
            span: data.span_context.span_id().to_string(),
            parent: (data.parent_span_id != SpanId::INVALID).then(|| data.parent_span_id.to_string()),
            name: data.name.to_string(),
            kind: format!("{:?}", data.span_kind).to_lowercase(),
            process: process.to_owned(),
            start_ns,
            duration_ns: end_ns.saturating_sub(start_ns),
            attributes: attributes(&data.attributes),
            events: data.events.iter().map(event).collect(),
            links: data
                .links
                .iter()
                .map(|link| format!("{}/{}", link.span_context.trace_id(), link.span_context.span_id()))
                .collect(),
            error: match &data.status {
                Status::Error { description } => Some(description.to_string()),
                _ => None,
            },
        }
    }

    /// The end, in nanoseconds since 1970.
    #[must_use]
    pub fn end_ns(&self) -> u64 {
        self.start_ns.saturating_add(self.duration_ns)
    }

    /// An integer attribute.
    #[must_use]
    pub fn number(&self, key: &str) -> Option<u64> {
        self.attributes.get(key)?.as_u64()
    }

    /// A text attribute.
    #[must_use]
    pub fn text(&self, key: &str) -> Option<&str> {
        self.attributes.get(key)?.as_str()
    }
}
