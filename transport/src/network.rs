//! The network of a process, on which its endpoints are bound: QUIC over UDP in production, `memory` in
//! tests.

use crate::Interference;
use crate::accept::{Accepted, RefusedCount};
use crate::access_token::AccessToken;
use crate::endpoint::Endpoint;
use crate::error::{Error, Result};
use crate::handshake::{Answer, PROTOCOL, PeerRole};
use crate::identity::{Identity, IssuedCertificate, KeyRequest, SUPERVISOR};
use crate::options::TransportOptions;
use crate::quic::Quic;
use crate::tls::ClientAuth;
use crate::wire::{BoxFuture, Control, Wire};
use std::fmt::Debug;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

/// A network on which endpoints are bound. Clones are handles of the same network.
///
/// A node joins and binds; a supervisor binds; an operator dials:
///
/// ```
/// # use std::time::Duration;
/// # use volary_transport::{Authority, ClientAuth, Network, TransportOptions};
/// # use volary_transport::loopback::probe_frame;
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> volary_transport::Result<()> {
/// let (network, options) = (Network::quic(), TransportOptions::default());
/// let authority = Authority::create()?;
/// let bind = |name: &str| {
///     network.bind(([127, 0, 0, 1], 0).into(), authority.identity(name)?, ClientAuth::Required, &options)
/// };
/// let (left, right) = (bind("left")?, bind("right")?);
/// let accepting = right.clone();
/// let accepted = tokio::spawn(async move { accepting.next_peer().await });
/// let link = left.connect(right.local_addr(), "right").await?;
/// let other = accepted.await.ok().flatten().expect("a link");
/// assert_eq!((link.peer(), other.peer()), ("right", "left"));
///
/// let mut inbound = other.serve();
/// link.send(probe_frame(1_000)).await?;
/// assert_eq!(inbound.next().await.map(|inbound| inbound.frame), Some(probe_frame(1_000)));
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Network(Arc<dyn Backend>);

impl Network {
    /// QUIC over UDP.
    #[must_use]
    pub fn quic() -> Self {
        Self::new(Quic::default())
    }

    /// QUIC over UDP sockets with fault injection, for tests.
    #[must_use]
    pub fn quic_with_interference(interference: Interference) -> Self {
        Self::new(Quic { interference: Some(interference) })
    }

    pub(crate) fn new(backend: impl Backend + 'static) -> Self {
        Self(Arc::new(backend))
    }

    /// Listens on `address` as `identity`; port 0 is any free port.
    ///
    /// # Errors
    /// [`Error::Bind`] when the address is in use or not one of this machine, [`Error::Identity`] when the
    /// identity is damaged.
    pub fn bind(
        &self,
        address: SocketAddr,
        identity: Identity,
        clients: ClientAuth,
        options: &TransportOptions,
    ) -> Result<Endpoint> {
        Endpoint::open(&*self.0, address, Some((identity, clients)), options)
    }

    /// An endpoint without an identity, which only dials: for [`Endpoint::operate`].
    ///
    /// # Errors
    /// [`Error::Bind`] when the machine has no free port, [`Error::Connection`] when it has no route to
    /// `towards`.
    pub fn dial_only(&self, towards: SocketAddr, options: &TransportOptions) -> Result<Endpoint> {
        Endpoint::open(&*self.0, SocketAddr::new(self.local_ip(towards)?, 0), None, options)
    }

    /// Exchanges an access token and a new key for an identity, under the preferred `name` if there is one.
    ///
    /// # Errors
    /// [`Error::Connection`] when the supervisor is unreachable or belongs to another cluster,
    /// [`Error::Refused`] when it refuses the token or the name.
    pub async fn join(
        &self,
        address: SocketAddr,
        token: &AccessToken,
        name: Option<String>,
        options: &TransportOptions,
    ) -> Result<Identity> {
        let endpoint = self.dial_only(address, options)?;
        let request = KeyRequest::new()?;
        let role = PeerRole::Join { token: token.reveal(), request: request.der().to_vec(), name };
        let credential = Credential::Pinned(token.fingerprint());
        match endpoint.dial(address, SUPERVISOR, credential, role).await?.answer {
            Answer::Certificate { name, certificate, ca, lifetime } => {
                Ok(request.into_identity(&name, IssuedCertificate { certificate, lifetime }, ca))
            }
            _ => Err(Error::malformed("handshake", "the supervisor issued no certificate")),
        }
    }

    /// This machine's address on the route to `towards`.
    ///
    /// # Errors
    /// [`Error::Connection`] when there is no route.
    pub fn local_ip(&self, towards: SocketAddr) -> Result<IpAddr> {
        self.0.local_ip(towards)
    }
}

/// Opens sockets.
pub(crate) trait Backend: Debug + Send + Sync {
    fn open(&self, args: SocketArgs<'_>) -> Result<Arc<dyn Socket>>;

    fn local_ip(&self, towards: SocketAddr) -> Result<IpAddr>;
}

pub(crate) struct SocketArgs<'a> {
    pub(crate) address: SocketAddr,
    /// `None` for a socket that only dials.
    pub(crate) server: Option<(Identity, ClientAuth)>,
    pub(crate) options: &'a TransportOptions,
    pub(crate) refused: RefusedCount,
}

/// The lower half of an endpoint: dials, and accepts the handshakes of others. It closes when it is dropped.
pub(crate) trait Socket: Debug + Send + Sync {
    fn local_addr(&self) -> SocketAddr;

    /// Connects and exchanges the greeting.
    fn dial(&self, dial: Dial) -> BoxFuture<'_, Result<Dialed>>;

    /// The next connection whose greeting is valid, or `None` when the socket is closed.
    fn accept(&self) -> BoxFuture<'_, Option<Accepted>>;

    /// Changes the identity and the options of future connections.
    fn configure(&self, server: Option<(Identity, ClientAuth)>, options: &TransportOptions) -> Result<()>;

    /// Closes all connections; connections that wait in [`Socket::accept`] are still returned.
    fn close(&self, reason: &str);
}

/// A connection to make.
#[derive(Debug)]
pub(crate) struct Dial {
    pub(crate) address: SocketAddr,
    /// The peer's name, which its certificate must prove.
    pub(crate) name: String,
    pub(crate) credential: Credential,
    pub(crate) role: PeerRole,
    pub(crate) protocol: u16,
}

impl Dial {
    pub(crate) fn new(address: SocketAddr, name: &str, credential: Credential, role: PeerRole) -> Self {
        Self { address, name: name.to_owned(), credential, role, protocol: PROTOCOL }
    }

    /// The peer in errors.
    pub(crate) fn peer(&self) -> String {
        format!("{} at {}", self.name, self.address)
    }
}

/// How both ends trust each other.
#[derive(Debug)]
pub(crate) enum Credential {
    /// The dialer presents its certificate; the peer's must be of the same authority.
    Certificate(Identity),
    /// The dialer presents no certificate; the peer's must be of the authority with this fingerprint.
    Pinned([u8; 32]),
}

/// A new connection, after its greeting.
#[derive(Debug)]
pub(crate) struct Dialed {
    pub(crate) wire: Arc<dyn Wire>,
    pub(crate) answer: Answer,
    pub(crate) control: Control,
}

/// [`Network::join`] over QUIC.
///
/// # Errors
/// As [`Network::join`].
pub async fn join(
    address: SocketAddr,
    token: &AccessToken,
    name: Option<String>,
    options: &TransportOptions,
) -> Result<Identity> {
    Network::quic().join(address, token, name, options).await
}
