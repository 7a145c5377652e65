//! The formats: plain text, JSON lines and Parquet, the first two also compressed by gzip or zstd.
//!
//! A reader yields raw documents one at a time and never holds more than one of them (Parquet: one page).

mod compression;
mod format;
mod jsonl;
mod lines;
mod parquet;
mod raw;
mod record;
mod text;

use std::path::Path;

use crate::error::Error;
pub(crate) use format::is_known_extension;
use format::{Format, detect};
pub(crate) use raw::{RawDocument, RawDocuments};

/// Opens a file in the format of its content; `column` names the text of JSONL and Parquet records.
pub(crate) fn open(path: &Path, column: &str) -> Result<RawDocuments, Error> {
    let (format, compression) = detect(path, column)?;
    Ok(match format {
        Format::Parquet => Box::new(parquet::ParquetDocuments::open(path, column)?),
        Format::Jsonl => Box::new(jsonl::JsonlDocuments::new(lines::Lines::open(path, compression)?, column)),
        Format::Text => Box::new(text::TextDocuments::new(lines::Lines::open(path, compression)?)),
    })
}

/// Checks from a file's header that it can be read; see [`open`].
///
/// # Errors
/// [`Error::Unreadable`] for a file without readable text, [`Error::Parquet`], [`Error::Read`].
pub(crate) fn check(path: &Path, column: &str) -> Result<(), Error> {
    match detect(path, column)?.0 {
        Format::Parquet => parquet::ParquetDocuments::open(path, column).map(drop),
        Format::Text | Format::Jsonl => Ok(()),
    }
}
