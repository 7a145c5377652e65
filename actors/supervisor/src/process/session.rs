//! The connection of one node, from its hello to its end.

use super::lanes::LaneReader;
use super::shared::Shared;
use crate::blocking::blocking;
use crate::error::Error;
use crate::limits::{
    CANARY_PING_MAX, FAREWELL_FAILED, HELLO_MAX, MESSAGES_AHEAD, MESSAGES_OF_NODE_MAX, RENEWALS_PER_LIFETIME,
};
use crate::messages::{FromNode, NodeArrival, SessionId, SupervisorMsg, notify};
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Instant;
use tokio::sync::{Notify, Semaphore, mpsc};
use volary_core::NodeId;
use volary_core::machine::LossCause;
use volary_core::messages::{NodeCommand, ResidentState};
use volary_core::profile::Profile;
use volary_protocol::frames::{self, ShardRequest, StoredShard};
use volary_protocol::layout::LayoutSender;
use volary_protocol::{FrameRefusal, FrameRefusalCode, NodeInfo, ToNode, ToSupervisor};
use volary_transport::{
    BytePermit, CanaryWatch, ControlReceiver, ControlSender, Frame, FrameKind, InboundFrame, Link, Refusal,
    RefusalCode,
};

/// What an admitted node has proven.
pub(super) struct Admitted {
    /// The hash of its certificate.
    pub(super) certificate: [u8; 32],
    /// The zone that its access token gave it.
    pub(super) zone: Option<String>,
}

/// A node that is connected.
struct NodeSession {
    shared: Arc<Shared>,
    id: SessionId,
    /// Its certificate, or the last one that renewed it.
    certificate: [u8; 32],
    zone: Option<String>,
    /// Where its peers are to reach it.
    address: String,
    messages: mpsc::Sender<ToNode>,
    /// Told of every message.
    heard: Arc<Notify>,
    renewed: Option<Instant>,
    /// Its places in the actor's mailbox.
    places: Arc<Semaphore>,
}

/// Serves a node until its link ends, its process dies, or it violates the protocol.
pub(super) async fn serve_node(
    shared: Arc<Shared>,
    link: Link,
    admitted: Admitted,
    sender: ControlSender,
    mut receiver: ControlReceiver,
) -> Result<(), Refusal> {
    let node = NodeId::new(link.peer());
    let Admitted { certificate, zone } = admitted;
    let (mut info, held) = receive_hello(&node, &mut receiver).await?;
    // It may have been fenced since it was admitted.
    if let Err(error) = shared.credentials.admit(&node.0, Some(certificate)) {
        link.refuse(&error.refusal());
        return Err(error.refusal());
    }
    if let Some(profile) = &mut info.profile {
        check_profile(profile, zone.as_ref())?;
    }
    let _name = shared.use_name(&node);
    let id = SessionId { node, number: shared.next_session() };
    let (messages, outbound) = mpsc::channel(MESSAGES_AHEAD);
    tokio::spawn(write_messages(Arc::clone(&shared), link.clone(), sender, outbound));
    let (canary, mut watch) = shared.expect_canary().unzip();
    let (arrived, stream) = (link.clone(), messages.clone());
    let address = info.address.clone();
    let arrival = NodeArrival { session: id.clone(), info, held, messages: stream, link: arrived, canary };
    notify(&shared.actor, SupervisorMsg::Connected(Box::new(arrival)));
    tokio::spawn(serve_frames(Arc::clone(&shared), link.clone(), id.clone()));

    let heard = Arc::new(Notify::new());
    let mut session = NodeSession {
        shared: Arc::clone(&shared),
        id: id.clone(),
        certificate,
        zone,
        address,
        messages: messages.clone(),
        heard: Arc::clone(&heard),
        renewed: None,
        places: Arc::new(Semaphore::new(MESSAGES_OF_NODE_MAX)),
    };
    let (cause, reason) = tokio::select! {
        reason = session.receive_loop(&mut receiver) => (LossCause::Unlinked, reason),
        () = process_ended(&mut watch, &messages, &heard) => {
            (LossCause::Ended, "its process has ended".to_owned())
        }
    };
    link.close("the control stream ended");
    notify(&shared.actor, SupervisorMsg::Disconnected { session: id, cause, reason });
    Ok(())
}

/// A node's first message.
async fn receive_hello(
    node: &NodeId,
    receiver: &mut ControlReceiver,
) -> Result<(NodeInfo, ResidentState), Refusal> {
    match tokio::time::timeout(HELLO_MAX, receiver.recv::<ToSupervisor>()).await {
        Ok(Ok(Some(ToSupervisor::Hello(info, held)))) => Ok((info, held)),
        _ => {
            let reason = format!("{node} sent no hello within {HELLO_MAX:?}");
            Err(Refusal::new(RefusalCode::Malformed, reason))
        }
    }
}

