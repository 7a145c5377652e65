//! The layout of a value in the database: a version byte, sixteen bytes of BLAKE3, postcard.
//!
//! The checksum covers the tree and the key too, so that a record under a wrong key is detected.

use crate::error::{Error, Result};
use crate::limits::RECORD_BYTES_MAX;
use serde::Serialize;
use serde::de::DeserializeOwned;

/// The version of this layout, not of the value.
const VERSION: u8 = 1;
const CHECKSUM_BYTES: usize = 16;
const HEADER_BYTES: usize = 1 + CHECKSUM_BYTES;

/// The place of a record, for its checksum and for errors.
#[derive(Clone, Copy)]
pub(crate) struct Place<'a> {
    /// The tree's name.
    pub(crate) tree: &'static str,
    /// The key's bytes.
    pub(crate) key: &'a [u8],
}

impl Place<'_> {
    /// The key in readable form: a step as its number, a name as text.
    fn readable(self) -> String {
        match (self.tree, <[u8; 8]>::try_from(self.key)) {
            ("journal" | "catalogue", Ok(bytes)) => format!("step {}", u64::from_be_bytes(bytes)),
            _ => String::from_utf8_lossy(self.key).into_owned(),
        }
    }

    fn damaged(self, reason: impl Into<String>) -> Error {
        Error::DamagedRecord { tree: self.tree, key: self.readable(), reason: reason.into() }
    }

    fn checksum(self, payload: &[u8]) -> [u8; CHECKSUM_BYTES] {
        let mut hasher = blake3::Hasher::new();
        // With lengths, a byte cannot move from the key to the payload undetected.
        for part in [self.tree.as_bytes(), self.key] {
            hasher.update(&(part.len() as u64).to_le_bytes()).update(part);
        }
        hasher.update(&[VERSION]).update(payload);
        let mut checksum = [0; CHECKSUM_BYTES];
        hasher.finalize_xof().fill(&mut checksum);
        checksum
    }
}

/// Encodes a value for its place.
pub(crate) fn seal<T: Serialize>(place: Place<'_>, value: &T) -> Result<Vec<u8>> {
    let unstorable = |reason: String| Error::Unstorable {
        what: format!("{} in {}", place.readable(), place.tree),
        reason,
    };
    let payload = postcard::to_stdvec(value).map_err(|e| unstorable(e.to_string()))?;
    if payload.len() > RECORD_BYTES_MAX {
        return Err(unstorable(format!("it has {} bytes, at most {RECORD_BYTES_MAX}", payload.len())));
    }
    let mut bytes = Vec::with_capacity(HEADER_BYTES + payload.len());
    bytes.push(VERSION);
    bytes.extend_from_slice(&place.checksum(&payload));
    bytes.extend_from_slice(&payload);
    Ok(bytes)
}

/// Verifies a record; returns its payload.
pub(crate) fn check<'b>(place: Place<'_>, bytes: &'b [u8]) -> Result<&'b [u8]> {
    let Some((header, payload)) = bytes.split_at_checked(HEADER_BYTES) else {
        return Err(place.damaged(format!("it has only {} bytes", bytes.len())));
    };
    if header[0] != VERSION {
        let what = format!("the record {} of {}", place.readable(), place.tree);
        return Err(Error::Format { what, found: header[0].into(), known: VERSION.into() });
    }
    if header[1..] != place.checksum(payload) {
        return Err(place.damaged("wrong checksum"));
    }
    Ok(payload)
}

/// Decodes a value from its place.
pub(crate) fn open<T: DeserializeOwned>(place: Place<'_>, bytes: &[u8]) -> Result<T> {
    let payload = check(place, bytes)?;
    let (value, rest) = postcard::take_from_bytes(payload)
        .map_err(|e| place.damaged(format!("it is not of the expected type ({e})")))?;
    if !rest.is_empty() {
        return Err(place.damaged(format!("it has {} extra bytes", rest.len())));
    }
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    type Value = (u64, String, Vec<Option<f32>>, bool);

    proptest! {
        #[test]
        fn a_sealed_value_opens_and_any_flipped_byte_is_detected(
            key in proptest::collection::vec(any::<u8>(), 0..12),
            value in any::<(u64, String, Vec<Option<i32>>, bool)>(),
            at in any::<prop::sample::Index>(),
            flip in 1..=255_u8,
        ) {
            let value: Value =
                (value.0, value.1, value.2.into_iter().map(|x| x.map(|x| x as f32)).collect(), value.3);
            let place = Place { tree: "journal", key: &key };
            let mut bytes = seal(place, &value).unwrap();
            prop_assert_eq!(open::<Value>(place, &bytes).unwrap(), value);
            let at = at.index(bytes.len());
            bytes[at] ^= flip;
            prop_assert!(open::<Value>(place, &bytes).is_err());
            bytes[at] ^= flip;
            prop_assert!(open::<Value>(place, &bytes[..at]).is_err());
            let mut other = key.clone();
            other.push(0);
            for other_place in [Place { tree: "journal", key: &other }, Place { tree: "facts", key: &key }] {
                prop_assert!(open::<Value>(other_place, &bytes).is_err());
            }
        }
    }

    #[test]
    fn a_damaged_record_is_named_by_its_step() {
        let key = 42_u64.to_be_bytes();
        let place = Place { tree: "journal", key: &key };
        let mut bytes = seal(place, &"committed").unwrap();
        bytes[20] ^= 1;
        let error = open::<String>(place, &bytes).unwrap_err().to_string();
        assert_eq!(error, "the record step 42 of journal is damaged: wrong checksum");
    }

    /// The layout is fixed: a change needs a new [`VERSION`].
    #[test]
    fn the_layout_of_a_record_is_fixed() {
        let key = 42_u64.to_be_bytes();
        let bytes = seal(Place { tree: "journal", key: &key }, &(7_u64, "seven")).unwrap();
        let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, "0103f732671ea05fe97f3f16c35ffc15930705736576656e");
    }

    #[test]
    fn an_oversized_record_is_refused() {
        let oversized = vec![1_u8; RECORD_BYTES_MAX + 1];
        let error = seal(Place { tree: "facts", key: b"oversized" }, &oversized).unwrap_err();
        assert!(matches!(error, Error::Unstorable { .. }), "{error}");
    }
}
