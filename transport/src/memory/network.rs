//! The hub: fake addresses, faults per pair of endpoints, crashes.

use super::channel::{Channel, Faults, Side};
use super::socket::{MemorySocket, REFUSED, Shared, Status};
use crate::accept::Accepted;
use crate::error::{Error, Result};
use crate::link::CLOSE_NORMAL;
use crate::network::{Backend, Socket, SocketArgs};
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::{Arc, Weak};
use tokio::sync::mpsc;

/// The first port that the hub assigns for port 0.
const FIRST_PORT: u16 = 20_001;

/// A network in memory: a hub that knows its endpoints by their addresses, and whose faults a test controls.
///
/// Processes get its [`Network::handle`]. Port 0 is the next free port; no address is ever opened.
#[derive(Clone, Debug, Default)]
pub struct Network(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    assigned_ports: u16,
    sockets: BTreeMap<SocketAddr, Arc<Shared>>,
    /// Of pairs that have some.
    faults: BTreeMap<(SocketAddr, SocketAddr), Faults>,
    links: Vec<HubLink>,
}

#[derive(Debug)]
struct HubLink {
    pair: (SocketAddr, SocketAddr),
    /// The dialer is side A.
    dialer: SocketAddr,
    channel: Weak<Channel>,
}

fn pair_of(a: SocketAddr, b: SocketAddr) -> (SocketAddr, SocketAddr) {
    (a.min(b), a.max(b))
}

impl Network {
    /// A network without endpoints and faults.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The handle for the processes under test.
    #[must_use]
    pub fn handle(&self) -> crate::Network {
        crate::Network::new(self.clone())
    }

    /// Replaces the faults between two endpoints, by their addresses, for present and future links. Call it
    /// in a tokio runtime.
    pub fn set_faults(&self, a: SocketAddr, b: SocketAddr, faults: Faults) {
        let mut state = self.0.lock();
        state.faults.insert(pair_of(a, b), faults);
        for link in state.links.iter().filter(|link| link.pair == pair_of(a, b)) {
            link.channel.upgrade().into_iter().for_each(|channel| channel.set_faults(faults));
        }
    }

    /// Ends an endpoint as the death of its process does: its links are reset at once, and it neither dials
    /// nor accepts any more. A new endpoint may bind the address.
    pub fn crash(&self, address: SocketAddr) {
        let mut state = self.0.lock();
        if let Some(socket) = state.sockets.remove(&address) {
            socket.status.send_replace(Status::Crashed);
        }
        for (channel, _) in state.channels_of(address) {
            channel.reset();
        }
    }

    /// The addresses of all open endpoints.
    #[must_use]
    pub fn addresses(&self) -> Vec<SocketAddr> {
        self.0.lock().sockets.keys().copied().collect()
    }
}

impl State {
    fn channels_of(&self, address: SocketAddr) -> impl Iterator<Item = (Arc<Channel>, &HubLink)> {
        let links = self.links.iter().filter(move |link| link.pair.0 == address || link.pair.1 == address);
        links.filter_map(|link| Some((link.channel.upgrade()?, link)))
    }

    /// The address that a new socket gets for the one it asks for.
    fn assign(&mut self, address: SocketAddr) -> Result<SocketAddr> {
        let failed = |reason: &str| Error::Bind { address, reason: reason.to_owned() };
        if address.port() != 0 {
            let is_free = !self.sockets.contains_key(&address);
            return is_free.then_some(address).ok_or_else(|| failed("it is in use by another process"));
        }
        while let Some(port) = FIRST_PORT.checked_add(self.assigned_ports) {
            self.assigned_ports += 1;
            let assigned = SocketAddr::new(address.ip(), port);
            if !self.sockets.contains_key(&assigned) {
                return Ok(assigned);
            }
        }
        Err(failed("no ports are left"))
    }
}

impl Backend for Network {
    fn open(&self, args: SocketArgs<'_>) -> Result<Arc<dyn Socket>> {
        let mut state = self.0.lock();
        let address = state.assign(args.address)?;
        let socket = MemorySocket::new(self.clone(), address, args);
        state.sockets.insert(address, Arc::clone(socket.shared()));
        Ok(Arc::new(socket))
    }

    fn local_ip(&self, _: SocketAddr) -> Result<IpAddr> {
        Ok(Ipv4Addr::LOCALHOST.into())
    }
}

/// For sockets.
impl Network {
    pub(super) fn listener(&self, address: SocketAddr) -> Option<Arc<Shared>> {
        self.0.lock().sockets.get(&address).cloned()
    }

    /// Registers a link, if both ends are open.
    pub(super) fn link(
        &self,
        dialer: &Shared,
        listener: &Shared,
        peer: &str,
    ) -> Result<(Arc<Channel>, mpsc::Sender<Accepted>)> {
        let mut state = self.0.lock();
        if !matches!(*dialer.status.borrow(), Status::Open(_)) {
            return Err(Error::connection(peer, "this endpoint is closed"));
        }
        let Status::Open(accepted) = &*listener.status.borrow() else {
            return Err(Error::connection(peer, REFUSED));
        };
        let pair = pair_of(dialer.address, listener.address);
        let faults = state.faults.get(&pair).copied().unwrap_or_default();
        // The shorter timeout counts, as in QUIC.
        let idle_timeout_ms = |socket: &Shared| socket.config.read().idle_timeout_ms;
        let idle_timeout_ms = idle_timeout_ms(dialer).min(idle_timeout_ms(listener));
        let channel = Arc::new(Channel::new(faults, idle_timeout_ms));
        if faults.partition {
            channel.start_idle_timeout();
        }
        state.links.retain(|link| link.channel.strong_count() > 0);
        state.links.push(HubLink { pair, dialer: dialer.address, channel: Arc::downgrade(&channel) });
        Ok((channel, accepted.clone()))
    }

    pub(super) fn close(&self, socket: &Shared, reason: &str) {
        let mut state = self.0.lock();
        let was_open = socket.status.send_if_modified(|status| {
            let is_open = matches!(status, Status::Open(_));
            if is_open {
                *status = Status::Closed;
            }
            is_open
        });
        // After a crash, another socket may have the address and its links.
        if was_open {
            state.sockets.remove(&socket.address);
            for (channel, link) in state.channels_of(socket.address) {
                channel.close_by(link.side_of(socket.address), CLOSE_NORMAL, reason);
            }
        }
    }
}

impl HubLink {
    fn side_of(&self, address: SocketAddr) -> Side {
        if self.dialer == address { Side::A } else { Side::B }
    }
}
