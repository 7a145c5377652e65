//! Sizes and durations with units, as in `8GiB` and `15m`.

use crate::limits::{DURATION_SECONDS_MAX, QUANTITY_MAX};
use serde::{Deserialize, Deserializer};
use std::error::Error;
use std::fmt;
use std::str::FromStr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Units of bytes; a unit that is the end of another one comes after it.
const BYTES: [(&str, f64); 9] = [
    ("KiB", 1024.0),
    ("MiB", 1_048_576.0),
    ("GiB", 1_073_741_824.0),
    ("TiB", 1_099_511_627_776.0),
    ("KB", 1e3),
    ("MB", 1e6),
    ("GB", 1e9),
    ("TB", 1e12),
    ("B", 1.0),
];
/// Units of time, in seconds, in the same order.
const SECONDS: [(&str, f64); 5] = [("ms", 1e-3), ("s", 1.0), ("m", 60.0), ("h", 3600.0), ("d", 86_400.0)];

/// A text that is not a size or a duration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InvalidQuantity {
    /// The text.
    pub found: String,
    /// The expected form.
    pub expected: &'static str,
}

impl fmt::Display for InvalidQuantity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: expected {}", self.found, self.expected)
    }
}

impl Error for InvalidQuantity {}

/// A number of bytes: `8GiB`, `512MB`, `1024`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size(pub u64);

/// The value of a number with a unit, in the base unit.
fn scaled(text: &str, units: &[(&str, f64)], expected: &'static str) -> Result<f64, InvalidQuantity> {
    let text = text.trim();
    let invalid = || InvalidQuantity { found: text.to_owned(), expected };
    let unit = units.iter().find(|(unit, _)| text.ends_with(unit));
    let (number, factor) = match unit {
        Some((unit, factor)) => (&text[..text.len() - unit.len()], *factor),
        None => (text, 1.0),
    };
    let value: f64 = number.trim().parse().map_err(|_| invalid())?;
    if !value.is_finite() || value < 0.0 || value * factor > QUANTITY_MAX {
        return Err(invalid());
    }
    Ok(value * factor)
}

impl FromStr for Size {
    type Err = InvalidQuantity;

    fn from_str(text: &str) -> Result<Self, InvalidQuantity> {
        Ok(Self(scaled(text, &BYTES, "a size such as 8GiB or 512MB")? as u64))
    }
}

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// A duration with a unit: `90s`, `15m`, `1h`, `7d`.
///
/// # Errors
/// When the text is not a duration.
pub fn duration(text: &str) -> Result<Duration, InvalidQuantity> {
    let expected = "a time such as 90s, 15m, 1h or 7d";
    if !text.trim().ends_with(char::is_alphabetic) {
        return Err(InvalidQuantity { found: text.to_owned(), expected });
    }
    Ok(Duration::from_secs_f64(scaled(text, &SECONDS, expected)?.min(DURATION_SECONDS_MAX)))
}

/// A size in text, with a binary unit: `1.5 GiB`.
#[must_use]
pub fn bytes(number: u64) -> String {
    let mut value = number as f64;
    for unit in ["B", "KiB", "MiB", "GiB"] {
        if value < 1024.0 {
            return format!("{value:.1} {unit}");
        }
        value /= 1024.0;
    }
    format!("{value:.1} TiB")
}

/// A number in text, with four significant digits and a decimal unit: `1.879B`.
#[must_use]
pub fn short(number: u64) -> String {
    let (value, unit) = match number {
        n if n >= 1_000_000_000_000 => (n as f64 / 1e12, "T"),
        n if n >= 1_000_000_000 => (n as f64 / 1e9, "B"),
        n if n >= 1_000_000 => (n as f64 / 1e6, "M"),
        n if n >= 1_000 => (n as f64 / 1e3, "k"),
        n => return n.to_string(),
    };
    format!("{value:.3}{unit}")
}

/// A number of things: `1 file`, `1.204k files`.
#[must_use]
pub fn counted(count: u64, thing: &str) -> String {
    format!("{} {thing}{}", short(count), if count == 1 { "" } else { "s" })
}

/// Seconds in text: `12.5 ms`, `2.50 s`.
#[must_use]
pub fn seconds(s: f64) -> String {
    if s < 1.0 { format!("{:.1} ms", s * 1e3) } else { format!("{s:.2} s") }
}

/// The time since 1970.
pub(crate) fn since_1970() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_durations_are_read_with_their_units() {
        for (text, bytes) in
            [("8GiB", 8 << 30), ("512MB", 512_000_000), ("1.5 KiB", 1536), ("7", 7), ("7B", 7)]
        {
            assert_eq!(text.parse::<Size>(), Ok(Size(bytes)), "{text}");
        }
        for (text, ms) in
            [("90s", 90_000), ("1.5h", 5_400_000), ("20ms", 20), ("2m", 120_000), ("1d", 86_400_000)]
        {
            assert_eq!(duration(text).map(|d| d.as_millis()), Ok(ms), "{text}");
        }
        for text in ["", "x", "GiB", "-1GB", "1e99TB", "NaN"] {
            assert!(text.parse::<Size>().is_err(), "{text}");
            assert!(duration(text).is_err(), "{text}");
        }
        assert!(duration("5").is_err(), "a duration needs its unit");
        assert_eq!(
            "much".parse::<Size>().unwrap_err().to_string(),
            "\"much\": expected a size such as 8GiB or 512MB"
        );
    }

    #[test]
    fn quantities_are_written_with_the_largest_unit_that_fits() {
        assert_eq!((bytes(1023), bytes(3 << 29)), ("1023.0 B".into(), "1.5 GiB".into()));
        assert_eq!((short(999), short(1_879_000_000)), ("999".into(), "1.879B".into()));
        assert_eq!((seconds(0.0125), seconds(2.5)), ("12.5 ms".into(), "2.50 s".into()));
    }
}
