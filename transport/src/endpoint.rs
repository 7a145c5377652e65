//! A QUIC endpoint: one UDP socket for all links of a process.
//!
//! quinn's drivers run on a thread of their own with a runtime of their own, away from everything that computes;
//! the links' methods may be awaited from any runtime. Settings follow the path (measured; see `docs/performance.md`):
//! on loopback 65,487-byte datagrams without segmentation offload, elsewhere MTU 1,452 with it.

use crate::accept::{Accepted, Refused, accept_all};
use crate::access_token::AccessToken;
use crate::control::{ControlReceiver, ControlSender};
use crate::error::{Error, Result};
use crate::handshake::{Answer, PROTOCOL, Role, greet};
use crate::identity::{Identity, Issued, KeyRequest, SUPERVISOR, dns_name};
use crate::interference::{Disturbed, Interference};
use crate::limits::{HANDSHAKE_MAX, INCOMING_MAX};
use crate::link::{CONTROL_PRIORITY, Link};
use crate::options::TransportOptions;
use crate::settings::{LOOPBACK_DATAGRAM, bind_error, local_ip, transport_config, udp_socket};
use crate::tls::{self, Admit};
use quinn::{Connection, Runtime as _, VarInt};
use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::sync::{Mutex, mpsc, oneshot};

/// One UDP socket and its connections; clones are the same endpoint.
#[derive(Clone, Debug)]
pub struct Endpoint {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    quinn: quinn::Endpoint,
    runtime: Handle,
    identity: RwLock<Option<Identity>>,
    admit: Option<Admit>,
    options: TransportOptions,
    transport: RwLock<Arc<quinn::TransportConfig>>,
    local: SocketAddr,
    incoming: Mutex<mpsc::Receiver<Accepted>>,
    refused: Refused,
    /// Certificates of nodes that are not trusted any more.
    revoked: RwLock<HashSet<[u8; 32]>>,
    /// Ends the endpoint's thread when the last clone is gone.
    _alive: oneshot::Sender<()>,
}

impl Endpoint {
    /// Listens on `address` as `identity`.
    ///
    /// # Errors
    /// When the address is in use or not this machine's, or the identity is damaged.
    pub fn bind(
        address: SocketAddr,
        identity: Identity,
        admit: Admit,
        options: &TransportOptions,
    ) -> Result<Self> {
        Self::open(address, Some((identity, admit)), options, None)
    }

    /// As [`Endpoint::bind`], with a hook that disturbs the socket.
    ///
    /// # Errors
    /// As [`Endpoint::bind`].
    pub fn bind_disturbed(
        address: SocketAddr,
        identity: Identity,
        admit: Admit,
        options: &TransportOptions,
        interference: Interference,
    ) -> Result<Self> {
        Self::open(address, Some((identity, admit)), options, Some(interference))
    }

    /// An endpoint that only dials, with nothing but a token to show.
    ///
    /// # Errors
    /// When the machine gives no socket.
    pub fn dial_only(towards: SocketAddr, options: &TransportOptions) -> Result<Self> {
        Self::open(SocketAddr::new(local_ip(towards)?, 0), None, options, None)
    }

