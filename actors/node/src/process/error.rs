//! Why a node process does not start, or cannot reach its supervisor.

use std::fmt;
use volary_core::compute::ComputeError;
use volary_transport::RefusalCode;

/// An error of a node process as a whole.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// The network, or a refusal.
    #[error(transparent)]
    Transport(#[from] volary_transport::Error),
    /// The device cannot take the model.
    #[error("the device: {0}")]
    Compute(#[from] ComputeError),
    /// A thread or an actor does not start.
    #[error("{what} does not start: {reason}")]
    Start {
        /// Which.
        what: &'static str,
        /// The error.
        reason: String,
    },
    /// The agent died.
    #[error("the node's agent died")]
    AgentDied,
    /// The supervisor's name has no address.
    #[error("the supervisor has no address")]
    NoAddress,
    /// A live process has the node's name.
    #[error("a live node has this name; choose another one")]
    NameInUse,
    /// The supervisor answered and did not describe the run.
    #[error("the supervisor did not send its welcome")]
    NoWelcome,
    /// The supervisor's description of the run cannot be read.
    #[error("the supervisor's description of the run: {0}")]
    RunInfo(serde_json::Error),
    /// The supervisor released the node before it had welcomed it.
    #[error("{0}")]
    Released(String),
}

impl ProcessError {
    pub(super) fn start(what: &'static str, reason: impl fmt::Display) -> Self {
        Self::Start { what, reason: reason.to_string() }
    }

    /// The code of a refusal.
    fn refusal(&self) -> Option<RefusalCode> {
        match self {
            Self::Transport(error) => error.refusal_code(),
            _ => None,
        }
    }

    /// Whether the supervisor does not accept this node's certificate any more, so that it may join again
    /// with its token.
    pub(super) fn needs_rejoin(&self) -> bool {
        matches!(
            self.refusal(),
            Some(
                RefusalCode::CertificateRevoked
                    | RefusalCode::CertificateUnknown
                    | RefusalCode::CertificateExpired
            )
        )
    }

    /// Whether another node has the name: a live one, or an earlier process that is not yet known to be gone.
    pub(super) fn is_name_in_use(&self) -> bool {
        matches!(self, Self::NameInUse) || self.refusal() == Some(RefusalCode::NameInUse)
    }

    /// Whether the supervisor is starting.
    pub(super) fn is_starting(&self) -> bool {
        self.refusal() == Some(RefusalCode::Starting)
    }

    /// Whether another attempt may succeed: everything that is no definite answer. A handshake that takes too
    /// long or breaks off is none.
    pub(super) fn is_transient(&self) -> bool {
        use volary_transport::Error::{Connection, Malformed};
        match self {
            Self::NameInUse | Self::NoWelcome => true,
            Self::Transport(Connection { .. } | Malformed { .. }) => true,
            _ => self.is_starting(),
        }
    }

    /// Whether a first attempt to join may succeed later: the supervisor does not listen yet, or does not
    /// know yet that an earlier process of this name is gone.
    pub(super) fn is_early(&self) -> bool {
        self.is_transient() || self.is_name_in_use()
    }
}
