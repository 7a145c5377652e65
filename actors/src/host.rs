//! The two kinds of process: how a supervisor and a node start, and how their links become actors' messages.

use crate::executor::Executor;
use crate::inbound;
use crate::limits::{DIAL_MAX, DIAL_PAUSE, IDLE_MS};
use crate::node::{NodeActor, NodeArgs, NodeEnd, NodeMsg};
use crate::node_context::NodeContext;
use crate::peers::Peers;
use crate::shards::Uplink;
use crate::supervisor::WORDS_AHEAD;
use crate::wire::{Down, NodeInfo, RunInfo, Up};
use ractor::{Actor, ActorRef};
use std::marker::PhantomData;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;
use tokio::sync::{mpsc, oneshot};
use volary_core::NodeId;
use volary_core::compute::{Compute, Computed};
use volary_transport::{
    Admit, ControlReceiver, ControlSender, Endpoint, Identity, Link, Token, TransportOptions, join, local_ip,
};

/// An error of a process as a whole.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The network.
    #[error(transparent)]
    Transport(#[from] volary_transport::Error),
    /// The disk.
    #[error(transparent)]
    Storage(#[from] volary_storage::Error),
    /// The device.
    #[error("the device: {0}")]
    Compute(#[from] volary_core::compute::ComputeError),
    /// An actor or thread that does not start.
    #[error("{0}")]
    Start(String),
}

/// The result of starting a process.
pub type Result<T> = std::result::Result<T, Error>;

/// What a node is told.
#[derive(Clone, Debug)]
pub struct NodeOptions {
    /// The supervisor's address.
    pub supervisor: SocketAddr,
    /// A node's token.
    pub token: Token,
    /// The name that it would like.
    pub name: Option<String>,
    /// Where peers reach it; this machine's address on the way to the supervisor, any port, when left out.
    pub listen: Option<SocketAddr>,
    /// Its device, for people.
    pub device: String,
    /// Threads of its device executor.
    pub threads: usize,
    /// How much it does in a second, relative to the others.
    pub capacity: f64,
    /// Memory that it may use, in bytes.
    pub memory_bytes: u64,
    /// Called on every thread of the executor before its first computation.
    pub prepare_thread: fn(),
}

/// Runs a node until it leaves or its supervisor is gone. `make` makes its computations once the run is known.
///
/// # Errors
/// When it is refused, or the device cannot take the model.
pub async fn run_node<B: Compute>(
    options: NodeOptions,
    make: impl FnOnce(&RunInfo) -> Computed<B>,
) -> Result<NodeEnd> {
    // The shorter of both ends' timeouts counts, and the supervisor's is the run's `cluster.node_timeout_ms`.
    let transport = TransportOptions { idle_timeout_ms: IDLE_MS, ..TransportOptions::default() };
    let identity = dial(&options, &transport).await?;
    let name = NodeId::new(identity.name());
    let listen = match options.listen {
        Some(listen) => listen,
        None => SocketAddr::new(local_ip(options.supervisor)?, 0),
    };
    let endpoint = Endpoint::bind(listen, identity, Admit::Certified, &transport)?;
    let (link, mut sender, mut receiver) = endpoint.connect_supervisor(options.supervisor).await?;
    let info = NodeInfo {
        pid: std::process::id(),
        device: options.device.clone(),
        threads: options.threads,
        capacity: options.capacity,
        memory_bytes: options.memory_bytes,
        address: endpoint.local_addr().to_string(),
    };
    sender.send(&Up::Hello(info)).await?;
    let Some(Down::Welcome(run)) = receiver.recv().await? else {
        return Err(Error::Start("the supervisor did not say what the run is; its log says why".into()));
    };
    let run: RunInfo = serde_json::from_str(&run)
        .map_err(|error| Error::Start(format!("the supervisor's words about the run: {error}")))?;
    tracing::info!(node = %name, run = run.run, device = options.device, "joined");
    let executor = Executor::start(make(&run)?, options.threads, options.prepare_thread)
        .map_err(|error| Error::Start(format!("the device's threads do not start: {error}")))?;
    let peers = Peers::new(endpoint.clone());
    let node = Arc::new(NodeContext::new(name, run.architecture.clone(), executor, peers));
    let (up, words) = mpsc::channel(WORDS_AHEAD);
    let (end, ended) = oneshot::channel();
    let args = NodeArgs { node: Arc::clone(&node), up, uplink: Uplink { link: link.clone() }, end };
    let (agent, running) = Actor::spawn(None, NodeActor(PhantomData), args)
        .await
        .map_err(|error| Error::Start(format!("the node's agent does not start: {error}")))?;
    tokio::spawn(inbound::accept(node, endpoint));
    tokio::spawn(write_up(sender, words));
    tokio::spawn(read_down(receiver, link.clone(), agent.clone()));
    let end = ended.await.unwrap_or_else(|_| NodeEnd::SupervisorGone("the node's agent died".into()));
    agent.stop(None);
    drop(running.await);
    link.close("the node leaves");
    Ok(end)
}

/// Joins, and tries again for a while when the supervisor does not listen yet; a refusal is final.
async fn dial(options: &NodeOptions, transport: &TransportOptions) -> Result<Identity> {
    let start = Instant::now();
    loop {
        match join(options.supervisor, &options.token, options.name.clone(), transport).await {
            Err(volary_transport::Error::Connection { .. }) if start.elapsed() < DIAL_MAX => {
                tokio::time::sleep(DIAL_PAUSE).await;
            }
            joined => return Ok(joined?),
        }
    }
}

async fn write_up(mut sender: ControlSender, mut words: mpsc::Receiver<Up>) {
    while let Some(word) = words.recv().await {
        if let Err(error) = sender.send(&word).await {
            return tracing::debug!(%error, "the supervisor does not hear this node any more");
        }
    }
    sender.finish().await;
}

async fn read_down(mut receiver: ControlReceiver, link: Link, agent: ActorRef<NodeMsg>) {
    let reason = loop {
        match receiver.recv::<Down>().await {
            Ok(Some(Down::Say(message))) => {
                if agent.cast(NodeMsg::Down(message)).is_err() {
                    return;
                }
            }
            Ok(Some(Down::Welcome(_))) => {}
            Ok(None) => break "it ended the control stream".to_owned(),
            Err(error) => break error.to_string(),
        }
    };
    link.close("the control stream ended");
    drop(agent.cast(NodeMsg::SupervisorGone { reason }));
}
