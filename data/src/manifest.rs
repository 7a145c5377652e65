//! The manifest of a prepared corpus: its sources, its token files and their hashes.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::duplicates::Duplicates;
use crate::error::Error;
use crate::file_manifest::hash_file;
use crate::limits::MAX_JSON_BYTES;
use crate::mixture::Mixture;
use crate::selection::Dropped;
use crate::skipped::Skipped;
use crate::tokenizer::Tokenizer;

/// The version of the folder's layout; readers reject any other.
pub const VERSION: u32 = 1;

/// The manifest's file name; it is written last, so a folder with a manifest is complete.
pub const MANIFEST: &str = "manifest.json";

/// The tokenizer's file name.
pub const TOKENIZER: &str = "tokenizer.json";

/// The content of a prepared corpus.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// [`VERSION`].
    pub version: u32,
    /// The BLAKE3 hash of the tokenizer's file.
    pub tokenizer: String,
    /// The number of token ids.
    pub vocabulary: usize,
    /// The id that ends every document.
    pub end_of_text: u32,
    /// The sources, in the order of the options.
    pub sources: Vec<SourceManifest>,
    /// The clusters of duplicates among the documents, if they were searched.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub duplicates: Option<Duplicates>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes references")]
fn is_zero(count: &u64) -> bool {
    *count == 0
}

/// The content of one source.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SourceManifest {
    /// The source's name.
    pub name: String,
    /// The relative frequency of sequences from this source.
    pub weight: f64,
    /// The number of files.
    pub files: u64,
    /// The number of documents.
    pub documents: u64,
    /// The length of the text, in bytes of UTF-8.
    pub bytes: u64,
    /// The number of byte sequences that are not UTF-8 and were replaced.
    pub replaced_utf8: u64,
    /// The files of a folder that were not read.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub skipped: Vec<Skipped>,
    /// The records that could not be read, and were skipped.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub bad_records: u64,
    /// The documents that the filters left out; they are not among [`documents`](Self::documents).
    #[serde(default, skip_serializing_if = "Dropped::is_empty")]
    pub dropped: Dropped,
    /// The kind of the split.
    pub held_out: HeldOut,
    /// The training documents that nearly equal held-out ones.
    #[serde(default)]
    pub near_duplicates: NearDuplicates,
    /// The training tokens.
    pub train: TokenFileRecord,
    /// The held-out tokens.
    pub validation: TokenFileRecord,
}

/// The documents of a source that nearly equal held-out documents of any source.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NearDuplicates {
    /// The number of documents.
    pub documents: u64,
    /// Their length, in tokens with the ends of text.
    pub tokens: u64,
    /// Whether they were left out. They are too many to leave out if all documents of a source follow one
    /// pattern.
    pub left_out: bool,
}

/// The split of a source into training and validation tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HeldOut {
    /// Whole documents are held out, in the order of their texts' hashes.
    Documents,
    /// The last tokens are held out: the source has too few documents for a split by document.
    Tail,
}

/// The record of a token file: ids as little-endian `u32`, each document followed by the end of text.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenFileRecord {
    /// The number of tokens in the file, ends of text included.
    pub tokens: u64,
    /// The BLAKE3 hash of the file, in hex.
    pub blake3: String,
}

/// One of a source's two token files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// Training tokens.
    Train,
    /// Held-out tokens.
    Validation,
}

impl SourceManifest {
    /// The name of a token file.
    #[must_use]
    pub fn file_name(&self, split: Split) -> String {
        file_name(&self.name, split)
    }

    /// The record of a token file.
    #[must_use]
    pub fn record(&self, split: Split) -> &TokenFileRecord {
        match split {
            Split::Train => &self.train,
            Split::Validation => &self.validation,
        }
    }

    /// Whether both token files hold at least one sequence of `sequence_length` tokens and its last target.
    #[must_use]
    pub fn suits(&self, sequence_length: usize) -> bool {
        self.train.tokens.min(self.validation.tokens) > sequence_length as u64
    }
}

pub(crate) fn file_name(source: &str, split: Split) -> String {
    match split {
        Split::Train => format!("{source}.train.tokens"),
        Split::Validation => format!("{source}.validation.tokens"),
    }
}

