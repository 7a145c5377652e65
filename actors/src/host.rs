//! A node's process: how it starts, what it is told, and when it ends.
//!
//! | file | what |
//! | --- | --- |
//! | `way` | its connector to the supervisor |
//! | `served` | what runs beside its link to the supervisor |
//! | `own` | what it says of itself |

mod connector;
mod own;
mod session;

use crate::credentials::{NO_CERTIFICATE, random_number};
use crate::disturb::{Disturbance, disturb};
use crate::executor::Executor;
use crate::inbound;
use crate::limits::{DIAL_MAX, IDLE_MS};
use crate::node::{NodeActor, NodeArgs, NodeEnd, NodeMsg};
use crate::node_context::NodeContext;
use crate::peers::Peers;
use crate::wire::{RunInfo, ToSupervisor};
use connector::{SupervisorConnector, dial};
use own::{measure_all, register_scrape_hooks, start_telemetry};
use ractor::Actor;
use session::{SupervisorSession, tell_of_breaks};
use std::marker::PhantomData;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot};
use volary_core::NodeId;
use volary_core::compute::{Compute, Computed};
use volary_core::messages::ResidentState;
use volary_telemetry::metrics::NodeMetrics;
use volary_transport::{AccessToken, Admit, Endpoint, Interference, TransportOptions, local_ip};

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
    /// An actor or thread that does not start, or a refusal.
    #[error("{0}")]
    Start(String),
    /// What another attempt may mend.
    #[error("{0}")]
    NotYet(String),
}

impl Error {
    /// Whether this node is known and its certificate is not good any more.
    fn says_that_the_certificate_is_over(&self) -> bool {
        matches!(self, Self::Transport(volary_transport::Error::Refused(reason)) if reason.starts_with(NO_CERTIFICATE))
    }

    /// Whether another attempt may mend it.
    fn may_pass(&self) -> bool {
        matches!(self, Self::NotYet(_) | Self::Transport(volary_transport::Error::Connection { .. }))
    }
}

/// The result of starting a process.
pub type Result<T> = std::result::Result<T, Error>;

/// What a node is told.
#[derive(Debug)]
pub struct NodeOptions {
    /// The supervisor's address.
    pub supervisor: SocketAddr,
    /// Its `HOST:PORT`, which is looked up again at each attempt: a supervisor that is started again may be somewhere else.
    pub supervisor_host: String,
    /// A node's token.
    pub token: AccessToken,
    /// The name that it would like.
    pub name: Option<String>,
    /// Where peers reach it; this machine's address on the connector to the supervisor, any port, when left out.
    pub listen: Option<SocketAddr>,
    /// Its device, for people.
    pub device: String,
    /// Threads of its device executor.
    pub threads: usize,
    /// Memory that it may use, in bytes.
    pub memory_bytes: u64,
    /// What fails together with it; empty when that is not known.
    pub zone: String,
    /// Called on every thread of the executor before its first computation.
    pub prepare_thread: fn(),
    /// What this node measures, for whoever scrapes it.
    pub metrics: Arc<NodeMetrics>,
    /// Where its figures are served, if they are.
    pub http: Option<SocketAddr>,
    /// A hook into the network, and what to do through it, for fault tests.
    pub disturbed: Option<(Interference, mpsc::Receiver<Disturbance>)>,
}

