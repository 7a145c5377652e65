//! The hub: fake addresses, handshakes, faults per pair of endpoints, crashes.

use super::channel::{Channel, Faults, Side};
use super::trust::{verify_dialer, verify_listener};
use super::wire::{End, MemoryWire, Peer, ends};
use crate::accept::{Accepted, Incoming, Places, RefusedCount};
use crate::error::{Error, Result};
use crate::handshake::greet;
use crate::identity::{Identity, fingerprint};
use crate::limits::{HANDSHAKE_MAX, INCOMING_MAX};
use crate::link::CLOSE_NORMAL;
use crate::network::{Backend, Dial, Dialed, Socket, SocketArgs};
use crate::options::TransportOptions;
use crate::tls::ClientAuth;
use crate::wire::{BoxFuture, Wire};
use parking_lot::{Mutex, RwLock};
use rustls::pki_types::CertificateDer;
use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use tokio::sync::{OwnedSemaphorePermit, mpsc, watch};

/// The first port that the hub assigns for port 0.
const FIRST_PORT: u16 = 20_001;

/// A network in memory: a hub that knows its endpoints by their addresses, and whose faults a test controls.
///
/// Processes get its [`Network::handle`]. Port 0 is the next free port; no address is ever opened.
#[derive(Clone, Debug, Default)]
pub struct Network(Arc<Hub>);

#[derive(Debug, Default)]
struct Hub(Mutex<State>);

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

    /// Replaces the faults between two endpoints, by their addresses, for present and future links. Call it in a tokio
    /// runtime.
    pub fn set_faults(&self, a: SocketAddr, b: SocketAddr, faults: Faults) {
        let mut state = self.0.0.lock();
        state.faults.insert(pair_of(a, b), faults);
        for link in state.links.iter().filter(|link| link.pair == pair_of(a, b)) {
            link.channel.upgrade().into_iter().for_each(|channel| channel.set_faults(faults));
        }
    }

    /// Ends an endpoint as the death of its process does: its links are reset at once, and it neither dials nor accepts
    /// any more. A new endpoint may bind the address.
    pub fn crash(&self, address: SocketAddr) {
        let mut state = self.0.0.lock();
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
        self.0.0.lock().sockets.keys().copied().collect()
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
        let (accepted, incoming) = mpsc::channel(INCOMING_MAX);
        let mut state = self.0.0.lock();
        let address = state.assign(args.address)?;
        let shared = Arc::new(Shared {
            address,
            config: RwLock::new(Config {
                server: args.server,
                idle_timeout_ms: args.options.idle_timeout_ms,
            }),
            status: watch::Sender::new(Status::Open(accepted)),
            places: Places::new(),
            refused: args.refused,
        });
        state.sockets.insert(address, Arc::clone(&shared));
        let incoming = tokio::sync::Mutex::new(incoming);
        Ok(Arc::new(MemorySocket { hub: self.clone(), shared, incoming }))
    }

    fn local_ip(&self, _: SocketAddr) -> Result<IpAddr> {
        Ok(Ipv4Addr::LOCALHOST.into())
    }
}

/// What the hub knows of a socket.
#[derive(Debug)]
struct Shared {
    address: SocketAddr,
    config: RwLock<Config>,
    status: watch::Sender<Status>,
    places: Places,
    refused: RefusedCount,
}

#[derive(Clone, Debug)]
struct Config {
    server: Option<(Identity, ClientAuth)>,
    idle_timeout_ms: u64,
}

#[derive(Debug)]
enum Status {
    Open(mpsc::Sender<Accepted>),
    Closed,
    Crashed,
}

/// One end of the hub's network.
#[derive(Debug)]
struct MemorySocket {
    hub: Network,
    shared: Arc<Shared>,
    incoming: tokio::sync::Mutex<mpsc::Receiver<Accepted>>,
}

impl Drop for MemorySocket {
    fn drop(&mut self) {
        self.close("the process ends");
    }
}

impl Socket for MemorySocket {
    fn local_addr(&self) -> SocketAddr {
        self.shared.address
    }

    fn dial(&self, dial: Dial) -> BoxFuture<'_, Result<Dialed>> {
        Box::pin(async move {
            let peer = dial.peer();
            let work = tokio::time::timeout(HANDSHAKE_MAX, self.connect(dial));
            let late = || Error::connection(peer, format!("no answer within {HANDSHAKE_MAX:?}"));
            work.await.unwrap_or_else(|_| Err(late()))
        })
    }

    fn accept(&self) -> BoxFuture<'_, Option<Accepted>> {
        Box::pin(async move {
            let mut status = self.shared.status.subscribe();
            let mut incoming = self.incoming.lock().await;
            tokio::select! {
                biased;
                _ = status.wait_for(|status| matches!(status, Status::Crashed)) => None,
                accepted = incoming.recv() => accepted,
            }
        })
    }

    fn configure(&self, server: Option<(Identity, ClientAuth)>, options: &TransportOptions) -> Result<()> {
        let mut config = self.shared.config.write();
        *config = Config { server, idle_timeout_ms: options.idle_timeout_ms };
        Ok(())
    }

    fn close(&self, reason: &str) {
        let mut state = self.hub.0.0.lock();
        let address = self.shared.address;
        let was_open = self.shared.status.send_if_modified(|status| {
            let is_open = matches!(status, Status::Open(_));
            if is_open {
                *status = Status::Closed;
            }
            is_open
        });
        // After a crash, another socket may have the address and its links.
        if was_open {
            state.sockets.remove(&address);
            for (channel, link) in state.channels_of(address) {
                channel.close_by(link.side_of(address), CLOSE_NORMAL, reason);
            }
        }
    }
}

