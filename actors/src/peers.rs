//! Links to the other nodes, dialled when they are first needed and again when they broke.

use crate::limits::{CALL_MAX, STRANGER_LOOK_EVERY, STRANGER_MAX};
use crate::measure;
use crate::wire::LinkReport;
use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;
use tokio::sync::{OnceCell, mpsc};
use tokio::task::JoinHandle;
use volary_core::NodeId;
use volary_core::compute::{ComputeError, Computed};
use volary_transport::{Endpoint, Frame, Kind, Link};

/// Links to the other nodes.
pub(crate) struct Peers {
    endpoint: Endpoint,
    state: Mutex<State>,
    /// Who hears of links that break while nobody waits for anything on them; each link says so once, and there is one for each peer.
    breaks: mpsc::UnboundedSender<Broken>,
}

/// A link, and who waits for its end for as long as it is kept here.
struct Watched {
    link: Link,
    watch: JoinHandle<()>,
}

impl Drop for Watched {
    fn drop(&mut self) {
        // It holds the link, which ends with its last handle.
        self.watch.abort();
    }
}

/// A link that broke, with the reason.
pub(crate) struct Broken {
    pub(crate) peer: NodeId,
    pub(crate) reason: String,
    link: Link,
}

#[derive(Default)]
struct State {
    addresses: HashMap<NodeId, String>,
    /// A cell each: two senders to one peer share its dialling, and one that does not answer holds up no other.
    links: HashMap<NodeId, Arc<OnceCell<Watched>>>,
    suspect: Option<NodeId>,
    /// Bytes per second to others, measured once for each link.
    bandwidths: HashMap<NodeId, f64>,
}

impl Peers {
    /// The links, and what tells of those that break.
    pub(crate) fn new(endpoint: Endpoint) -> (Self, mpsc::UnboundedReceiver<Broken>) {
        let (breaks, broken) = mpsc::unbounded_channel();
        (Self { endpoint, state: Mutex::default(), breaks }, broken)
    }

