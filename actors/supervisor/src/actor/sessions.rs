//! Connected nodes: they connect, measure themselves, join the cluster, report, and disconnect.

use super::SupervisorState;
use crate::error::Result;
use crate::messages::{NodeArrival, SessionId};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Instant;
use tokio::sync::mpsc;
use volary_core::NodeId;
use volary_core::machine::{Event, LossCause};
use volary_core::messages::{NodeReport, ResidentState};
use volary_core::profile::Profile;
use volary_protocol::operator::{OperatorReply, OperatorRequest};
use volary_protocol::{LinkReport, NodeInfo, ToNode, Welcome};
use volary_transport::Link;

/// A connected node.
pub(super) struct Session {
    pub(super) info: NodeInfo,
    number: u64,
    messages: mpsc::Sender<ToNode>,
    link: Link,
    /// The links that it reported last.
    pub(super) links: Vec<LinkReport>,
    last_message: Instant,
    /// What it came with, until it has measured itself and joins the cluster.
    joining: Option<ResidentState>,
}

impl Session {
    /// Queues a message. A node that does not read until the queue is full is disconnected; a disconnected
    /// one is handled elsewhere.
    pub(super) fn send(&self, message: ToNode) {
        if let Err(mpsc::error::TrySendError::Full(_)) = self.messages.try_send(message) {
            self.link.close("it does not read its control stream");
        }
    }

    /// Whether it is still measuring itself.
    pub(super) fn is_joining(&self) -> bool {
        self.joining.is_some()
    }
}

/// The connected nodes.
#[derive(Default)]
pub(super) struct Sessions {
    by_node: BTreeMap<NodeId, Session>,
    /// Sessions of nodes that were released, until their links end.
    released: BTreeMap<NodeId, u64>,
}

impl Sessions {
    pub(super) fn get(&self, node: &NodeId) -> Option<&Session> {
        self.by_node.get(node)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&NodeId, &Session)> {
        self.by_node.iter()
    }

    /// A node's session, if this is its current one.
    pub(super) fn current(&mut self, id: &SessionId) -> Option<&mut Session> {
        self.by_node.get_mut(&id.node).filter(|session| session.number == id.number)
    }

    fn send(&self, node: &NodeId, message: ToNode) {
        if let Some(session) = self.by_node.get(node) {
            session.send(message);
        }
    }

    /// Why a newcomer cannot be linked with another node: one is reached on this machine only.
    fn on_other_network(&self, newcomer: &NodeId, address: &str) -> Option<String> {
        let is_local = |address: &str| Some(address.parse::<SocketAddr>().ok()?.ip().is_loopback());
        let mine = is_local(address)?;
        let others =
            self.by_node.iter().filter(|(node, session)| *node != newcomer && session.joining.is_none());
        others.map(|(node, session)| (node, &session.info.address)).find_map(|(node, other)| {
            let theirs = is_local(other)?;
            (mine != theirs).then(|| {
                let local = if mine { address } else { other };
                format!("{node} is at {other}, and {local} is reached on its own machine only")
            })
        })
    }

    pub(super) fn send_to_all(&self, message: &ToNode) {
        self.by_node.values().for_each(|session| session.send(message.clone()));
    }

    /// A node that was released leaves once its link ends.
    pub(super) fn release(&mut self, node: NodeId) {
        if let Some(session) = self.by_node.get(&node) {
            self.released.insert(node, session.number);
        }
    }

    pub(super) fn clear(&mut self) {
        self.by_node.clear();
    }

    /// Closes a node's link, and returns when its last message came.
    fn disconnect(&mut self, node: &NodeId, reason: &str) -> Option<Instant> {
        let session = self.by_node.remove(node)?;
        session.link.close(reason);
        Some(session.last_message)
    }
}

impl SupervisorState {
    pub(super) async fn on_connected(&mut self, arrival: NodeArrival) -> Result<()> {
        let NodeArrival { session: SessionId { node, number }, info, held, messages, link, canary } = arrival;
        if let Some(before) = self.sessions.get(&node) {
            if before.info.instance != info.instance {
                // Another process of this name: the first one stays for as long as it lives. A full queue
                // is not possible here, a closed one means that the newcomer is gone.
                drop(messages.try_send(ToNode::NameInUse));
                return Ok(());
            }
            self.lose(&node, LossCause::Unlinked, "its process reconnected").await?;
        }
        let run = serde_json::to_string(&self.run)?;
        let keep = self.machine.accepts_state(&held);
        let revoked = self.credentials.revoked()?;
        drop(messages.try_send(ToNode::Welcome(Box::new(Welcome { run, keep, canary, revoked }))));
        let joining = Some(if keep { held } else { ResidentState::default() });
        let profile = info.profile.clone();
        let (links, last_message) = (Vec::new(), Instant::now());
        let session = Session { info, number, messages, link, links, last_message, joining };
        self.sessions.by_node.insert(node.clone(), session);
        match profile {
            Some(profile) => self.on_measured(SessionId { node, number }, Box::new(profile)).await,
            None => Ok(()),
        }
    }

