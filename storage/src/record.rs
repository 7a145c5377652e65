//! How a value lies in the database: a version byte, sixteen bytes of BLAKE3, postcard.
//!
//! The checksum covers the tree and the key as well, so that a record under another's key is found out too.

use crate::error::{Error, Result};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// The version of this layout, not of what the caller stores in it.
const VERSION: u8 = 1;
const SUM: usize = 16;
const HEADER: usize = 1 + SUM;

/// sled puts up to sixteen values into a page, and a page bigger than a quarter of a segment into a file of its own,
/// which it never syncs: sixteen of these do not make such a page.
pub(crate) const MAX_BYTES: usize = 120 * 1024;

/// Where a record lies, for its checksum and for what is said when it does not fit.
#[derive(Clone, Copy)]
pub(crate) struct Place<'a> {
    /// The tree's name.
    pub(crate) tree: &'static str,
    /// The key's bytes.
    pub(crate) key: &'a [u8],
}

impl Place<'_> {
    /// The key as people read it: a step's eight bytes as its number, a name as itself.
    fn readable(self) -> String {
        match (self.tree, <[u8; 8]>::try_from(self.key)) {
            ("journal" | "catalogue", Ok(bytes)) => format!("step {}", u64::from_be_bytes(bytes)),
            _ => String::from_utf8_lossy(self.key).into_owned(),
        }
    }

    fn damaged(self, reason: impl Into<String>) -> Error {
        Error::DamagedRecord { tree: self.tree, key: self.readable(), reason: reason.into() }
    }

    fn sum(self, payload: &[u8]) -> [u8; SUM] {
        let mut hasher = blake3::Hasher::new();
        // Lengths first: otherwise a byte could move from the key to the payload unseen.
        for part in [self.tree.as_bytes(), self.key] {
            hasher.update(&(part.len() as u64).to_le_bytes()).update(part);
        }
        hasher.update(&[VERSION]).update(payload);
        let mut sum = [0; SUM];
        hasher.finalize_xof().fill(&mut sum);
        sum
    }
}

/// A value's bytes for this place.
pub(crate) fn seal<T: Serialize>(place: Place<'_>, value: &T) -> Result<Vec<u8>> {
    let unstorable = |reason: String| Error::Unstorable {
        what: format!("{} in {}", place.readable(), place.tree),
        reason,
    };
    let payload = postcard::to_stdvec(value).map_err(|e| unstorable(e.to_string()))?;
    if payload.len() > MAX_BYTES {
        return Err(unstorable(format!("it has {} bytes, and a record holds {MAX_BYTES}", payload.len())));
    }
    let mut bytes = Vec::with_capacity(HEADER + payload.len());
    bytes.push(VERSION);
    bytes.extend_from_slice(&place.sum(&payload));
    bytes.extend_from_slice(&payload);
    Ok(bytes)
}

/// Whether the bytes are those that were written here; their payload if so.
pub(crate) fn check<'b>(place: Place<'_>, bytes: &'b [u8]) -> Result<&'b [u8]> {
    let Some((header, payload)) = bytes.split_at_checked(HEADER) else {
        return Err(place.damaged(format!("it has only {} bytes", bytes.len())));
    };
    if header[0] != VERSION {
        let what = format!("the record {} of {}", place.readable(), place.tree);
        return Err(Error::Format { what, found: header[0].into(), known: VERSION.into() });
    }
    if header[1..] != place.sum(payload) {
        return Err(place.damaged("its checksum does not fit"));
    }
    Ok(payload)
}

/// The value that was sealed.
pub(crate) fn open<T: DeserializeOwned>(place: Place<'_>, bytes: &[u8]) -> Result<T> {
    let payload = check(place, bytes)?;
    let (value, rest) = postcard::take_from_bytes(payload)
        .map_err(|e| place.damaged(format!("it holds something else than is asked for ({e})")))?;
    if !rest.is_empty() {
        return Err(place.damaged(format!("it has {} bytes more than what is asked for", rest.len())));
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
        fn what_is_sealed_opens_and_any_flipped_byte_is_found(
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
            for elsewhere in [Place { tree: "journal", key: &other }, Place { tree: "facts", key: &key }] {
                prop_assert!(open::<Value>(elsewhere, &bytes).is_err());
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
        assert_eq!(error, "the record step 42 of journal is damaged: its checksum does not fit");
    }

    #[test]
    fn a_record_that_sled_would_not_sync_is_refused() {
        let big = vec![1_u8; MAX_BYTES + 1];
        let error = seal(Place { tree: "facts", key: b"big" }, &big).unwrap_err();
        assert!(matches!(error, Error::Unstorable { .. }), "{error}");
    }
}