    fn open(
        address: SocketAddr,
        server: Option<(Identity, Admit)>,
        options: &TransportOptions,
        interference: Option<Interference>,
    ) -> Result<Self> {
        let loopback = address.ip().is_loopback();
        let transport = Arc::new(transport_config(loopback, options)?);
        let socket = udp_socket(address)?;
        let local = socket.local_addr().map_err(|e| bind_error(address, &e))?;
        let mut config = quinn::EndpointConfig::default();
        if loopback {
            config.max_udp_payload_size(LOOPBACK_DATAGRAM).map_err(Error::identity)?;
        }
        let (identity, admit) = server.unzip();
        let server = match identity.as_ref().zip(admit) {
            Some((identity, admit)) => {
                let mut server = tls::server(identity, admit)?;
                server.transport_config(Arc::clone(&transport));
                Some(server)
            }
            None => None,
        };
        let (alive, gone) = oneshot::channel::<()>();
        let (accepted, incoming) = mpsc::channel(INCOMING_MAX);
        let (opened, wait) = std::sync::mpsc::channel();
        let refused = Refused::default();
        let counting = Arc::clone(&refused);
        let start = move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            let _entered = runtime.enter();
            let here = Arc::new(quinn::TokioRuntime);
            let quinn = match interference {
                None => quinn::Endpoint::new(config, server, socket, here)?,
                Some(interference) => {
                    let socket = here.wrap_udp_socket(socket)?;
                    let disturbed = Arc::new(Disturbed { socket, interference });
                    quinn::Endpoint::new_with_abstract_socket(config, server, disturbed, here)?
                }
            };
            // The other end waits for exactly this.
            drop(opened.send(Ok((quinn.clone(), runtime.handle().clone()))));
            runtime.block_on(async {
                tokio::spawn(accept_all(quinn.clone(), accepted, counting));
                drop(gone.await);
                quinn.close(VarInt::from_u32(0), b"the process ends");
                // The last words leave the socket.
                drop(tokio::time::timeout(Duration::from_millis(200), quinn.wait_idle()).await);
            });
            Ok::<(), std::io::Error>(())
        };
        let failed = |error: &dyn std::fmt::Display| Error::Bind { address, reason: error.to_string() };
        std::thread::Builder::new()
            .name("quic".into())
            .spawn(move || {
                if let Err(error) = start() {
                    tracing::error!(%error, "the endpoint does not start");
                }
            })
            .map_err(|e| failed(&e))?;
        let started: std::result::Result<_, std::io::Error> =
            wait.recv().map_err(|_| failed(&"its thread did not start"))?;
        let (quinn, runtime) = started.map_err(|e| failed(&e))?;
        let shared = Shared {
            quinn,
            runtime,
            identity: RwLock::new(identity),
            admit,
            options: options.clone(),
            transport: RwLock::new(transport),
            local,
            incoming: Mutex::new(incoming),
            refused,
            revoked: RwLock::default(),
            _alive: alive,
        };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// How many connections, and frames that the caller counted, were turned away.
    #[must_use]
    pub fn refused(&self) -> u64 {
        self.shared.refused.load(Ordering::Relaxed)
    }

