//! What runs beside a node's link to its supervisor: words both ways, reports of links, another certificate in time.

use super::connector::Connected;
use crate::limits::{LINKS_EVERY, SPANS_PER_WORD};
use crate::node::{Connection, NodeMsg};
use crate::node_context::NodeContext;
use crate::peers::Broken;
use crate::shards::Uplink;
use crate::supervisor::WORDS_AHEAD;
use crate::wire::{ToNode, ToSupervisor};
use ractor::ActorRef;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use volary_core::compute::Compute;
use volary_telemetry::Pipeline;
use volary_transport::canary::CanaryHeld;
use volary_transport::{ControlReceiver, ControlSender, Endpoint, Issued, KeyRequest, Link};

/// A link to the supervisor in use.
pub(super) struct SupervisorSession {
    pub(super) link: Link,
    pub(super) up: mpsc::Sender<ToSupervisor>,
    reader: tokio::task::JoinHandle<String>,
    canary: Option<CanaryHeld>,
    reports: tokio::task::JoinHandle<()>,
    renewals: tokio::task::JoinHandle<()>,
}

impl SupervisorSession {
    pub(super) fn start<B: Compute>(
        connected: Connected,
        agent: &ActorRef<NodeMsg>,
        node: &Arc<NodeContext<B>>,
        endpoint: &Endpoint,
    ) -> Self {
        let Connected { link, sender, receiver, keep, canary, .. } = connected;
        let (up, words) = mpsc::channel(WORDS_AHEAD);
        let connection = Connection { up: up.clone(), uplink: Uplink { link: link.clone() }, keep };
        drop(agent.cast(NodeMsg::Connected(connection)));
        tokio::spawn(write_up(sender, words));
        let (renewed, answers) = mpsc::channel(1);
        let reader = tokio::spawn(read_down(receiver, agent.clone(), renewed, endpoint.clone()));
        let renewals = tokio::spawn(renew(endpoint.clone(), up.clone(), answers));
        let reports = tokio::spawn(report_links(Arc::clone(node), up.clone()));
        Self { link, up, reader, canary, reports, renewals }
    }

    /// Resolves when the supervisor cannot be heard any more, with the reason.
    pub(super) async fn ended(&mut self) -> String {
        let canary = async {
            match &mut self.canary {
                Some(canary) => canary.ended().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            reason = &mut self.reader => reason.unwrap_or_else(|error| error.to_string()),
            () = canary => "its process has ended".into(),
        }
    }

    /// Spans that find no room are not kept, and counted.
    pub(super) fn send_spans(&self, pipeline: &Pipeline, spans: &[String]) {
        for part in spans.chunks(SPANS_PER_WORD) {
            if self.up.try_send(ToSupervisor::Spans(part.to_vec())).is_err() {
                pipeline.lost(part.len() as u64);
            }
        }
    }

    pub(super) fn close(&self) {
        self.link.close("the link is given up");
        self.reader.abort();
        self.reports.abort();
        self.renewals.abort();
    }
}

async fn write_up(mut sender: ControlSender, mut words: mpsc::Receiver<ToSupervisor>) {
    while let Some(word) = words.recv().await {
        if let Err(error) = sender.send(&word).await {
            return tracing::debug!(%error, "the supervisor does not hear this node any more");
        }
    }
    sender.finish().await;
}

/// Asks for another certificate, for a new key, when half of the present one's time has passed.
async fn renew(endpoint: Endpoint, up: mpsc::Sender<ToSupervisor>, mut answers: mpsc::Receiver<Issued>) {
    let (name, authority) = match endpoint.identity() {
        Ok(own) => (own.name().to_owned(), own.authority().to_vec()),
        Err(error) => return tracing::warn!(%error, "there is nothing to renew"),
    };
    loop {
        let left = endpoint.identity().map_or(Duration::ZERO, |own| own.left());
        tokio::time::sleep(left / 2).await;
        let Ok(request) = KeyRequest::new() else { continue };
        if up.send(ToSupervisor::Renew(request.der().to_vec())).await.is_err() {
            return;
        }
        let Some(issued) = answers.recv().await else { return };
        match endpoint.set_identity(request.into_identity(&name, issued, authority.clone())) {
            Ok(()) => tracing::info!("this node's certificate was renewed"),
            Err(error) => tracing::warn!(%error, "a renewed certificate is no good"),
        }
    }
}

async fn read_down(
    mut receiver: ControlReceiver,
    agent: ActorRef<NodeMsg>,
    renewed: mpsc::Sender<Issued>,
    endpoint: Endpoint,
) -> String {
    loop {
        match receiver.recv::<ToNode>().await {
            Ok(Some(ToNode::Protocol(message, traced))) => {
                if agent.cast(NodeMsg::Down(message, traced)).is_err() {
                    return "the node's agent has ended".to_owned();
                }
            }
            Ok(Some(ToNode::Revoked(hashes))) => endpoint.revoke(hashes),
            Ok(Some(ToNode::Renewed(issued))) => drop(renewed.try_send(issued)),
            Ok(Some(ToNode::Welcome(_) | ToNode::NameInUse)) => {}
            Ok(None) => return "it ended the control stream".to_owned(),
            Err(error) => return error.to_string(),
        }
    }
}

/// A link between two parts of a run that breaks ends the epoch: what was on its connector may be lost, and its receiver would wait for it
/// in silence until the step's time is over.
pub(super) async fn tell_of_breaks<B: Compute>(
    node: Arc<NodeContext<B>>,
    agent: ActorRef<NodeMsg>,
    mut breaks: mpsc::UnboundedReceiver<Broken>,
) {
    while let Some(broken) = breaks.recv().await {
        let placement = node.placement();
        let has_a_part = placement.is_member(&broken.peer) || placement.is_learning(&broken.peer);
        if node.peers.counts(&broken) && has_a_part {
            let reason = format!("the link to {} broke: {}", broken.peer, broken.reason);
            drop(agent.cast(NodeMsg::Failed { epoch: placement.epoch, reason }));
        }
    }
}

/// Tells the supervisor now and then what this node knows of its links.
async fn report_links<B: Compute>(node: Arc<NodeContext<B>>, up: mpsc::Sender<ToSupervisor>) {
    loop {
        tokio::time::sleep(LINKS_EVERY).await;
        node.peers.measure_new_links().await;
        if up.send(ToSupervisor::Links(node.peers.reports())).await.is_err() {
            return;
        }
    }
}
