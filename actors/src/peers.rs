//! Links to the other nodes, dialled when they are first needed and again when they broke.

use crate::limits::CALL_MAX;
use std::collections::HashMap;
use std::net::SocketAddr;
use tokio::sync::Mutex;
use volary_core::NodeId;
use volary_core::compute::{ComputeError, Computed};
use volary_transport::{Endpoint, Frame, Kind, Link};

/// Links to the other nodes.
pub(crate) struct Peers {
    endpoint: Endpoint,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    addresses: HashMap<NodeId, String>,
    links: HashMap<NodeId, Link>,
}

impl Peers {
    pub(crate) fn new(endpoint: Endpoint) -> Self {
        Self { endpoint, state: Mutex::default() }
    }

    /// The members of a new placement and where they are; links to others are closed.
    pub(crate) async fn set_members(&self, addresses: &[(NodeId, String)]) {
        let mut state = self.state.lock().await;
        let before = std::mem::replace(&mut state.addresses, addresses.iter().cloned().collect());
        let State { addresses, links } = &mut *state;
        // A node of the same name at another address is another process.
        links.retain(|node, _| addresses.get(node).is_some_and(|now| before.get(node) == Some(now)));
    }

    async fn link(&self, node: &NodeId) -> Computed<Link> {
        // Held while dialling: two senders to one peer share the link.
        let mut state = self.state.lock().await;
        if let Some(link) = state.links.get(node) {
            return Ok(link.clone());
        }
        let address =
            state.addresses.get(node).ok_or_else(|| ComputeError(format!("{node} is no member")))?;
        let socket: SocketAddr =
            address.parse().map_err(|_| ComputeError(format!("{node} has no usable address: {address}")))?;
        let link = self.endpoint.connect(socket, &node.0).await.map_err(|e| unreachable_peer(node, &e))?;
        state.links.insert(node.clone(), link.clone());
        Ok(link)
    }

    async fn broken(&self, node: &NodeId, error: &volary_transport::Error) -> ComputeError {
        self.state.lock().await.links.remove(node);
        unreachable_peer(node, error)
    }

    /// Sends a frame and awaits the answer; a refusal is an error.
    pub(crate) async fn request(&self, node: &NodeId, frame: Frame) -> Computed<Frame> {
        let link = self.link(node).await?;
        let reply = match tokio::time::timeout(CALL_MAX, link.request(frame)).await {
            Ok(Ok(reply)) => reply,
            Ok(Err(error)) => return Err(self.broken(node, &error).await),
            Err(_) => return Err(ComputeError(format!("{node} did not answer within {CALL_MAX:?}"))),
        };
        refused(node, reply)
    }

    /// Sends a frame that has no answer.
    pub(crate) async fn send(&self, node: &NodeId, frame: Frame) -> Computed<()> {
        let link = self.link(node).await?;
        match tokio::time::timeout(CALL_MAX, link.send(frame)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(self.broken(node, &error).await),
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

fn unreachable_peer(node: &NodeId, error: &volary_transport::Error) -> ComputeError {
    ComputeError(format!("{node} cannot be reached: {error}"))
}
