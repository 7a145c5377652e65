//! Text sources, the tokenizer, the mixture, and the function (step, lane) -> tokens.
//!
//! [`prepare`](prepare()) turns [`DataOptions`] into a folder of token files that belongs to the run;
//! [`Dataset`] reads it. The modules, in the order in which text passes through them:
//!
//! | module | content |
//! | --- | --- |
//! | [`options`] | the options: sources, tokenizer, validation, cache |
//! | [`file_manifest`] | a source's list of files with their hashes |
//! | `paths` | variables and patterns in the path of a source |
//! | [`files`], [`skipped`] | from a path, folder or glob to a list of files; those that are not read |
//! | `readers` | formats by content: plain text, JSONL and Parquet, with gzip and zstd |
//! | [`source`] | a source as a stream of documents |
//! | [`document_hash`], `words` | the hashes of documents and of their words |
//! | [`quality`] | the quality filter: a classifier and the sample that its scores give |
//! | [`tokenizer`] | training, loading, encoding, decoding |
//! | [`duplicates`] | copies and near-duplicates among all documents |
//! | [`selection`] | the documents that the filters keep |
//! | `holdout`, `near_duplicates` | the choice of the validation documents; training documents like them |
//! | `corpus`, `tokenized` | from documents to token files |
//! | `tokens`, `rows` | writing, splitting and reading token files |
//! | `unfinished` | what a preparation that was killed goes on with |
//! | [`manifest`] | the description and verification of the resulting folder |
//! | `cache` | the corpora that runs share |
//! | [`progress`] | the progress of the preparation |
//! | [`mod@prepare`] | the preparation as a whole |
//! | [`mixture`], [`permutation`] | from the number of a sequence to its source and window |
//! | [`dataset`] | from (step, lane) to token ids |
//! | [`validation`] | the standard error of a validation loss |
//! | [`limits`] | every bound |
//! | [`error`] | every error |

mod cache;
mod corpus;
pub mod dataset;
pub mod document_hash;
pub mod duplicates;
pub mod error;
pub mod file_manifest;
pub mod files;
mod holdout;
pub mod limits;
pub mod manifest;
pub mod mixture;
mod near_duplicates;
pub mod options;
mod paths;
pub mod permutation;
pub mod prepare;
pub mod progress;
pub mod quality;
mod readers;
mod rows;
pub mod selection;
pub mod skipped;
pub mod source;
mod tokenized;
pub mod tokenizer;
mod tokens;
mod unfinished;
pub mod validation;
mod words;

pub use cache::remove_partial_folders;
pub use dataset::Dataset;
pub use document_hash::DocumentHash;
pub use error::Error;
pub use file_manifest::{FileManifest, ListedFile};
pub use manifest::{HeldOut, Manifest, SourceManifest};
pub use options::{DataOptions, SourceOptions};
pub use prepare::{Prepared, prepare};
pub use progress::{PreparationStage, Progress};
pub use source::{Document, Source};
pub use tokenizer::Tokenizer;

/// Reads all documents of a file; for fuzzing.
#[doc(hidden)]
pub fn fuzz_records(path: &std::path::Path) {
    if let Ok(documents) = readers::open(path, "text") {
        documents.for_each(drop);
    }
}
