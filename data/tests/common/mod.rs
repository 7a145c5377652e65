//! Test sources with different text in every document.
#![allow(clippy::unwrap_used, reason = "a helper that fails is a test that fails")]
#![allow(dead_code, reason = "each test binary uses its own part")]

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parquet::basic::Repetition;
use parquet::basic::Type as Physical;
use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::types::Type;
use volary_data::{DataOptions, Error, Prepared, SourceOptions, prepare};

/// Document `n`: about 300 bytes, different from every other document.
pub(crate) fn document(n: usize) -> String {
    let words =
        ["river", "mountain", "lantern", "quietly", "sings", "beneath", "copper", "the", "a", "wanders"];
    let mut text = format!("Document {n}.\n");
    let mut state = n as u64 + 1;
    for _ in 0..45 {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        text.push_str(words[(state >> 40) as usize % words.len()]);
        text.push(' ');
    }
    text
}

/// JSONL lines of the documents in `range`, with a second field without text.
pub(crate) fn jsonl(range: std::ops::Range<usize>) -> String {
    range.map(|n| serde_json::json!({"id": n, "text": document(n)}).to_string() + "\n").collect()
}

/// Writes a file below `dir`, with its folders, and returns its path.
pub(crate) fn write(dir: &Path, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
    let path = dir.join(name);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(&path, bytes).unwrap();
    path
}

pub(crate) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// A Parquet file with a text column named `column`, with nulls, and a column of ids.
pub(crate) fn parquet(path: &Path, column: &str, texts: &[Option<&str>]) {
    let field = Type::primitive_type_builder(column, Physical::BYTE_ARRAY)
        .with_repetition(Repetition::OPTIONAL)
        .with_logical_type(Some(parquet::basic::LogicalType::String))
        .build()
        .unwrap();
    let id = Type::primitive_type_builder("id", Physical::BYTE_ARRAY)
        .with_repetition(Repetition::REQUIRED)
        .build()
        .unwrap();
    let fields = vec![Arc::new(id), Arc::new(field)];
    let schema = Arc::new(Type::group_type_builder("schema").with_fields(fields).build().unwrap());
    let mut writer = SerializedFileWriter::new(File::create(path).unwrap(), schema, Arc::default()).unwrap();
    for group in texts.chunks(100) {
        let mut rows = writer.next_row_group().unwrap();
        let mut ids = rows.next_column().unwrap().unwrap();
        let values = vec![ByteArray::from("id"); group.len()];
        ids.typed::<ByteArrayType>().write_batch(&values, None, None).unwrap();
        ids.close().unwrap();
        let mut texts = rows.next_column().unwrap().unwrap();
        let values: Vec<ByteArray> = group.iter().flatten().map(|&t| ByteArray::from(t)).collect();
        let levels: Vec<i16> = group.iter().map(|t| i16::from(t.is_some())).collect();
        texts.typed::<ByteArrayType>().write_batch(&values, Some(&levels), None).unwrap();
        texts.close().unwrap();
        rows.close().unwrap();
    }
    writer.close().unwrap();
}

/// Options with a cache below `dir` and a small vocabulary.
pub(crate) fn options(dir: &Path, sources: Vec<SourceOptions>) -> DataOptions {
    DataOptions { sources, vocabulary: 400, cache: Some(dir.join("cache")), ..DataOptions::default() }
}

pub(crate) fn source(name: &str, path: &Path) -> SourceOptions {
    SourceOptions::new(name, path.to_str().unwrap())
}

/// Prepares for sequences of 16 tokens, without a progress report.
pub(crate) fn prepare_16(options: &DataOptions, run: &Path) -> Result<Prepared, Error> {
    prepare(options, 16, run, &mut |_| {})
}
