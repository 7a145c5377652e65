//! The format and the compression of a file, from its name.

use std::path::Path;

/// The extensions of text files; they matter in folders only: explicit files and matches of a glob may have
/// any name.
const TEXT_EXTENSIONS: &[&str] = &[
    "txt", "text", "md", "markdown", "rst", "tex", "org", "adoc", "html", "htm", "xml", "csv", "tsv", "rs",
    "py", "pyi", "c", "h", "cc", "cpp", "cxx", "hpp", "hh", "cu", "cuh", "js", "mjs", "jsx", "ts", "tsx",
    "go", "java", "kt", "scala", "swift", "cs", "rb", "php", "pl", "lua", "r", "jl", "hs", "ml", "mli", "ex",
    "exs", "erl", "clj", "sh", "bash", "sql", "proto", "toml", "yaml", "yml", "cmake", "zig", "nim", "dart",
    "el", "vim",
];

/// The format of a file.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Format {
    Text,
    Jsonl,
    Parquet,
}

/// The compression of a file.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Compression {
    None,
    Gzip,
    Zstd,
}

/// The format and the compression of a file, and the extension without that of the compression.
pub(crate) fn format_of(path: &Path) -> (Format, Compression, String) {
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
        // Parquet compresses internally; a compressed Parquet file cannot be read from its end.
        "parquet" if compression == Compression::None => Format::Parquet,
        _ => Format::Text,
    };
    (format, compression, extension)
}

/// Whether a file of a folder belongs to a source.
pub(crate) fn is_known_extension(path: &Path) -> bool {
    let (format, _, extension) = format_of(path);
    format != Format::Text || TEXT_EXTENSIONS.contains(&extension.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_contribute_text_and_records_but_no_binaries() {
        for known in ["a.txt", "a.RS", "a.jsonl", "a.jsonl.gz", "a.txt.zst", "a.parquet"] {
            assert!(is_known_extension(Path::new(known)), "{known}");
        }
        for unknown in ["a.png", "a", "Makefile", "a.tar.gz", "a.safetensors", "a.parquet.gz"] {
            assert!(!is_known_extension(Path::new(unknown)), "{unknown}");
        }
    }
}
