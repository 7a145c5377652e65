//! The reason why serde rejects a value, as a type.
//!
//! `toml::de::Error` has only a text. A second pass over the parsed value, with an error type that keeps
//! serde's own arguments, has the unknown key and the known ones. Both passes visit keys in the same order,
//! so they stop at the same one.

use serde::Deserializer;
use serde::de::value::{MapAccessDeserializer, MapDeserializer, SeqDeserializer};
use serde::de::{DeserializeOwned, Error, IntoDeserializer, Visitor};
use serde::forward_to_deserialize_any;
use std::fmt;
use toml::Value;

/// Why a value is rejected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Rejection {
    /// An unknown key or variant.
    Unknown { found: String, known: &'static [&'static str] },
    /// A required key is missing.
    Missing,
    /// A type or value.
    Other,
}

impl fmt::Display for Rejection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unknown { found, .. } => write!(f, "unknown key `{found}`"),
            Self::Missing => f.write_str("missing key"),
            Self::Other => f.write_str("invalid value"),
        }
    }
}

impl std::error::Error for Rejection {}

impl Error for Rejection {
    fn custom<T: fmt::Display>(_message: T) -> Self {
        Self::Other
    }

    fn unknown_field(field: &str, known: &'static [&'static str]) -> Self {
        Self::Unknown { found: field.to_owned(), known }
    }

    fn unknown_variant(variant: &str, known: &'static [&'static str]) -> Self {
        Self::Unknown { found: variant.to_owned(), known }
    }

    fn missing_field(_field: &'static str) -> Self {
        Self::Missing
    }
}

/// Why `T` rejects a value, if it does.
pub(super) fn rejection<T: DeserializeOwned>(value: Value) -> Option<Rejection> {
    T::deserialize(Typed(value)).err()
}

/// A TOML value as a deserializer with [`Rejection`] as its error.
struct Typed(Value);

impl<'de> IntoDeserializer<'de, Rejection> for Typed {
    type Deserializer = Self;

    fn into_deserializer(self) -> Self {
        self
    }
}

/// The entries of a table.
fn entries(table: toml::Table) -> impl Iterator<Item = (String, Typed)> {
    table.into_iter().map(|(key, value)| (key, Typed(value)))
}

impl<'de> Deserializer<'de> for Typed {
    type Error = Rejection;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Rejection> {
        match self.0 {
            Value::String(text) => visitor.visit_string(text),
            Value::Integer(number) => visitor.visit_i64(number),
            Value::Float(number) => visitor.visit_f64(number),
            Value::Boolean(flag) => visitor.visit_bool(flag),
            Value::Datetime(time) => visitor.visit_string(time.to_string()),
            Value::Array(values) => visitor.visit_seq(SeqDeserializer::new(values.into_iter().map(Typed))),
            Value::Table(table) => visitor.visit_map(MapDeserializer::new(entries(table))),
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Rejection> {
        visitor.visit_some(self)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        visitor: V,
    ) -> Result<V::Value, Rejection> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _name: &'static str,
        _variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Rejection> {
        match self.0 {
            Value::String(variant) => visitor.visit_enum(variant.into_deserializer()),
            Value::Table(table) => {
                visitor.visit_enum(MapAccessDeserializer::new(MapDeserializer::new(entries(table))))
            }
            _ => Err(Rejection::Other),
        }
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf unit unit_struct seq
        tuple tuple_struct map struct identifier ignored_any
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;

    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    #[expect(dead_code, reason = "only read")]
    struct Outer {
        count: u64,
        inner: Option<Inner>,
        tagged: Option<Tagged>,
    }

    #[derive(Deserialize)]
    #[serde(rename_all = "snake_case")]
    #[expect(dead_code, reason = "only read")]
    enum Inner {
        Plain,
        Scaled(f64),
    }

    #[derive(Deserialize)]
    #[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
    #[expect(dead_code, reason = "only read")]
    enum Tagged {
        Fast { rate: f64 },
    }

    fn why(text: &str) -> Option<Rejection> {
        rejection::<Outer>(Value::Table(text.parse().expect("TOML")))
    }

    fn unknown(found: &str, known: &'static [&'static str]) -> Option<Rejection> {
        Some(Rejection::Unknown { found: found.into(), known })
    }

    #[test]
    fn a_rejection_has_the_unknown_key_and_the_known_ones() {
        assert_eq!(why("count = 3\ninner = \"plain\""), None);
        assert_eq!(
            why("count = 3\ninner = { scaled = 1.5 }\ntagged = { kind = \"fast\", rate = 1.0 }"),
            None
        );
        assert_eq!(why("count = 3\ncuont = 3"), unknown("cuont", &["count", "inner", "tagged"]));
        assert_eq!(why("count = 3\ninner = \"plan\""), unknown("plan", &["plain", "scaled"]));
        assert_eq!(why("count = 3\ninner = { scald = 1.5 }"), unknown("scald", &["plain", "scaled"]));
        assert_eq!(why("count = 3\ntagged = { kind = \"fast\", rat = 1.0 }"), unknown("rat", &["rate"]));
        assert_eq!(why("inner = \"plain\""), Some(Rejection::Missing));
        assert_eq!(why("count = \"three\""), Some(Rejection::Other));
    }
}
