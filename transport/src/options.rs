//! How connections behave.

use serde::{Deserialize, Serialize};

/// How connections behave.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TransportOptions {
    /// Milliseconds between signs of life on an idle connection.
    pub keep_alive_ms: u64,
    /// Milliseconds without a sign of life after which a peer is gone.
    pub idle_timeout_ms: u64,
}

impl Default for TransportOptions {
    fn default() -> Self {
        Self { keep_alive_ms: 300, idle_timeout_ms: 2_000 }
    }
}
