//! How a node reaches its supervisor: it joins once, connects, and reconnects.

use super::error::ProcessError;
use crate::limits::{
    DIAL_MAX, DIAL_PAUSE, NAME_IN_USE_MAX, REFUSED_PAUSE, STARTING_MAX, STARTING_PAUSE, WELCOME_MAX,
};
use crate::messages::NodeMsg;
use crate::options::NodeOptions;
use ractor::ActorRef;
use ractor::rpc::CallResult;
use std::hash::{BuildHasher, Hasher};
use std::net::SocketAddr;
use std::time::{Duration, Instant};
use volary_core::NodeId;
use volary_core::messages::{NodeCommand, ResidentState};
use volary_core::profile::Profile;
use volary_protocol::{NodeInfo, RunInfo, ToNode, ToSupervisor, Welcome};
use volary_transport::canary::{self, CanaryHeld};
use volary_transport::{ControlReceiver, ControlSender, Endpoint, Identity, Link, TransportOptions};

/// A link that the supervisor has accepted.
pub(crate) struct Connected {
    pub(crate) link: Link,
    pub(crate) sender: ControlSender,
    pub(crate) receiver: ControlReceiver,
    pub(crate) run: RunInfo,
    /// Whether the supervisor accepts the state in this node's memory.
    pub(crate) keep: bool,
    pub(crate) canary: Option<CanaryHeld>,
}

/// Connects a node that has joined to its supervisor, as often as that is needed.
pub(crate) struct SupervisorConnector {
    /// A random number that tells this process from an earlier or later one of its name.
    instance: u64,
    name: NodeId,
    endpoint: Endpoint,
    options: NodeOptions,
    /// What the node can do, once it is measured.
    profile: Option<Profile>,
}

impl SupervisorConnector {
    pub(super) fn new(name: NodeId, endpoint: Endpoint, options: NodeOptions) -> Self {
        Self { instance: random_number(), name, endpoint, options, profile: None }
    }

    pub(super) fn options(&self) -> &NodeOptions {
        &self.options
    }

    pub(super) fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    pub(super) fn set_profile(&mut self, profile: Profile) {
        self.profile = Some(profile);
    }

    /// The measured profile; the default one before.
    pub(super) fn profile(&self) -> Profile {
        self.profile.clone().unwrap_or_else(|| Profile::relative(self.options.threads as f64))
    }

    /// Connects with the state that the agent holds.
    pub(super) async fn reconnect(
        &mut self,
        agent: &ActorRef<NodeMsg>,
        patience: Duration,
    ) -> Result<Connected, ProcessError> {
        match agent.call(|reply| NodeMsg::ResidentState { reply }, None).await {
            Ok(CallResult::Success(state)) => self.connect(state, patience).await,
            _ => Err(ProcessError::AgentDied),
        }
    }

    /// Connects, retrying until the deadline what may pass. A supervisor that is starting is waited for as
    /// long as it says so.
    pub(super) async fn connect(
        &mut self,
        state: ResidentState,
        patience: Duration,
    ) -> Result<Connected, ProcessError> {
        let start = Instant::now();
        let mut deadline = start + patience;
        let (mut name, mut told) = (NameWait::default(), false);
        loop {
            // The certificate could not be renewed without the supervisor.
            if self.endpoint.identity()?.remaining().is_zero() {
                drop(self.rejoin().await);
            }
            match self.connect_once(state.clone()).await {
                Err(error) if name.is_taken(&error) => return Err(error),
                // A fenced node may join again, with its token if that is still valid.
                Err(error) if error.needs_rejoin() => {
                    if !std::mem::replace(&mut told, true) {
                        tracing::warn!(%error, "this node is not admitted any more: it joins again");
                    }
                    match self.rejoin().await {
                        // Its name may be reserved, for itself, for a moment.
                        Err(error) if Instant::now() >= deadline || !error.is_early() => return Err(error),
                        Err(error) if name.is_taken(&error) => return Err(error),
                        Err(error) if error.is_name_in_use() => tokio::time::sleep(REFUSED_PAUSE).await,
                        _ => {}
                    }
                }
                Err(error) if error.is_starting() && start.elapsed() < STARTING_MAX => {
                    tracing::debug!(%error, "waiting");
                    tokio::time::sleep(STARTING_PAUSE).await;
                    // It lives: from here on it has as much time as one that was just lost.
                    deadline = Instant::now() + patience;
                }
                Err(error) if Instant::now() < deadline && error.is_transient() => {
                    tracing::debug!(%error, "supervisor not reached");
                    tokio::time::sleep(DIAL_PAUSE).await;
                }
                connected => return connected,
            }
        }
    }

    async fn rejoin(&self) -> Result<(), ProcessError> {
        tokio::time::sleep(DIAL_PAUSE).await;
        let name = Some(self.name.0.clone());
        let (identity, _) = join_once(&self.options, name, &TransportOptions::default()).await?;
        Ok(self.endpoint.set_identity(identity)?)
    }

    /// Connects to the first address of the supervisor that answers.
    async fn connect_once(&self, state: ResidentState) -> Result<Connected, ProcessError> {
        let mut failed = None;
        for address in addresses(&self.options).await {
            match self.connect_to(address, state.clone()).await {
                Err(error) if error.is_transient() => failed = Some(error),
                answered => return answered,
            }
        }
        Err(failed.unwrap_or(ProcessError::NoAddress))
    }

