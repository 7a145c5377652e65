//! The errors of the model crate.

use std::error::Error as StdError;
use tch::Kind;
use volary_core::ShardId;
use volary_core::compute::ComputeError;

/// An error of the model crate.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// libtorch failed: no memory, or shapes that do not match.
    #[error("libtorch: {}", first_line(.0))]
    Torch(#[from] tch::TchError),
    /// A step has the factors of another optimizer.
    #[error("the step has the factors of another optimizer")]
    Moments,
    /// A stored shard is not valid safetensors.
    #[error("stored shard: {0}")]
    SafeTensors(#[from] safetensors::SafeTensorError),
    /// The header of a stored shard cannot be written.
    #[error("header of a stored shard: {0}")]
    Header(#[from] serde_json::Error),
    /// A stored shard cannot be read.
    #[error("cannot read the stored {shard}: {source}")]
    Fetch {
        /// The shard.
        shard: ShardId,
        /// The error of the store.
        source: Box<dyn StdError + Send + Sync>,
    },
    /// A stored shard does not fit the model.
    #[error("the stored {shard} does not fit: {reason}")]
    Stored {
        /// The shard.
        shard: ShardId,
        /// The difference.
        reason: String,
    },
    /// A number of token ids that is not a multiple of a row.
    #[error("expected a multiple of {row} tokens (sequence_length + 1), got {found}")]
    TokenCount {
        /// The length of a row: `sequence_length + 1`.
        row: usize,
        /// The number of ids.
        found: usize,
    },
    /// A token id that the model does not have.
    #[error("token {id} is outside the model's vocabulary of {vocabulary}")]
    Vocabulary {
        /// The id.
        id: u32,
        /// The size of the vocabulary.
        vocabulary: usize,
    },
    /// A prompt without tokens.
    #[error("the prompt is empty")]
    EmptyPrompt,
    /// More tokens than a sequence may have.
    #[error("{found} tokens are more than the model's context of {context}")]
    Context {
        /// The longest sequence.
        context: usize,
        /// The number of tokens.
        found: usize,
    },
    /// The model's output is not finite.
    #[error("the model's output is not a finite number: its weights are broken")]
    NotFinite,
    /// A call without the preceding call that it needs, or with parameters of another shard.
    #[error("{0} was called out of turn")]
    OutOfTurn(&'static str),
    /// A tensor of a kind that does not cross the wire.
    #[error("a tensor of kind {0:?} cannot cross the wire: expected f32 or bf16")]
    WireKind(Kind),
    /// Bytes that do not match the shape of their tensor.
    #[error("{bytes} bytes for a tensor of shape {shape:?}")]
    ByteCount {
        /// The number of bytes.
        bytes: usize,
        /// The shape.
        shape: Vec<usize>,
    },
    /// A gradient that is not one of its shard.
    #[error("gradient of {shard}: {reason}")]
    Gradient {
        /// The shard.
        shard: ShardId,
        /// The difference.
        reason: String,
    },
    /// The load of a backward call is that of another number of experts.
    #[error("the load of {found} experts: expected {experts}")]
    Load {
        /// The experts of a layer.
        experts: usize,
        /// The numbers found.
        found: usize,
    },
    /// Gradients with another number of tensors than expected.
    #[error("a gradient has {found} tensors, expected {expected}")]
    GradientTensors {
        /// The expected number.
        expected: usize,
        /// The number.
        found: usize,
    },
    /// A device that is not available.
    #[error("device {name}: {reason}")]
    Device {
        /// The requested device.
        name: String,
        /// The reason.
        reason: String,
    },
}

/// The first line of a libtorch error; the rest is a C++ stack trace.
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
