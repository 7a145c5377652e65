//! The options of a run's data: the sources, their weights and the tokenizer.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::duplicates::DuplicateOptions;
use crate::error::Error;
use crate::limits::{MAX_SOURCE_NAME_BYTES, MAX_VALIDATION_FRACTION, MAX_VOCABULARY, MIN_VOCABULARY};
use crate::quality::QualityOptions;

/// The data of a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataOptions {
    /// The sources of text; at least one.
    pub sources: Vec<SourceOptions>,
    /// A tokenizer in the `tokenizer.json` format; if absent, a byte-level BPE is trained.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokenizer: Option<PathBuf>,
    /// The size of a trained tokenizer's vocabulary, in tokens (including the end of text).
    #[serde(default = "default_vocabulary")]
    pub vocabulary: usize,
    /// The training text of a tokenizer, in bytes; sampled from the sources in proportion to their weights.
    #[serde(default = "default_tokenizer_sample_bytes")]
    pub tokenizer_sample_bytes: u64,
    /// The share of each source's tokens that is held out for validation, by whole documents; from 0 to 0.5.
    #[serde(default = "default_validation_fraction")]
    pub validation_fraction: f64,
    /// The filter of low-quality documents; none if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quality: Option<QualityOptions>,
    /// The removal of duplicates; none if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub duplicates: Option<DuplicateOptions>,
    /// Whether text that is not UTF-8 and records that cannot be read are errors; otherwise invalid bytes are
    /// replaced, records are skipped, and both are counted.
    #[serde(default)]
    pub strict: bool,
    /// The cache of tokenized corpora that runs share; default `$XDG_CACHE_HOME/volary`, else
    /// `~/.cache/volary`.
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
    /// The only files to read, with their BLAKE3 hashes: lines `HASH  RELATIVE/PATH` as `b3sum` prints them.
    /// Paths are relative to `path`, which is a folder or a glob of folders: the first folder with the file
    /// counts. A relative path of the manifest itself is relative to the working folder; see
    /// [`DataOptions::resolve_paths`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub manifest: Option<PathBuf>,
    /// The relative frequency of sequences from this source.
    #[serde(default = "default_weight")]
    pub weight: f64,
    /// The field or column with the text of JSONL and Parquet records; default `text`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub column: Option<String>,
    /// The most text to read, in bytes; the files are a pseudo-random sample of the source.
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
            quality: None,
            duplicates: None,
            strict: false,
            cache: None,
        }
    }
}

impl SourceOptions {
    /// A source of weight 1 that is read completely.
    #[must_use]
    pub fn new(name: impl Into<String>, path: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            path: path.into(),
            manifest: None,
            weight: default_weight(),
            column: None,
            max_bytes: None,
        }
    }

    /// The field or column with the text.
    #[must_use]
    pub fn column(&self) -> &str {
        self.column.as_deref().unwrap_or("text")
    }

    fn validate(&self, at: usize) -> Result<(), Error> {
        let option = |field: &str| format!("sources[{at}].{field}");
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        if self.name.is_empty()
            || self.name.len() > MAX_SOURCE_NAME_BYTES
            || self.name.starts_with('.')
            || !self.name.chars().all(plain)
        {
            let reason = format!(
                "{:?}: expected 1 to {MAX_SOURCE_NAME_BYTES} letters, digits, '-', '_' and '.', the first not a '.'",
                self.name
            );
            return Err(Error::Option { option: option("name"), reason });
        }
        if self.path.is_empty() {
            return Err(Error::Option { option: option("path"), reason: "is empty".into() });
        }
        if !(self.weight.is_finite() && self.weight > 0.0) {
            let reason = format!("{} (source {:?}): expected a positive number", self.weight, self.name);
            return Err(Error::Option { option: option("weight"), reason });
        }
        if self.max_bytes == Some(0) {
            return Err(Error::Option {
                option: option("max_bytes"),
                reason: "0: expected at least 1".into(),
            });
        }
        Ok(())
    }
}

impl DataOptions {
    /// Makes the paths of manifests and of the classifier absolute; relative ones are relative to `folder`,
    /// the folder of the configuration file.
    ///
    /// # Errors
    /// [`Error::Read`] if `folder` is relative and the working folder is unknown.
    pub fn resolve_paths(&mut self, folder: &Path) -> Result<(), Error> {
        let manifests = self.sources.iter_mut().filter_map(|source| source.manifest.as_mut());
        for file in manifests.chain(self.quality.as_mut().map(|quality| &mut quality.classifier)) {
            let path = folder.join(&file);
            *file = std::path::absolute(&path).map_err(Error::read(&path))?;
        }
        Ok(())
    }

    /// Checks everything that does not need a file.
    ///
    /// # Errors
    /// [`Error::Option`] for the first invalid option.
    pub fn validate(&self) -> Result<(), Error> {
        let fail = |option: &str, reason: String| Err(Error::Option { option: option.into(), reason });
        if self.sources.is_empty() {
            return fail("sources", "is empty: expected at least one source of text".into());
        }
        let mut names = BTreeSet::new();
        for (at, source) in self.sources.iter().enumerate() {
            source.validate(at)?;
            // Names become file names, and some file systems ignore case.
            if !names.insert(source.name.to_ascii_lowercase()) {
                return fail("sources", format!("two sources are named {:?} (ignoring case)", source.name));
            }
        }
        if !self.sources.iter().map(|s| s.weight).sum::<f64>().is_finite() {
            return fail("sources", "the sum of the weights is not finite".into());
        }
        if !(0.0..=MAX_VALIDATION_FRACTION).contains(&self.validation_fraction) {
            let reason = format!("{}: expected 0 to {MAX_VALIDATION_FRACTION}", self.validation_fraction);
            return fail("validation_fraction", reason);
        }
        if let Some(quality) = &self.quality {
            let names: Vec<&str> = self.sources.iter().map(|source| source.name.as_str()).collect();
            quality.validate(&names)?;
        }
        self.duplicates.as_ref().map_or(Ok(()), DuplicateOptions::validate)?;
        if self.tokenizer.is_some() {
            return Ok(());
        }
        if !(MIN_VOCABULARY..=MAX_VOCABULARY).contains(&self.vocabulary) {
            return fail(
                "vocabulary",
                format!("{}: expected {MIN_VOCABULARY} to {MAX_VOCABULARY}", self.vocabulary),
            );
        }
        if self.tokenizer_sample_bytes == 0 {
            return fail("tokenizer_sample_bytes", "0: expected at least 1".into());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_name_and_a_path_are_required_and_unknown_options_are_rejected() {
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
    fn manifests_are_relative_to_the_configuration() {
        let manifest = Some(PathBuf::from("quickstart/code.manifest"));
        let absolute = Some(PathBuf::from("/lists/prose.manifest"));
        let source = SourceOptions { manifest, ..SourceOptions::new("code", "$HOME/code") };
        let other = SourceOptions { manifest: absolute.clone(), ..SourceOptions::new("prose", "prose") };
        let sources = vec![source, other, SourceOptions::new("plain", "plain")];
        let mut options = DataOptions { sources, ..DataOptions::default() };
        options.resolve_paths(Path::new("/etc/volary")).unwrap();
        let resolved: Vec<_> = options.sources.iter().map(|source| source.manifest.clone()).collect();
        assert_eq!(resolved, [Some("/etc/volary/quickstart/code.manifest".into()), absolute, None]);
        let before = options.clone();
        options.resolve_paths(Path::new("elsewhere")).unwrap();
        assert_eq!(options, before);
    }

    #[test]
    fn numbers_out_of_range_are_rejected_by_name() {
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
