//! TOML documents, and one-line errors that name the file, the line, the key and the nearest known key.

use crate::document::typed::Rejection;
use serde::de::DeserializeOwned;
use std::error::Error;
use std::fmt;

mod typed;

/// The least similarity of an unknown key to a known one that is worth a hint, from 0 to 1.
const SIMILARITY_MIN: f64 = 0.6;

/// A document that cannot be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct DocumentError {
    /// The file with its line and key; none for a value that is not in a file.
    place: Option<String>,
    message: String,
    rejection: Option<Rejection>,
}

impl DocumentError {
    fn new<T: DeserializeOwned>(
        error: &toml::de::Error,
        place: Option<String>,
        value: Option<toml::Value>,
    ) -> Self {
        let message = error.message().lines().collect::<Vec<_>>().join(" ");
        Self { place, message, rejection: value.and_then(typed::rejection::<T>) }
    }

    /// Whether the document only lacks a key.
    pub(crate) fn is_missing_key(&self) -> bool {
        matches!(self.rejection, Some(Rejection::Missing))
    }
}

impl fmt::Display for DocumentError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(place) = &self.place {
            write!(f, "{place}: ")?;
        }
        f.write_str(&self.message)?;
        match self.rejection.as_ref().and_then(nearest) {
            Some(known) => write!(f, "; did you mean `{known}`?"),
            None => Ok(()),
        }
    }
}

impl Error for DocumentError {}

/// The known key or variant nearest to an unknown one.
fn nearest(rejection: &Rejection) -> Option<&'static str> {
    let Rejection::Unknown { found, known } = rejection else { return None };
    let similarity = |known: &str| strsim::jaro_winkler(known, found);
    let best = known.iter().copied().max_by(|a, b| similarity(a).total_cmp(&similarity(b)))?;
    (similarity(best) > SIMILARITY_MIN).then_some(best)
}

/// Reads a document; errors call it `name`.
///
/// # Errors
/// When it is not TOML, or not a `T`.
pub(crate) fn parse<T: DeserializeOwned>(text: &str, name: &str) -> Result<T, DocumentError> {
    toml::from_str(text).map_err(|error| {
        let value = text.parse::<toml::Table>().ok().map(toml::Value::Table);
        DocumentError::new::<T>(&error, Some(place(name, text, &error)), value)
    })
}

/// Reads a value that is already parsed.
///
/// # Errors
/// When it is not a `T`.
pub(crate) fn convert<T: DeserializeOwned>(value: toml::Value) -> Result<T, DocumentError> {
    value.clone().try_into().map_err(|error| DocumentError::new::<T>(&error, None, Some(value)))
}

/// The file, line and key of an error.
fn place(name: &str, text: &str, error: &toml::de::Error) -> String {
    let Some(span) = error.span() else { return name.to_owned() };
    let before = &text[..span.start.min(text.len())];
    let number = before.matches('\n').count() + 1;
    let section =
        before.lines().rev().find_map(|l| l.trim().strip_prefix('[').map(|s| s.trim_matches(['[', ']'])));
    let key = text.lines().nth(number - 1).and_then(|l| l.split_once('=')).map(|(key, _)| key.trim());
    let key = match (section, key) {
        (Some(section), Some(key)) => format!(", key {section}.{key}"),
        (None, Some(key)) => format!(", key {key}"),
        (Some(section), None) => format!(", section {section}"),
        (None, None) => String::new(),
    };
    format!("{name}, line {number}{key}")
}
