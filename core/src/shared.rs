//! A value that is sent to many nodes and encoded once.

use crate::digest::Digest;
use serde::Serialize;
use std::fmt;
use std::ops::Deref;
use std::sync::{Arc, OnceLock};

/// A value with its encoded form; clones share both.
pub struct Shared<T>(Arc<Inner<T>>);

struct Inner<T> {
    value: T,
    encoded: OnceLock<Encoded>,
}

/// The bytes of a value, and their digest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Encoded {
    /// The value as postcard encodes it.
    pub bytes: Vec<u8>,
    /// The digest of `bytes`.
    pub digest: Digest,
}

impl<T> Shared<T> {
    /// Shares a value.
    #[must_use]
    pub fn new(value: T) -> Self {
        Self(Arc::new(Inner { value, encoded: OnceLock::new() }))
    }
}

impl<T: Serialize> Shared<T> {
    /// The encoded value.
    ///
    /// # Errors
    /// The encoder's, for a value that has no binary form.
    pub fn encoded(&self) -> postcard::Result<&Encoded> {
        if let Some(encoded) = self.0.encoded.get() {
            return Ok(encoded);
        }
        let bytes = postcard::to_stdvec(&self.0.value)?;
        let encoded = Encoded { digest: Digest::of(&bytes), bytes };
        Ok(self.0.encoded.get_or_init(|| encoded))
    }
}

impl<T> Clone for Shared<T> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<T: Default> Default for Shared<T> {
    fn default() -> Self {
        Self::new(T::default())
    }
}

impl<T> Deref for Shared<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0.value
    }
}

impl<T: PartialEq> PartialEq for Shared<T> {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

impl<T: fmt::Debug> fmt::Debug for Shared<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Serializer;
    use std::sync::atomic::{AtomicUsize, Ordering};

    static ENCODED: AtomicUsize = AtomicUsize::new(0);

    struct Counted(Vec<u32>);

    impl Serialize for Counted {
        fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
            ENCODED.fetch_add(1, Ordering::Relaxed);
            self.0.serialize(serializer)
        }
    }

    #[test]
    fn a_shared_value_is_encoded_once() {
        let shared = Shared::new(Counted((0..1_000).collect()));
        for clone in vec![shared.clone(); 10] {
            let encoded = clone.encoded().expect("bytes");
            assert_eq!(postcard::from_bytes::<Vec<u32>>(&encoded.bytes).expect("numbers"), shared.0.value.0);
            assert_eq!(encoded.digest, Digest::of(&encoded.bytes));
        }
        assert_eq!(ENCODED.load(Ordering::Relaxed), 1);
    }
}
