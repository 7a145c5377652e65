//! The collector of traces: from the standard variables of OpenTelemetry, or else from the run's options
//! (<https://opentelemetry.io/docs/specs/otel/protocol/exporter/>).

use crate::limits::EXPORT_MAX;
use opentelemetry_otlp::tonic_types::transport::ClientTlsConfig;
use opentelemetry_otlp::{Protocol, WithExportConfig, WithTonicConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::SpanExporter as _;
use volary_core::options::{OtlpProtocol, TelemetryOptions};

const ENDPOINT: &str = "OTEL_EXPORTER_OTLP_ENDPOINT";
const TRACES_ENDPOINT: &str = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT";
/// The path of traces over HTTP, which the endpoint of all signals lacks.
const TRACES_PATH: &str = "/v1/traces";

/// A variable of the environment with a value that has no meaning.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{variable}={value}: expected {expected}")]
pub struct InvalidVariable {
    variable: &'static str,
    value: String,
    expected: &'static str,
}

/// Checks the variables that say where traces go.
///
/// # Errors
/// The first that has no meaning.
pub fn check_environment() -> Result<(), InvalidVariable> {
    Target::from_environment(&TelemetryOptions::default()).map(drop)
}

/// The collector of an export.
#[derive(Debug, PartialEq)]
pub(crate) struct Target {
    /// A URL; over HTTP with its path.
    endpoint: String,
    protocol: OtlpProtocol,
}

impl Target {
    pub(crate) fn from_environment(options: &TelemetryOptions) -> Result<Option<Self>, InvalidVariable> {
        Self::resolve(options, |name| std::env::var(name).ok())
    }

    /// The collector by variables, which take precedence, and options. An empty variable is not set.
    fn resolve(
        options: &TelemetryOptions,
        variable: impl Fn(&'static str) -> Option<String>,
    ) -> Result<Option<Self>, InvalidVariable> {
        let set = |name: &'static str| Some((name, variable(name).filter(|value| !value.is_empty())?));
        let is_disabled =
            set("OTEL_SDK_DISABLED").is_some_and(|(_, value)| value.eq_ignore_ascii_case("true"));
        let is_off = match set("OTEL_TRACES_EXPORTER") {
            Some((_, value)) if value == "none" => true,
            Some((variable, value)) if value != "otlp" => {
                return Err(InvalidVariable { variable, value, expected: "otlp or none" });
            }
            _ => false,
        };
        let protocol =
            set("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL").or_else(|| set("OTEL_EXPORTER_OTLP_PROTOCOL"));
        let protocol = match protocol {
            None => options.protocol,
            Some((_, value)) if value == "grpc" => OtlpProtocol::Grpc,
            Some((_, value)) if value == "http/protobuf" => OtlpProtocol::HttpProtobuf,
            Some((variable, value)) => {
                return Err(InvalidVariable { variable, value, expected: "grpc or http/protobuf" });
            }
        };
        let is_http = protocol == OtlpProtocol::HttpProtobuf;
        let endpoint = match (set(TRACES_ENDPOINT), set(ENDPOINT), &options.endpoint) {
            // Used as it is.
            (Some((variable, value)), ..) => url(variable, value)?,
            (None, Some((variable, value)), _) => with_path(url(variable, value)?, is_http),
            (None, None, Some(endpoint)) => with_path(endpoint.clone(), is_http),
            (None, None, None) => return Ok(None),
        };
        Ok((!is_disabled && !is_off).then_some(Self { endpoint, protocol }))
    }

    /// Whether the connection uses TLS.
    fn uses_tls(&self) -> bool {
        self.endpoint.starts_with("https://")
    }

    pub(crate) fn exporter(self, resource: &Resource) -> Option<opentelemetry_otlp::SpanExporter> {
        // The HTTP client takes the process's provider of cryptography, also for addresses without TLS;
        // another one may be set already.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let built = match self.protocol {
            OtlpProtocol::Grpc => {
                let mut builder =
                    opentelemetry_otlp::SpanExporter::builder().with_tonic().with_timeout(EXPORT_MAX);
                if self.uses_tls() {
                    builder = builder.with_tls_config(ClientTlsConfig::new().with_enabled_roots());
                }
                builder.with_endpoint(self.endpoint).build()
            }
            OtlpProtocol::HttpProtobuf => opentelemetry_otlp::SpanExporter::builder()
                .with_http()
                .with_protocol(Protocol::HttpBinary)
                .with_timeout(EXPORT_MAX)
                .with_endpoint(self.endpoint)
                .build(),
        };
        let built = built.inspect_err(|error| tracing::warn!(%error, "traces are not exported"));
        built.ok().map(|mut exporter| {
            exporter.set_resource(resource);
            exporter
        })
    }
}

fn url(variable: &'static str, value: String) -> Result<String, InvalidVariable> {
    let host = value.strip_prefix("http://").or_else(|| value.strip_prefix("https://"));
    if host
        .is_some_and(|host| !host.is_empty() && !host.starts_with('/') && !host.contains(char::is_whitespace))
    {
        return Ok(value);
    }
    // Without a scheme it could be either, and the wrong one loses all traces.
    Err(InvalidVariable { variable, value, expected: "a URL that begins with http:// or https://" })
}

/// The endpoint of all signals over HTTP is a base to which the path is added, unless it is there already.
fn with_path(endpoint: String, is_http: bool) -> String {
    let base = endpoint.trim_end_matches('/');
    if !is_http || base.ends_with(TRACES_PATH) { endpoint } else { format!("{base}{TRACES_PATH}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolve(
        variables: &[(&str, &str)],
        endpoint: Option<&str>,
    ) -> Result<Option<Target>, InvalidVariable> {
        let options =
            TelemetryOptions { endpoint: endpoint.map(String::from), ..TelemetryOptions::default() };
        Target::resolve(&options, |name| {
            variables.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).into())
        })
    }

    #[test]
    fn the_endpoint_is_found_as_the_specification_says() {
        let http = ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf");
        for (variables, endpoint, expected) in [
            (&[][..], None, None),
            (&[], Some("http://a:4317"), Some("http://a:4317")),
            (&[(ENDPOINT, "http://b:4317")], Some("http://a:4317"), Some("http://b:4317")),
            (&[(ENDPOINT, "")], Some("http://a:4317"), Some("http://a:4317")),
            (&[(ENDPOINT, "https://b:4318/x/"), http], None, Some("https://b:4318/x/v1/traces")),
            (&[(ENDPOINT, "http://b:4318/v1/traces"), http], None, Some("http://b:4318/v1/traces")),
            (
                &[(TRACES_ENDPOINT, "http://c:4318/own"), (ENDPOINT, "http://b"), http],
                None,
                Some("http://c:4318/own"),
            ),
            (&[(ENDPOINT, "http://b:4317"), ("OTEL_SDK_DISABLED", "TRUE")], None, None),
            (&[(ENDPOINT, "http://b:4317"), ("OTEL_TRACES_EXPORTER", "none")], None, None),
        ] {
            let found = resolve(variables, endpoint).unwrap().map(|target| target.endpoint);
            assert_eq!(found.as_deref(), expected, "{variables:?}");
        }
    }

    #[test]
    fn a_value_without_meaning_is_named_with_its_variable() {
        for (variable, value) in [
            (ENDPOINT, "localhost:4317"),
            (ENDPOINT, "http://"),
            (TRACES_ENDPOINT, "ftp://b"),
            ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json"),
            ("OTEL_TRACES_EXPORTER", "jaeger"),
        ] {
            let error = resolve(&[(variable, value)], None).unwrap_err().to_string();
            assert!(error.starts_with(&format!("{variable}={value}: expected ")), "{error}");
        }
    }
}
