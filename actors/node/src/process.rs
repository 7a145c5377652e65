//! A node's process: it joins a run, serves its supervisor, reconnects when the link breaks, and ends.
//!
//! | module | contents |
//! | --- | --- |
//! | `connect` | how it reaches the supervisor |
//! | `session` | what runs beside the link to the supervisor |
//! | `setup` | its profile, spans and metrics |

pub(crate) mod connect;
mod error;
mod session;
mod setup;

use crate::agent::{AgentActor, AgentArgs, NodeEnd};
use crate::context::NodeContext;
use crate::device::executor::Executor;
use crate::faults;
use crate::inbound;
use crate::limits::{DIAL_MAX, IDLE_MS};
use crate::messages::{NodeMsg, notify};
use crate::net::peers::Peers;
use crate::options::NodeOptions;
use connect::{Connected, SupervisorConnector, join_run};
pub use error::ProcessError;
use ractor::{Actor, ActorRef};
use session::{SupervisorSession, report_broken_links};
use setup::{measure_profile, register_scrape_hooks, start_telemetry};
use std::marker::PhantomData;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use volary_core::NodeId;
use volary_core::compute::{Compute, Computed};
use volary_core::messages::ResidentState;
use volary_protocol::{RunInfo, ToSupervisor};
use volary_telemetry::Pipeline;
use volary_transport::{ClientAuth, Identity, TransportOptions};

/// Runs a node until it leaves or its supervisor is gone for too long. `make` creates its computations once
/// the run is known. A first message in `leave` asks the run to release this node; a second one ends it at
/// once.
///
/// # Errors
/// When the supervisor refuses the node, or the device cannot take the model.
pub async fn run_node<B: Compute>(
    options: NodeOptions,
    make: impl FnOnce(&RunInfo) -> Computed<B>,
    mut leave: mpsc::Receiver<()>,
) -> Result<NodeEnd, ProcessError> {
    // The shorter of both ends' timeouts counts, and the supervisor's is the run's `cluster.node_timeout_ms`.
    let transport = TransportOptions { idle_timeout_ms: IDLE_MS, ..TransportOptions::default() };
    let (identity, supervisor) = tokio::select! {
        joined = join_run(&options, &transport) => joined?,
        Some(()) = leave.recv() => {
            return Ok(NodeEnd::Left("it was asked to leave before it had joined".into()));
        }
    };
    let (process, first) =
        NodeProcess::start(options, (identity, supervisor), &transport, make, leave).await?;
    Ok(process.run(first).await)
}

/// A node that has joined.
struct NodeProcess<B: Compute> {
    run: RunInfo,
    node: Arc<NodeContext<B>>,
    connector: SupervisorConnector,
    agent: ActorRef<NodeMsg>,
    agent_task: JoinHandle<()>,
    /// Resolves when the agent ends the node.
    ended: oneshot::Receiver<NodeEnd>,
    pipeline: Pipeline,
    spans: mpsc::Receiver<Vec<String>>,
    leave: mpsc::Receiver<()>,
    leaving: bool,
}

/// The link to the supervisor.
enum SupervisorLink {
    Up(SupervisorSession),
    /// The ended session keeps the canary: this process lives, and the supervisor must not think otherwise.
    Down {
        reason: String,
        ended: SupervisorSession,
    },
}

/// What ends the present state of the link.
enum Next {
    /// The session has ended.
    Ended { reason: String },
    /// The supervisor is connected again.
    Connected(SupervisorSession),
    /// The node has ended.
    Node(NodeEnd),
}

impl<B: Compute> NodeProcess<B> {
    /// Connects for the first time, and starts everything that outlives a link.
    async fn start(
        mut options: NodeOptions,
        (identity, supervisor): (Identity, SocketAddr),
        transport: &TransportOptions,
        make: impl FnOnce(&RunInfo) -> Computed<B>,
        leave: mpsc::Receiver<()>,
    ) -> Result<(Self, Connected), ProcessError> {
        let name = NodeId::new(identity.name());
        let listen = match options.listen {
            Some(listen) => listen,
            None => SocketAddr::new(options.network.local_ip(supervisor)?, 0),
        };
        let endpoint = options.network.bind(listen, identity, ClientAuth::Required, transport)?;
        let faults = options.faults.take();
        let mut connector = SupervisorConnector::new(name.clone(), endpoint.clone(), options);
        let first = connector.connect(ResidentState::default(), DIAL_MAX).await?;
        let (run, options) = (first.run.clone(), connector.options());
        tracing::info!(node = %name, run = run.run, device = options.device, "joined");
        endpoint.set_idle_timeout(run.node_timeout_ms)?;

        let executor = Executor::start(make(&run)?, options.threads, options.prepare_thread)
            .map_err(|error| ProcessError::start("the device's threads", error))?;
        let (peers, broken_links) = Peers::new(endpoint.clone());
        let (pipeline, spans) = start_telemetry(&run, &name, &options.device)?;
        let shape = (&run.architecture, &run.training);
        let observers = (pipeline.tracer(), Arc::clone(&options.metrics));
        let node = Arc::new(NodeContext::new(name, shape, executor, peers, observers));
        register_scrape_hooks(&node, &pipeline);
        let (end, ended) = oneshot::channel();
        let args = AgentArgs { node: Arc::clone(&node), end };
        let (agent, agent_task) = Actor::spawn(None, AgentActor(PhantomData), args)
            .await
            .map_err(|error| ProcessError::start("the node's agent", error))?;
        tokio::spawn(inbound::accept(Arc::clone(&node), endpoint));
        tokio::spawn(report_broken_links(Arc::clone(&node), agent.clone(), broken_links));
        if let Some((interference, faults)) = faults {
            tokio::spawn(faults::inject(Arc::clone(&node), interference, faults));
        }
        let profile = measure_profile(&node, connector.options(), &run, &first.link).await;
        connector.set_profile(profile);
        let leaving = false;
        let process =
            Self { run, node, connector, agent, agent_task, ended, pipeline, spans, leave, leaving };
        Ok((process, first))
    }

