//! JSONL: one JSON object per line, with its text in one field.

use super::lines::Lines;
use super::raw::RawDocument;
use super::record::{Record, parse_record};
use crate::error::{Error, Place};
use crate::limits::MAX_DOCUMENT_BYTES;

/// The documents of a JSONL file; blank lines and objects with a null text are skipped.
pub(crate) struct JsonlDocuments {
    lines: Lines,
    column: String,
    done: bool,
}

impl JsonlDocuments {
    pub(crate) fn new(lines: Lines, column: &str) -> Self {
        Self { lines, column: column.into(), done: false }
    }

    fn read(&mut self) -> Result<Option<RawDocument>, Error> {
        let mut line = Vec::new();
        loop {
            line.clear();
            let place = Place::Line(self.lines.ended + 1);
            if self.lines.next_into(&mut line, MAX_DOCUMENT_BYTES + 1)? == 0 {
                return Ok(None);
            }
            if line.len() as u64 > MAX_DOCUMENT_BYTES {
                let path = self.lines.path.clone();
                if line.last() != Some(&b'\n') {
                    self.lines.skip_line()?;
                }
                return Err(Error::DocumentTooLong { path, place, limit: MAX_DOCUMENT_BYTES });
            }
            let line = line.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&line);
            if line.trim_ascii().is_empty() {
                continue;
            }
            if let Some(bytes) = self.text(line, place)? {
                return Ok(Some(RawDocument { bytes, place }));
            }
        }
    }

    /// The text of the object on a line; `None` if it is null.
    fn text(&self, line: &[u8], place: Place) -> Result<Option<Vec<u8>>, Error> {
        let fail = |found: String| {
            let expected = format!("a JSON object with a string field {:?}", self.column);
            Error::Record { path: self.lines.path.clone(), place, expected, found }
        };
        match parse_record(line, &self.column).map_err(|error| fail(error.to_string()))? {
            Record::Text(text) => Ok(Some(text)),
            Record::Null => Ok(None),
            Record::Missing(names) => Err(fail(format!("the fields {names:?}"))),
        }
    }
}

impl Iterator for JsonlDocuments {
    type Item = Result<RawDocument, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.done {
            return None;
        }
        let document = self.read();
        self.done = match &document {
            Ok(document) => document.is_none(),
            Err(error) => !error.is_of_record(),
        };
        document.transpose()
    }
}
