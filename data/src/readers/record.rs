//! One JSON object on a line, of which one field matters.
//!
//! Only the wanted field is parsed strictly. Other fields may hold what no strict parser accepts but other
//! programs write: bare `NaN` and `Infinity`, numbers beyond the range of floats, lone surrogates, and
//! nesting of any depth.

use std::fmt;

use serde::de::{Deserialize, DeserializeSeed, Deserializer, IgnoredAny, MapAccess, Visitor};

use crate::limits::MAX_LISTED_NAMES;

/// The wanted field of an object.
pub(crate) enum Record {
    /// Its text as bytes that may not be UTF-8: each lone surrogate has become one invalid byte.
    Text(Vec<u8>),
    /// It is null.
    Null,
    /// The object has no such field, but these.
    Missing(Vec<String>),
}

impl Record {
    pub(crate) fn has_text(&self) -> bool {
        matches!(self, Self::Text(_))
    }
}

/// Parses the object on `line`; the last field named `column` counts.
///
/// # Errors
/// The error of the parser if the line is not an object, or the field neither a string nor null.
pub(crate) fn parse_record(line: &[u8], column: &str) -> serde_json::Result<Record> {
    let parse = |line: &[u8]| {
        let mut json = serde_json::Deserializer::from_slice(line);
        let record = Object { column }.deserialize(&mut json)?;
        json.end().map(|()| record)
    };
    parse(line).or_else(|error| match without_bare_numbers(line) {
        Some(line) => parse(&line),
        None => Err(error),
    })
}

/// `line` with `null` in place of each bare `NaN`, `Infinity` and `-Infinity`; `None` if there is none.
fn without_bare_numbers(line: &[u8]) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(line.len());
    let (mut at, mut in_string, mut changed) = (0, false, false);
    while at < line.len() {
        let rest = &line[at..];
        let bare = [&b"NaN"[..], b"Infinity", b"-Infinity"].into_iter().find(|bare| rest.starts_with(bare));
        let length = match (in_string, rest[0], bare) {
            (true, b'\\', _) => 2.min(rest.len()),
            (false, _, Some(bare)) => {
                out.extend_from_slice(b"null");
                changed = true;
                at += bare.len();
                continue;
            }
            (_, byte, _) => {
                in_string ^= byte == b'"';
                1
            }
        };
        out.extend_from_slice(&rest[..length]);
        at += length;
    }
    changed.then_some(out)
}

struct Object<'a> {
    column: &'a str,
}

impl<'de> DeserializeSeed<'de> for Object<'_> {
    type Value = Record;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Record, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Object<'_> {
    type Value = Record;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a JSON object with a string field {:?}", self.column)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Record, A::Error> {
        let (mut record, mut names) = (None, Vec::new());
        while let Some(Bytes(name)) = map.next_key()? {
            if name == self.column.as_bytes() {
                record = Some(match map.next_value::<Option<Bytes>>()? {
                    Some(Bytes(text)) => Record::Text(text),
                    None => Record::Null,
                });
            } else {
                if names.len() < MAX_LISTED_NAMES {
                    names.push(String::from_utf8_lossy(&name).into_owned());
                }
                map.next_value::<IgnoredAny>()?;
            }
        }
        Ok(record.unwrap_or(Record::Missing(names)))
    }
}

/// The bytes of a string. The parser gives a lone surrogate as the three bytes that UTF-8 would have for it.
struct Bytes(Vec<u8>);

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Text;
        impl Visitor<'_> for Text {
            type Value = Bytes;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string")
            }

            fn visit_bytes<E>(self, bytes: &[u8]) -> Result<Bytes, E> {
                Ok(Bytes(with_single_surrogates(bytes)))
            }
        }
        deserializer.deserialize_bytes(Text)
    }
}

/// `bytes` with one invalid byte for each surrogate: the source then replaces and counts one character.
fn with_single_surrogates(bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(bytes.len());
    let mut rest = bytes;
    while let Some(byte) = rest.first() {
        let is_surrogate = matches!(rest, [0xed, 0xa0..=0xbf, 0x80..=0xbf, ..]);
        out.push(if is_surrogate { 0x80 } else { *byte });
        rest = &rest[if is_surrogate { 3 } else { 1 }..];
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(line: &[u8]) -> Vec<u8> {
        match parse_record(line, "text").unwrap() {
            Record::Text(text) => text,
            Record::Null => b"(null)".to_vec(),
            Record::Missing(names) => panic!("{names:?}"),
        }
    }

    #[test]
    fn other_fields_may_hold_what_no_strict_parser_accepts() {
        let deep = "[".repeat(5000) + &"]".repeat(5000);
        for other in
            ["NaN", "[-Infinity, {\"a\": Infinity}]", "1e999", r#""\ud800""#, "\"\\\"NaN\"", deep.as_str()]
        {
            let line = format!(r#"{{"score": {other}, "text": "NaN is \"no\" number"}}"#);
            assert_eq!(text(line.as_bytes()), br#"NaN is "no" number"#, "{other:.40}");
        }
        assert_eq!(text(b"{\"a\": \"\xff\", \"text\": \"x\"}"), b"x");
    }

    #[test]
    fn the_wanted_field_keeps_its_characters_and_marks_what_is_none() {
        assert_eq!(text(br#"{"text": "\ud83d\ude00 \u00e9"}"#), "😀 é".as_bytes());
        assert_eq!(text(br#"{"text": "a\ud800b"}"#), b"a\x80b");
        assert_eq!(text(br#"{"text": "a\udc00\ud800"}"#), b"a\x80\x80");
        assert_eq!(text(b"{\"text\": \"caf\xe9\"}"), b"caf\xe9");
        assert_eq!(text(br#"{"text": NaN}"#), b"(null)");
        assert_eq!(text(br#"{"text": "first", "text": "last"}"#), b"last");
    }

    #[test]
    fn lines_that_are_no_objects_are_errors() {
        for line in ["", "{", "[1]", "7", "{\"text\": \"a\"} x", "{\"text\": \"a", "{\"text\": [1, 2]}"] {
            assert!(parse_record(line.as_bytes(), "text").is_err(), "{line}");
        }
    }
}
