//! What runs beside a node's link to its supervisor: messages both ways, link reports, certificate renewal.

use super::connect::Connected;
use crate::context::NodeContext;
use crate::error::Error;
use crate::limits::{CANARY_PING_MAX, FAREWELL_MAX, LINK_REPORT_INTERVAL, MESSAGES_AHEAD};
use crate::messages::{Connection, NodeMsg, notify};
use crate::net::peers::BrokenLink;
use crate::net::uplink::Uplink;
use ractor::ActorRef;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinHandle;
use volary_core::compute::Compute;
use volary_core::limits::LANES_MAX;
use volary_core::messages::NodeCommand;
use volary_protocol::layout::LayoutReceiver;
use volary_protocol::limits::SPANS_PER_MESSAGE;
use volary_protocol::{ToNode, ToSupervisor};
use volary_telemetry::Pipeline;
use volary_transport::canary::CanaryHeld;
use volary_transport::{ControlReceiver, ControlSender, Endpoint, IssuedCertificate, KeyRequest, Link};

/// A link to the supervisor in use.
pub(super) struct SupervisorSession {
    link: Link,
    messages: mpsc::Sender<ToSupervisor>,
    reader: JoinHandle<String>,
    canary: Option<CanaryHeld>,
    /// Told of every message of the supervisor.
    heard: Arc<Notify>,
    reports: JoinHandle<()>,
    renewals: JoinHandle<()>,
    writer: JoinHandle<()>,
}

impl SupervisorSession {
    /// Gives the link to the agent, and starts the tasks beside it.
    pub(super) fn start<B: Compute>(
        connected: Connected,
        agent: &ActorRef<NodeMsg>,
        node: &Arc<NodeContext<B>>,
        endpoint: &Endpoint,
    ) -> Self {
        let Connected { link, sender, receiver, keep, canary, .. } = connected;
        let (messages, outbound) = mpsc::channel(MESSAGES_AHEAD);
        let uplink = Uplink { link: link.clone() };
        notify(agent, NodeMsg::Connected(Connection { messages: messages.clone(), uplink, keep }));
        let writer = tokio::spawn(write_messages(link.clone(), sender, outbound));
        let (renewed, answers) = mpsc::channel(1);
        let heard = Arc::new(Notify::new());
        let answering = Answering { messages: messages.clone(), renewed, heard: Arc::clone(&heard) };
        let reader = tokio::spawn(read_messages(receiver, agent.clone(), answering, endpoint.clone()));
        let renewals = tokio::spawn(renew(endpoint.clone(), messages.clone(), answers));
        let reports = tokio::spawn(report_links(Arc::clone(node), messages.clone()));
        Self { link, messages, reader, canary, heard, reports, renewals, writer }
    }

    /// Queues a message; a session that has ended drops it.
    pub(super) async fn send(&self, message: ToSupervisor) {
        drop(self.messages.send(message).await);
    }

    /// Resolves when the session ends, with the reason.
    pub(super) async fn ended(&mut self) -> String {
        let Self { canary, reader, messages, heard, .. } = self;
        tokio::select! {
            reason = reader => reason.unwrap_or_else(|error| error.to_string()),
            () = process_ended(canary, messages, heard) => "its process has ended".into(),
        }
    }

    /// Sends ended spans. Those that do not fit into the queue are dropped and counted.
    pub(super) fn send_spans(&self, pipeline: &Pipeline, spans: &[String]) {
        for part in spans.chunks(SPANS_PER_MESSAGE) {
            if self.messages.try_send(ToSupervisor::Spans(part.to_vec())).is_err() {
                pipeline.count_lost(part.len() as u64);
            }
        }
    }

    /// Ends the session's tasks and its link.
    pub(super) fn close(&self) {
        self.link.close("the link is given up");
        self.reader.abort();
        self.reports.abort();
        self.renewals.abort();
    }

    /// Sends what is queued, for a bounded time, and ends the session.
    pub(super) async fn finish(self, reason: &str) {
        let Self { link, messages, reader, reports, renewals, writer, .. } = self;
        [&reports, &renewals].into_iter().for_each(JoinHandle::abort);
        drop(messages);
        // The writer ends when the last sender is dropped, at the latest with the link.
        drop(tokio::time::timeout(FAREWELL_MAX, writer).await);
        reader.abort();
        link.close(reason);
    }
}

/// Resolves when the supervisor's process has ended: its canary connection is closed, and it does not answer.
async fn process_ended(
    canary: &mut Option<CanaryHeld>,
    messages: &mpsc::Sender<ToSupervisor>,
    heard: &Notify,
) {
    let Some(canary) = canary else { return std::future::pending().await };
    canary.ended().await;
    let answered = heard.notified();
    drop(messages.try_send(ToSupervisor::Ping));
    if tokio::time::timeout(CANARY_PING_MAX, answered).await.is_ok() {
        tracing::warn!(
            "the supervisor's canary connection ended and it lives: its end is noticed by silence"
        );
        std::future::pending().await
    }
}

