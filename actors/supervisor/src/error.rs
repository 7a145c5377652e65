//! What ends a supervisor, or keeps it from starting.

use crate::credentials::CredentialError;
use std::fmt;
use std::path::PathBuf;

/// An error of the supervisor.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The network.
    #[error(transparent)]
    Transport(#[from] volary_transport::Error),
    /// The run's state on disk.
    #[error(transparent)]
    Storage(#[from] volary_storage::Error),
    /// The newest checkpoint is damaged, and no operator has allowed the run to go back past it.
    #[error(
        "the checkpoint of step {step} is damaged: {damage}; repair it, or start again with --go-back to set it \
         aside and go back to the one before it"
    )]
    DamagedCheckpoint {
        /// The checkpoint's step.
        step: volary_core::Step,
        /// What is damaged.
        damage: volary_storage::Error,
    },
    /// Access tokens and certificates.
    #[error(transparent)]
    Credentials(#[from] CredentialError),
    /// A token batch cannot be read.
    #[error("tokens of step {step}, lane {lane}: {source}")]
    Tokens {
        /// The step.
        step: volary_core::Step,
        /// The lane.
        lane: volary_core::Lane,
        /// The reason.
        source: Box<volary_data::Error>,
    },
    /// The prepared data cannot be read.
    #[error(transparent)]
    Data(#[from] volary_data::Error),
    /// A file that the options name cannot be used.
    #[error("{}: {reason}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The reason.
        reason: String,
    },
    /// A thread or an actor does not start.
    #[error("{what} does not start: {reason}")]
    Start {
        /// Which.
        what: &'static str,
        /// The error.
        reason: String,
    },
    /// Blocking work was lost.
    #[error("disk work did not end: {0}")]
    Blocking(#[from] tokio::task::JoinError),
    /// A message cannot be encoded.
    #[error("the run's description: {0}")]
    Encode(#[from] serde_json::Error),
}

impl Error {
    pub(crate) fn start(what: &'static str, reason: impl fmt::Display) -> Self {
        Self::Start { what, reason: reason.to_string() }
    }
}

/// The result of the supervisor's operations.
pub type Result<T> = std::result::Result<T, Error>;
