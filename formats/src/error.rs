//! The errors of the formats crate.

use std::error::Error as StdError;
use std::io;
use std::path::PathBuf;
use volary_core::ShardId;

/// The result of the formats crate's functions.
pub type Result<T> = std::result::Result<T, Error>;

/// An error of the formats crate.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The target of an export exists.
    #[error("{path} exists: expected a path for a new folder", path = path.display())]
    Exists {
        /// The target.
        path: PathBuf,
    },
    /// A file cannot be written.
    #[error("cannot write {path}: {source}", path = path.display())]
    Write {
        /// The file or folder.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },
    /// A shard of the checkpoint cannot be read.
    #[error("cannot read {shard}: {source}")]
    Read {
        /// The shard.
        shard: ShardId,
        /// The reason.
        source: Box<dyn StdError + Send + Sync>,
    },
    /// A shard does not fit the model.
    #[error(transparent)]
    Model(#[from] volary_model::Error),
    /// A safetensors file cannot be written.
    #[error("cannot write {path}: {source}", path = path.display())]
    SafeTensors {
        /// The file.
        path: PathBuf,
        /// The reason.
        source: safetensors::SafeTensorError,
    },
    /// A folder or file of another program cannot be imported.
    #[error("{path}: {reason}", path = path.display())]
    Import {
        /// The folder or file.
        path: PathBuf,
        /// What it has, and what was expected.
        reason: String,
    },
    /// A format has only one family of models.
    #[error("model.family = \"glam\": expected \"qwen3_moe\" for this format; --format safetensors has all")]
    Family,
    /// A description cannot be written as JSON.
    #[error("JSON: {0}")]
    Json(#[from] serde_json::Error),
}

impl Error {
    /// [`Error::Import`] with a reason.
    pub(crate) fn import(path: impl Into<PathBuf>, reason: impl ToString) -> Self {
        Self::Import { path: path.into(), reason: reason.to_string() }
    }

    /// [`Error::Write`] at a path.
    pub(crate) fn write(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        |source| Self::Write { path, source }
    }
}
