//! QUIC over UDP: one socket for all links of a process.
//!
//! quinn's drivers run on a thread of their own with a runtime of their own, away from all computation; the
//! links' methods may be awaited from any runtime. Settings follow the path (measurements are in
//! `docs/performance.md`): on loopback 65,487-byte datagrams without segmentation offload, elsewhere an MTU
//! of 1,452 bytes with it.

mod accept;
mod buffer;
mod control;
mod frames;
mod interference;
pub(crate) mod settings;
mod wire;

pub use interference::Interference;

use crate::accept::{Accepted, RefusedCount};
use crate::error::{Error, Result};
use crate::handshake::{Answer, greet};
use crate::identity::{Identity, dns_name};
use crate::limits::{GOODBYE_MAX, HANDSHAKE_MAX, INCOMING_MAX};
use crate::network::{Backend, Credential, Dial, Dialed, Socket, SocketArgs};
use crate::options::TransportOptions;
use crate::tls::{self, ClientAuth};
use crate::wire::{BoxFuture, Control};
use accept::accept_all;
use control::control_stream;
use interference::FaultySocket;
use parking_lot::RwLock;
use quinn::{Connection, Runtime as _, VarInt};
use settings::{LOOPBACK_DATAGRAM, bind_error, local_ip, transport_config, udp_socket};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::Arc;
use tokio::runtime::Handle;
use tokio::sync::{Mutex, mpsc, oneshot};
use wire::QuicWire;

/// The QUIC network.
#[derive(Debug, Default)]
pub(crate) struct Quic {
    /// Fault injection on its sockets.
    pub(crate) interference: Option<Interference>,
}

impl Backend for Quic {
    fn open(&self, args: SocketArgs<'_>) -> Result<Arc<dyn Socket>> {
        Ok(Arc::new(QuicSocket::open(args, self.interference.clone())?))
    }

    fn local_ip(&self, towards: SocketAddr) -> Result<IpAddr> {
        local_ip(towards)
    }
}

/// One UDP socket and its connections.
#[derive(Debug)]
pub(crate) struct QuicSocket {
    quinn: quinn::Endpoint,
    runtime: Handle,
    transport: RwLock<Arc<quinn::TransportConfig>>,
    local: SocketAddr,
    incoming: Mutex<mpsc::Receiver<Accepted>>,
    refused: RefusedCount,
    /// Ends the driver thread when it is dropped.
    _alive: oneshot::Sender<()>,
}

impl QuicSocket {
    pub(crate) fn open(args: SocketArgs<'_>, interference: Option<Interference>) -> Result<Self> {
        let SocketArgs { address, server, options, refused } = args;
        let loopback = address.ip().is_loopback();
        let transport = Arc::new(transport_config(loopback, options)?);
        let socket = udp_socket(address)?;
        let local = socket.local_addr().map_err(|e| bind_error(address, &e))?;
        let mut config = quinn::EndpointConfig::default();
        if loopback {
            config.max_udp_payload_size(LOOPBACK_DATAGRAM).map_err(Error::identity)?;
        }
        let server = server.map(|server| server_config(&server, &transport)).transpose()?;
        let (accepted, incoming) = mpsc::channel(INCOMING_MAX);
        let (alive, dropped) = oneshot::channel();
        let driver =
            Driver { config, server, socket, interference, accepted, refused: Arc::clone(&refused), dropped };
        let (quinn, runtime) = driver.start(address)?;
        Ok(Self {
            quinn,
            runtime,
            transport: RwLock::new(transport),
            local,
            incoming: Mutex::new(incoming),
            refused,
            _alive: alive,
        })
    }

    /// Connects and exchanges the greeting, on the socket's runtime: a connection's driver runs where it was
    /// opened.
    pub(crate) async fn connect(&self, dial: Dial) -> Result<(Connection, Answer, Control)> {
        let mut config = match &dial.credential {
            Credential::Certificate(identity) => tls::client(identity)?,
            Credential::Pinned(authority) => tls::pinned(*authority)?,
        };
        config.transport_config(Arc::clone(&self.transport.read()));
        let (quinn, name, peer) = (self.quinn.clone(), dial.name.clone(), dial.peer());
        let work = self.runtime.spawn(async move {
            let broken = |error: &dyn std::fmt::Display| Error::connection(peer.clone(), error);
            let connecting = quinn
                .connect_with(config, dial.address, &dns_name(&dial.name))
                .map_err(|error| broken(&error))?;
            let connection = match tokio::time::timeout(HANDSHAKE_MAX, connecting).await {
                Ok(connected) => connected.map_err(|e| broken(&e))?,
                Err(_) => return Err(broken(&format!("no answer within {HANDSHAKE_MAX:?}"))),
            };
            let streams = connection.open_bi().await.map_err(|e| broken(&e))?;
            let (mut sender, mut receiver) = control_stream(streams);
            let answer = greet((&mut sender, &mut receiver), &dial.role, dial.protocol).await?;
            Ok((connection, answer, (sender, receiver)))
        });
        work.await.unwrap_or_else(|error| Err(Error::connection(name, error)))
    }
}

