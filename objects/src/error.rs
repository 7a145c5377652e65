//! The errors of the objects crate.

use std::io;
use std::path::PathBuf;

/// The result of the objects crate's functions.
pub type Result<T> = std::result::Result<T, Error>;

/// An error of the objects crate.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A text that is no address.
    #[error(
        "{text:?}: expected s3://, gs://, az:// or file://, with a bucket and a path, or http(s)://: {reason}"
    )]
    Address {
        /// The text.
        text: String,
        /// What is wrong.
        reason: String,
    },
    /// A store cannot be set up from the environment.
    #[error("{location}: {source}")]
    Setup {
        /// The address.
        location: String,
        /// The reason.
        source: Box<object_store::Error>,
    },
    /// A request has failed, and so have its repetitions.
    #[error("{object}: {reason}")]
    Request {
        /// The address of the object or folder.
        object: String,
        /// The reason, in one line.
        reason: String,
        /// Whether the store says that there is no such thing.
        is_missing: bool,
    },
    /// An object is larger than expected.
    #[error("{object}: it has {bytes} bytes, expected at most {most}")]
    Large {
        /// The address of the object.
        object: String,
        /// Its size in bytes.
        bytes: u64,
        /// The largest expected size.
        most: u64,
    },
    /// A local file cannot be read or written.
    #[error("{path}: {source}", path = path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },
}

impl Error {
    /// Whether the store says that there is no such object.
    #[must_use]
    pub fn is_missing(&self) -> bool {
        matches!(self, Self::Request { is_missing: true, .. })
    }

    /// A failed request, with the reason in one line: stores answer with documents.
    pub(crate) fn request(object: String, error: &object_store::Error) -> Self {
        use object_store::Error::{NotFound, PermissionDenied, Unauthenticated};
        let is_missing = matches!(error, NotFound { .. });
        let summary = match error {
            NotFound { .. } => "there is no such object or bucket: ",
            PermissionDenied { .. } => "the store refuses access: ",
            Unauthenticated { .. } => "the store does not accept the credentials: ",
            _ => "",
        };
        let text = std::iter::successors(Some(error as &dyn std::error::Error), |error| error.source())
            .map(ToString::to_string)
            .reduce(|all, cause| if all.contains(&cause) { all } else { format!("{all}: {cause}") });
        let words: Vec<&str> = text.as_deref().unwrap_or_default().split_whitespace().collect();
        Self::Request { object, reason: format!("{summary}{}", words.join(" ")), is_missing }
    }
}
