//! Parquet: one text column of each row, read row group by row group.

use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parquet::basic::{Compression, Repetition, Type as Physical};
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::reader::RowIter;
use parquet::record::{Field, Row};
use parquet::schema::types::Type;

use super::raw::RawDocument;
use crate::error::{Error, Place};
use crate::limits::{EXPANSION_FLOOR_BYTES, MAX_DOCUMENT_BYTES, MAX_EXPANSION, MAX_LISTED_NAMES};

/// The documents of a Parquet file; rows with a null text are skipped.
pub(crate) struct ParquetDocuments {
    path: PathBuf,
    column: String,
    rows: RowIter<'static>,
    record: u64,
    done: bool,
}

impl ParquetDocuments {
    pub(crate) fn open(path: &Path, column: &str) -> Result<Self, Error> {
        let file = File::open(path).map_err(Error::read(path))?;
        let rows = guarded(path, || {
            let reader = SerializedFileReader::new(file).map_err(|e| damaged(path, &e))?;
            let projection = projection(&reader, path, column)?;
            RowIter::from_file_into(Box::new(reader)).project(Some(projection)).map_err(|e| damaged(path, &e))
        })?;
        Ok(Self { path: path.to_path_buf(), column: column.into(), rows, record: 0, done: false })
    }

    fn read(&mut self) -> Result<Option<RawDocument>, Error> {
        loop {
            let rows = &mut self.rows;
            let Some(row) = guarded(&self.path, || Ok(rows.next()))? else { return Ok(None) };
            self.record += 1;
            let row = row.map_err(|e| Error::Record {
                path: self.path.clone(),
                place: Place::Record(self.record),
                expected: "a readable row".into(),
                found: e.to_string(),
            })?;
            if let Some(bytes) = self.text(row)? {
                return Ok(Some(RawDocument { bytes, place: Place::Record(self.record) }));
            }
        }
    }

    fn text(&self, row: Row) -> Result<Option<Vec<u8>>, Error> {
        let place = Place::Record(self.record);
        let bytes = match row.into_columns().into_iter().next() {
            Some((_, Field::Str(text))) => text.into_bytes(),
            Some((_, Field::Bytes(bytes))) => bytes.data().to_vec(),
            Some((_, Field::Null)) => return Ok(None),
            other => {
                let expected = format!("text in column {:?}", self.column);
                let found = format!("{:?}", other.map(|(_, field)| field));
                return Err(Error::Record { path: self.path.clone(), place, expected, found });
            }
        };
        if bytes.len() as u64 > MAX_DOCUMENT_BYTES {
            return Err(Error::DocumentTooLong { path: self.path.clone(), place, limit: MAX_DOCUMENT_BYTES });
        }
        Ok(Some(bytes))
    }
}

/// The schema of the text column only: no other column is decoded.
fn projection(reader: &SerializedFileReader<File>, path: &Path, column: &str) -> Result<Type, Error> {
    let schema = reader.metadata().file_metadata().schema();
    let fail = |reason: String| Error::Parquet { path: path.to_path_buf(), reason };
    let mut named = schema.get_fields().iter().filter(|field| field.name() == column);
    let Some(field) = named.next() else {
        let names: Vec<_> =
            schema.get_fields().iter().take(MAX_LISTED_NAMES).map(|field| field.name()).collect();
        return Err(fail(format!("has no column {column:?}; its columns are {names:?}")));
    };
    if named.next().is_some() {
        return Err(fail(format!("has several columns named {column:?}")));
    }
    let is_repeated = field.get_basic_info().repetition() == Repetition::REPEATED;
    if !field.is_primitive() || is_repeated || field.get_physical_type() != Physical::BYTE_ARRAY {
        return Err(fail(format!("column {column:?} does not hold text")));
    }
    check_chunks(reader, path, column)?;
    Type::group_type_builder(schema.name())
        .with_fields(vec![Arc::clone(field)])
        .build()
        .map_err(|e| damaged(path, &e))
}

/// Refuses from the header what the pages would show too late: text that expands implausibly, and
/// compressions that cannot be read.
fn check_chunks(reader: &SerializedFileReader<File>, path: &Path, column: &str) -> Result<(), Error> {
    let size = std::fs::metadata(path).map_err(Error::read(path))?.len();
    let limit = size.saturating_mul(MAX_EXPANSION).max(EXPANSION_FLOOR_BYTES);
    let chunks = reader.metadata().row_groups().iter().flat_map(|group| group.columns());
    for chunk in chunks.filter(|chunk| chunk.column_path().parts() == [column]) {
        if u64::try_from(chunk.uncompressed_size()).map_or(true, |expanded| expanded > limit) {
            return Err(Error::Expands { path: path.to_path_buf(), limit });
        }
        if chunk.compression() == Compression::LZO {
            let reason = format!("column {column:?} is compressed by LZO, which cannot be read");
            return Err(Error::Parquet { path: path.to_path_buf(), reason });
        }
    }
    Ok(())
}

fn damaged(path: &Path, error: &parquet::errors::ParquetError) -> Error {
    Error::Parquet { path: path.to_path_buf(), reason: format!("not a readable Parquet file: {error}") }
}

/// Runs code of the parquet crate, whose row reader panics on some damaged files.
fn guarded<T>(path: &Path, work: impl FnOnce() -> Result<T, Error>) -> Result<T, Error> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| {
        Err(Error::Parquet {
            path: path.to_path_buf(),
            reason: "the file is damaged: its pages cannot be decoded".into(),
        })
    })
}

impl Iterator for ParquetDocuments {
    type Item = Result<RawDocument, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.done {
            return None;
        }
        let document = self.read();
        self.done = !matches!(document, Ok(Some(_)));
        document.transpose()
    }
}