/// Resolves when a node's process has ended: its canary connection is closed, and it does not answer. A
/// connection may also end by itself, at a firewall for example: then the link's own timeout judges.
async fn process_ended(watch: &mut Option<CanaryWatch>, messages: &mpsc::Sender<ToNode>, heard: &Notify) {
    let Some(watch) = watch else { return std::future::pending().await };
    watch.ended().await;
    let answered = heard.notified();
    // A full queue belongs to a node that does not read.
    drop(messages.try_send(ToNode::Ping));
    if tokio::time::timeout(CANARY_PING_MAX, answered).await.is_ok() {
        tracing::warn!("a canary connection ended and its process lives: deaths are noticed by silence");
        std::future::pending().await
    }
}

/// Checks a profile, and completes it with the zone of the node's access token if it names none itself.
fn check_profile(profile: &mut Profile, zone: Option<&String>) -> Result<(), Refusal> {
    let invalid = |reason| Refusal::new(RefusalCode::Malformed, format!("impossible profile: {reason}"));
    profile.check().map_err(invalid)?;
    if let (true, Some(zone)) = (profile.zone.is_empty(), zone) {
        profile.zone.clone_from(zone);
    }
    Ok(())
}

impl NodeSession {
    /// Passes on what the node sends, until it ends; the reason.
    async fn receive_loop(&mut self, receiver: &mut ControlReceiver) -> String {
        loop {
            let received = match receiver.recv::<ToSupervisor>().await {
                Ok(Some(message)) => self.on_message(message).await,
                Ok(None) => return "it ended its control stream".to_owned(),
                Err(error) => return error.to_string(),
            };
            match received {
                ControlFlow::Continue(None) => {}
                ControlFlow::Continue(Some(message)) => {
                    // The semaphore is never closed.
                    let Ok(place) = Arc::clone(&self.places).acquire_owned().await else { continue };
                    let session = self.id.clone();
                    let message = SupervisorMsg::FromNode { session, message, place };
                    if self.shared.actor.cast(message).is_err() {
                        return "the supervisor has ended".to_owned();
                    }
                }
                ControlFlow::Break(reason) => return reason,
            }
        }
    }

    /// The outcome of a message: something for the actor, nothing, or the session's end.
    async fn on_message(&mut self, message: ToSupervisor) -> ControlFlow<String, Option<FromNode>> {
        self.heard.notify_waiters();
        match message {
            ToSupervisor::Protocol(report) => ControlFlow::Continue(Some(FromNode::Report(report))),
            ToSupervisor::Links(links) => ControlFlow::Continue(Some(FromNode::Links(links))),
            ToSupervisor::Profile(profile) => self.on_profile(profile).await,
            ToSupervisor::Renew(request) => self.on_renew(&request).await,
            ToSupervisor::Spans(spans) => {
                self.shared.keep_spans(&self.id.node, &spans);
                ControlFlow::Continue(None)
            }
            ToSupervisor::Ping => {
                drop(self.messages.try_send(ToNode::Pong));
                ControlFlow::Continue(None)
            }
            ToSupervisor::Pong | ToSupervisor::Hello(..) => ControlFlow::Continue(None),
        }
    }

    /// A newcomer has measured itself: it joins if others can reach it.
    async fn on_profile(&self, mut profile: Box<Profile>) -> ControlFlow<String, Option<FromNode>> {
        if let Err(refusal) = check_profile(&mut profile, self.zone.as_ref()) {
            return ControlFlow::Break(refusal.reason);
        }
        let node = &self.id.node;
        if let Err(reason) = self.shared.dial_back(node, &self.address).await {
            let address = self.address.clone();
            let ended = format!("it cannot be reached at {address}: {reason}");
            tracing::warn!(%node, address, reason, "a newcomer is turned away: nobody reaches it");
            drop(self.messages.send(ToNode::Unreachable { address, reason }).await);
            // It ends by itself when it has read this.
            tokio::time::sleep(FAREWELL_FAILED).await;
            return ControlFlow::Break(ended);
        }
        ControlFlow::Continue(Some(FromNode::Measured(profile)))
    }

    async fn on_renew(&mut self, request: &[u8]) -> ControlFlow<String, Option<FromNode>> {
        let credentials = &self.shared.credentials;
        let interval = credentials.lifetime() / RENEWALS_PER_LIFETIME;
        if self.renewed.is_some_and(|renewed| renewed.elapsed() < interval) {
            return ControlFlow::Break("it renews its certificate too often".to_owned());
        }
        match credentials.renew(&self.id.node.0, self.certificate, request) {
            Ok(issued) => {
                tracing::info!(node = %self.id.node, "certificate renewed");
                self.certificate = issued.fingerprint();
                self.renewed = Some(Instant::now());
                // A writer that has ended is noticed by the reader.
                drop(self.messages.send(ToNode::Renewed(issued)).await);
                ControlFlow::Continue(None)
            }
            Err(error) => ControlFlow::Break(error.to_string()),
        }
    }
}

