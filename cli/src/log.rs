//! The log on standard error.

use clap::ValueEnum;
use std::io::IsTerminal;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer};

/// The format of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// Lines of text.
    Text,
    /// One JSON object per line.
    Json,
}

/// Starts the log. `RUST_LOG` overrides `verbose`.
pub fn start(verbose: u8, format: Format) {
    let level = match verbose {
        0 => "warn",
        1 => "info",
        _ => "debug",
    };
    let default = format!("{level},quinn=error,sled=error,tokenizers=error");
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(default));
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    // A log that cannot be written must not end a run.
    let lines = lines.log_internal_errors(false);
    let lines = match format {
        Format::Text => lines.with_target(false).with_ansi(std::io::stderr().is_terminal()).boxed(),
        Format::Json => lines.json().boxed(),
    };
    let subscriber =
        tracing_subscriber::registry().with(lines.with_filter(filter)).with(volary_telemetry::layer::layer());
    // A second start, in a test process, keeps the first.
    let _ = subscriber.try_init();
}