    async fn run(mut self, first: Connected) -> NodeEnd {
        let session = self.session(first);
        // With its profile the node can be placed.
        session.send(ToSupervisor::Profile(Box::new(self.connector.profile()))).await;
        let mut link = SupervisorLink::Up(session);
        loop {
            let next = match &mut link {
                SupervisorLink::Up(session) => self.serve(session).await,
                SupervisorLink::Down { reason, .. } => self.reconnect(reason).await,
            };
            link = match (next, link) {
                (Next::Ended { reason }, SupervisorLink::Up(ended)) => SupervisorLink::Down { reason, ended },
                (Next::Connected(session), _) => SupervisorLink::Up(session),
                (Next::Node(end), link) => {
                    self.shut_down(link).await;
                    return end;
                }
                (Next::Ended { .. }, down) => down,
            };
        }
    }

    fn session(&self, connected: Connected) -> SupervisorSession {
        SupervisorSession::start(connected, &self.agent, &self.node, self.connector.endpoint())
    }

    /// Serves a session until it ends, or the node does.
    async fn serve(&mut self, session: &mut SupervisorSession) -> Next {
        loop {
            tokio::select! {
                biased;
                end = &mut self.ended => return Next::Node(agent_end(end)),
                Some(()) = self.leave.recv() => {
                    if std::mem::replace(&mut self.leaving, true) {
                        return Next::Node(leave_at_once());
                    }
                    notify(&self.agent, NodeMsg::LeaveRequested);
                }
                Some(spans) = self.spans.recv() => session.send_spans(&self.pipeline, &spans),
                reason = session.ended() => {
                    session.close();
                    notify(&self.agent, NodeMsg::SupervisorLost);
                    tracing::warn!(reason, "the link to the supervisor has ended; this node keeps its state and connects again");
                    return Next::Ended { reason };
                }
            }
        }
    }

    /// Waits for the supervisor to return, for at most the run's `cluster.supervisor_timeout_ms`.
    async fn reconnect(&mut self, reason: &str) -> Next {
        let patience = Duration::from_millis(self.run.supervisor_timeout_ms);
        let connected = tokio::select! {
            biased;
            end = &mut self.ended => return Next::Node(agent_end(end)),
            connected = self.connector.reconnect(&self.agent, patience) => connected,
            Some(()) = self.leave.recv() => return Next::Node(leave_at_once()),
        };
        match connected {
            Ok(connected) if connected.run.same_model(&self.run) => {
                tracing::info!(keep = connected.keep, "the supervisor is back");
                let session = self.session(connected);
                if self.leaving {
                    notify(&self.agent, NodeMsg::LeaveRequested);
                }
                Next::Connected(session)
            }
            Ok(_) => {
                let reason = "the supervisor of another run has taken its place";
                Next::Node(NodeEnd::SupervisorLost(reason.into()))
            }
            // The last command on the old stream may have released this node.
            Err(error) => Next::Node(
                self.ended
                    .try_recv()
                    .unwrap_or_else(|_| NodeEnd::SupervisorLost(format!("{reason}; then {error}"))),
            ),
        }
    }

    /// Ends the agent, and sends the last spans where there is a link; otherwise they are counted as lost.
    async fn shut_down(mut self, link: SupervisorLink) {
        self.agent.stop(None);
        drop(self.agent_task.await);
        self.pipeline.flush().await;
        let (session, is_up) = match link {
            SupervisorLink::Up(session) => (session, true),
            SupervisorLink::Down { ended, .. } => (ended, false),
        };
        while let Ok(spans) = self.spans.try_recv() {
            if is_up {
                session.send_spans(&self.pipeline, &spans);
            } else {
                self.pipeline.count_lost(spans.len() as u64);
            }
        }
        session.finish("the node leaves").await;
    }
}

fn agent_end(end: Result<NodeEnd, oneshot::error::RecvError>) -> NodeEnd {
    end.unwrap_or_else(|_| NodeEnd::SupervisorLost("the node's agent died".into()))
}

fn leave_at_once() -> NodeEnd {
    NodeEnd::Left("it was asked to leave at once".into())
}
