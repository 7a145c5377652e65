//! The options `[data.quality]`.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::limits::MAX_ALPHA;

/// The filter of low-quality documents.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QualityOptions {
    /// The classifier's file, relative to the configuration.
    pub classifier: PathBuf,
    /// The shape of the Pareto distribution: the larger, the fewer documents of low scores stay.
    #[serde(default = "default_alpha")]
    pub alpha: f64,
    /// The names of the sources to filter; all if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sources: Option<Vec<String>>,
}

/// GPT-3's.
fn default_alpha() -> f64 {
    9.0
}

pub(super) fn check_alpha(alpha: f64) -> Result<(), String> {
    match alpha > 0.0 && alpha <= MAX_ALPHA {
        true => Ok(()),
        false => Err(format!("{alpha}: expected more than 0 and at most {MAX_ALPHA}")),
    }
}

impl QualityOptions {
    /// A filter of all sources.
    #[must_use]
    pub fn new(classifier: impl Into<PathBuf>) -> Self {
        Self { classifier: classifier.into(), alpha: default_alpha(), sources: None }
    }

    /// Whether the filter is for the source of this name.
    #[must_use]
    pub fn filters(&self, source: &str) -> bool {
        self.sources.as_ref().is_none_or(|names| names.iter().any(|name| name == source))
    }

    pub(crate) fn validate(&self, sources: &[&str]) -> Result<(), Error> {
        let fail = |option: &str, reason| Err(Error::Option { option: format!("quality.{option}"), reason });
        if let Err(reason) = check_alpha(self.alpha) {
            return fail("alpha", reason);
        }
        let mut names = self.sources.iter().flatten();
        if let Some(unknown) = names.find(|name| !sources.contains(&name.as_str())) {
            return fail("sources", format!("no source is named {unknown:?}: expected one of {sources:?}"));
        }
        Ok(())
    }
}
