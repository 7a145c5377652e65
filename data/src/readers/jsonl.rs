//! JSONL: one JSON object per line, with its text in one field.

use serde_json::{Map, Value};

use super::lines::Lines;
use super::raw::RawDocument;
use crate::error::{Error, Place};
use crate::limits::{MAX_DOCUMENT_BYTES, MAX_LISTED_NAMES};

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
        // JSON is UTF-8, but the object of a line that is not may still be complete.
        let parsed = match std::str::from_utf8(line) {
            Ok(text) => serde_json::from_str::<Map<String, Value>>(text),
            Err(_) => return self.broken_text(line, place),
        };
        let mut object = parsed.map_err(|e| fail(e.to_string()))?;
        match object.remove(&self.column) {
            Some(Value::String(text)) => Ok(Some(text.into_bytes())),
            Some(Value::Null) => Ok(None),
            Some(other) => Err(fail(format!("{:?}: {}", self.column, kind(&other)))),
            None => {
                let fields: Vec<_> = object.keys().take(MAX_LISTED_NAMES).cloned().collect();
                Err(fail(format!("the fields {fields:?}")))
            }
        }
    }

    /// The text of a line that is not UTF-8. Invalid bytes become lone continuation bytes: the source then
    /// replaces and counts them, or rejects them, as in every other format.
    fn broken_text(&self, line: &[u8], place: Place) -> Result<Option<Vec<u8>>, Error> {
        const MARK: char = '\u{10fffe}';
        let mut marked = String::with_capacity(line.len());
        for chunk in line.utf8_chunks() {
            marked.push_str(chunk.valid());
            if !chunk.invalid().is_empty() {
                marked.push(MARK);
            }
        }
        let Some(text) = self.text(marked.as_bytes(), place)? else { return Ok(None) };
        let text = String::from_utf8_lossy(&text).into_owned();
        let mut bytes = Vec::with_capacity(text.len());
        for (at, part) in text.split(MARK).enumerate() {
            if at > 0 {
                bytes.push(0x80);
            }
            bytes.extend_from_slice(part.as_bytes());
        }
        Ok(Some(bytes))
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

impl Iterator for JsonlDocuments {
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
