//! Links to the other nodes, dialed when they are first needed and re-dialed when they broke.

use crate::error::{Error, Result};
use crate::limits::{CALL_MAX, DIAL_AGAIN, UNKNOWN_PEER_MAX, UNKNOWN_PEER_POLL};
use crate::net::probe::probe;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;
use tokio::sync::{OnceCell, mpsc};
use tokio::task::JoinHandle;
use volary_core::NodeId;
use volary_protocol::frames;
use volary_protocol::{FrameRefusal, LinkReport};
use volary_transport::{Endpoint, Frame, FrameKind, Link};

/// Links to the other nodes.
pub(crate) struct Peers {
    endpoint: Endpoint,
    state: Mutex<State>,
    /// Reports of broken links. Unbounded, since each link sends at most one and there is at most one link
    /// per member.
    breaks: mpsc::UnboundedSender<BrokenLink>,
}

#[derive(Default)]
struct State {
    addresses: HashMap<NodeId, String>,
    /// A cell each: two senders to one peer share its dialing, and a peer that does not answer holds up no
    /// other.
    links: HashMap<NodeId, LinkCell>,
    /// The last failed dial of each peer: when it failed, and why.
    failed_dials: HashMap<NodeId, (Instant, String)>,
    /// Bytes per second to others, measured once for each link; 0 where the probe failed.
    bandwidths: HashMap<NodeId, f64>,
}

type LinkCell = Arc<OnceCell<WatchedLink>>;

/// A link, and the task that waits for its end for as long as the link is kept here.
struct WatchedLink {
    link: Link,
    watch: JoinHandle<()>,
}

impl Drop for WatchedLink {
    fn drop(&mut self) {
        // The task holds the link, which closes with its last handle.
        self.watch.abort();
    }
}

/// A link that broke.
pub(crate) struct BrokenLink {
    pub(crate) peer: NodeId,
    pub(crate) reason: String,
    link: Link,
}

impl Peers {
    /// No links yet, and the reports of those that break.
    pub(crate) fn new(endpoint: Endpoint) -> (Self, mpsc::UnboundedReceiver<BrokenLink>) {
        let (breaks, broken) = mpsc::unbounded_channel();
        (Self { endpoint, state: Mutex::default(), breaks }, broken)
    }

    /// Takes the members of a new placement and their addresses; links to others are closed.
    pub(crate) fn set_members(&self, addresses: &[(NodeId, String)]) {
        let mut state = self.state.lock();
        let before = std::mem::replace(&mut state.addresses, addresses.iter().cloned().collect());
        let State { addresses, links, bandwidths, failed_dials } = &mut *state;
        bandwidths.retain(|node, _| addresses.contains_key(node));
        // A node of the same name at another address is another process.
        let is_same = |node: &NodeId| addresses.get(node).is_some_and(|now| before.get(node) == Some(now));
        links.retain(|node, _| is_same(node));
        failed_dials.retain(|node, _| is_same(node));
    }

    /// Removes a broken link, and tells whether it was in use: a frame may be lost with it, which no
    /// other event reports.
    pub(crate) fn remove_broken(&self, broken: &BrokenLink) -> bool {
        self.remove(&broken.peer, &broken.link)
    }

    /// Removes exactly this link: a new one may have been dialed since.
    fn remove(&self, peer: &NodeId, link: &Link) -> bool {
        let mut state = self.state.lock();
        let same = |cell: &LinkCell| cell.get().is_some_and(|now| now.link.same_as(link));
        let found = state.links.get(peer).is_some_and(same);
        if found {
            state.links.remove(peer);
        }
        found
    }

    /// Connections and frames refused so far.
    pub(crate) fn refused(&self) -> u64 {
        self.endpoint.refused()
    }

    pub(crate) fn count_refused(&self) {
        self.endpoint.count_refused();
    }

    /// Whether the certificate at the other end of a link is revoked.
    pub(crate) fn is_revoked(&self, link: &Link) -> bool {
        self.endpoint.is_revoked(link.certificate())
    }

    /// Waits until a node has a part in the run: a new member may be a little ahead of the placement that
    /// names it.
    pub(crate) async fn until_known(&self, node: &NodeId) -> bool {
        let start = Instant::now();
        loop {
            if self.state.lock().addresses.contains_key(node) {
                return true;
            }
            if start.elapsed() > UNKNOWN_PEER_MAX {
                return false;
            }
            tokio::time::sleep(UNKNOWN_PEER_POLL).await;
        }
    }

    /// The address of a member.
    pub(crate) fn address(&self, node: &str) -> Option<SocketAddr> {
        self.state.lock().addresses.get(&NodeId::new(node))?.parse().ok()
    }

