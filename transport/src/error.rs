//! Errors of the transport.

use crate::access_token::AccessTokenError;
use crate::refusal::{Refusal, RefusalCode};
use std::net::SocketAddr;

/// An error of the transport.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The endpoint cannot bind its address.
    #[error("cannot listen on {address}: {reason}")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// The reason, e.g. that it is in use or not an address of this machine.
        reason: String,
    },
    /// The peer did not answer, or the connection broke.
    #[error("{peer}: {reason}")]
    Connection {
        /// The peer.
        peer: String,
        /// The reason.
        reason: String,
    },
    /// The peer refused the connection.
    #[error("refused: {reason}")]
    Refused {
        /// For programs.
        code: RefusalCode,
        /// For people.
        reason: String,
    },
    /// The peer's bytes are not a valid frame, message or handshake.
    #[error("malformed {what}: {reason}")]
    Malformed {
        /// Frame, message or handshake.
        what: &'static str,
        /// The reason.
        reason: String,
    },
    /// A certificate or key cannot be created, read or used.
    #[error("identity: {0}")]
    Identity(String),
    /// A frame of this process is over a bound, or its parts contradict their shapes, and it is not sent.
    #[error("frame not sent: {0}")]
    TooLarge(String),
    /// An access token is invalid.
    #[error(transparent)]
    AccessToken(#[from] AccessTokenError),
}

impl Error {
    pub(crate) fn malformed(what: &'static str, reason: impl Into<String>) -> Self {
        Self::Malformed { what, reason: reason.into() }
    }

    pub(crate) fn too_large(reason: impl Into<String>) -> Self {
        Self::TooLarge(reason.into())
    }

    /// An error of the connection to `peer`.
    pub fn connection(peer: impl Into<String>, reason: impl ToString) -> Self {
        Self::Connection { peer: peer.into(), reason: reason.to_string() }
    }

    pub(crate) fn identity(reason: impl ToString) -> Self {
        Self::Identity(reason.to_string())
    }

    /// The code of a refusal; `None` for every other error.
    #[must_use]
    pub fn refusal_code(&self) -> Option<RefusalCode> {
        match self {
            Self::Refused { code, .. } => Some(*code),
            _ => None,
        }
    }
}

impl From<Refusal> for Error {
    fn from(Refusal { reason, code }: Refusal) -> Self {
        Self::Refused { code, reason }
    }
}

/// The result of the transport's functions.
pub type Result<T> = std::result::Result<T, Error>;
