//! The format and the compression of a file, from its content.
//!
//! The first bytes tell the compression and whether the file is text at all. The name matters only where the
//! content leaves a choice: `.jsonl` and `.json` promise records, any other name gives text unless its first
//! line is a record with the wanted field.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use super::compression::Compression;
use super::record::parse_record;
use crate::error::Error;
use crate::limits::{HEAD_BYTES, MAX_CONTROL_SHARE};

/// The extensions of text files; they matter in folders only: explicit files and matches of a glob may have
/// any name.
const TEXT_EXTENSIONS: &[&str] = &[
    "txt", "text", "md", "markdown", "rst", "tex", "org", "adoc", "html", "htm", "xml", "csv", "tsv", "rs",
    "py", "pyi", "c", "h", "cc", "cpp", "cxx", "hpp", "hh", "cu", "cuh", "js", "mjs", "jsx", "ts", "tsx",
    "go", "java", "kt", "scala", "swift", "cs", "rb", "php", "pl", "lua", "r", "jl", "hs", "ml", "mli", "ex",
    "exs", "erl", "clj", "sh", "bash", "sql", "proto", "toml", "yaml", "yml", "cmake", "zig", "nim", "dart",
    "el", "vim",
];

/// The extensions of files of records.
const RECORD_EXTENSIONS: &[&str] = &["jsonl", "ndjson", "json", "parquet"];

/// The format of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    Text,
    Jsonl,
    Parquet,
}

/// The extension of a file's name in lower case, without that of a compression.
fn extension(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy().to_ascii_lowercase();
    let name = [".gz", ".zst"].iter().find_map(|end| name.strip_suffix(end)).unwrap_or(&name);
    name.rsplit_once('.').map_or("", |(_, extension)| extension).to_string()
}

/// Whether a file of a folder belongs to a source.
pub(crate) fn is_known_extension(path: &Path) -> bool {
    let extension = extension(path);
    TEXT_EXTENSIONS.iter().chain(RECORD_EXTENSIONS).any(|known| *known == extension)
}

/// The format and the compression of a file; `column` names the text of records.
///
/// # Errors
/// [`Error::Read`], and [`Error::Unreadable`] for a file without readable text, with the reason.
pub(crate) fn detect(path: &Path, column: &str) -> Result<(Format, Compression), Error> {
    let mut head = Vec::new();
    let file = File::open(path).map_err(Error::read(path))?;
    file.take(HEAD_BYTES as u64).read_to_end(&mut head).map_err(Error::read(path))?;
    let refuse = |reason: String| Error::Unreadable { path: path.to_path_buf(), reason };
    let extension = extension(path);
    if head.starts_with(b"PAR1") {
        return Ok((Format::Parquet, Compression::None));
    }
    let compression = Compression::of(&head);
    if let Some(promised) = Compression::of_name(path)
        && promised != compression
        && !head.is_empty()
    {
        return Err(refuse(format!("its name promises {promised}, but it is {compression}")));
    }
    let head = compression.expand_head(head);
    if let Some(kind) = not_text(&head) {
        return Err(refuse(format!("it holds {kind}, not text")));
    }
    match text_format(&head, &extension, column) {
        Ok(format) => Ok((format, compression)),
        Err(found) => Err(refuse(format!("expected one JSON object per line, found {found}"))),
    }
}