    /// The present links.
    pub(crate) fn reports(&self) -> Vec<LinkReport> {
        let state = self.state.lock();
        let report = |(node, cell): (&NodeId, &LinkCell)| {
            let stats = cell.get()?.link.stats();
            tracing::debug!(peer = %node, lost = stats.lost_packets, window = stats.window, "link");
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

    /// Probes links that have not been probed yet, one after the other, since each probe takes bandwidth
    /// from training.
    pub(crate) async fn probe_new_links(&self) {
        let new: Vec<(NodeId, Link)> = {
            let state = self.state.lock();
            let unknown = |(node, cell): (&NodeId, &LinkCell)| {
                let watched = cell.get().filter(|_| !state.bandwidths.contains_key(node))?;
                Some((node.clone(), watched.link.clone()))
            };
            state.links.iter().filter_map(unknown).collect()
        };
        for (node, link) in new {
            let sent = || self.reports().iter().map(|report| report.sent_bytes).sum();
            let bandwidth = probe(&link, sent).await.map_or(0.0, |probe| probe.bandwidth);
            self.state.lock().bandwidths.insert(node, bandwidth);
        }
    }

    async fn link(&self, peer: &NodeId) -> Result<Link> {
        let (cell, address) = {
            let mut state = self.state.lock();
            let address = state.addresses.get(peer).cloned();
            let address = address.ok_or_else(|| Error::NotAMember { peer: peer.clone() })?;
            (Arc::clone(state.links.entry(peer.clone()).or_default()), address)
        };
        let asked = Instant::now();
        let dial = || async {
            let unreachable = |reason: String| Error::Unreachable { peer: peer.clone(), reason };
            // The dial for which this one has waited: another one would fail as late.
            if let Some(reason) = self.failed_since(peer, asked) {
                return Err(unreachable(reason));
            }
            let bad = |_| Error::BadAddress { peer: peer.clone(), address: address.clone() };
            let socket: SocketAddr = address.parse().map_err(bad)?;
            match self.endpoint.connect(socket, &peer.0).await {
                Ok(link) => Ok(self.watch(peer.clone(), link)),
                Err(error) => {
                    let reason = error.to_string();
                    let failed = (Instant::now(), reason.clone());
                    self.state.lock().failed_dials.insert(peer.clone(), failed);
                    Err(unreachable(reason))
                }
            }
        };
        cell.get_or_try_init(dial).await.map(|watched| watched.link.clone())
    }

    /// Why the peer could not be dialed since `moment`, if that was tried.
    fn failed_since(&self, peer: &NodeId, moment: Instant) -> Option<String> {
        let state = self.state.lock();
        state.failed_dials.get(peer).filter(|(at, _)| *at >= moment).map(|(_, reason)| reason.clone())
    }

    /// An error if the peer could not be dialed a moment ago: what can wait does not try again so soon.
    pub(crate) fn check_dialed(&self, peer: &NodeId) -> Result<()> {
        let moment = Instant::now().checked_sub(DIAL_AGAIN);
        match moment.and_then(|moment| self.failed_since(peer, moment)) {
            Some(reason) => Err(Error::Unreachable { peer: peer.clone(), reason }),
            None => Ok(()),
        }
    }

    fn watch(&self, peer: NodeId, link: Link) -> WatchedLink {
        let (breaks, watched) = (self.breaks.clone(), link.clone());
        let watch = tokio::spawn(async move {
            let reason = watched.closed().await.to_string();
            // The receiver ends with the node.
            drop(breaks.send(BrokenLink { peer, reason, link: watched }));
        });
        WatchedLink { link, watch }
    }

    /// What a failed use of a link means. Every error but an oversized frame of this node breaks the link.
    fn failed(&self, peer: &NodeId, link: &Link, error: volary_transport::Error) -> Error {
        let (peer, reason) = (peer.clone(), error.to_string());
        if matches!(error, volary_transport::Error::TooLarge(_)) {
            return Error::TooLarge { peer, reason };
        }
        self.remove(&peer, link);
        Error::Unreachable { peer, reason }
    }

    /// Sends a frame and awaits the answer; a refusal is an error.
    pub(crate) async fn request(&self, peer: &NodeId, frame: Frame) -> Result<Frame> {
        let link = self.link(peer).await?;
        let reply = match tokio::time::timeout(CALL_MAX, link.request(frame)).await {
            Ok(Ok(reply)) => reply,
            Ok(Err(error)) => return Err(self.failed(peer, &link, error)),
            Err(_) => return Err(Error::NoAnswer { peer: peer.clone(), limit: CALL_MAX }),
        };
        if reply.kind == FrameKind::Refusal {
            let refusal: FrameRefusal = frames::decode(&reply)?;
            return Err(Error::Refused { peer: peer.clone(), refusal });
        }
        Ok(reply)
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::expect_used, reason = "tests")]

    use super::*;
    use std::time::Duration;
    use volary_transport::{Authority, ClientAuth, Network, TransportOptions};

    #[tokio::test]
    async fn all_who_wait_for_a_dial_share_its_failure() {
        let authority = Authority::create().expect("an authority");
        let identity = authority.identity("a").expect("an identity");
        let any = ([127, 0, 0, 1], 0).into();
        let endpoint = Network::quic()
            .bind(any, identity, ClientAuth::Required, &TransportOptions::default())
            .expect("an endpoint");
        // It takes datagrams and answers none.
        let silent = std::net::UdpSocket::bind("127.0.0.1:0").expect("a socket");
        let (peers, _broken) = Peers::new(endpoint);
        let peer = NodeId::new("b");
        peers.set_members(&[(peer.clone(), silent.local_addr().expect("an address").to_string())]);
        peers.check_dialed(&peer).expect("not dialed yet");
        let began = Instant::now();
        let (one, two, three) = tokio::join!(peers.link(&peer), peers.link(&peer), peers.link(&peer));
        assert!(one.is_err() && two.is_err() && three.is_err());
        let once = volary_transport::limits::HANDSHAKE_MAX;
        assert!(began.elapsed() < once + Duration::from_secs(4), "{:?}", began.elapsed());
        assert!(peers.check_dialed(&peer).is_err(), "a copy would dial again at once");
    }
}
