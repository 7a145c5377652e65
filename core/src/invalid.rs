//! The error of a value that is out of its bounds.

/// A value with a wrong key, bound or form, from a configuration file or from a peer.
///
/// ```
/// let error = volary_core::InvalidValue::new("training.lanes", 0, "a number from 1 to 65536");
/// assert_eq!(error.to_string(), "training.lanes = 0: expected a number from 1 to 65536");
/// ```
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{key} = {found}: expected {expected}")]
pub struct InvalidValue {
    /// The key with its section, as in `training.lanes`.
    pub key: String,
    /// The value.
    pub found: String,
    /// The expected values.
    pub expected: String,
}

impl InvalidValue {
    /// A value and the expectation that it does not meet.
    #[must_use]
    pub fn new(key: impl Into<String>, found: impl ToString, expected: impl Into<String>) -> Self {
        Self { key: key.into(), found: found.to_string(), expected: expected.into() }
    }
}
