//! The files of a folder that a source does not read.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::limits::MAX_SKIP_REASONS;

/// Files that were skipped for one reason.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Skipped {
    /// The reason, such as `"no known type (.png)"`.
    pub reason: String,
    /// The number of files.
    pub files: u64,
    /// The path of the first of them.
    pub example: String,
}

/// Counts a skipped file. Reasons beyond the limit count as one.
pub(crate) fn add(skipped: &mut Vec<Skipped>, reason: String, path: &Path) {
    let known = skipped.iter().position(|other| other.reason == reason);
    if known.is_none() && skipped.len() < MAX_SKIP_REASONS {
        skipped.push(Skipped { reason, files: 1, example: path.display().to_string() });
        return;
    }
    let at = known.unwrap_or(skipped.len() - 1);
    skipped[at].files += 1;
    if known.is_none() {
        skipped[at].reason = "other reasons".into();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_counted_by_reason_and_the_reasons_are_bounded() {
        let mut skipped = Vec::new();
        for n in 0..100 {
            add(&mut skipped, format!("reason {n}"), Path::new("a"));
            add(&mut skipped, "reason 0".into(), Path::new("b"));
        }
        assert_eq!(skipped.len(), MAX_SKIP_REASONS);
        assert_eq!((skipped[0].files, skipped[0].example.as_str()), (101, "a"));
        assert_eq!(skipped.iter().map(|skipped| skipped.files).sum::<u64>(), 200);
    }
}