impl Socket for QuicSocket {
    fn local_addr(&self) -> SocketAddr {
        self.local
    }

    fn dial(&self, dial: Dial) -> BoxFuture<'_, Result<Dialed>> {
        Box::pin(async move {
            let peer = dial.name.clone();
            let (connection, answer, control) = self.connect(dial).await?;
            let (runtime, refused) = (self.runtime.clone(), Arc::clone(&self.refused));
            let wire = Arc::new(QuicWire { connection, peer, runtime, refused });
            Ok(Dialed { wire, answer, control })
        })
    }

    fn accept(&self) -> BoxFuture<'_, Option<Accepted>> {
        Box::pin(async move { self.incoming.lock().await.recv().await })
    }

    fn configure(&self, server: Option<(Identity, ClientAuth)>, options: &TransportOptions) -> Result<()> {
        let transport = Arc::new(transport_config(self.local.ip().is_loopback(), options)?);
        let server = server.map(|server| server_config(&server, &transport)).transpose()?;
        *self.transport.write() = transport;
        if server.is_some() {
            self.quinn.set_server_config(server);
        }
        Ok(())
    }

    fn close(&self, reason: &str) {
        self.quinn.close(VarInt::from_u32(0), reason.as_bytes());
    }
}

fn server_config(
    (identity, clients): &(Identity, ClientAuth),
    transport: &Arc<quinn::TransportConfig>,
) -> Result<quinn::ServerConfig> {
    let mut server = tls::server(identity, *clients)?;
    server.transport_config(Arc::clone(transport));
    Ok(server)
}

/// The thread that drives a socket.
struct Driver {
    config: quinn::EndpointConfig,
    server: Option<quinn::ServerConfig>,
    socket: UdpSocket,
    interference: Option<Interference>,
    accepted: mpsc::Sender<Accepted>,
    refused: RefusedCount,
    /// Resolves when the socket is dropped.
    dropped: oneshot::Receiver<()>,
}

type Started = (quinn::Endpoint, Handle);

impl Driver {
    fn start(self, address: SocketAddr) -> Result<Started> {
        let failed = |error: &dyn std::fmt::Display| Error::Bind { address, reason: error.to_string() };
        let (started, wait) = std::sync::mpsc::channel();
        std::thread::Builder::new()
            .name("quic".into())
            .spawn(move || {
                if let Err(error) = self.run(&started) {
                    // The caller waits for exactly this.
                    drop(started.send(Err(error)));
                }
            })
            .map_err(|e| failed(&e))?;
        let started: std::result::Result<_, std::io::Error> =
            wait.recv().map_err(|_| failed(&"its thread did not start"))?;
        started.map_err(|e| failed(&e))
    }

    fn run(self, started: &std::sync::mpsc::Sender<std::io::Result<Started>>) -> std::io::Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let _entered = runtime.enter();
        let tokio = Arc::new(quinn::TokioRuntime);
        let quinn = match self.interference {
            None => quinn::Endpoint::new(self.config, self.server, self.socket, tokio)?,
            Some(interference) => {
                let socket = tokio.wrap_udp_socket(self.socket)?;
                let faulty = Arc::new(FaultySocket { socket, interference });
                quinn::Endpoint::new_with_abstract_socket(self.config, self.server, faulty, tokio)?
            }
        };
        drop(started.send(Ok((quinn.clone(), runtime.handle().clone()))));
        runtime.block_on(async {
            tokio::spawn(accept_all(quinn.clone(), self.accepted, self.refused));
            drop(self.dropped.await);
            quinn.close(VarInt::from_u32(0), b"the process ends");
            // The last datagrams leave the socket.
            drop(tokio::time::timeout(GOODBYE_MAX, quinn.wait_idle()).await);
        });
        Ok(())
    }
}

#[cfg(test)]
mod tests;
