//! What can go wrong on the way to a peer.

use crate::access_token::AccessTokenError;
use std::net::SocketAddr;

/// An error of the transport.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The address cannot be listened on.
    #[error("address {address} cannot be listened on: {reason}")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// Why: in use, not this machine's.
        reason: String,
    },
    /// The peer did not answer, or the connection broke.
    #[error("{peer}: {reason}")]
    Connection {
        /// Which peer.
        peer: String,
        /// What happened.
        reason: String,
    },
    /// The peer said no.
    #[error("refused: {0}")]
    Refused(String),
    /// What the peer sent is no frame or message of ours.
    #[error("malformed {what}: {reason}")]
    Malformed {
        /// Frame, message or handshake.
        what: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// A certificate or key cannot be made, read or used.
    #[error("identity: {0}")]
    Identity(String),
    /// A token is no good.
    #[error(transparent)]
    AccessToken(#[from] AccessTokenError),
}

impl Error {
    pub(crate) fn malformed(what: &'static str, reason: impl Into<String>) -> Self {
        Self::Malformed { what, reason: reason.into() }
    }

    pub(crate) fn connection(peer: impl Into<String>, reason: impl ToString) -> Self {
        Self::Connection { peer: peer.into(), reason: reason.to_string() }
    }

    pub(crate) fn identity(reason: impl ToString) -> Self {
        Self::Identity(reason.to_string())
    }
}

/// The result of the transport's functions.
pub type Result<T> = std::result::Result<T, Error>;
