//! The errors between a source of text and a batch of tokens.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

/// The position of a document in its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// A line, from 1.
    Line(u64),
    /// A record, from 1.
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

/// An error of this crate; each names a file or an option.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The value of an option is invalid.
    #[error("data option {option}: {reason}")]
    Option {
        /// The option's path, such as `sources[0].weight`.
        option: String,
        /// The reason.
        reason: String,
    },
    /// A path uses a variable that is not set.
    #[error("source {name:?}: {path:?} uses ${variable}, which is not set")]
    Unset {
        /// The source.
        name: String,
        /// The path as given.
        path: String,
        /// The variable.
        variable: String,
    },
    /// A source has no readable file.
    #[error("source {name:?}: {path:?}: {reason}")]
    NothingFound {
        /// The source.
        name: String,
        /// The path as given.
        path: String,
        /// The missing thing.
        reason: String,
    },
    /// A line of a source's manifest is not `HASH  PATH`.
    #[error("{}, line {line}: expected `HASH  RELATIVE/PATH` as `b3sum` prints it: {reason}", path.display())]
    FileManifestLine {
        /// The manifest.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// The reason.
        reason: &'static str,
    },
    /// A manifest without files, or one that is too large.
    #[error("{}: {reason}", path.display())]
    FileManifest {
        /// The manifest.
        path: PathBuf,
        /// The reason.
        reason: &'static str,
    },
    /// A file of a source's manifest does not exist.
    #[error(
        "source {name:?}: {file:?}, a file of {}, does not exist below {searched}; if these are sources of crates, build \
         the workspace first, and if the versions in Cargo.lock have changed, regenerate the manifest",
        manifest.display()
    )]
    ListedFileMissing {
        /// The source.
        name: String,
        /// The file, as listed.
        file: String,
        /// The manifest.
        manifest: PathBuf,
        /// The path of the source, and the folders that it matches.
        searched: String,
    },
    /// A file of a source's manifest has another content.
    #[error(
        "source {name:?}: {} has the BLAKE3 hash {found}, but {} lists {expected}; restore the file, or regenerate the \
         manifest if the change is intended",
        path.display(),
        manifest.display()
    )]
    ListedFileChanged {
        /// The source.
        name: String,
        /// The file.
        path: PathBuf,
        /// The manifest.
        manifest: PathBuf,
        /// The hash in the manifest, in hex.
        expected: String,
        /// The hash of the file, in hex.
        found: String,
    },
    /// A file or folder could not be read.
    #[error("cannot read {}: {error}", path.display())]
    Read {
        /// The file or folder.
        path: PathBuf,
        /// The error of the system or the decoder.
        #[source]
        error: io::Error,
    },
    /// A file or folder could not be written.
    #[error("cannot write {}: {error}", path.display())]
    Write {
        /// The file or folder.
        path: PathBuf,
        /// The error of the system.
        #[source]
        error: io::Error,
    },
    /// A file has changed while it was read.
    #[error("{} has changed while it was read: start again when it is complete", path.display())]
    ChangedWhileRead {
        /// The file.
        path: PathBuf,
    },
    /// A record does not match the format.
    #[error("{}, {place}: expected {expected}, found {found}", path.display())]
    Record {
        /// The file.
        path: PathBuf,
        /// The position of the record.
        place: Place,
        /// The expected content.
        expected: String,
        /// The actual content.
        found: String,
    },
    /// A file does not hold readable text.
    #[error("{}: {reason}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// The kind of its content, or what its name promised.
        reason: String,
    },
    /// A Parquet file is damaged or has no text column.
    #[error("{}: {reason}", path.display())]
    Parquet {
        /// The file.
        path: PathBuf,
        /// The reason.
        reason: String,
    },
    /// Text is not UTF-8, and `strict` is set.
    #[error("{}, {place}: the text is not UTF-8 (without `strict`, invalid bytes are replaced)", path.display())]
    NotUtf8 {
        /// The file.
        path: PathBuf,
        /// The position of the document.
        place: Place,
    },
    /// A document is longer than the limit.
    #[error("{}, {place}: the document has more than {limit} bytes", path.display())]
    DocumentTooLong {
        /// The file.
        path: PathBuf,
        /// The position of the document.
        place: Place,
        /// The limit, in bytes.
        limit: u64,
    },
    /// A compressed file expands implausibly.
    #[error("{}: expands to more than {limit} bytes, which is implausible for a text file of its size", path.display())]
    Expands {
        /// The file.
        path: PathBuf,
        /// The limit, in bytes.
        limit: u64,
    },
    /// A source has no text.
    #[error("source {name:?}: {path:?} holds no text: {} empty", empty_files(*files))]
    Empty {
        /// The source.
        name: String,
        /// The path as given.
        path: String,
        /// The number of its files.
        files: usize,
    },
    /// A source is too short for the sequence length.
    #[error(
        "source {name:?} holds {tokens} tokens, but sequences of {sequence_length} tokens need at least {needed}: \
         one sequence for training and one for validation; add text or shorten the sequences"
    )]
    TooShort {
        /// The source.
        name: String,
        /// The number of its tokens.
        tokens: u64,
        /// The number of tokens that it needs.
        needed: u64,
        /// The sequence length, in tokens.
        sequence_length: usize,
    },
    /// A tokenizer could not be trained, loaded or used.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// A file is not a quality classifier.
    #[error("{}: not a quality classifier: {reason}", path.display())]
    Classifier {
        /// The file.
        path: PathBuf,
        /// The reason.
        reason: String,
    },
    /// More documents than can be compared.
    #[error("more than {limit} documents cannot be compared with each other: prepare them in parts")]
    TooManyDocuments {
        /// The limit.
        limit: u32,
    },
    /// The filters left nothing of a source.
    #[error("source {name:?}: the filters keep none of its {documents} documents")]
    AllDropped {
        /// The source.
        name: String,
        /// The number of its documents.
        documents: u64,
    },
    /// A quality classifier cannot be trained or evaluated.
    #[error("no {kind} document is left for {part}: add {kind} text, or documents (a file is one document)")]
    TooFewExamples {
        /// `positive` or `negative`.
        kind: &'static str,
        /// `training` or `the evaluation`.
        part: &'static str,
    },
    /// Prepared data does not match its manifest.
    #[error("{}: {reason}; the prepared data is damaged: delete its folder to prepare it again", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// The mismatch.
        reason: String,
    },
    /// A step, a lane or a shape that a dataset does not have.
    #[error("{0}")]
    OutOfRange(String),
}

fn empty_files(files: usize) -> String {
    if files == 1 { "its only file is".into() } else { format!("all of its {files} files are") }
}

impl Error {
    /// Whether it is of one record, after which the file can be read on.
    pub(crate) fn is_of_record(&self) -> bool {
        matches!(self, Self::Record { .. } | Self::DocumentTooLong { .. })
    }

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
