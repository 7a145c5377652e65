//! The supervisor's admission: who is let in, and what becomes of the links of nodes and operators.

use crate::credentials::{Credentials, NAME_IN_USE};
use crate::limits::{CHECKPOINT_BYTES_AHEAD, HELLO_MAX};
use crate::operator::{OperatorReply, OperatorRequest};
use crate::supervisor::{Arrival, SupervisorMsg, WORDS_AHEAD};
use crate::wire::{self, ShardAt, ShardWish, ToNode, ToSupervisor};
use ractor::rpc::CallResult;
use ractor::{ActorRef, ActorStatus};
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;
use tokio::sync::{Semaphore, mpsc};
use volary_core::NodeId;
use volary_core::compute::{ComputeError, Computed};
use volary_core::profile::Profile;
use volary_storage::Checkpoints;
use volary_telemetry::{Pipeline, SpanRecord};
use volary_transport::{
    Accepted, AccessRole, Canary, CanaryKey, CanaryWatch, ControlReceiver, ControlSender, Endpoint, Frame,
    InboundFrame, Kind, Link, Role,
};

/// What is needed to let somebody in.
pub(super) struct Admission {
    pub(super) credentials: Arc<Credentials>,
    pub(super) checkpoints: Checkpoints,
    pub(super) actor: ActorRef<SupervisorMsg>,
    pub(super) sessions: AtomicU64,
    pub(super) canary: Option<Canary>,
    pub(super) pipeline: Pipeline,
    /// How many links each name has: nobody else gets a certificate for it meanwhile.
    pub(super) names: Mutex<HashMap<NodeId, usize>>,
    /// Kibibytes of checkpoints' shards that are in memory at a time.
    pub(super) room: Arc<Semaphore>,
}

/// A name that is in use until this is dropped.
struct InUse<'a>(&'a Admission, NodeId);

impl Drop for InUse<'_> {
    fn drop(&mut self) {
        let mut names = self.0.names();
        if let Some(links) = names.get_mut(&self.1) {
            *links -= 1;
            if *links == 0 {
                names.remove(&self.1);
            }
        }
    }
}

/// Whose words are session_state.
struct NodeSession {
    node: NodeId,
    session: u64,
    /// The certificate that it came with, or its last one since.
    certificate: [u8; 32],
    /// The zone that its token gave it.
    zone: Option<String>,
    down: mpsc::Sender<ToNode>,
    renewed: Option<Instant>,
}

pub(super) async fn accept(admission: Arc<Admission>, endpoint: Endpoint) {
    while let Some(accepted) = endpoint.accept().await {
        let admission = Arc::clone(&admission);
        tokio::spawn(async move {
            if let Err(reason) = admission.admit(accepted).await {
                tracing::warn!(reason, "somebody was not let in");
            }
        });
    }
}

impl Admission {
    fn names(&self) -> MutexGuard<'_, HashMap<NodeId, usize>> {
        self.names.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn admit(self: Arc<Self>, accepted: Accepted) -> std::result::Result<(), String> {
        let mut zone = None;
        let certificate = accepted.certificate.unwrap_or_default();
        let is_over = self.actor.get_status() == ActorStatus::Stopped;
        let verdict = match &accepted.role {
            // People may still ask, and are told the same.
            Role::Join { .. } | Role::Node { .. } if is_over => Err("the run has ended".to_owned()),
            Role::Join { name: Some(name), .. } if self.names().contains_key(&NodeId::new(name)) => {
                Err(format!("{NAME_IN_USE}; choose another one"))
            }
            Role::Join { token, .. } => self.credentials.check(token, AccessRole::Node),
            Role::Operator { token } => self.credentials.check(token, AccessRole::Operator),
            Role::Node { name } => self.credentials.admit(name, accepted.certificate).map(|of| zone = of),
            Role::Peer { .. } => Err("this is the supervisor, not a node".into()),
        };
        if let Err(reason) = verdict {
            accepted.refuse(&reason).await;
            return Err(reason);
        }
        match accepted.role.clone() {
            Role::Join { token, request, name } => self.certify(accepted, &token, &request, name).await,
            Role::Operator { token } => {
                let (link, sender, receiver) = accepted.welcome().await.map_err(|e| e.to_string())?;
                self.serve_operator(&token, link, sender, receiver).await;
                Ok(())
            }
            Role::Node { .. } | Role::Peer { .. } => {
                let (link, sender, receiver) = accepted.welcome().await.map_err(|e| e.to_string())?;
                self.serve_node((link, certificate, zone), sender, receiver).await
            }
        }
    }

