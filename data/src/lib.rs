//! Text sources, the tokenizer, the mixture, and the function (step, lane) -> tokens.
//!
//! [`prepare`](prepare()) turns [`DataOptions`] into a folder of token files that the run owns; [`Dataset`] reads it. Where
//! things are, in the order in which text passes through them:
//!
//! | file | what |
//! | --- | --- |
//! | [`options`] | the sources and what is done with them |
//! | [`files`] | a path, folder or glob to a list of files |
//! | `readers` | plain text, JSONL, Parquet, gzip and zstd |
//! | [`source`] | a source as a stream of documents |
//! | [`tokenizer`] | training, loading, encoding, decoding |
//! | `corpus` | documents to token files; what is held out for validation |
//! | [`manifest`], `tokens` | the folder that results, and its checks |
//! | [`mod@prepare`], `cache` | the whole way, once for all runs that ask for the same |
//! | [`mixture`], [`permutation`] | the number of a sequence to its source and window |
//! | [`dataset`] | (step, lane) to token ids |
//! | [`limits`], [`error`] | every bound; every error |

mod cache;
mod corpus;
pub mod dataset;
pub mod error;
pub mod files;
pub mod limits;
pub mod manifest;
pub mod mixture;
pub mod options;
pub mod permutation;
pub mod prepare;
mod readers;
pub mod source;
pub mod tokenizer;
mod tokens;

pub use dataset::Dataset;
pub use error::Error;
pub use manifest::{HeldOut, Manifest, SourceManifest};
pub use options::{DataOptions, SourceOptions};
pub use prepare::{Prepared, Progress, Stage, prepare};
pub use source::{Document, Source};
pub use tokenizer::Tokenizer;

/// Reads all documents of a file, for fuzzing.
#[doc(hidden)]
pub fn fuzz_records(path: &std::path::Path) {
    if let Ok(documents) = readers::open(path, "text") {
        documents.for_each(drop);
    }
}
