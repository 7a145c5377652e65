//! What can go wrong between a source of text and a batch of tokens.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

/// Where in a file a document begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// A line, counted from 1.
    Line(u64),
    /// A record, counted from 1.
    Record(u64),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Line(n) => write!(f, "line {n}"),
            Self::Record(n) => write!(f, "record {n}"),
        }
    }
}

/// An error of this crate; each names the file or the option to look at.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An option's value is not usable.
    #[error("data option {option}: {reason}")]
    Option {
        /// The option's path, such as `sources[0].weight`.
        option: String,
        /// What is wrong with its value.
        reason: String,
    },
    /// A path names a variable that is not set.
    #[error("source {name:?}: {path:?} uses ${variable}, which is not set")]
    Unset {
        /// The source.
        name: String,
        /// The path as given.
        path: String,
        /// The variable.
        variable: String,
    },
    /// A source's path leads to nothing that can be read.
    #[error("source {name:?}: {path:?}: {reason}")]
    NothingFound {
        /// The source.
        name: String,
        /// The path as given.
        path: String,
        /// What is missing.
        reason: String,
    },
    /// A file or folder could not be read.
    #[error("cannot read {}: {error}", path.display())]
    Read {
        /// The file or folder.
        path: PathBuf,
        /// The system's or the decoder's words.
        #[source]
        error: io::Error,
    },
    /// A file or folder could not be written.
    #[error("cannot write {}: {error}", path.display())]
    Write {
        /// The file or folder.
        path: PathBuf,
        /// The system's words.
        #[source]
        error: io::Error,
    },
    /// A record is not what the format asks for.
    #[error("{}, {place}: expected {expected}, found {found}", path.display())]
    Record {
        /// The file.
        path: PathBuf,
        /// The record's place in it.
        place: Place,
        /// What was expected.
        expected: String,
        /// What was there.
        found: String,
    },
    /// A Parquet file is damaged or lacks the text column.
    #[error("{}: {reason}", path.display())]
    Parquet {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// Text is not UTF-8, and `strict` is set.
    #[error("{}, {place}: the text is not UTF-8 (without `strict` such bytes are replaced)", path.display())]
    NotUtf8 {
        /// The file.
        path: PathBuf,
        /// Where the document begins.
        place: Place,
    },
    /// A document is longer than the limit.
    #[error("{}, {place}: a document of more than {limit} bytes", path.display())]
    DocumentTooLong {
        /// The file.
        path: PathBuf,
        /// Where the document begins.
        place: Place,
        /// The limit, in bytes.
        limit: u64,
    },
    /// A compressed file expands beyond any plausible text.
    #[error("{}: expands to more than {limit} bytes: this is not plausible for text of its size", path.display())]
    Expands {
        /// The file.
        path: PathBuf,
        /// The limit, in bytes.
        limit: u64,
    },
    /// A source holds no text.
    #[error("source {name:?}: {path:?} holds no text ({files} files, all of them empty)")]
    Empty {
        /// The source.
        name: String,
        /// The path as given.
        path: String,
        /// How many files it led to.
        files: usize,
    },
    /// A source is too short for the sequence length.
    #[error(
        "source {name:?} holds {tokens} tokens, but sequences of {sequence_length} tokens need at least {needed}: \
         one sequence to train on and one to validate with; give it more text or make sequences shorter"
    )]
    TooShort {
        /// The source.
        name: String,
        /// How many tokens it holds.
        tokens: u64,
        /// How many it would need.
        needed: u64,
        /// The sequence length, in tokens.
        sequence_length: usize,
    },
    /// A tokenizer could not be trained, loaded or used.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// Prepared data is not what its manifest says.
    #[error("{}: {reason}; the prepared data is damaged, delete its folder to prepare it anew", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What does not fit.
        reason: String,
    },
    /// A step, a lane or a shape that a data set does not have.
    #[error("{0}")]
    OutOfRange(String),
}

impl Error {
    pub(crate) fn read(path: &Path) -> impl FnOnce(io::Error) -> Self + use<> {
        let path = path.to_path_buf();
        move |error| Self::Read { path, error }
    }

    pub(crate) fn write(path: &Path) -> impl FnOnce(io::Error) -> Self + use<> {
        let path = path.to_path_buf();
        move |error| Self::Write { path, error }
    }

    pub(crate) fn damaged(path: &Path, reason: impl Into<String>) -> Self {
        Self::Damaged { path: path.to_path_buf(), reason: reason.into() }
    }
}