    /// Whether a link that broke was in use: a frame that had left may be lost with it, and no one else would ever say so.
    pub(crate) fn counts(&self, broken: &Broken) -> bool {
        let mut state = self.lock();
        let same =
            |cell: &Arc<OnceCell<Watched>>| cell.get().is_some_and(|now| now.link.same_as(&broken.link));
        let in_use = state.links.get(&broken.peer).is_some_and(same);
        if in_use {
            state.links.remove(&broken.peer);
            state.suspect = Some(broken.peer.clone());
        }
        in_use
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The members of a new placement and where they are; links to others are closed.
    pub(crate) fn set_members(&self, addresses: &[(NodeId, String)]) {
        let mut state = self.lock();
        let before = std::mem::replace(&mut state.addresses, addresses.iter().cloned().collect());
        let State { addresses, links, suspect, bandwidths } = &mut *state;
        bandwidths.retain(|node, _| addresses.contains_key(node));
        // A node of the same name at another address is another process.
        links.retain(|node, _| addresses.get(node).is_some_and(|now| before.get(node) == Some(now)));
        *suspect = None;
    }

    /// What was turned away here so far.
    pub(crate) fn refused(&self) -> u64 {
        self.endpoint.refused()
    }

    /// Whether the other end of a link is not trusted any more.
    pub(crate) fn is_revoked(&self, link: &Link) -> bool {
        self.endpoint.is_revoked(link.certificate())
    }

    pub(crate) fn count_refused(&self) {
        self.endpoint.count_refused();
    }

    /// Whether a node has a part in the run; one that does not yet may be a little ahead of what this one was told.
    pub(crate) async fn until_known(&self, node: &NodeId) -> bool {
        let start = Instant::now();
        loop {
            if self.lock().addresses.contains_key(node) {
                return true;
            }
            if start.elapsed() > STRANGER_MAX {
                return false;
            }
            tokio::time::sleep(STRANGER_LOOK_EVERY).await;
        }
    }

    /// The node that could not be reached last, since the last placement.
    pub(crate) fn suspect(&self) -> Option<NodeId> {
        self.lock().suspect.clone()
    }

    /// Where a node is, as far as this one knows.
    pub(crate) fn address(&self, node: &str) -> Option<SocketAddr> {
        self.lock().addresses.get(&NodeId::new(node))?.parse().ok()
    }

    /// The links as they are now.
    pub(crate) fn reports(&self) -> Vec<LinkReport> {
        let state = self.lock();
        let report = |(node, cell): (&NodeId, &Arc<OnceCell<Watched>>)| {
            let stats = cell.get()?.link.stats();
            tracing::debug!(peer = %node, lost = stats.lost_packets, window = stats.window, "a link");
            Some(LinkReport {
                peer: node.0.clone(),
                round_trip_ms: stats.round_trip.as_secs_f64() * 1e3,
                sent_bytes: stats.bytes_sent,
                received_bytes: stats.bytes_received,
                bandwidth: state.bandwidths.get(node).copied(),
            })
        };
        state.links.iter().filter_map(report).collect()
    }

    /// Measures the links that have not been measured yet, one after the other: a probe is a moment of training.
    pub(crate) async fn measure_new_links(&self) {
        let new: Vec<(NodeId, Link)> = {
            let state = self.lock();
            let unknown = |(node, cell): (&NodeId, &Arc<OnceCell<Watched>>)| {
                let watched = cell.get().filter(|_| !state.bandwidths.contains_key(node))?;
                Some((node.clone(), watched.link.clone()))
            };
            state.links.iter().filter_map(unknown).collect()
        };
        for (node, link) in new {
            // A link that cannot be measured is not asked again.
            let sent = || self.reports().iter().map(|report| report.sent_bytes).sum();
            let bandwidth = measure::link(&link, sent).await.map_or(0.0, |probe| probe.bandwidth);
            self.lock().bandwidths.insert(node, bandwidth);
        }
    }

    async fn link(&self, node: &NodeId) -> Computed<Link> {
        let (cell, address) = {
            let mut state = self.lock();
            let address = state.addresses.get(node).cloned();
            let address = address.ok_or_else(|| ComputeError(format!("{node} is no member")))?;
            (Arc::clone(state.links.entry(node.clone()).or_default()), address)
        };
        let dial = || async {
            let socket: SocketAddr = address
                .parse()
                .map_err(|_| ComputeError(format!("{node} has no usable address: {address}")))?;
            let dialled = self.endpoint.connect(socket, &node.0).await;
            let link = dialled.map_err(|error| self.unreachable(node, &error))?;
            Ok(self.watch(node.clone(), link))
        };
        cell.get_or_try_init(dial).await.map(|watched| watched.link.clone())
    }

    fn watch(&self, peer: NodeId, link: Link) -> Watched {
        let (breaks, watched) = (self.breaks.clone(), link.clone());
        let watch = tokio::spawn(async move {
            let reason = watched.closed().await;
            drop(breaks.send(Broken { peer, reason, link: watched }));
        });
        Watched { link, watch }
    }

    fn unreachable(&self, node: &NodeId, error: &volary_transport::Error) -> ComputeError {
        self.lock().suspect = Some(node.clone());
        ComputeError(format!("{node} cannot be reached: {error}"))
    }

    fn broken(&self, node: &NodeId, link: &Link, error: &volary_transport::Error) -> ComputeError {
        // Only this link: meanwhile somebody may have dialled a new one.
        let mut state = self.lock();
        let same = |cell: &Arc<OnceCell<Watched>>| cell.get().is_some_and(|now| now.link.same_as(link));
        if state.links.get(node).is_some_and(same) {
            state.links.remove(node);
        }
        drop(state);
        self.unreachable(node, error)
    }

    /// Sends a frame and awaits the answer; a refusal is an error.
    pub(crate) async fn request(&self, node: &NodeId, frame: Frame) -> Computed<Frame> {
        let link = self.link(node).await?;
        let reply = match tokio::time::timeout(CALL_MAX, link.request(frame)).await {
            Ok(Ok(reply)) => reply,
            Ok(Err(error)) => return Err(self.broken(node, &link, &error)),
            Err(_) => return Err(ComputeError(format!("{node} did not answer within {CALL_MAX:?}"))),
        };
        refused(node, reply)
    }

    /// Sends a frame that has no answer.
    pub(crate) async fn send(&self, node: &NodeId, frame: Frame) -> Computed<()> {
        let link = self.link(node).await?;
        match tokio::time::timeout(CALL_MAX, link.send(frame)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(self.broken(node, &link, &error)),
            Err(_) => Err(ComputeError(format!("{node} did not take a frame within {CALL_MAX:?}"))),
        }
    }
}

/// Turns a refusal into an error.
pub(crate) fn refused(node: &NodeId, reply: Frame) -> Computed<Frame> {
    if reply.kind == Kind::Refusal {
        let reason: String = crate::wire::decode(&reply)?;
        return Err(ComputeError(format!("{node} refused: {reason}")));
    }
    Ok(reply)
}