/// What the reader answers and passes on by itself.
struct Answering {
    messages: mpsc::Sender<ToSupervisor>,
    renewed: mpsc::Sender<IssuedCertificate>,
    heard: Arc<Notify>,
}

/// Sends what is queued for the supervisor. A message that cannot be sent ends the link, with the reason for
/// both ends: the supervisor would wait for it.
async fn write_messages(link: Link, mut sender: ControlSender, mut messages: mpsc::Receiver<ToSupervisor>) {
    while let Some(message) = messages.recv().await {
        if let Err(error) = sender.send(&message).await {
            if link.is_open() {
                tracing::error!(%error, "a message to the supervisor cannot be sent");
            }
            return link.close(&format!("a message cannot be sent: {error}"));
        }
    }
    sender.finish().await;
}

async fn read_messages(
    mut receiver: ControlReceiver,
    agent: ActorRef<NodeMsg>,
    answering: Answering,
    endpoint: Endpoint,
) -> String {
    let mut lanes_ahead = Vec::new();
    let mut layouts = LayoutReceiver::default();
    loop {
        let received = receiver.recv::<ToNode>().await;
        answering.heard.notify_waiters();
        match received {
            Ok(Some(ToNode::Tokens(lanes))) if lanes.len() + lanes_ahead.len() <= LANES_MAX as usize => {
                lanes_ahead.extend(lanes);
            }
            Ok(Some(ToNode::Tokens(_))) => return format!("tokens of more than {LANES_MAX} lanes"),
            Ok(Some(ToNode::Layout(patch))) => {
                if let Err(error) = layouts.receive(&patch) {
                    return error.to_string();
                }
            }
            Ok(Some(ToNode::Protocol(mut command, trace))) => {
                command.prepend_lanes(&mut lanes_ahead);
                if let NodeCommand::Assign(assignment) = &mut command
                    && let Err(error) = layouts.complete(assignment)
                {
                    return error.to_string();
                }
                if agent.cast(NodeMsg::Command(command, trace)).is_err() {
                    return "the node's agent has ended".to_owned();
                }
            }
            Ok(Some(ToNode::Revoked(hashes))) => endpoint.revoke(hashes),
            // No caller waits for a second certificate.
            Ok(Some(ToNode::Renewed(certificate))) => drop(answering.renewed.try_send(certificate)),
            Ok(Some(ToNode::Ping)) => drop(answering.messages.try_send(ToSupervisor::Pong)),
            Ok(Some(ToNode::Unreachable { address, reason })) => {
                notify(&agent, NodeMsg::Unreachable { address, reason });
            }
            Ok(Some(ToNode::Pong | ToNode::Welcome(_) | ToNode::NameInUse)) => {}
            Ok(None) => return "it ended the control stream".to_owned(),
            Err(error) => return error.to_string(),
        }
    }
}

/// Requests a certificate for a new key whenever half of the present one's lifetime has passed.
async fn renew(
    endpoint: Endpoint,
    messages: mpsc::Sender<ToSupervisor>,
    mut answers: mpsc::Receiver<IssuedCertificate>,
) {
    let (name, authority) = match endpoint.identity() {
        Ok(identity) => (identity.name().to_owned(), identity.authority().to_vec()),
        Err(error) => return tracing::warn!(%error, "no certificate to renew"),
    };
    loop {
        let left = endpoint.identity().map_or(Duration::ZERO, |identity| identity.remaining());
        tokio::time::sleep(left / 2).await;
        let Ok(request) = KeyRequest::new() else { continue };
        if messages.send(ToSupervisor::Renew(request.der().to_vec())).await.is_err() {
            return;
        }
        let Some(issued) = answers.recv().await else { return };
        match endpoint.set_identity(request.into_identity(&name, issued, authority.clone())) {
            Ok(()) => tracing::info!("certificate renewed"),
            Err(error) => tracing::warn!(%error, "a renewed certificate cannot be used"),
        }
    }
}

/// Fails the epoch when a link between two nodes of the placement breaks: a frame may be lost with it, and
/// its receiver would wait for it until the step times out.
pub(super) async fn report_broken_links<B: Compute>(
    node: Arc<NodeContext<B>>,
    agent: ActorRef<NodeMsg>,
    mut broken_links: mpsc::UnboundedReceiver<BrokenLink>,
) {
    while let Some(broken) = broken_links.recv().await {
        let in_use = node.peers.remove_broken(&broken);
        let placement = node.placement();
        let peer = broken.peer;
        if in_use && (placement.is_member(&peer) || placement.is_learning(&peer)) {
            let reason = format!("its link broke: {}", broken.reason);
            let error = Error::Unreachable { peer, reason };
            notify(&agent, NodeMsg::Failed { epoch: placement.epoch, error });
        }
    }
}

/// Reports this node's links to the supervisor at intervals.
async fn report_links<B: Compute>(node: Arc<NodeContext<B>>, messages: mpsc::Sender<ToSupervisor>) {
    loop {
        tokio::time::sleep(LINK_REPORT_INTERVAL).await;
        node.peers.probe_new_links().await;
        if messages.send(ToSupervisor::Links(node.peers.reports())).await.is_err() {
            return;
        }
    }
}