impl HubLink {
    fn side_of(&self, address: SocketAddr) -> Side {
        if self.dialer == address { Side::A } else { Side::B }
    }
}

/// A listener that trusts a dialer and is trusted by it.
struct Listener {
    shared: Arc<Shared>,
    certificate: CertificateDer<'static>,
    dialer_certificate: Option<CertificateDer<'static>>,
    place: OwnedSemaphorePermit,
}

impl MemorySocket {
    async fn connect(&self, dial: Dial) -> Result<Dialed> {
        let failed = |reason: &dyn std::fmt::Display| Error::connection(dial.peer(), reason);
        let listener = self.find(&dial).map_err(|reason| failed(&reason))?;
        let (channel, accepted) = self.link(&listener).map_err(|reason| failed(&reason))?;
        let (End { frames, control: (mut sender, mut receiver) }, far) = ends(&channel);
        let peer = Peer {
            name: dial.name.clone(),
            address: dial.address,
            certificate: Some(fingerprint(&listener.certificate)),
        };
        let wire = Arc::new(MemoryWire::new(frames, peer));
        // The first flight of the handshake.
        wire.reach_peer().await?;
        tokio::spawn(introduce(listener, accepted, self.shared.address, far));
        let answer = greet((&mut sender, &mut receiver), &dial.role, dial.protocol).await?;
        Ok(Dialed { wire, answer, control: (sender, receiver) })
    }

    /// The listener at the dialed address, if both ends trust each other; otherwise the reason.
    fn find(&self, dial: &Dial) -> std::result::Result<Listener, String> {
        let shared = self.hub.0.0.lock().sockets.get(&dial.address).cloned().ok_or(REFUSED)?;
        let Some((identity, clients)) = shared.config.read().server.clone() else {
            return Err(REFUSED.into());
        };
        verify_listener(&identity, &dial.name, &dial.credential).map_err(|error| error.to_string())?;
        let count = || shared.refused.fetch_add(1, Ordering::Relaxed);
        let verified = verify_dialer(&identity, clients, &dial.credential);
        let dialer_certificate = verified.map_err(|error| {
            count();
            error.to_string()
        })?;
        let place = shared.places.take().ok_or_else(|| {
            count();
            "too many connections wait for admission".to_owned()
        })?;
        Ok(Listener { certificate: identity.certificate, shared, dialer_certificate, place })
    }

    /// Registers a link to a listener, if both are still open.
    fn link(
        &self,
        listener: &Listener,
    ) -> std::result::Result<(Arc<Channel>, mpsc::Sender<Accepted>), &'static str> {
        let mut state = self.hub.0.0.lock();
        if !matches!(*self.shared.status.borrow(), Status::Open(_)) {
            return Err("this endpoint is closed");
        }
        let accepted = match &*listener.shared.status.borrow() {
            Status::Open(accepted) => accepted.clone(),
            Status::Closed | Status::Crashed => return Err(REFUSED),
        };
        let pair = pair_of(self.shared.address, listener.shared.address);
        let faults = state.faults.get(&pair).copied().unwrap_or_default();
        // The shorter timeout counts, as in QUIC.
        let idle_timeout_ms = |shared: &Shared| shared.config.read().idle_timeout_ms;
        let idle_timeout_ms = idle_timeout_ms(&self.shared).min(idle_timeout_ms(&listener.shared));
        let channel = Arc::new(Channel::new(faults, idle_timeout_ms));
        if faults.partition {
            channel.start_idle_timeout();
        }
        state.links.retain(|link| link.channel.strong_count() > 0);
        let link = HubLink { pair, dialer: self.shared.address, channel: Arc::downgrade(&channel) };
        state.links.push(link);
        Ok((channel, accepted))
    }
}

const REFUSED: &str = "connection refused";

/// The listener's side of a handshake.
async fn introduce(
    listener: Listener,
    accepted: mpsc::Sender<Accepted>,
    dialer: SocketAddr,
    End { frames, control }: End,
) {
    let Listener { shared, dialer_certificate: certificate, place, .. } = listener;
    let hash = certificate.as_ref().map(|certificate| fingerprint(certificate));
    let incoming = Incoming { control, certificate, place, refused: Arc::clone(&shared.refused) };
    let introduced = incoming.introduce(|name| {
        let peer = Peer { name, address: dialer, certificate: hash };
        Arc::new(MemoryWire::new(frames, peer)) as Arc<dyn Wire>
    });
    match tokio::time::timeout(2 * HANDSHAKE_MAX, introduced).await {
        Ok(Ok(connection)) => drop(accepted.send(connection).await),
        Ok(Err(error)) => tracing::warn!(%dialer, %error, "connection refused"),
        Err(_) => tracing::warn!(%dialer, "connection refused: no greeting in time"),
    }
}
