//! Options of connections.

use serde::{Deserialize, Serialize};

/// Options of connections.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TransportOptions {
    /// Interval of keep-alive packets on an idle connection, in milliseconds.
    pub keep_alive_ms: u64,
    /// Silence after which a connection times out, in milliseconds. The shorter value of both ends counts.
    pub idle_timeout_ms: u64,
}

impl Default for TransportOptions {
    fn default() -> Self {
        Self { keep_alive_ms: 300, idle_timeout_ms: 2_000 }
    }
}
