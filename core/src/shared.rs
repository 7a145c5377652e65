//! A value that is sent to many nodes and encoded once.

use serde::{Deserialize, Deserializer, Serialize, Serializer, de, ser};
use std::fmt;
use std::ops::Deref;
use std::sync::{Arc, OnceLock};

/// A value with its encoded form; clones share both. In a message it is a sequence of bytes, in which the
/// value is encoded as the message is (postcard).
pub struct Shared<T>(Arc<Inner<T>>);

struct Inner<T> {
    value: Arc<T>,
    encoded: OnceLock<Vec<u8>>,
}

impl<T> Shared<T> {
    /// Shares a value.
    #[must_use]
    pub fn new(value: T) -> Self {
        Self(Arc::new(Inner { value: Arc::new(value), encoded: OnceLock::new() }))
    }

    /// The value alone.
    #[must_use]
    pub fn value(&self) -> Arc<T> {
        Arc::clone(&self.0.value)
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

impl<T: Serialize> Serialize for Shared<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if let Some(encoded) = self.0.encoded.get() {
            return serializer.serialize_bytes(encoded);
        }
        let encoded = postcard::to_stdvec(&self.0.value).map_err(ser::Error::custom)?;
        serializer.serialize_bytes(self.0.encoded.get_or_init(|| encoded))
    }
}

impl<'de, T: de::DeserializeOwned> Deserialize<'de> for Shared<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let encoded = <&[u8]>::deserialize(deserializer)?;
        postcard::from_bytes(encoded).map(Self::new).map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    static ENCODED: AtomicUsize = AtomicUsize::new(0);

    #[derive(Debug, PartialEq, Deserialize)]
    struct Counted(Vec<u32>);

    impl Serialize for Counted {
        fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
            ENCODED.fetch_add(1, Ordering::Relaxed);
            serializer.serialize_newtype_struct("Counted", &self.0)
        }
    }

    #[test]
    fn a_shared_value_is_encoded_once_and_survives() {
        let shared = Shared::new(Counted((0..1_000).collect()));
        let all: Vec<Vec<u8>> =
            (0..10).map(|_| postcard::to_stdvec(&(7u8, shared.clone())).expect("bytes")).collect();
        assert_eq!(ENCODED.load(Ordering::Relaxed), 1);
        for bytes in all {
            let back: (u8, Shared<Counted>) = postcard::from_bytes(&bytes).expect("a message");
            assert_eq!(back, (7, shared.clone()));
            assert!(postcard::from_bytes::<(u8, Shared<Counted>)>(&bytes[..bytes.len() - 1]).is_err());
        }
    }
}
