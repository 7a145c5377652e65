//! The options `[data.duplicates]`.

use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::limits::{MAX_PERMUTATIONS, MAX_SHINGLE_WORDS};

/// The removal of duplicates. Exact copies are removed in any case.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DuplicateOptions {
    /// Whether documents that nearly equal an earlier one are removed as well.
    pub near: bool,
    /// The length of the compared n-grams, in words.
    pub ngram: usize,
    /// The length of a signature. The standard error of an estimated similarity s is
    /// `sqrt(s (1 - s) / permutations)`.
    pub permutations: usize,
    /// The similarity from which two documents are near-duplicates, 0 to 1.
    pub threshold: f64,
}

impl Default for DuplicateOptions {
    fn default() -> Self {
        Self { near: true, ngram: 5, permutations: 128, threshold: 0.8 }
    }
}

impl DuplicateOptions {
    pub(crate) fn validate(&self) -> Result<(), Error> {
        let fail =
            |option: &str, reason| Err(Error::Option { option: format!("duplicates.{option}"), reason });
        if !(1..=MAX_SHINGLE_WORDS).contains(&self.ngram) {
            return fail("ngram", format!("{}: expected 1 to {MAX_SHINGLE_WORDS}", self.ngram));
        }
        if !(1..=MAX_PERMUTATIONS).contains(&self.permutations) {
            return fail("permutations", format!("{}: expected 1 to {MAX_PERMUTATIONS}", self.permutations));
        }
        if !(self.threshold > 0.0 && self.threshold <= 1.0) {
            return fail("threshold", format!("{}: expected more than 0 and at most 1", self.threshold));
        }
        Ok(())
    }
}
