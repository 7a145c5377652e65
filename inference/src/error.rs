//! The errors of the inference crate.

use crate::limits::{STOP_STRINGS, WAITING_REQUESTS};
use std::io;
use std::path::PathBuf;

/// The result of the inference crate's functions.
pub type Result<T> = std::result::Result<T, Error>;

/// An error of the inference crate.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A thread for the model cannot be started.
    #[error("a thread for the model: {0}")]
    Thread(std::io::Error),
    /// A thread of the model has ended.
    #[error("a thread of the model has ended")]
    ThreadEnded,
    /// The model failed or refused its input.
    #[error(transparent)]
    Model(#[from] volary_model::Error),
    /// The tokenizer failed.
    #[error(transparent)]
    Tokenizer(#[from] volary_data::Error),
    /// Too many requests wait.
    #[error("{WAITING_REQUESTS} requests are waiting: try again later")]
    Busy,
    /// More strings that end a text than the bound.
    #[error("{found} stop strings: expected at most {STOP_STRINGS}, none of them empty")]
    StopStrings {
        /// The number of strings.
        found: usize,
    },
    /// A file or folder of tasks cannot be read.
    #[error("cannot read {path}: {source}", path = path.display())]
    Read {
        /// The file or folder.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },
    /// A record of a task file is not what its task needs.
    #[error("{path}:{line}: {reason}", path = path.display())]
    Record {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// The difference.
        reason: String,
    },
    /// A path without tasks.
    #[error("{path}: {reason}", path = path.display())]
    NoTask {
        /// The file or folder.
        path: PathBuf,
        /// What is missing.
        reason: String,
    },
}
