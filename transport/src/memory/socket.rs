//! Sockets in memory: the handshake of both ends.

use super::network::Network;
use super::trust::{verify_dialer, verify_listener};
use super::wire::{End, MemoryWire, Peer, ends};
use crate::accept::{Accepted, Incoming, Places, RefusedCount};
use crate::error::{Error, Result};
use crate::handshake::greet;
use crate::identity::{Identity, fingerprint};
use crate::limits::{HANDSHAKE_MAX, INCOMING_MAX};
use crate::network::{Dial, Dialed, Socket, SocketArgs};
use crate::options::TransportOptions;
use crate::tls::ClientAuth;
use crate::wire::{BoxFuture, Wire};
use parking_lot::RwLock;
use rustls::pki_types::CertificateDer;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use tokio::sync::{Mutex, OwnedSemaphorePermit, mpsc, watch};

/// The part of a socket that the hub knows.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) address: SocketAddr,
    pub(super) config: RwLock<Config>,
    pub(super) status: watch::Sender<Status>,
    places: Places,
    refused: RefusedCount,
}

#[derive(Clone, Debug)]
pub(super) struct Config {
    server: Option<(Identity, ClientAuth)>,
    pub(super) idle_timeout_ms: u64,
}

#[derive(Debug)]
pub(super) enum Status {
    Open(mpsc::Sender<Accepted>),
    Closed,
    Crashed,
}

/// A socket of the hub's network.
#[derive(Debug)]
pub(super) struct MemorySocket {
    hub: Network,
    shared: Arc<Shared>,
    incoming: Mutex<mpsc::Receiver<Accepted>>,
}

impl MemorySocket {
    pub(super) fn new(hub: Network, address: SocketAddr, args: SocketArgs<'_>) -> Self {
        let (accepted, incoming) = mpsc::channel(INCOMING_MAX);
        let config = Config { server: args.server, idle_timeout_ms: args.options.idle_timeout_ms };
        let shared = Shared {
            address,
            config: RwLock::new(config),
            status: watch::Sender::new(Status::Open(accepted)),
            places: Places::new(),
            refused: args.refused,
        };
        Self { hub, shared: Arc::new(shared), incoming: Mutex::new(incoming) }
    }

    pub(super) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }
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
        self.hub.close(&self.shared, reason);
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
        let listener = self.find(&dial)?;
        let (channel, accepted) = self.hub.link(&self.shared, &listener.shared, &dial.peer())?;
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

    /// The listener at the dialed address, if both ends trust each other.
    fn find(&self, dial: &Dial) -> Result<Listener> {
        let failed = |reason: &dyn std::fmt::Display| Error::connection(dial.peer(), reason);
        let shared = self.hub.listener(dial.address).ok_or_else(|| failed(&REFUSED))?;
        let server = shared.config.read().server.clone();
        let (identity, clients) = server.ok_or_else(|| failed(&REFUSED))?;
        verify_listener(&identity, &dial.name, &dial.credential).map_err(|error| failed(&error))?;
        let refused = |reason: &dyn std::fmt::Display| {
            shared.refused.fetch_add(1, Ordering::Relaxed);
            failed(reason)
        };
        let verified = verify_dialer(&identity, clients, &dial.credential);
        let dialer_certificate = verified.map_err(|error| refused(&error))?;
        let place =
            shared.places.take().ok_or_else(|| refused(&"too many connections wait for admission"))?;
        Ok(Listener { certificate: identity.certificate, dialer_certificate, place, shared })
    }
}

/// The reason of a dial to an address without a listener.
pub(super) const REFUSED: &str = "connection refused";

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
        Err(_) => {
            shared.refused.fetch_add(1, Ordering::Relaxed);
            tracing::warn!(%dialer, "connection refused: no greeting in time");
        }
    }
}
