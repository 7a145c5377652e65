//! The error of a value on the command line.

use std::borrow::Cow;
use std::error::Error;
use std::fmt;

/// A value that its option does not accept; clap names the option and the value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InvalidArgument {
    /// The expected values, as in `a number that is not negative`.
    pub expected: Cow<'static, str>,
}

impl InvalidArgument {
    /// With a description of the expected values.
    #[must_use]
    pub fn new(expected: impl Into<Cow<'static, str>>) -> Self {
        Self { expected: expected.into() }
    }
}

impl fmt::Display for InvalidArgument {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "expected {}", self.expected)
    }
}

impl Error for InvalidArgument {}
