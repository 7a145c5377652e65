//! What a run is told about its data: the sources, their weights and the tokenizer.

use std::collections::BTreeSet;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::limits::{MAX_VOCABULARY, MIN_VOCABULARY};

/// The data of a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataOptions {
    /// Where the text comes from; at least one.
    pub sources: Vec<SourceOptions>,
    /// A tokenizer to use, in the `tokenizer.json` format; without one, a byte-level BPE is trained.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokenizer: Option<PathBuf>,
    /// The size of a trained tokenizer's vocabulary, in tokens (the end of text is one).
    #[serde(default = "default_vocabulary")]
    pub vocabulary: usize,
    /// How much text a tokenizer is trained on, in bytes; taken from the sources in proportion to their weights.
    #[serde(default = "default_tokenizer_sample_bytes")]
    pub tokenizer_sample_bytes: u64,
    /// The share of documents held out for validation, from 0 to 0.5.
    #[serde(default = "default_validation_fraction")]
    pub validation_fraction: f64,
    /// Whether text that is not UTF-8 is an error; otherwise it is replaced and counted.
    #[serde(default)]
    pub strict: bool,
    /// The folder of tokenised corpora that runs share; default `$XDG_CACHE_HOME/volary`, else `~/.cache/volary`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache: Option<PathBuf>,
}

/// One source of text.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SourceOptions {
    /// The source's name, unique in the run and part of file names: letters, digits, `-`, `_` and `.`.
    pub name: String,
    /// A file, a folder (read recursively) or a glob; `~`, `$NAME` and `${NAME}` are expanded.
    pub path: String,
    /// How often sequences come from this source, relative to the others.
    #[serde(default = "default_weight")]
    pub weight: f64,
    /// The field or column that holds the text of JSONL and Parquet records; default `text`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub column: Option<String>,
    /// Read no more than this many bytes of text, from files picked all over the source.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_bytes: Option<u64>,
}

fn default_vocabulary() -> usize {
    4096
}

fn default_tokenizer_sample_bytes() -> u64 {
    8 << 20
}

fn default_validation_fraction() -> f64 {
    0.01
}

fn default_weight() -> f64 {
    1.0
}

impl Default for DataOptions {
    fn default() -> Self {
        Self {
            sources: Vec::new(),
            tokenizer: None,
            vocabulary: default_vocabulary(),
            tokenizer_sample_bytes: default_tokenizer_sample_bytes(),
            validation_fraction: default_validation_fraction(),
            strict: false,
            cache: None,
        }
    }
}

impl SourceOptions {
    /// A source of weight 1 that is read whole.
    #[must_use]
    pub fn new(name: impl Into<String>, path: impl Into<String>) -> Self {
        Self { name: name.into(), path: path.into(), weight: default_weight(), column: None, max_bytes: None }
    }

    /// The field or column that holds the text.
    #[must_use]
    pub fn column(&self) -> &str {
        self.column.as_deref().unwrap_or("text")
    }

    fn validate(&self, at: usize) -> Result<(), Error> {
        let option = |field: &str| format!("sources[{at}].{field}");
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        if self.name.is_empty()
            || self.name.len() > 100
            || self.name.starts_with('.')
            || !self.name.chars().all(plain)
        {
            let reason = format!(
                "{:?} is not a name: use 1 to 100 letters, digits, '-', '_' and '.', the first not a '.'",
                self.name
            );
            return Err(Error::Option { option: option("name"), reason });
        }
        if self.path.is_empty() {
            return Err(Error::Option { option: option("path"), reason: "is empty".into() });
        }
        if !(self.weight.is_finite() && self.weight > 0.0) {
            let reason = format!("{} (source {:?}) is not a positive number", self.weight, self.name);
            return Err(Error::Option { option: option("weight"), reason });
        }
        if self.max_bytes == Some(0) {
            return Err(Error::Option {
                option: option("max_bytes"),
                reason: "0 leaves nothing to read".into(),
            });
        }
        Ok(())
    }
}

impl DataOptions {
    /// Checks everything that can be checked without looking at a file.
    pub fn validate(&self) -> Result<(), Error> {
        let fail = |option: &str, reason: String| Err(Error::Option { option: option.into(), reason });
        if self.sources.is_empty() {
            return fail("sources", "is empty: name at least one source of text".into());
        }
        let mut names = BTreeSet::new();
        for (at, source) in self.sources.iter().enumerate() {
            source.validate(at)?;
            // Names become file names, and some file systems do not tell case apart.
            if !names.insert(source.name.to_ascii_lowercase()) {
                return fail("sources", format!("two sources are called {:?} (case aside)", source.name));
            }
        }
        if !self.sources.iter().map(|s| s.weight).sum::<f64>().is_finite() {
            return fail("sources", "the weights' sum is not finite".into());
        }
        if !(0.0..=0.5).contains(&self.validation_fraction) {
            return fail("validation_fraction", format!("{} is not in 0 to 0.5", self.validation_fraction));
        }
        if self.tokenizer.is_some() {
            return Ok(());
        }
        if !(MIN_VOCABULARY..=MAX_VOCABULARY).contains(&self.vocabulary) {
            return fail(
                "vocabulary",
                format!("{} is not in {MIN_VOCABULARY} to {MAX_VOCABULARY}", self.vocabulary),
            );
        }
        if self.tokenizer_sample_bytes == 0 {
            return fail("tokenizer_sample_bytes", "0 leaves nothing to train a tokenizer on".into());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_name_and_a_path_must_be_given_and_unknown_options_are_refused() {
        let json = r#"{"sources": [{"name": "a", "path": "a.txt"}]}"#;
        let options: DataOptions = serde_json::from_str(json).unwrap();
        let expected =
            DataOptions { sources: vec![SourceOptions::new("a", "a.txt")], ..DataOptions::default() };
        assert_eq!(options, expected);
        options.validate().unwrap();
        let written = serde_json::to_string(&options).unwrap();
        assert_eq!(serde_json::from_str::<DataOptions>(&written).unwrap(), options);
        assert!(serde_json::from_str::<DataOptions>(&json.replace("path", "pth")).is_err());
    }

    #[test]
    fn numbers_out_of_range_are_refused_by_name() {
        let sources = vec![SourceOptions::new("a", "a.txt")];
        let good = DataOptions { sources, ..DataOptions::default() };
        for (bad, name) in [
            (DataOptions { vocabulary: 256, ..good.clone() }, "vocabulary"),
            (DataOptions { validation_fraction: 0.6, ..good.clone() }, "validation_fraction"),
            (DataOptions { validation_fraction: f64::NAN, ..good.clone() }, "validation_fraction"),
            (DataOptions { tokenizer_sample_bytes: 0, ..good }, "tokenizer_sample_bytes"),
        ] {
            assert!(bad.validate().unwrap_err().to_string().contains(name));
        }
    }
}
