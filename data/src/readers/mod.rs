//! The formats: plain text, JSONL and Parquet, the first two also compressed by gzip or zstd.
//!
//! A reader yields raw documents one at a time and never holds more than one of them (Parquet: one page).

mod format;
mod jsonl;
mod lines;
mod parquet;
mod raw;
mod text;

use std::path::Path;

use crate::error::Error;
pub(crate) use format::is_known_extension;
use format::{Format, format_of};
pub(crate) use raw::{RawDocument, RawDocuments};

/// Opens a file in the format of its name; `column` names the text of JSONL and Parquet records.
pub(crate) fn open(path: &Path, column: &str) -> Result<RawDocuments, Error> {
    let (format, compression, _) = format_of(path);
    Ok(match format {
        Format::Parquet => Box::new(parquet::ParquetDocuments::open(path, column)?),
        Format::Jsonl => Box::new(jsonl::JsonlDocuments::new(lines::Lines::open(path, compression)?, column)),
        Format::Text => Box::new(text::TextDocuments::new(lines::Lines::open(path, compression)?)),
    })
}