    /// A node has measured its profile: it joins the cluster.
    pub(super) async fn on_measured(&mut self, id: SessionId, profile: Box<Profile>) -> Result<()> {
        let Some(session) = self.sessions.current(&id) else { return Ok(()) };
        session.last_message = Instant::now();
        session.info.profile = Some((*profile).clone());
        let Some(held) = session.joining.take() else { return Ok(()) };
        let address = session.info.address.clone();
        if let Some(reason) = self.sessions.on_other_network(&id.node, &address) {
            tracing::warn!(node = %id.node, address, reason, "a newcomer is turned away");
            // It ends by itself when it has read this.
            self.sessions.send(&id.node, ToNode::Unreachable { address, reason });
            return Ok(());
        }
        self.on_event(Event::Joined { node: id.node, profile, address, held }).await
    }

    pub(super) async fn on_report(&mut self, id: SessionId, report: NodeReport) -> Result<()> {
        let Some(session) = self.sessions.current(&id) else { return Ok(()) };
        session.last_message = Instant::now();
        if matches!(report, NodeReport::Prepared { .. }) {
            self.telemetry.traces.prepared(&id.node.0);
        }
        self.on_event(Event::Reported { node: id.node, message: report }).await
    }

    /// Takes a node's links. The median by bandwidth stands for all of them.
    pub(super) async fn on_links(&mut self, id: SessionId, links: Vec<LinkReport>) -> Result<()> {
        let Some(session) = self.sessions.current(&id) else { return Ok(()) };
        session.last_message = Instant::now();
        for LinkReport { peer, sent_bytes, received_bytes, .. } in &links {
            self.telemetry.metrics.link(&id.node.0, peer, *sent_bytes, *received_bytes);
        }
        let probed = |link: &LinkReport| {
            let bandwidth = link.bandwidth.filter(|bandwidth| *bandwidth > 0.0)?;
            Some((bandwidth, link.round_trip_ms / 1e3))
        };
        let mut probes: Vec<(f64, f64)> = links.iter().filter_map(probed).collect();
        session.links = links;
        self.retain_metrics();
        probes.sort_by(|a, b| a.0.total_cmp(&b.0));
        let Some(&(bandwidth, round_trip_s)) = probes.get(probes.len() / 2) else { return Ok(()) };
        self.on_event(Event::LinkMeasured { node: id.node, bandwidth, round_trip_s }).await
    }

    pub(super) async fn on_disconnected(
        &mut self,
        id: SessionId,
        cause: LossCause,
        reason: String,
    ) -> Result<()> {
        if self.sessions.current(&id).is_none() {
            return Ok(());
        }
        let node = id.node;
        if self.sessions.released.get(&node) == Some(&id.number) {
            self.sessions.released.remove(&node);
            self.sessions.by_node.remove(&node);
            self.retain_metrics();
            let step = self.machine.committed();
            self.answer(&OperatorRequest::Drain { node: node.0 }, &OperatorReply::Done { step });
            return Ok(());
        }
        self.lose(&node, cause, &reason).await
    }

    /// A node is lost; whatever its link still brings is ignored.
    async fn lose(&mut self, node: &NodeId, cause: LossCause, reason: &str) -> Result<()> {
        self.disconnect(node, reason);
        let lost = OperatorReply::Failed { reason: format!("{node} is disconnected: {reason}") };
        self.answer(&OperatorRequest::Drain { node: node.0.clone() }, &lost);
        self.on_event(Event::Lost { node: node.clone(), cause, reason: reason.to_owned() }).await
    }

    /// The metrics keep no series of nodes that are gone.
    fn retain_metrics(&self) {
        let is_connected = |name: &str| self.sessions.by_node.keys().any(|node| node.0 == name);
        self.telemetry.metrics.retain_nodes(is_connected);
    }

    pub(super) fn disconnect(&mut self, node: &NodeId, reason: &str) {
        if let Some(last_message) = self.sessions.disconnect(node, reason) {
            self.timings.lost(node, reason, last_message.elapsed());
        }
        self.retain_metrics();
    }
}