    async fn connect_to(
        &self,
        supervisor: SocketAddr,
        state: ResidentState,
    ) -> Result<Connected, ProcessError> {
        let (link, mut sender, mut receiver) = self.endpoint.connect_supervisor(supervisor).await?;
        sender.send(&ToSupervisor::Hello(self.info(supervisor)?, state)).await?;
        let Welcome { run, keep, canary, revoked } = receive_welcome(&mut receiver).await?;
        self.endpoint.revoke(revoked);
        let run: RunInfo = serde_json::from_str(&run).map_err(ProcessError::RunInfo)?;
        let canary = match canary {
            // Without it a death is detected later, by silence.
            Some((port, key)) => canary::hold(SocketAddr::new(supervisor.ip(), port), &key).await.ok(),
            None => None,
        };
        Ok(Connected { link, sender, receiver, run, keep, canary })
    }

    /// Where peers reach this node. An unspecified address means nothing to others.
    fn announced_address(&self, supervisor: SocketAddr) -> Result<SocketAddr, ProcessError> {
        let NodeOptions { network, advertise, .. } = &self.options;
        let bound = self.endpoint.local_addr();
        Ok(match advertise {
            // Port 0 stands for the port that is bound.
            Some(address) if address.port() == 0 => SocketAddr::new(address.ip(), bound.port()),
            Some(address) => *address,
            None if bound.ip().is_unspecified() => {
                SocketAddr::new(network.local_ip(supervisor)?, bound.port())
            }
            None => bound,
        })
    }

    fn info(&self, supervisor: SocketAddr) -> Result<NodeInfo, ProcessError> {
        let options = &self.options;
        let address = self.announced_address(supervisor)?;
        let http = options.http.map(|http| match http.ip().is_unspecified() {
            true => SocketAddr::new(address.ip(), http.port()),
            false => http,
        });
        Ok(NodeInfo {
            pid: std::process::id(),
            device: options.device.clone(),
            threads: options.threads,
            profile: self.profile.clone(),
            address: address.to_string(),
            http: http.map(|http| http.to_string()),
            instance: self.instance,
        })
    }
}

/// Waits for a name that another node has.
#[derive(Default)]
struct NameWait {
    since: Option<Instant>,
}

impl NameWait {
    /// Whether another node has the name and keeps it. The first time, it is only said.
    fn is_taken(&mut self, error: &ProcessError) -> bool {
        if !error.is_name_in_use() {
            return false;
        }
        let first = || {
            tracing::warn!(%error, "another node has the name of this one");
            Instant::now()
        };
        self.since.get_or_insert_with(first).elapsed() >= NAME_IN_USE_MAX
    }
}

/// The supervisor's present addresses, in the order of the resolver.
async fn addresses(options: &NodeOptions) -> Vec<SocketAddr> {
    let Some(host) = &options.supervisor_host else { return options.supervisor.clone() };
    let resolved: Vec<_> = match tokio::net::lookup_host(host).await {
        Ok(found) => found.collect(),
        Err(_) => Vec::new(),
    };
    if resolved.is_empty() { options.supervisor.clone() } else { resolved }
}

/// Joins the run at the first address of the supervisor that answers. Returns that address too.
async fn join_once(
    options: &NodeOptions,
    name: Option<String>,
    transport: &TransportOptions,
) -> Result<(Identity, SocketAddr), ProcessError> {
    let mut failed = None;
    for address in addresses(options).await {
        let joined = options.network.join(address, &options.token, name.clone(), transport).await;
        match joined.map_err(ProcessError::from) {
            Ok(identity) => return Ok((identity, address)),
            Err(error) if error.is_transient() => failed = Some(error),
            Err(refused) => return Err(refused),
        }
    }
    Err(failed.unwrap_or(ProcessError::NoAddress))
}

/// The supervisor's answer to a node's hello.
async fn receive_welcome(receiver: &mut ControlReceiver) -> Result<Welcome, ProcessError> {
    match tokio::time::timeout(WELCOME_MAX, receiver.recv::<ToNode>()).await {
        Ok(Ok(Some(ToNode::Welcome(welcome)))) => Ok(*welcome),
        Ok(Ok(Some(ToNode::NameInUse))) => Err(ProcessError::NameInUse),
        Ok(Ok(Some(ToNode::Protocol(NodeCommand::Leave { reason }, _)))) => {
            Err(ProcessError::Released(reason))
        }
        Ok(Err(error)) => Err(error.into()),
        _ => Err(ProcessError::NoWelcome),
    }
}

/// Joins the run with the access token, and returns the address that answered too. It retries for a while
/// where it is too early; any other refusal is final.
pub(super) async fn join_run(
    options: &NodeOptions,
    transport: &TransportOptions,
) -> Result<(Identity, SocketAddr), ProcessError> {
    let (start, mut reported) = (Instant::now(), false);
    loop {
        match join_once(options, options.name.clone(), transport).await {
            Err(error) if error.is_starting() && start.elapsed() < STARTING_MAX => {
                if !std::mem::replace(&mut reported, true) {
                    tracing::info!(%error, "waiting");
                }
                tokio::time::sleep(STARTING_PAUSE).await;
            }
            Err(error) if start.elapsed() < DIAL_MAX && error.is_early() => {
                // A supervisor that answers is not asked ten times a second.
                let refused = !error.is_transient();
                if refused && !std::mem::replace(&mut reported, true) {
                    tracing::warn!(%error, "retrying: the name may become free in a moment");
                }
                tokio::time::sleep(if refused { REFUSED_PAUSE } else { DIAL_PAUSE }).await;
            }
            joined => return joined,
        }
    }
}

/// A number that no other process draws. Not a secret.
fn random_number() -> u64 {
    std::collections::hash_map::RandomState::new().build_hasher().finish()
}