    async fn certify(
        &self,
        accepted: Accepted,
        token: &str,
        request: &[u8],
        name: Option<String>,
    ) -> std::result::Result<(), String> {
        match self.credentials.exchange(token, request, name) {
            Ok((name, issued)) => {
                let ca = self.credentials.authority().certificate().to_vec();
                accepted.certify(name, issued, ca).await.map_err(|error| error.to_string())
            }
            Err(reason) => {
                accepted.refuse(&reason).await;
                Err(reason)
            }
        }
    }

    /// A node, from its first words to the end of its link.
    async fn serve_node(
        self: Arc<Self>,
        (link, certificate, zone): (Link, [u8; 32], Option<String>),
        sender: ControlSender,
        mut receiver: ControlReceiver,
    ) -> std::result::Result<(), String> {
        let node = NodeId::new(link.peer());
        let hello = tokio::time::timeout(HELLO_MAX, receiver.recv::<ToSupervisor>()).await;
        let Ok(Ok(Some(ToSupervisor::Hello(mut info, held)))) = hello else {
            return Err(format!("{node} did not say what it is within {HELLO_MAX:?}"));
        };
        // It may have been shut out since it came to the admission.
        if let Err(reason) = self.credentials.admit(&node.0, Some(certificate)) {
            link.close(&reason);
            return Err(reason);
        }
        if let Some(profile) = &mut info.profile {
            measured(profile, zone.as_ref())?;
        }
        *self.names().entry(node.clone()).or_default() += 1;
        let _in_use = InUse(&self, node.clone());
        let session = self.sessions.fetch_add(1, Ordering::Relaxed);
        let (down, words) = mpsc::channel(WORDS_AHEAD);
        tokio::spawn(write_down(sender, words));
        let mut session_state =
            NodeSession { node: node.clone(), session, certificate, zone, down: down.clone(), renewed: None };
        let (key, mut watch) = self.expect_canary().unzip();
        let arrival =
            Arrival { node: node.clone(), info, held, session, down, link: link.clone(), canary: key };
        drop(self.actor.cast(SupervisorMsg::Joined(Box::new(arrival))));
        tokio::spawn(serve_shards(Arc::clone(&self), link.clone(), session));
        let died = async {
            match &mut watch {
                Some(watch) => watch.ended().await,
                None => std::future::pending().await,
            }
        };
        let reason = tokio::select! {
            reason = self.receive_loop(&mut session_state, &mut receiver) => reason,
            () = died => "its process has ended".to_owned(),
        };
        link.close("the control stream ended");
        drop(self.actor.cast(SupervisorMsg::Lost { node, session, reason }));
        Ok(())
    }

    fn expect_canary(&self) -> Option<((u16, CanaryKey), CanaryWatch)> {
        let canary = self.canary.as_ref()?;
        let (key, watch) = canary.expect().ok()?;
        Some(((canary.address().port(), key), watch))
    }

    /// Hands on what a node says, until it says no more.
    async fn receive_loop(&self, session_state: &mut NodeSession, receiver: &mut ControlReceiver) -> String {
        loop {
            let (node, session) = (session_state.node.clone(), session_state.session);
            let told = match receiver.recv::<ToSupervisor>().await {
                Ok(Some(ToSupervisor::Protocol(message))) => SupervisorMsg::Said { node, session, message },
                Ok(Some(ToSupervisor::Spans(spans))) => {
                    self.keep_spans(&node, &spans);
                    continue;
                }
                Ok(Some(ToSupervisor::Links(links))) => SupervisorMsg::Links { node, session, links },
                Ok(Some(ToSupervisor::Profile(mut profile))) => {
                    if let Err(reason) = measured(&mut profile, session_state.zone.as_ref()) {
                        return reason;
                    }
                    SupervisorMsg::Measured { node, session, profile }
                }
                // Half a lifetime lies between two of an honest node's.
                Ok(Some(ToSupervisor::Renew(_)))
                    if session_state
                        .renewed
                        .is_some_and(|at| at.elapsed() < self.credentials.lifetime() / 4) =>
                {
                    return "it asks for one certificate after the other".to_owned();
                }
                Ok(Some(ToSupervisor::Renew(request))) => {
                    match self.credentials.renew(&node.0, session_state.certificate, &request) {
                        Ok(issued) => {
                            tracing::info!(%node, "its certificate was renewed");
                            session_state.certificate = issued.fingerprint();
                            session_state.renewed = Some(Instant::now());
                            drop(session_state.down.send(ToNode::Renewed(issued)).await);
                            continue;
                        }
                        Err(reason) => return reason,
                    }
                }
                Ok(Some(ToSupervisor::Hello(..))) => continue,
                Ok(None) => return "it ended its control stream".to_owned(),
                Err(error) => return error.to_string(),
            };
            if self.actor.cast(told).is_err() {
                return "the supervisor has ended".to_owned();
            }
        }
    }

