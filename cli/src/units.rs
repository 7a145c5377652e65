//! Sizes and durations as people write them.

use serde::{Deserialize, Deserializer};
use std::str::FromStr;

/// Units of bytes; a unit that is another one's end comes after it.
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

/// A number of bytes: `8GiB`, `512MB`, `1024`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size(pub u64);

/// Splits a number with a unit into the number, in the smallest unit.
fn scaled(text: &str, units: &[(&str, f64)], expected: &str) -> Result<f64, String> {
    let text = text.trim();
    let unit = units.iter().find(|(unit, _)| text.ends_with(unit));
    let (number, factor) = match unit {
        Some((unit, factor)) => (&text[..text.len() - unit.len()], *factor),
        None => (text, 1.0),
    };
    let value: f64 = number.trim().parse().map_err(|_| format!("{text:?}: expected {expected}"))?;
    if !value.is_finite() || value < 0.0 || value * factor > 1e18 {
        return Err(format!("{text:?}: expected {expected}"));
    }
    Ok(value * factor)
}

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Ok(Self(scaled(text, &BYTES, "a size such as 8GiB or 512MB")? as u64))
    }
}

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// A time: `90s`, `15m`, `1h`, `7d`.
///
/// # Errors
/// What was expected.
pub fn duration(text: &str) -> Result<std::time::Duration, String> {
    const TIMES: [(&str, f64); 5] = [("ms", 1e-3), ("s", 1.0), ("m", 60.0), ("h", 3600.0), ("d", 86_400.0)];
    let expected = "a time such as 90s, 15m, 1h or 7d";
    if !text.trim().ends_with(char::is_alphabetic) {
        return Err(format!("{text:?}: expected {expected}"));
    }
    Ok(std::time::Duration::from_secs_f64(scaled(text, &TIMES, expected)?.min(1e10)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_times_are_read_with_their_units() {
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
        assert!(duration("5").is_err(), "a time needs its unit");
    }
}