    /// [`Endpoint::refused`] for somebody who must not keep the endpoint open.
    pub fn counter(&self) -> impl Fn() -> u64 + Send + 'static {
        let refused = Arc::clone(&self.shared.refused);
        move || refused.load(Ordering::Relaxed)
    }

    /// Counts something that was turned away after its connection was let in.
    pub fn count_refused(&self) {
        self.shared.refused.fetch_add(1, Ordering::Relaxed);
    }

    /// The address that it listens on.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.shared.local
    }

    /// From now on a silent peer is gone after so many milliseconds, on links that are not made yet.
    ///
    /// # Errors
    /// When that is more than QUIC can count.
    pub fn set_idle_timeout(&self, idle_timeout_ms: u64) -> Result<()> {
        let keep_alive_ms = self.shared.options.keep_alive_ms.min((idle_timeout_ms / 6).max(1));
        let options = TransportOptions { keep_alive_ms, idle_timeout_ms };
        let transport = Arc::new(transport_config(self.shared.local.ip().is_loopback(), &options)?);
        *self.shared.transport.write().unwrap_or_else(PoisonError::into_inner) = transport;
        self.reload_server_config()
    }

    /// From now on this end shows another certificate, of the same authority; links that are made stay.
    ///
    /// # Errors
    /// When the identity is damaged, or another cluster's or name's.
    pub fn set_identity(&self, identity: Identity) -> Result<()> {
        let own = self.identity()?;
        if identity.ca != own.ca || identity.name() != own.name() {
            return Err(Error::identity(format!("{identity:?} cannot take the place of {own:?}")));
        }
        *self.shared.identity.write().unwrap_or_else(PoisonError::into_inner) = Some(identity);
        self.reload_server_config()
    }

    fn reload_server_config(&self) -> Result<()> {
        if let Some((identity, admit)) = self.identity().ok().zip(self.shared.admit) {
            let mut server = tls::server(&identity, admit)?;
            let transport = self.shared.transport.read().unwrap_or_else(PoisonError::into_inner);
            server.transport_config(Arc::clone(&transport));
            self.shared.quinn.set_server_config(Some(server));
        }
        Ok(())
    }

    /// The next one who wants in, or `None` when the endpoint is closed.
    pub async fn accept(&self) -> Option<Accepted> {
        self.shared.incoming.lock().await.recv().await
    }

    /// From now on links of these certificates are refused, either way.
    pub fn revoke(&self, fingerprints: impl IntoIterator<Item = [u8; 32]>) {
        self.shared.revoked.write().unwrap_or_else(PoisonError::into_inner).extend(fingerprints);
    }

    /// Whether a certificate is not trusted any more.
    #[must_use]
    pub fn is_revoked(&self, certificate: Option<[u8; 32]>) -> bool {
        let revoked = self.shared.revoked.read().unwrap_or_else(PoisonError::into_inner);
        certificate.is_some_and(|certificate| revoked.contains(&certificate))
    }

    /// The next node that links to this one; everybody else is refused.
    pub async fn next_peer(&self) -> Option<Link> {
        loop {
            let accepted = self.accept().await?;
            if let Some(link) = self.accept_peer(accepted).await {
                return Some(link);
            }
        }
    }

    /// Lets somebody in who is a node and trusted, and refuses everybody else.
    pub async fn accept_peer(&self, accepted: Accepted) -> Option<Link> {
        if !matches!(accepted.role, Role::Peer { .. }) {
            accepted.refuse("this is a node, not a supervisor").await;
            return None;
        }
        if self.is_revoked(accepted.certificate) {
            accepted.refuse("the certificate is not good any more").await;
            return None;
        }
        match accepted.welcome().await {
            Ok((link, sender, receiver)) => Some(link.with_control(sender, receiver)),
            Err(error) => {
                tracing::debug!(%error, "a peer went away");
                None
            }
        }
    }

    /// Closes all links and takes up no more; what waited to be taken up still is.
    pub fn close(&self, reason: &str) {
        self.shared.quinn.close(VarInt::from_u32(0), reason.as_bytes());
    }

    /// Links to the node `name` at `address`, which must prove the name.
    ///
    /// # Errors
    /// When it is not there, is another, or refuses.
    pub async fn connect(&self, address: SocketAddr, name: &str) -> Result<Link> {
        let own = self.own_name()?;
        let config = tls::client(&self.identity()?)?;
        let (connection, _, control) = self.dial(address, name, config, Role::Peer { name: own }).await?;
        let link = self.link(connection, name);
        if self.is_revoked(link.certificate()) {
            link.close("the certificate is not good any more");
            return Err(Error::Refused(format!("{name} is not trusted any more")));
        }
        Ok(link.with_control(control.0, control.1))
    }

    /// Links to the supervisor as a node; its certificate must prove that it is one.
    ///
    /// # Errors
    /// As [`Endpoint::connect`].
    pub async fn connect_supervisor(
        &self,
        address: SocketAddr,
    ) -> Result<(Link, ControlSender, ControlReceiver)> {
        let own = self.own_name()?;
        let config = tls::client(&self.identity()?)?;
        let (connection, _, control) =
            self.dial(address, SUPERVISOR, config, Role::Node { name: own }).await?;
        Ok((self.link(connection, SUPERVISOR), control.0, control.1))
    }

    /// A control stream to the supervisor as an operator.
    ///
    /// # Errors
    /// When it is not there, or the token is no good.
    pub async fn operate(
        &self,
        address: SocketAddr,
        token: &AccessToken,
    ) -> Result<(Link, ControlSender, ControlReceiver)> {
        let config = tls::pinned(token.fingerprint())?;
        let role = Role::Operator { token: token.reveal() };
        let (connection, _, control) = self.dial(address, SUPERVISOR, config, role).await?;
        Ok((self.link(connection, SUPERVISOR), control.0, control.1))
    }

    fn link(&self, connection: Connection, peer: &str) -> Link {
        let Shared { runtime, refused, .. } = &*self.shared;
        Link::new(connection, peer.to_owned(), runtime.clone(), Arc::clone(refused))
    }

    /// The identity that this end shows.
    ///
    /// # Errors
    /// When it has none: it only dials.
    pub fn identity(&self) -> Result<Identity> {
        let own = self.shared.identity.read().unwrap_or_else(PoisonError::into_inner).clone();
        own.ok_or_else(|| Error::identity("this endpoint has no certificate"))
    }

    fn own_name(&self) -> Result<String> {
        Ok(self.identity()?.name().to_owned())
    }

    async fn dial(
        &self,
        address: SocketAddr,
        name: &str,
        config: quinn::ClientConfig,
        role: Role,
    ) -> Result<(Connection, Answer, (ControlSender, ControlReceiver))> {
        self.dial_as(address, name, config, role, PROTOCOL).await
    }

    pub(crate) async fn dial_as(
        &self,
        address: SocketAddr,
        name: &str,
        mut config: quinn::ClientConfig,
        role: Role,
        protocol: u16,
    ) -> Result<(Connection, Answer, (ControlSender, ControlReceiver))> {
        let transport = Arc::clone(&self.shared.transport.read().unwrap_or_else(PoisonError::into_inner));
        config.transport_config(transport);
        let (quinn, dns, peer) = (self.shared.quinn.clone(), dns_name(name), format!("{name} at {address}"));
        // On the endpoint's runtime: a connection's driver runs where it was opened.
        let work = self.shared.runtime.spawn(async move {
            let broken = |error: &dyn std::fmt::Display| Error::connection(peer.clone(), error);
            let connecting = quinn.connect_with(config, address, &dns).map_err(|e| broken(&e))?;
            let connection = match tokio::time::timeout(HANDSHAKE_MAX, connecting).await {
                Ok(connected) => connected.map_err(|e| broken(&e))?,
                Err(_) => return Err(broken(&format!("no answer within {HANDSHAKE_MAX:?}"))),
            };
            let (mut send, mut receive) = connection.open_bi().await.map_err(|e| broken(&e))?;
            // The stream is young; a closed one shows at the first write.
            let _ = send.set_priority(CONTROL_PRIORITY);
            let answer = greet(&mut send, &mut receive, &role, protocol).await?;
            Ok((connection, answer, (ControlSender::new(send), ControlReceiver::new(receive))))
        });
        work.await.unwrap_or_else(|error| Err(Error::connection(name, error)))
    }
}

/// Exchanges a token and a key made here for an identity.
///
/// # Errors
/// When the supervisor is not there, is another cluster's, or refuses.
pub async fn join(
    address: SocketAddr,
    token: &AccessToken,
    name: Option<String>,
    options: &TransportOptions,
) -> Result<Identity> {
    let endpoint = Endpoint::dial_only(address, options)?;
    let request = KeyRequest::new()?;
    let role = Role::Join { token: token.reveal(), request: request.der().to_vec(), name };
    let config = tls::pinned(token.fingerprint())?;
    match endpoint.dial(address, SUPERVISOR, config, role).await? {
        (_, Answer::Certificate { name, certificate, ca, lifetime }, _) => {
            Ok(request.into_identity(&name, Issued { certificate, lifetime }, ca))
        }
        _ => Err(Error::malformed("handshake", "the supervisor gave no certificate")),
    }
}

#[cfg(test)]
#[path = "endpoint_tests.rs"]
mod tests;