    async fn serve_operator(
        &self,
        token: &str,
        link: Link,
        mut sender: ControlSender,
        mut receiver: ControlReceiver,
    ) {
        while let Ok(Some(request)) = receiver.recv::<OperatorRequest>().await {
            // It may have been revoked since the link was made.
            if let Err(reason) = self.credentials.check(token, AccessRole::Operator) {
                return link.close(&reason);
            }
            let answer = match self.credentials.answer(&request) {
                Some(answer) => answer,
                None => tokio::select! {
                    answer = ask_operator(&self.actor, request) => answer,
                    _ = link.closed() => return,
                },
            };
            if sender.send(&answer).await.is_err() {
                return;
            }
        }
    }

    /// Keeps what a node has traced. It speaks for itself only, whatever it says.
    fn keep_spans(&self, node: &NodeId, spans: &[String]) {
        let own = |mut record: SpanRecord| {
            record.process.clone_from(&node.0);
            record
        };
        self.pipeline
            .keep(spans.iter().filter_map(|span| serde_json::from_str(span).ok().map(own)).collect());
    }

    async fn stored_shard(&self, frame: &Frame) -> Computed<Frame> {
        let wish: ShardWish = wire::decode(frame)?;
        let version = wish.version.ok_or_else(|| ComputeError("of which checkpoint?".into()))?;
        let at = ShardAt { shard: wish.shard, version };
        let checkpoints = self.checkpoints.clone();
        let read = move || checkpoints.read(version, wish.shard);
        let bytes = crate::checkpointer::blocking(read).await.map_err(ComputeError)?;
        wire::blob(Kind::Shard, frame.epoch, frame.step, &at, bytes)
    }
}

/// A profile as it counts: checked, and with the zone of the node's token if it names none itself.
fn measured(profile: &mut Profile, zone: Option<&String>) -> std::result::Result<(), String> {
    profile.check().map_err(|reason| format!("it measured what cannot be: {reason}"))?;
    if let (true, Some(zone)) = (profile.zone.is_empty(), zone) {
        profile.zone.clone_from(zone);
    }
    Ok(())
}

async fn write_down(mut sender: ControlSender, mut words: mpsc::Receiver<ToNode>) {
    while let Some(word) = words.recv().await {
        if let Err(error) = sender.send(&word).await {
            return tracing::debug!(%error, "a node does not hear its supervisor any more");
        }
    }
    sender.finish().await;
}

/// A node's wishes for shards of a checkpoint, and its own for the next one.
async fn serve_shards(admission: Arc<Admission>, link: Link, session: u64) {
    let node = NodeId::new(link.peer());
    let mut inbound = link.serve();
    while let Some(InboundFrame { frame, reply }) = inbound.next().await {
        match frame.kind {
            Kind::Blob => {
                let step = frame.step;
                match wire::decode::<ShardAt>(&frame).and_then(|at| Ok((at, wire::only_blob(frame)?))) {
                    Ok((at, bytes)) => {
                        let kib = u32::try_from(bytes.len() >> 10).unwrap_or(u32::MAX);
                        let kib = kib.clamp(1, CHECKPOINT_BYTES_AHEAD >> 10);
                        // Nodes are quicker than disks: what finds no room waits on the wire.
                        let Ok(room) = Arc::clone(&admission.room).acquire_many_owned(kib).await else {
                            return;
                        };
                        let (node, shard) = (node.clone(), at.shard);
                        drop(admission.actor.cast(SupervisorMsg::Shard {
                            node,
                            session,
                            step,
                            shard,
                            bytes,
                            room,
                        }))
                    }
                    Err(error) => {
                        tracing::warn!(peer = link.peer(), %error, "a checkpoint's shard is malformed")
                    }
                }
            }
            Kind::Probe => {
                if let (Some(reply), Ok(answer)) = (reply, wire::frame(Kind::Reply, 0, 0, &(), Vec::new())) {
                    drop(reply.reply(answer).await);
                }
            }
            Kind::ShardRequest => {
                let answer = admission.stored_shard(&frame).await;
                let answer =
                    answer.unwrap_or_else(|error| wire::refusal(frame.epoch, frame.step, &error.to_string()));
                if let Some(reply) = reply
                    && let Err(error) = reply.reply(answer).await
                {
                    tracing::debug!(peer = link.peer(), %error, "a shard did not get through");
                }
            }
            other => tracing::warn!(peer = link.peer(), kind = ?other, "a frame that has no business here"),
        }
    }
}

pub(super) async fn ask_operator(actor: &ActorRef<SupervisorMsg>, request: OperatorRequest) -> OperatorReply {
    match actor.call(|reply| SupervisorMsg::Operator { request, reply }, None).await {
        Ok(CallResult::Success(answer)) => answer,
        _ => OperatorReply::Failed { reason: "the run has ended".into() },
    }
}