/// The format of a file whose content starts with `head`, or what it is although its name promises records.
fn text_format(head: &[u8], extension: &str, column: &str) -> Result<Format, &'static str> {
    let text = head.strip_prefix(b"\xef\xbb\xbf").unwrap_or(head).trim_ascii_start();
    let first_line = text.split(|byte| *byte == b'\n').next().unwrap_or_default();
    let is_whole = first_line.len() < text.len() || head.len() < HEAD_BYTES;
    let record =
        if text.starts_with(b"{") && is_whole { parse_record(first_line, column).ok() } else { None };
    match extension {
        "parquet" => Err("text (the name promises Parquet)"),
        // Any other content is an error of its reader, which names the line.
        "jsonl" | "ndjson" => Ok(Format::Jsonl),
        "json" if text.is_empty() || record.is_some() => Ok(Format::Jsonl),
        "json" if text.starts_with(b"{") && !is_whole => Ok(Format::Jsonl),
        "json" if text.starts_with(b"[") => Err("one array (`jq -c '.[]'` splits it into lines)"),
        "json" if text.starts_with(b"{") => Err("an object over several lines (`jq -c .` joins them)"),
        "json" => Err("other text"),
        _ if record.is_some_and(|record| record.has_text()) => Ok(Format::Jsonl),
        _ => Ok(Format::Text),
    }
}

/// The kind of a file that is not text in UTF-8 or a superset of ASCII; `None` for text.
fn not_text(head: &[u8]) -> Option<String> {
    for (mark, encoding) in [
        (&b"\xff\xfe\0\0"[..], "UTF-32"),
        (b"\0\0\xfe\xff", "UTF-32"),
        (b"\xff\xfe", "UTF-16"),
        (b"\xfe\xff", "UTF-16"),
    ] {
        if head.starts_with(mark) {
            return Some(format!("{encoding} (`iconv -f {encoding} -t UTF-8` converts it)"));
        }
    }
    let control = |byte: &&u8| **byte < 0x20 && !b"\t\n\r\x08\x0c\x1b".contains(byte) || **byte == 0x7f;
    let controls = head.iter().filter(control).count();
    // A character at the end may be cut.
    let is_utf8 = std::str::from_utf8(head).map_or_else(|error| error.error_len().is_none(), |_| true);
    let is_binary = head.contains(&0) || controls as f64 > MAX_CONTROL_SHARE * head.len() as f64;
    let known = infer::get(head).filter(|kind| kind.matcher_type() != infer::MatcherType::Text);
    match known {
        // Some marks are two letters, with which a text may begin.
        Some(kind) if is_binary || !is_utf8 || kind.extension() == "pdf" => {
            Some(kind.mime_type().to_string())
        }
        None if is_binary => Some("binary data".into()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_contribute_text_and_records_but_no_binaries() {
        for known in ["a.txt", "a.RS", "a.jsonl", "a.jsonl.gz", "a.json.gz", "a.txt.zst", "a.parquet"] {
            assert!(is_known_extension(Path::new(known)), "{known}");
        }
        for unknown in ["a.png", "a", "Makefile", "a.tar.gz", "a.safetensors", "a.txt.xz"] {
            assert!(!is_known_extension(Path::new(unknown)), "{unknown}");
        }
    }

    #[test]
    fn text_in_any_script_and_encoding_that_extends_ascii_is_text() {
        for text in
            [&b"BM is how this text begins"[..], b"MZ", "日本語".as_bytes(), b"caf\xe9", b"#!/bin/sh", b""]
        {
            assert_eq!(not_text(text), None, "{}", text.escape_ascii());
        }
        assert_eq!(not_text(&"aé".as_bytes()[..2]), None);
    }

    #[test]
    fn binaries_are_named_by_their_first_bytes() {
        for (head, kind) in [
            (&b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"[..], "image/png"),
            (b"PK\x03\x04\x14\0\0\0\x08\0", "application/zip"),
            (b"\xfd7zXZ\0\0\x04", "application/x-xz"),
            (b"BZh91AY&SY\xf2\x11\x90", "application/x-bzip2"),
            (&[&b"\x7fELF\x02\x01\x01"[..], &[0; 60]].concat(), "application/x-executable"),
            (b"%PDF-1.7\n1 0 obj", "application/pdf"),
            (b"\xff\xfeh\0i\0", "UTF-16"),
            (b"h\0i\0", "binary data"),
        ] {
            let found = not_text(head).unwrap_or_default();
            assert!(found.contains(kind), "{found} instead of {kind}");
        }
    }
}
