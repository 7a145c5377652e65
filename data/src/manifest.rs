//! The manifest of a prepared corpus: what was read, into which token files, with which hashes.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::limits::MAX_JSON_BYTES;
use crate::tokenizer::Tokenizer;

/// The version of the folder's layout; readers refuse any other.
pub const VERSION: u32 = 1;

/// The manifest's file name; it is written last, so that a folder with a manifest is whole.
pub const MANIFEST: &str = "manifest.json";

/// The tokenizer's file name.
pub const TOKENIZER: &str = "tokenizer.json";

/// What a prepared corpus holds.
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
}

/// What one source holds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SourceManifest {
    /// The source's name.
    pub name: String,
    /// How often sequences come from it, relative to the others.
    pub weight: f64,
    /// How many files were found.
    pub files: u64,
    /// How many documents were read.
    pub documents: u64,
    /// How much text was read, in bytes of UTF-8.
    pub bytes: u64,
    /// How many runs of bytes that are not UTF-8 were replaced.
    pub replaced_utf8: u64,
    /// How validation was held out.
    pub held_out: HeldOut,
    /// The tokens to train on.
    pub train: Split,
    /// The tokens to validate with.
    pub validation: Split,
}

/// How a source's validation tokens were chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HeldOut {
    /// Whole documents, by the hash of their text.
    Documents,
    /// The source's last tokens: too few documents for a split by hash.
    Tail,
}

/// One token file: ids as little-endian `u32`, each document followed by the end of text.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Split {
    /// How many tokens the file holds, ends of text included.
    pub tokens: u64,
    /// The BLAKE3 hash of the file, in hex.
    pub blake3: String,
}

/// One of a source's two token files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// To train on.
    Train,
    /// To validate with.
    Validation,
}

impl SourceManifest {
    /// The file name of a part.
    #[must_use]
    pub fn file_name(&self, part: Part) -> String {
        file_name(&self.name, part)
    }

    /// The token file's record.
    #[must_use]
    pub fn split(&self, part: Part) -> &Split {
        match part {
            Part::Train => &self.train,
            Part::Validation => &self.validation,
        }
    }

    /// Whether both parts hold at least one sequence of `sequence_length` tokens and its last target.
    #[must_use]
    pub fn suits(&self, sequence_length: usize) -> bool {
        self.train.tokens.min(self.validation.tokens) > sequence_length as u64
    }
}

pub(crate) fn file_name(source: &str, part: Part) -> String {
    match part {
        Part::Train => format!("{source}.train.tokens"),
        Part::Validation => format!("{source}.validation.tokens"),
    }
}

impl Manifest {
    /// Reads the manifest in `dir` and checks that its files are there and as long as it says.
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
            let reason = format!("is of version {version}, but this program reads version {VERSION}");
            return Err(Error::damaged(&path, reason));
        }
        let manifest: Self = serde_json::from_slice(&json).map_err(damaged)?;
        if manifest.sources.is_empty()
            || manifest.sources.iter().any(|s| !(s.weight.is_finite() && s.weight > 0.0))
        {
            return Err(Error::damaged(&path, "has no sources, or weights that are not positive"));
        }
        for (path, split) in manifest.token_files(dir) {
            let bytes = fs::metadata(&path).map_err(Error::read(&path))?.len();
            if bytes != 4 * split.tokens {
                let reason =
                    format!("holds {bytes} bytes, but the manifest says {} tokens of 4 bytes", split.tokens);
                return Err(Error::damaged(&path, reason));
            }
        }
        Ok(manifest)
    }

    /// Opens the manifest in `dir` and compares every file with its hash: about a second per gigabyte.
    pub fn verify(dir: &Path) -> Result<Self, Error> {
        let manifest = Self::open(dir)?;
        manifest.load_tokenizer(dir)?;
        for (path, split) in manifest.token_files(dir) {
            if hash_file(&path)? != split.blake3 {
                return Err(Error::damaged(&path, "its content does not match the manifest's hash"));
            }
        }
        Ok(manifest)
    }

    /// The tokenizer in `dir`, if it is the one that the manifest names.
    pub fn load_tokenizer(&self, dir: &Path) -> Result<Tokenizer, Error> {
        let path = dir.join(TOKENIZER);
        let tokenizer = Tokenizer::load(&path)?;
        if tokenizer.fingerprint() != self.tokenizer {
            return Err(Error::damaged(&path, "is not the tokenizer that the manifest names"));
        }
        Ok(tokenizer)
    }

    /// The token files of a corpus in `dir`, each with its record.
    fn token_files(&self, dir: &Path) -> impl Iterator<Item = (PathBuf, &Split)> {
        let parts = [Part::Train, Part::Validation];
        self.sources.iter().flat_map(move |s| parts.map(|part| (dir.join(s.file_name(part)), s.split(part))))
    }

    /// The names of all files of a corpus, the manifest last.
    pub(crate) fn file_names(&self) -> Vec<String> {
        let mut names = vec![TOKENIZER.to_string()];
        for source in &self.sources {
            names.extend([Part::Train, Part::Validation].map(|part| source.file_name(part)));
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

pub(crate) fn hash_file(path: &Path) -> Result<String, Error> {
    let file = File::open(path).map_err(Error::read(path))?;
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(file).map_err(Error::read(path))?;
    Ok(hasher.finalize().to_hex().to_string())
}