/// Sends what is queued for a node. A message that cannot be sent ends the link, with the reason for both
/// ends: the node would wait for it.
async fn write_messages(
    shared: Arc<Shared>,
    link: Link,
    mut sender: ControlSender,
    mut messages: mpsc::Receiver<ToNode>,
) {
    let mut lanes = LaneReader::new(Arc::clone(&shared.dataset));
    let mut layouts = LayoutSender::new(Arc::clone(&shared.patches));
    while let Some(mut message) = messages.recv().await {
        if let ToNode::Protocol(command, trace) = &mut message
            && let Err(error) = lanes.complete(command, trace.as_mut()).await
        {
            return notify(&shared.actor, SupervisorMsg::Failed(error));
        }
        let layout = match &message {
            ToNode::Protocol(NodeCommand::Assign(assignment), _) => match layouts.patch(assignment) {
                Ok(patch) => Some(ToNode::Layout(patch)),
                Err(error) => return close_unsent(&link, &error),
            },
            _ => None,
        };
        for message in layout.into_iter().chain(message.split()) {
            if let Err(error) = sender.send(&message).await {
                return close_unsent(&link, &error);
            }
        }
    }
    sender.finish().await;
}

/// Ends a link on which a message cannot be sent.
fn close_unsent(link: &Link, error: &dyn std::error::Error) {
    if link.is_open() {
        tracing::error!(node = link.peer(), %error, "a message cannot be sent");
    }
    link.close(&format!("a message cannot be sent: {error}"));
}

/// Serves a node's frames: requests for shards of a checkpoint, shards for the next one, and probes.
async fn serve_frames(shared: Arc<Shared>, link: Link, session: SessionId) {
    // Nodes are faster than disks: what does not fit into memory waits on the wire.
    let mut inbound = link.serve_within(Some(shared.checkpoint_budget.clone()));
    while let Some(InboundFrame { frame, reply, permit }) = inbound.next().await {
        let (kind, epoch, step) = (frame.kind, frame.epoch, frame.step);
        let answer = match kind {
            FrameKind::Blob => {
                on_checkpoint_shard(&shared, &session, frame, permit);
                continue;
            }
            FrameKind::Probe => frames::frame(FrameKind::Reply, epoch, step, &(), Vec::new()).ok(),
            FrameKind::ShardRequest => {
                Some(on_shard_request(&shared, &frame).await.unwrap_or_else(|error| {
                    frames::refused(epoch, step, &FrameRefusal::new(error.code(), error))
                }))
            }
            _ => {
                tracing::warn!(node = %session.node, ?kind, "unexpected frame");
                continue;
            }
        };
        if let (Some(reply), Some(answer)) = (reply, answer)
            && let Err(error) = reply.reply(answer).await
        {
            tracing::debug!(node = %session.node, %error, "an answer was not delivered");
        }
    }
}

fn on_checkpoint_shard(shared: &Shared, session: &SessionId, frame: Frame, permit: Option<BytePermit>) {
    let step = frame.step;
    let parsed = frames::decode::<StoredShard>(&frame).and_then(|at| Ok((at, frames::only_blob(frame)?)));
    let (StoredShard { shard, .. }, bytes) = match parsed {
        Ok(parsed) => parsed,
        Err(error) => return tracing::warn!(node = %session.node, %error, "malformed checkpoint shard"),
    };
    let session = session.clone();
    notify(&shared.actor, SupervisorMsg::Shard { session, step, shard, bytes, permit });
}

/// Why a request for a shard is refused.
#[derive(Debug, thiserror::Error)]
enum ShardUnavailable {
    #[error("shard request without a checkpoint step")]
    NoStep,
    #[error(transparent)]
    Frame(#[from] volary_protocol::Error),
    #[error(transparent)]
    Read(#[from] Error),
}

impl ShardUnavailable {
    fn code(&self) -> FrameRefusalCode {
        match self {
            Self::NoStep | Self::Frame(_) => FrameRefusalCode::Malformed,
            Self::Read(_) => FrameRefusalCode::MissingShard,
        }
    }
}

/// Reads a shard of a checkpoint.
async fn on_shard_request(shared: &Shared, frame: &Frame) -> Result<Frame, ShardUnavailable> {
    let ShardRequest { shard, version } = frames::decode(frame)?;
    let version = version.ok_or(ShardUnavailable::NoStep)?;
    let checkpoints = shared.checkpoints.clone();
    let bytes = blocking(move || checkpoints.read(version, shard)).await?;
    let header = StoredShard { shard, version };
    Ok(frames::blob(FrameKind::Shard, frame.epoch, frame.step, &header, bytes)?)
}
