//! The tokens of one source, before they are split into training and validation text.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::document_hash::DocumentHash;
use crate::error::Error;
use crate::holdout::{self, Candidate};
use crate::limits::{BATCH_BYTES, SAVE_BYTES};
use crate::manifest::{Split, file_name};
use crate::options::DataOptions;
use crate::progress::Reporter;
use crate::rows::RowFile;
use crate::selection::{Dropped, Selection};
use crate::source::{Document, Source};
use crate::tokenizer::Tokenizer;
use crate::tokens::TokenWriter;
use crate::unfinished;

/// The kept documents of one source.
pub(crate) struct Kept<'a> {
    pub(crate) selection: &'a Selection,
    pub(crate) source: usize,
}

/// A source's tokens in two files: candidates for validation, and documents that are for training in any
/// case.
pub(crate) struct TokenizedSource<'a> {
    pub(crate) source: &'a Source,
    pub(crate) train_path: PathBuf,
    pub(crate) validation_path: PathBuf,
    /// The lengths of the training file's documents, in tokens.
    pub(crate) train_lengths: Vec<u32>,
    /// The documents of the validation file, in the order of the file.
    pub(crate) candidates: Vec<Candidate>,
    pub(crate) counts: Counts,
    pub(crate) dropped: Dropped,
}

/// How far a source is tokenized.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Counts {
    /// Documents of the source, kept or not.
    read: u64,
    /// Kept documents.
    pub(crate) documents: u64,
    /// Their text, in bytes.
    pub(crate) bytes: u64,
    pub(crate) replaced_utf8: u64,
    /// Known at the end.
    pub(crate) bad_records: u64,
    train_documents: u64,
    train_tokens: u64,
    candidates: u64,
    candidate_tokens: u64,
    is_complete: bool,
}

impl<'a> TokenizedSource<'a> {
    /// Tokenizes the documents of `source` that are kept, from where an earlier attempt in `dir` has ended.
    pub(crate) fn create(
        source: &'a Source,
        kept: &Kept<'_>,
        tokenizer: &Tokenizer,
        options: &DataOptions,
        dir: &Path,
        reporter: &mut Reporter<'_>,
    ) -> Result<Self, Error> {
        let bound = holdout::candidate_bound(options.validation_fraction);
        let mut sorter = DocumentSorter::open(tokenizer, bound, &source.options.name, dir)?;
        if sorter.counts.is_complete {
            reporter.advance(sorter.counts.bytes);
        } else {
            tokenize(source, kept, options.strict, &mut sorter, reporter)?;
        }
        if sorter.counts.documents == 0 {
            let (name, path, files) =
                (source.options.name.clone(), source.options.path.clone(), source.files.len());
            return Err(match sorter.counts.read {
                0 => Error::Empty { name, path, files },
                documents => Error::AllDropped { name, documents },
            });
        }
        let DocumentSorter {
            paths: [train_path, validation_path], train_lengths, candidates, counts, ..
        } = sorter;
        let dropped = kept.selection.dropped(kept.source);
        Ok(Self { source, train_path, validation_path, train_lengths, candidates, counts, dropped })
    }
}

fn tokenize(
    source: &Source,
    kept: &Kept<'_>,
    strict: bool,
    sorter: &mut DocumentSorter<'_>,
    reporter: &mut Reporter<'_>,
) -> Result<(), Error> {
    let done = sorter.counts.read;
    if done > 0 {
        tracing::info!(source = source.options.name, documents = done, "tokenizing goes on where it was");
    }
    let (mut batch, mut batch_bytes, mut since_saved) = (Vec::new(), 0, 0);
    let mut stream = source.documents(strict);
    let mut read = 0;
    while let Some(document) = stream.next().transpose()? {
        read += 1;
        if read <= done {
            reporter.advance(document.text.len() as u64);
            continue;
        }
        if kept.selection.keeps(kept.source, read as usize - 1) {
            batch_bytes += document.text.len();
            batch.push(document);
        }
        if batch_bytes >= BATCH_BYTES {
            sorter.write(&mut batch, read)?;
            since_saved += batch_bytes;
            reporter.advance(std::mem::take(&mut batch_bytes) as u64);
        }
        if since_saved >= SAVE_BYTES {
            sorter.save()?;
            since_saved = 0;
        }
    }
    sorter.write(&mut batch, read)?;
    reporter.advance(batch_bytes as u64);
    sorter.counts.bad_records = stream.finish()?;
    sorter.counts.is_complete = true;
    sorter.save()
}

/// Writes tokenized documents to the file of the candidates or to the training file.
struct DocumentSorter<'a> {
    tokenizer: &'a Tokenizer,
    /// Documents with a rank below this bound are candidates.
    bound: u64,
    /// The training file and that of the candidates.
    paths: [PathBuf; 2],
    train_file: TokenWriter,
    train_lengths: Vec<u32>,
    train_rows: RowFile,
    candidate_file: TokenWriter,
    candidates: Vec<Candidate>,
    candidate_rows: RowFile,
    counts: Counts,
    record: PathBuf,
}

