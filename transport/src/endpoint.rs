//! An endpoint: the identity of a process, its admission of peers, and its links, over the socket of a
//! [`crate::Network`].

use crate::accept::{Accepted, RefusedCount};
use crate::access_token::AccessToken;
use crate::control::{ControlReceiver, ControlSender};
use crate::error::{Error, Result};
use crate::handshake::PeerRole;
use crate::identity::{Identity, SUPERVISOR};
use crate::limits::KEEP_ALIVES_PER_IDLE_TIMEOUT;
use crate::link::Link;
use crate::network::{Backend, Credential, Dial, Dialed, Network, Socket, SocketArgs};
use crate::options::TransportOptions;
use crate::refusal::{Refusal, RefusalCode};
use crate::tls::ClientAuth;
use parking_lot::RwLock;
use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;

const REVOKED: &str = "the certificate is revoked";

/// One socket and its links. Clones are handles of the same endpoint; it closes when the last of them is
/// dropped.
#[derive(Clone, Debug)]
pub struct Endpoint {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    socket: Arc<dyn Socket>,
    config: RwLock<Config>,
    clients: Option<ClientAuth>,
    /// Of the options at the start.
    keep_alive_ms: u64,
    refused: RefusedCount,
    revoked: RwLock<HashSet<[u8; 32]>>,
}

#[derive(Debug)]
struct Config {
    identity: Option<Identity>,
    options: TransportOptions,
}

impl Endpoint {
    /// [`Network::bind`] over QUIC.
    ///
    /// # Errors
    /// As [`Network::bind`].
    pub fn bind(
        address: SocketAddr,
        identity: Identity,
        clients: ClientAuth,
        options: &TransportOptions,
    ) -> Result<Self> {
        Network::quic().bind(address, identity, clients, options)
    }

    /// [`Network::dial_only`] over QUIC.
    ///
    /// # Errors
    /// As [`Network::dial_only`].
    pub fn dial_only(towards: SocketAddr, options: &TransportOptions) -> Result<Self> {
        Network::quic().dial_only(towards, options)
    }

    pub(crate) fn open(
        backend: &dyn Backend,
        address: SocketAddr,
        server: Option<(Identity, ClientAuth)>,
        options: &TransportOptions,
    ) -> Result<Self> {
        let refused = RefusedCount::default();
        let args = SocketArgs { address, server: server.clone(), options, refused: Arc::clone(&refused) };
        let socket = backend.open(args)?;
        let (identity, clients) = server.unzip();
        let shared = Shared {
            socket,
            config: RwLock::new(Config { identity, options: options.clone() }),
            clients,
            keep_alive_ms: options.keep_alive_ms,
            refused,
            revoked: RwLock::default(),
        };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// The number of refused connections, and of refused frames that the caller has counted.
    #[must_use]
    pub fn refused(&self) -> u64 {
        self.shared.refused.load(Ordering::Relaxed)
    }

    /// [`Endpoint::refused`] for a caller that must not keep the endpoint open.
    pub fn refused_counter(&self) -> impl Fn() -> u64 + Send + 'static {
        let refused = Arc::clone(&self.shared.refused);
        move || refused.load(Ordering::Relaxed)
    }

    /// Counts a refusal on an admitted connection.
    pub fn count_refused(&self) {
        self.shared.refused.fetch_add(1, Ordering::Relaxed);
    }

