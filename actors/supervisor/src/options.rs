//! What a supervisor is told.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use volary_core::machine::Settings;
use volary_protocol::RunInfo;
use volary_storage::{Digest, RunDir};
use volary_telemetry::metrics::SupervisorMetrics;
use volary_transport::Network;

/// What a supervisor is told.
#[derive(Clone, Debug)]
pub struct SupervisorOptions {
    /// The network on which nodes and operators reach it.
    pub network: Network,
    /// What nodes must know of the run.
    pub run: RunInfo,
    /// The state machine's settings.
    pub settings: Settings,
    /// The run's directory, whose lock the caller holds.
    pub dir: RunDir,
    /// The hash of everything that the mathematics depends on.
    pub config_hash: Digest,
    /// The address to listen on.
    pub listen: SocketAddr,
    /// Its metrics.
    pub metrics: Arc<SupervisorMetrics>,
    /// A folder with an authority created elsewhere (`ca.crt`, `ca.key`) and access tokens (`join-token`,
    /// and optionally `operator-token`); by default the run's own authority.
    pub identity: Option<PathBuf>,
    /// The lifetime of node certificates; nodes renew them at half of it.
    pub certificate_lifetime: Duration,
    /// Whether no node holds state in memory any more, so that the run resumes from its last checkpoint.
    pub nodes_are_gone: bool,
    /// Whether an operator allows the run to go back past a damaged checkpoint.
    pub may_go_back: bool,
}