/// Runs a node until it leaves or its supervisor has been gone for too long. `make` makes its computations once the run
/// is known; each word in `leave` asks to leave, the second one at once.
///
/// # Errors
/// When it is refused, or the device cannot take the model.
pub async fn run_node<B: Compute>(
    options: NodeOptions,
    make: impl FnOnce(&RunInfo) -> Computed<B>,
    mut leave: mpsc::Receiver<()>,
) -> Result<NodeEnd> {
    // The shorter of both ends' timeouts counts, and the supervisor's is the run's `cluster.node_timeout_ms`.
    let transport = TransportOptions { idle_timeout_ms: IDLE_MS, ..TransportOptions::default() };
    let identity = tokio::select! {
        joined = dial(&options, &transport) => joined?,
        Some(()) = leave.recv() => return Ok(NodeEnd::Left("it was told to leave before it had joined".into())),
    };
    let name = NodeId::new(identity.name());
    let listen = match options.listen {
        Some(listen) => listen,
        None => SocketAddr::new(local_ip(options.supervisor)?, 0),
    };
    let endpoint = match &options.disturbed {
        Some((hook, _)) => {
            Endpoint::bind_disturbed(listen, identity, Admit::Certified, &transport, hook.clone())?
        }
        None => Endpoint::bind(listen, identity, Admit::Certified, &transport)?,
    };
    let mut connector = SupervisorConnector {
        instance: random_number(),
        name: name.0.clone(),
        endpoint,
        options,
        profile: None,
    };
    let first = connector.connect(ResidentState::default(), Instant::now() + DIAL_MAX).await?;
    let run = first.run.clone();
    tracing::info!(node = %name, run = run.run, device = connector.options.device, "joined");
    connector.endpoint.set_idle_timeout(run.node_timeout_ms)?;
    let executor = Executor::start(make(&run)?, connector.options.threads, connector.options.prepare_thread)
        .map_err(|error| Error::Start(format!("the device's threads do not start: {error}")))?;
    let (peers, breaks) = Peers::new(connector.endpoint.clone());
    let (pipeline, mut spans) = start_telemetry(&run, &name, &connector.options.device)?;
    let shape = (&run.architecture, &run.training);
    let observed = (pipeline.tracer(), Arc::clone(&connector.options.metrics));
    let node = Arc::new(NodeContext::new(name, shape, executor, peers, observed));
    register_scrape_hooks(&node, &pipeline);
    let (end, mut ended) = oneshot::channel();
    let args = NodeArgs { node: Arc::clone(&node), end };
    let (agent, running) = Actor::spawn(None, NodeActor(PhantomData), args)
        .await
        .map_err(|error| Error::Start(format!("the node's agent does not start: {error}")))?;
    tokio::spawn(inbound::accept(Arc::clone(&node), connector.endpoint.clone()));
    tokio::spawn(tell_of_breaks(Arc::clone(&node), agent.clone(), breaks));
    if let Some((interference, orders)) = connector.options.disturbed.take() {
        tokio::spawn(disturb(Arc::clone(&node), interference, orders));
    }
    let profile = measure_all(&node, &connector.options, &run, &first.link).await;
    connector.profile = Some(profile.clone());
    let mut session = SupervisorSession::start(first, &agent, &node, &connector.endpoint);
    // Now it may be placed.
    drop(session.up.send(ToSupervisor::Profile(Box::new(profile))).await);
    let mut asked = false;
    let end = loop {
        tokio::select! {
            biased;
            end = &mut ended => {
                break end.unwrap_or_else(|_| NodeEnd::SupervisorGone("the node's agent died".into()));
            }
            Some(()) = leave.recv() => {
                if asked {
                    break NodeEnd::Left("it was told to leave at once".into());
                }
                asked = true;
                drop(agent.cast(NodeMsg::LeaveRequested));
            }
            Some(ended) = spans.recv() => session.send_spans(&pipeline, &ended),
            reason = session.ended() => {
                session.close();
                drop(agent.cast(NodeMsg::SupervisorLost));
                tracing::warn!(reason, "the supervisor is gone; this node keeps its state and waits");
                let deadline = Instant::now() + Duration::from_millis(run.supervisor_timeout_ms);
                let mut wish = std::pin::pin!(connector.reconnect(&agent, deadline));
                let back = tokio::select! {
                    biased;
                    end = &mut ended => break end.unwrap_or_else(|_| NodeEnd::Left("the node's agent ended".into())),
                    back = &mut wish => back,
                    Some(()) = leave.recv() => break NodeEnd::Left("it was told to leave at once".into()),
                };
                match back {
                    Ok(connected) if connected.run.same_model(&run) => {
                        tracing::info!(keep = connected.keep, "the supervisor is back");
                        session = SupervisorSession::start(connected, &agent, &node, &connector.endpoint);
                        if asked {
                            drop(agent.cast(NodeMsg::LeaveRequested));
                        }
                    }
                    Ok(_) => break NodeEnd::SupervisorGone("another run's supervisor has taken its place".into()),
                    // The last word on the stream may have been that this node is let go.
                    Err(error) => break ended.try_recv().unwrap_or_else(|_| {
                        NodeEnd::SupervisorGone(format!("{reason}; then {error}"))
                    }),
                }
            }
        }
    };
    agent.stop(None);
    drop(running.await);
    pipeline.flush().await;
    while let Ok(ended) = spans.try_recv() {
        session.send_spans(&pipeline, &ended);
    }
    session.link.close("the node leaves");
    Ok(end)
}