impl Manifest {
    /// How often `sequences` sequences of a run read each source: its name, and its sequences as a multiple
    /// of its windows of `sequence_length` tokens.
    #[must_use]
    pub fn epochs(&self, mixture: &Mixture, sequences: u128, sequence_length: usize) -> Vec<(String, f64)> {
        let epochs = |(number, source): (usize, &SourceManifest)| {
            let windows = source.train.tokens.saturating_sub(1) / sequence_length.max(1) as u64;
            (source.name.clone(), mixture.drawn(number, sequences) as f64 / windows.max(1) as f64)
        };
        self.sources.iter().enumerate().map(epochs).collect()
    }

    /// Reads the manifest in `dir` and checks the lengths of its token files.
    ///
    /// # Errors
    /// [`Error::Read`] for a missing file, [`Error::Damaged`] for a manifest of another version and for a
    /// file of another length.
    pub fn open(dir: &Path) -> Result<Self, Error> {
        let path = dir.join(MANIFEST);
        let mut json = Vec::new();
        let file = File::open(&path).map_err(Error::read(&path))?;
        file.take(MAX_JSON_BYTES).read_to_end(&mut json).map_err(Error::read(&path))?;
        #[derive(Deserialize)]
        struct Version {
            version: u32,
        }
        let damaged = |e: serde_json::Error| Error::damaged(&path, e.to_string());
        let Version { version } = serde_json::from_slice(&json).map_err(damaged)?;
        if version != VERSION {
            let reason = format!("has version {version}, but this program reads version {VERSION}");
            return Err(Error::damaged(&path, reason));
        }
        let manifest: Self = serde_json::from_slice(&json).map_err(damaged)?;
        if manifest.sources.is_empty()
            || manifest.sources.iter().any(|s| !(s.weight.is_finite() && s.weight > 0.0))
        {
            return Err(Error::damaged(&path, "has no sources, or a weight that is not positive"));
        }
        for (path, record) in manifest.token_files(dir) {
            let bytes = fs::metadata(&path).map_err(Error::read(&path))?.len();
            if bytes != 4 * record.tokens {
                let reason =
                    format!("has {bytes} bytes, but the manifest lists {} tokens of 4 bytes", record.tokens);
                return Err(Error::damaged(&path, reason));
            }
        }
        Ok(manifest)
    }

    /// Reads the manifest in `dir` and compares every file with its hash: about a second per gigabyte.
    ///
    /// # Errors
    /// As [`open`](Self::open), and [`Error::Damaged`] for a file of another content.
    pub fn verify(dir: &Path) -> Result<Self, Error> {
        let manifest = Self::open(dir)?;
        manifest.load_tokenizer(dir)?;
        for (path, record) in manifest.token_files(dir) {
            if hash_file(&path)?.to_hex().as_str() != record.blake3 {
                return Err(Error::damaged(&path, "its content does not match the hash in the manifest"));
            }
        }
        Ok(manifest)
    }

    /// Loads the tokenizer in `dir`.
    ///
    /// # Errors
    /// [`Error::Damaged`] if it is not the tokenizer of this manifest; as [`Tokenizer::load`].
    pub fn load_tokenizer(&self, dir: &Path) -> Result<Tokenizer, Error> {
        let path = dir.join(TOKENIZER);
        let tokenizer = Tokenizer::load(&path)?;
        if tokenizer.fingerprint() != self.tokenizer {
            return Err(Error::damaged(&path, "is not the tokenizer of the manifest"));
        }
        Ok(tokenizer)
    }

    /// The token files of a corpus in `dir`, each with its record.
    fn token_files(&self, dir: &Path) -> impl Iterator<Item = (PathBuf, &TokenFileRecord)> {
        let splits = [Split::Train, Split::Validation];
        self.sources
            .iter()
            .flat_map(move |s| splits.map(|split| (dir.join(s.file_name(split)), s.record(split))))
    }

    /// The names of a corpus's files, the manifest last.
    pub(crate) fn file_names(&self) -> Vec<String> {
        let mut names = vec![TOKENIZER.to_string()];
        for source in &self.sources {
            names.extend([Split::Train, Split::Validation].map(|split| source.file_name(split)));
        }
        names.push(MANIFEST.to_string());
        names
    }

    pub(crate) fn save(&self, dir: &Path) -> Result<(), Error> {
        let path = dir.join(MANIFEST);
        let json = serde_json::to_vec_pretty(self).map_err(|e| Error::damaged(&path, e.to_string()))?;
        let mut file = File::create(&path).map_err(Error::write(&path))?;
        file.write_all(&json).and_then(|()| file.sync_all()).map_err(Error::write(&path))
    }
}
