//! The formats: plain text, JSONL and Parquet, the first two also compressed by gzip or zstd.
//!
//! A reader yields raw documents one at a time and never holds more than one of them (Parquet: one page).

mod jsonl;
mod lines;
mod parquet;
mod text;

use std::path::Path;

use crate::error::{Error, Place};

/// A document as it lies in its file: bytes that may not be UTF-8.
pub(crate) struct Raw {
    pub(crate) bytes: Vec<u8>,
    pub(crate) place: Place,
}

/// The raw documents of one file; after an error it yields nothing more.
pub(crate) type RawDocuments = Box<dyn Iterator<Item = Result<Raw, Error>>>;

/// What folders are searched for; a file that is named, or matched by a glob, may be called anything.
const TEXT_EXTENSIONS: &[&str] = &[
    "txt", "text", "md", "markdown", "rst", "tex", "org", "adoc", "html", "htm", "xml", "csv", "tsv", "rs",
    "py", "pyi", "c", "h", "cc", "cpp", "cxx", "hpp", "hh", "cu", "cuh", "js", "mjs", "jsx", "ts", "tsx",
    "go", "java", "kt", "scala", "swift", "cs", "rb", "php", "pl", "lua", "r", "jl", "hs", "ml", "mli", "ex",
    "exs", "erl", "clj", "sh", "bash", "sql", "proto", "toml", "yaml", "yml", "cmake", "zig", "nim", "dart",
    "el", "vim",
];

#[derive(Clone, Copy, PartialEq, Eq)]
enum Format {
    Text,
    Jsonl,
    Parquet,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Compression {
    None,
    Gzip,
    Zstd,
}

/// The format and compression that a file's name tells of, and the extension that remains.
fn format_of(path: &Path) -> (Format, Compression, String) {
    let name = path.file_name().unwrap_or_default().to_string_lossy().to_ascii_lowercase();
    let (name, compression) = if let Some(rest) = name.strip_suffix(".gz") {
        (rest, Compression::Gzip)
    } else if let Some(rest) = name.strip_suffix(".zst") {
        (rest, Compression::Zstd)
    } else {
        (name.as_str(), Compression::None)
    };
    let extension = name.rsplit_once('.').map_or("", |(_, extension)| extension).to_string();
    let format = match extension.as_str() {
        "jsonl" | "ndjson" => Format::Jsonl,
        // Parquet compresses within; a compressed Parquet file cannot be read from its end.
        "parquet" if compression == Compression::None => Format::Parquet,
        _ => Format::Text,
    };
    (format, compression, extension)
}

/// Whether a file met in a folder is one to read.
pub(crate) fn is_known_extension(path: &Path) -> bool {
    let (format, _, extension) = format_of(path);
    format != Format::Text || TEXT_EXTENSIONS.contains(&extension.as_str())
}

/// Opens a file by its name's format; `column` names the text of JSONL and Parquet records.
pub(crate) fn open(path: &Path, column: &str) -> Result<RawDocuments, Error> {
    let (format, compression, _) = format_of(path);
    Ok(match format {
        Format::Parquet => Box::new(parquet::ParquetDocuments::open(path, column)?),
        Format::Jsonl => Box::new(jsonl::JsonlDocuments::new(lines::Lines::open(path, compression)?, column)),
        Format::Text => Box::new(text::TextDocuments::new(lines::Lines::open(path, compression)?)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_are_searched_for_text_and_records_but_not_for_binaries() {
        for known in ["a.txt", "a.RS", "a.jsonl", "a.jsonl.gz", "a.txt.zst", "a.parquet"] {
            assert!(is_known_extension(Path::new(known)), "{known}");
        }
        for unknown in ["a.png", "a", "Makefile", "a.tar.gz", "a.safetensors", "a.parquet.gz"] {
            assert!(!is_known_extension(Path::new(unknown)), "{unknown}");
        }
    }
}