    /// The address on which the endpoint listens.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.shared.socket.local_addr()
    }

    /// Changes the idle timeout of future links, in milliseconds. Existing links keep theirs.
    ///
    /// # Errors
    /// [`Error::Identity`] when the timeout is out of QUIC's range.
    pub fn set_idle_timeout(&self, idle_timeout_ms: u64) -> Result<()> {
        let keep_alive_max_ms = (idle_timeout_ms / KEEP_ALIVES_PER_IDLE_TIMEOUT).max(1);
        let keep_alive_ms = self.shared.keep_alive_ms.min(keep_alive_max_ms);
        let mut config = self.shared.config.write();
        let options = TransportOptions { keep_alive_ms, idle_timeout_ms };
        self.shared.socket.configure(self.server(config.identity.as_ref()), &options)?;
        config.options = options;
        Ok(())
    }

    /// Replaces the certificate, for future links, by another one of the same authority and name.
    ///
    /// # Errors
    /// [`Error::Identity`] when the identity is damaged, or has another authority or name.
    pub fn set_identity(&self, identity: Identity) -> Result<()> {
        let mut config = self.shared.config.write();
        let current = config.identity.as_ref().ok_or_else(no_identity)?;
        if identity.ca != current.ca || identity.name() != current.name() {
            return Err(Error::identity(format!("{identity:?} cannot replace {current:?}")));
        }
        self.shared.socket.configure(self.server(Some(&identity)), &config.options)?;
        config.identity = Some(identity);
        Ok(())
    }

    fn server(&self, identity: Option<&Identity>) -> Option<(Identity, ClientAuth)> {
        identity.cloned().zip(self.shared.clients)
    }

    /// The identity that this endpoint presents.
    ///
    /// # Errors
    /// [`Error::Identity`] when the endpoint only dials.
    pub fn identity(&self) -> Result<Identity> {
        self.shared.config.read().identity.clone().ok_or_else(no_identity)
    }

    /// The next connection that asks for admission, or `None` when the endpoint is closed.
    pub async fn accept(&self) -> Option<Accepted> {
        self.shared.socket.accept().await
    }

    /// Revokes certificates, by their SHA-256 hashes: [`Endpoint::accept_peer`] and [`Endpoint::connect`]
    /// refuse their holders from now on. Existing links stay.
    pub fn revoke(&self, fingerprints: impl IntoIterator<Item = [u8; 32]>) {
        self.shared.revoked.write().extend(fingerprints);
    }

    /// Whether a certificate is revoked.
    #[must_use]
    pub fn is_revoked(&self, certificate: Option<[u8; 32]>) -> bool {
        certificate.is_some_and(|certificate| self.shared.revoked.read().contains(&certificate))
    }

    /// The next link from another node, or `None` when the endpoint is closed; all other connections are
    /// refused.
    pub async fn next_peer(&self) -> Option<Link> {
        loop {
            let accepted = self.accept().await?;
            if let Some(link) = self.accept_peer(accepted).await {
                return Some(link);
            }
        }
    }

    /// Admits a node whose certificate is not revoked, and refuses all other connections.
    pub async fn accept_peer(&self, accepted: Accepted) -> Option<Link> {
        if !matches!(accepted.role, PeerRole::Peer { .. }) {
            let reason = "this is a node, not a supervisor";
            accepted.refuse(Refusal::new(RefusalCode::NotASupervisor, reason)).await;
            return None;
        }
        if self.is_revoked(accepted.certificate) {
            accepted.refuse(Refusal::new(RefusalCode::CertificateRevoked, REVOKED)).await;
            return None;
        }
        match accepted.welcome().await {
            Ok((link, sender, receiver)) => Some(link.with_control(sender, receiver)),
            Err(error) => {
                tracing::debug!(%error, "a peer disconnected during its handshake");
                None
            }
        }
    }

    /// Closes all links and accepts no more; connections that wait in [`Endpoint::accept`] are still
    /// returned.
    pub fn close(&self, reason: &str) {
        self.shared.socket.close(reason);
    }

    /// Connects to the node `name` at `address`, which must prove its name.
    ///
    /// # Errors
    /// [`Error::Connection`] when it is unreachable or does not prove its name, [`Error::Refused`] when it
    /// refuses, or when its certificate is revoked.
    pub async fn connect(&self, address: SocketAddr, name: &str) -> Result<Link> {
        let identity = self.identity()?;
        let role = PeerRole::Peer { name: identity.name().to_owned() };
        let dialed = self.dial(address, name, Credential::Certificate(identity), role).await?;
        let (link, sender, receiver) = admitted(dialed, name);
        if self.is_revoked(link.certificate()) {
            let refusal = Refusal::new(RefusalCode::CertificateRevoked, REVOKED);
            link.refuse(&refusal);
            let reason = format!("the certificate of {name} is revoked");
            return Err(Error::Refused { code: refusal.code, reason });
        }
        Ok(link.with_control(sender, receiver))
    }

    /// Connects to the supervisor as a node; its certificate must prove that it is the supervisor.
    ///
    /// # Errors
    /// As [`Endpoint::connect`].
    pub async fn connect_supervisor(
        &self,
        address: SocketAddr,
    ) -> Result<(Link, ControlSender, ControlReceiver)> {
        let identity = self.identity()?;
        let role = PeerRole::Node { name: identity.name().to_owned() };
        let dialed = self.dial(address, SUPERVISOR, Credential::Certificate(identity), role).await?;
        Ok(admitted(dialed, SUPERVISOR))
    }

    /// Connects to the supervisor as an operator.
    ///
    /// # Errors
    /// [`Error::Connection`] when it is unreachable or belongs to another cluster, [`Error::Refused`] when it
    /// refuses the access token.
    pub async fn operate(
        &self,
        address: SocketAddr,
        token: &AccessToken,
    ) -> Result<(Link, ControlSender, ControlReceiver)> {
        let role = PeerRole::Operator { token: token.reveal() };
        let credential = Credential::Pinned(token.fingerprint());
        let dialed = self.dial(address, SUPERVISOR, credential, role).await?;
        Ok(admitted(dialed, SUPERVISOR))
    }

    pub(crate) async fn dial(
        &self,
        address: SocketAddr,
        name: &str,
        credential: Credential,
        role: PeerRole,
    ) -> Result<Dialed> {
        self.shared.socket.dial(Dial::new(address, name, credential, role)).await
    }
}

fn no_identity() -> Error {
    Error::identity("this endpoint has no certificate")
}

fn admitted(dialed: Dialed, peer: &str) -> (Link, ControlSender, ControlReceiver) {
    let (sender, receiver) = dialed.control;
    (Link::new(dialed.wire, peer.to_owned()), sender, receiver)
}