impl<'a> DocumentSorter<'a> {
    /// Opens the files of a source in `dir`, as far as their record goes.
    fn open(tokenizer: &'a Tokenizer, bound: u64, source: &str, dir: &Path) -> Result<Self, Error> {
        let record = dir.join(format!("{source}.tokenized"));
        let paths = [Split::Train, Split::Validation].map(|split| dir.join(file_name(source, split)));
        let [lengths, candidates] =
            ["lengths", "candidates"].map(|name| dir.join(format!("{source}.{name}")));
        let counts: Counts = unfinished::load(&record).unwrap_or_default();
        let open = |counts: &Counts| {
            Ok::<_, Error>((
                [
                    TokenWriter::open(&paths[0], counts.train_tokens)?,
                    TokenWriter::open(&paths[1], counts.candidate_tokens)?,
                ],
                RowFile::open(&lengths, 4, counts.train_documents)?,
                RowFile::open(&candidates, 16, counts.candidates)?,
            ))
        };
        // Files that are shorter than their record are of a damaged disk: the source begins again.
        let (counts, files) = match open(&counts) {
            Err(Error::Damaged { .. }) => (Counts::default(), open(&Counts::default())?),
            files => (counts, files?),
        };
        let ([train_file, candidate_file], train_rows, candidate_rows) = files;
        let (mut train_lengths, mut candidates) = (Vec::new(), Vec::new());
        train_rows.for_each(|row: &[u8; 4]| train_lengths.push(u32::from_le_bytes(*row)))?;
        candidate_rows.for_each(|row: &[u8; 16]| {
            let [rank, tokens] = [0, 1].map(|at| u64::from_le_bytes(row.as_chunks::<8>().0[at]));
            candidates.push(Candidate { rank, tokens });
        })?;
        Ok(Self {
            tokenizer,
            bound,
            paths,
            train_file,
            train_lengths,
            train_rows,
            candidate_file,
            candidates,
            candidate_rows,
            counts,
            record,
        })
    }

    /// Writes documents; `read` is the number of the source's documents up to the last of them.
    fn write(&mut self, batch: &mut Vec<Document>, read: u64) -> Result<(), Error> {
        let texts: Vec<&str> = batch.iter().map(|document| document.text.as_str()).collect();
        for (text, ids) in texts.iter().zip(self.tokenizer.encode_batch(&texts)?) {
            let (rank, tokens) = (DocumentHash::of(text).rank(), ids.len() as u64 + 1);
            if rank < self.bound {
                self.candidates.push(Candidate { rank, tokens });
                self.candidate_rows.push(&[rank.to_le_bytes(), tokens.to_le_bytes()].concat())?;
                self.candidate_file.write(&ids, self.tokenizer.end_of_text())?;
            } else {
                self.train_lengths.push(tokens as u32);
                self.train_rows.push(&(tokens as u32).to_le_bytes())?;
                self.train_file.write(&ids, self.tokenizer.end_of_text())?;
            }
        }
        self.counts.read = read;
        self.counts.documents += batch.len() as u64;
        self.counts.bytes += texts.iter().map(|text| text.len() as u64).sum::<u64>();
        self.counts.replaced_utf8 += batch.iter().map(|document| document.replaced).sum::<u64>();
        batch.clear();
        Ok(())
    }

    /// Makes everything durable, then its record.
    fn save(&mut self) -> Result<(), Error> {
        self.counts.train_tokens = self.train_file.sync()?;
        self.counts.candidate_tokens = self.candidate_file.sync()?;
        self.counts.train_documents = self.train_rows.sync()?;
        self.counts.candidates = self.candidate_rows.sync()?;
        unfinished::save(&self.record, &self.counts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Place;
    use crate::source::Origin;

    fn batch(numbers: std::ops::Range<u64>) -> Vec<Document> {
        let document = |number| Document {
            text: format!("document {number} has {}", "some words ".repeat(number as usize % 7)),
            replaced: number % 2,
            origin: Origin { path: "a.jsonl".into(), place: Place::Line(number) },
        };
        numbers.map(document).collect()
    }

    #[test]
    fn what_was_written_after_the_last_record_is_written_again() {
        let texts = batch(0..50).into_iter().map(|document| document.text);
        let tokenizer = Tokenizer::train(texts, 300).unwrap();
        let open = |dir: &Path| DocumentSorter::open(&tokenizer, u64::MAX / 3, "a", dir).unwrap();
        let folders = [(); 2].map(|()| tempfile::tempdir().unwrap());
        let [whole, killed] = folders.each_ref().map(tempfile::TempDir::path);
        let mut sorter = open(whole);
        sorter.write(&mut batch(0..90), 90).unwrap();
        sorter.save().unwrap();
        let expected = (sorter.train_lengths, sorter.candidates);
        assert!(!expected.0.is_empty() && !expected.1.is_empty());

        let mut sorter = open(killed);
        sorter.write(&mut batch(0..30), 30).unwrap();
        sorter.save().unwrap();
        sorter.write(&mut batch(30..60), 60).unwrap();
        // A part of the tokens reaches the files, and no record does.
        sorter.train_file.sync().unwrap();
        drop(sorter);
        let mut sorter = open(killed);
        assert_eq!((sorter.counts.read, sorter.counts.documents), (30, 30));
        sorter.write(&mut batch(30..90), 90).unwrap();
        sorter.save().unwrap();
        assert_eq!((sorter.train_lengths, sorter.candidates), expected);
        assert_eq!(sorter.counts.replaced_utf8, 45);
        for name in ["a.train.tokens", "a.validation.tokens"] {
            assert_eq!(std::fs::read(killed.join(name)).unwrap(), std::fs::read(whole.join(name)).unwrap());
        }
    }

    #[test]
    fn files_shorter_than_their_record_begin_again() {
        let tokenizer = Tokenizer::train(["some text".to_string()].into_iter(), 300).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let open = || DocumentSorter::open(&tokenizer, 0, "a", folder.path()).unwrap();
        let mut sorter = open();
        sorter.write(&mut batch(0..30), 30).unwrap();
        sorter.save().unwrap();
        drop(sorter);
        std::fs::write(folder.path().join("a.lengths"), b"").unwrap();
        assert_eq!(open().counts.read, 0);
    }
}
