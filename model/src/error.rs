//! What can go wrong in the model crate.

use volary_core::ShardId;
use volary_core::compute::ComputeError;

/// An error of the model crate.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// libtorch refused.
    #[error("libtorch: {}", first_line(.0))]
    Torch(#[from] tch::TchError),
    /// A stored shard cannot be read.
    #[error("stored shard: {0}")]
    SafeTensors(#[from] safetensors::SafeTensorError),
    /// A stored shard's header cannot be written.
    #[error("stored shard's header: {0}")]
    Header(#[from] serde_json::Error),
    /// A stored shard does not fit the model.
    #[error("the stored {shard} does not fit: {reason}")]
    Stored {
        /// The shard.
        shard: ShardId,
        /// What does not fit.
        reason: String,
    },
    /// Input that a caller must not give.
    #[error("{0}")]
    Input(String),
    /// A device that is not there.
    #[error("device {name}: {reason}")]
    Device {
        /// What was asked for.
        name: String,
        /// Why it cannot be had.
        reason: String,
    },
}

/// libtorch's messages carry a whole C++ stack; people need its first line.
fn first_line(error: &tch::TchError) -> String {
    error.to_string().lines().next().unwrap_or_default().to_owned()
}

impl From<Error> for ComputeError {
    fn from(error: Error) -> Self {
        Self(error.to_string())
    }
}

/// The result of the model crate's functions.
pub type Result<T> = std::result::Result<T, Error>;
