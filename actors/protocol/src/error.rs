//! What can be wrong with a frame.

use volary_core::compute::ComputeError;
use volary_transport::FrameKind;

/// An error of encoding or decoding a frame.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// The header cannot be encoded.
    #[error("cannot encode the header of a {kind:?} frame: {reason}")]
    Encode {
        /// The frame's kind.
        kind: FrameKind,
        /// What the encoder said.
        reason: String,
    },
    /// The header or the parts are not what the kind asks for.
    #[error("malformed {kind:?} frame: {reason}")]
    Malformed {
        /// The frame's kind.
        kind: FrameKind,
        /// What was found, and what was expected.
        reason: String,
    },
    /// The tensor library does not take the parts.
    #[error(transparent)]
    Compute(#[from] ComputeError),
}

impl Error {
    pub(crate) fn malformed(kind: FrameKind, reason: impl Into<String>) -> Self {
        Self::Malformed { kind, reason: reason.into() }
    }
}

/// The result of encoding or decoding a frame.
pub type Result<T> = std::result::Result<T, Error>;
