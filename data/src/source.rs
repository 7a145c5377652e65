//! A source as a stream of documents with their origins.

use std::path::{Path, PathBuf};
use std::vec;

use crate::error::{Error, Place};
use crate::files::{FoundFiles, SourceFile, find_files};
use crate::limits::MAX_LOGGED_RECORDS;
use crate::options::SourceOptions;
use crate::readers::{self, RawDocument, RawDocuments};
use crate::skipped::{self, Skipped};
use crate::tokenizer::floor_boundary;

/// A source and its files.
#[derive(Clone, Debug)]
pub struct Source {
    /// The options of the source.
    pub options: SourceOptions,
    /// The files, ordered by relative path, or in the order of the source's manifest.
    pub files: Vec<SourceFile>,
    /// The files of a folder that are not read.
    pub skipped: Vec<Skipped>,
    /// Whether the files are those of a folder.
    of_folder: bool,
}

/// The origin of a document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origin {
    /// The file.
    pub path: PathBuf,
    /// The position of the document in the file.
    pub place: Place,
}

/// One document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Document {
    /// Its text.
    pub text: String,
    /// The number of byte sequences that are not UTF-8 and were replaced by U+FFFD.
    pub replaced: u64,
    /// Its origin.
    pub origin: Origin,
}

impl Source {
    /// Finds the files of a source.
    ///
    /// # Errors
    /// As [`find_files`].
    pub fn find(options: &SourceOptions) -> Result<Self, Error> {
        let FoundFiles { files, of_folder, skipped } = find_files(options)?;
        Ok(Self { options: options.clone(), files, skipped, of_folder })
    }

    /// Checks the header of every file. A folder may hold files that are not for training: those without
    /// readable text are skipped and counted.
    ///
    /// # Errors
    /// An [`Error`] that names the file: one that cannot be read, and one without readable text unless it is
    /// in a folder.
    pub fn check(&mut self) -> Result<(), Error> {
        let mut readable = Vec::with_capacity(self.files.len());
        for file in std::mem::take(&mut self.files) {
            match readers::check(&file.path, self.options.column()) {
                Ok(()) => readable.push(file),
                Err(Error::Unreadable { path, reason }) if self.of_folder => {
                    skipped::add(&mut self.skipped, reason, &path);
                }
                Err(error) => return Err(error),
            }
        }
        self.files = readable;
        Ok(())
    }

    /// The size of the files, at most `max_bytes` (the option), in bytes: an estimate of the text.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        let size = self.files.iter().map(|file| file.bytes).sum();
        self.options.max_bytes.map_or(size, |most| most.min(size))
    }

    /// The documents of the source, at most `max_bytes` (the option) of text.
    ///
    /// A limited source is read in the order of the BLAKE3 hashes of its files' relative paths: a sample of
    /// the whole source that is equal on all machines. The last document is cut to fit. An unlimited source
    /// is read in the order of [`files`](Self::files).
    #[must_use]
    pub fn documents(&self, strict: bool) -> Documents {
        self.limited(self.options.max_bytes, strict)
    }

    /// A sample of about `bytes` bytes of text, in the order of a limited source.
    #[must_use]
    pub fn sample(&self, bytes: u64, strict: bool) -> Documents {
        self.limited(Some(self.options.max_bytes.map_or(bytes, |most| most.min(bytes))), strict)
    }

    fn limited(&self, budget: Option<u64>, strict: bool) -> Documents {
        let mut files = self.files.clone();
        if budget.is_some() {
            files.sort_by_cached_key(|file| *blake3::hash(file.relative.as_bytes()).as_bytes());
        }
        Documents {
            files: files.into_iter(),
            current: None,
            column: self.options.column().to_string(),
            strict,
            remaining: budget.unwrap_or(u64::MAX),
            bad: BadRecords::default(),
        }
    }
}

/// A stream of documents; it ends after the first error. Documents of white space only are skipped, and
/// without `strict` records that cannot be read are, too.
pub struct Documents {
    files: vec::IntoIter<SourceFile>,
    current: Option<(PathBuf, RawDocuments)>,
    column: String,
    strict: bool,
    remaining: u64,
    bad: BadRecords,
}

/// The skipped records of a source.
#[derive(Default)]
struct BadRecords {
    count: u64,
    /// The errors of the first of them.
    first: Vec<Error>,
    /// Whether any record could be read.
    has_good: bool,
}

impl Documents {
    /// Logs the skipped records and returns their number.
    ///
    /// # Errors
    /// The error of the first record if no record could be read: this is not a file with a few bad records.
    pub fn finish(mut self) -> Result<u64, Error> {
        if !self.bad.has_good && !self.bad.first.is_empty() {
            return Err(self.bad.first.swap_remove(0));
        }
        for error in &self.bad.first {
            tracing::warn!("skipped a record: {error}");
        }
        let more = self.bad.count - self.bad.first.len() as u64;
        if more > 0 {
            tracing::warn!("skipped {more} more records of this source that cannot be read");
        }
        Ok(self.bad.count)
    }

    fn read(&mut self) -> Result<Option<Document>, Error> {
        while self.remaining > 0 {
            let Some((path, documents)) = &mut self.current else {
                let Some(file) = self.files.next() else { return Ok(None) };
                let documents = readers::open(&file.path, &self.column)?;
                self.current = Some((file.path, documents));
                continue;
            };
            let raw = match documents.next() {
                Some(Err(error)) if error.is_of_record() && !self.strict => {
                    self.bad.count += 1;
                    if self.bad.count <= MAX_LOGGED_RECORDS {
                        self.bad.first.push(error);
                    }
                    continue;
                }
                Some(raw) => raw?,
                None => {
                    self.current = None;
                    continue;
                }
            };
            self.bad.has_good = true;
            let mut document = decode(raw, path, self.strict)?;
            if document.text.trim().is_empty() {
                continue;
            }
            truncate(&mut document.text, self.remaining);
            self.remaining -= (document.text.len() as u64).clamp(1, self.remaining);
            if !document.text.is_empty() {
                return Ok(Some(document));
            }
        }
        Ok(None)
    }
}

impl Iterator for Documents {
    type Item = Result<Document, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        let document = self.read();
        if document.is_err() {
            self.remaining = 0;
        }
        document.transpose()
    }
}

/// Truncates `text` to at most `most` bytes, between characters.
fn truncate(text: &mut String, most: u64) {
    if text.len() as u64 > most {
        text.truncate(floor_boundary(text, most as usize));
    }
}

fn decode(raw: RawDocument, path: &Path, strict: bool) -> Result<Document, Error> {
    let origin = Origin { path: path.to_path_buf(), place: raw.place };
    let bytes = match String::from_utf8(raw.bytes) {
        Ok(text) => return Ok(Document { text, replaced: 0, origin }),
        Err(error) => error.into_bytes(),
    };
    if strict {
        return Err(Error::NotUtf8 { path: origin.path, place: origin.place });
    }
    let (mut text, mut replaced) = (String::with_capacity(bytes.len()), 0);
    for chunk in bytes.utf8_chunks() {
        text.push_str(chunk.valid());
        if !chunk.invalid().is_empty() {
            text.push(char::REPLACEMENT_CHARACTER);
            replaced += 1;
        }
    }
    Ok(Document { text, replaced, origin })
}
