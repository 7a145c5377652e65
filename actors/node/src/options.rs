//! What a node process is told.

use crate::faults::Fault;
use std::net::SocketAddr;
use std::sync::Arc;
use tokio::sync::mpsc;
use volary_telemetry::metrics::NodeMetrics;
use volary_transport::{AccessToken, Interference, Network};

/// What a node process is told.
#[derive(Debug)]
pub struct NodeOptions {
    /// The network that joins it to the supervisor and to its peers.
    pub network: Network,
    /// The supervisor's addresses, of which any will do.
    pub supervisor: Vec<SocketAddr>,
    /// Its `HOST:PORT`, resolved again at each attempt, since a restarted supervisor may have another
    /// address; nothing when it has no name.
    pub supervisor_host: Option<String>,
    /// A node's access token.
    pub token: AccessToken,
    /// The requested name; by default the supervisor assigns one.
    pub name: Option<String>,
    /// The address on which peers reach it; by default this machine's address towards the supervisor
    /// and any port.
    pub listen: Option<SocketAddr>,
    /// The address that is announced to peers; by default the one on which it listens or, where that is
    /// unspecified, this machine's address towards the supervisor.
    pub advertise: Option<SocketAddr>,
    /// Its device, as `cpu` or `cuda:0`.
    pub device: String,
    /// Threads of its device executor.
    pub threads: usize,
    /// Memory that the run may use, in bytes.
    pub memory_bytes: u64,
    /// Its failure domain; empty when unknown.
    pub zone: String,
    /// Called on every thread of the executor before its first computation.
    pub prepare_thread: fn(),
    /// Its metrics.
    pub metrics: Arc<NodeMetrics>,
    /// Where its metrics are served, if they are.
    pub http: Option<SocketAddr>,
    /// Fault injection, for scripted runs: the hook into its network, and the faults to inject.
    pub faults: Option<(Interference, mpsc::Receiver<Fault>)>,
}
