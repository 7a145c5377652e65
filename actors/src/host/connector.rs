//! A node's connector to its supervisor: joining, connecting, and connecting again.

use super::{Error, NodeOptions, Result};
use crate::credentials::NAME_IN_USE;
use crate::limits::{DIAL_MAX, DIAL_PAUSE, REFUSED_PAUSE, WELCOME_MAX};
use crate::node::NodeMsg;
use crate::wire::{NodeInfo, RunInfo, ToNode, ToSupervisor};
use ractor::ActorRef;
use ractor::rpc::CallResult;
use std::net::SocketAddr;
use std::time::Instant;
use volary_core::messages::{NodeCommand, ResidentState};
use volary_core::profile::Profile;
use volary_transport::canary::CanaryHeld;
use volary_transport::{ControlReceiver, ControlSender, Endpoint, Identity, Link, TransportOptions, join};

/// What a supervisor let in.
pub(super) struct Connected {
    pub(super) link: Link,
    pub(super) sender: ControlSender,
    pub(super) receiver: ControlReceiver,
    pub(super) run: RunInfo,
    pub(super) keep: bool,
    pub(super) canary: Option<CanaryHeld>,
}

/// The connector to the supervisor.
pub(super) struct SupervisorConnector {
    pub(super) instance: u64,
    pub(super) name: String,
    pub(super) endpoint: Endpoint,
    pub(super) options: NodeOptions,
    /// What was measured, once it was.
    pub(super) profile: Option<Profile>,
}

impl SupervisorConnector {
    /// Connects with what the agent holds, again and again until the deadline.
    pub(super) async fn reconnect(&self, agent: &ActorRef<NodeMsg>, deadline: Instant) -> Result<Connected> {
        let held = match agent.call(|reply| NodeMsg::ResidentState { reply }, None).await {
            Ok(CallResult::Success(held)) => held,
            _ => return Err(Error::Start("the node's agent died".into())),
        };
        self.connect(held, deadline).await
    }

    pub(super) async fn connect(&self, held: ResidentState, deadline: Instant) -> Result<Connected> {
        loop {
            // While the supervisor was away nobody could renew it.
            if self.endpoint.identity()?.left().is_zero() {
                drop(self.rejoin().await);
            }
            match self.connect_once(held.clone()).await {
                // Shut out, it may join anew: with its token, if that is still good, and another certificate.
                Err(error) if error.says_that_the_certificate_is_over() => self.rejoin().await?,
                Err(error) if Instant::now() < deadline && error.may_pass() => {
                    tracing::debug!(%error, "not yet");
                    tokio::time::sleep(DIAL_PAUSE).await;
                }
                connected => return connected,
            }
        }
    }

    /// Where the supervisor is now.
    async fn supervisor(&self) -> SocketAddr {
        let options = &self.options;
        let looked_up = tokio::net::lookup_host(&options.supervisor_host).await;
        looked_up.ok().and_then(|mut found| found.next()).unwrap_or(options.supervisor)
    }

    async fn rejoin(&self) -> Result<()> {
        tokio::time::sleep(DIAL_PAUSE).await;
        let token = &self.options.token;
        let name = Some(self.name.clone());
        let identity = join(self.supervisor().await, token, name, &TransportOptions::default()).await?;
        self.endpoint.set_identity(identity)?;
        Ok(())
    }

    async fn connect_once(&self, held: ResidentState) -> Result<Connected> {
        let options = &self.options;
        let supervisor = self.supervisor().await;
        let (link, mut sender, mut receiver) = self.endpoint.connect_supervisor(supervisor).await?;
        let info = NodeInfo {
            pid: std::process::id(),
            device: options.device.clone(),
            threads: options.threads,
            profile: self.profile.clone(),
            address: self.endpoint.local_addr().to_string(),
            http: options.http.map(|address| address.to_string()),
            instance: self.instance,
        };
        sender.send(&ToSupervisor::Hello(info, held)).await?;
        let welcome = match tokio::time::timeout(WELCOME_MAX, receiver.recv::<ToNode>()).await {
            Ok(Ok(Some(ToNode::Welcome(welcome)))) => *welcome,
            Ok(Ok(Some(ToNode::NameInUse))) => {
                return Err(Error::NotYet(format!("{NAME_IN_USE}; choose another one")));
            }
            Ok(Ok(Some(ToNode::Protocol(NodeCommand::Leave { reason }, _)))) => {
                return Err(Error::Start(reason));
            }
            Ok(Err(error)) => return Err(error.into()),
            _ => return Err(Error::NotYet("the supervisor did not say what the run is".into())),
        };
        self.endpoint.revoke(welcome.revoked);
        let run: RunInfo = serde_json::from_str(&welcome.run)
            .map_err(|error| Error::Start(format!("the supervisor's words about the run: {error}")))?;
        let canary = match welcome.canary {
            // Without it a death is noticed all the same, only later.
            Some((port, key)) => {
                volary_transport::canary::hold(SocketAddr::new(supervisor.ip(), port), &key).await.ok()
            }
            None => None,
        };
        Ok(Connected { link, sender, receiver, run, keep: welcome.keep, canary })
    }
}

/// Whether the supervisor does not listen yet, or has not noticed yet that an earlier process of this name is gone.
fn is_early(error: &volary_transport::Error) -> bool {
    match error {
        volary_transport::Error::Connection { .. } => true,
        volary_transport::Error::Refused(reason) => reason.starts_with(NAME_IN_USE),
        _ => false,
    }
}

/// Joins, and tries again for a while when it comes too early; any other refusal is final.
pub(super) async fn dial(options: &NodeOptions, transport: &TransportOptions) -> Result<Identity> {
    let (start, mut told) = (Instant::now(), false);
    loop {
        match join(options.supervisor, &options.token, options.name.clone(), transport).await {
            Err(error) if start.elapsed() < DIAL_MAX && is_early(&error) => {
                // Whoever listens and says no is not asked ten times a second.
                let refused = matches!(error, volary_transport::Error::Refused(_));
                if refused && !told {
                    tracing::warn!(%error, "trying for a while: it may be gone in a moment");
                    told = true;
                }
                tokio::time::sleep(if refused { REFUSED_PAUSE } else { DIAL_PAUSE }).await;
            }
            joined => return Ok(joined?),
        }
    }
}
