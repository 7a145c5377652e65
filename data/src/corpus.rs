//! From sources to a folder of token files: the tokenizer, the documents' tokens and their split.
//!
//! [`holdout`](crate::holdout) decides which documents are for validation. A source with too few documents
//! for that (the held-out ones would not fill a sequence, or would far exceed the share) is split by position
//! instead: its last `validation_fraction` of tokens, but at least one sequence, is for validation, and one
//! document may lie on both sides of the cut.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use crate::error::Error;
use crate::file_manifest::hash_file;
use crate::holdout::{self, Candidate};
use crate::limits::BATCH_BYTES;
use crate::manifest::{
    HeldOut, Manifest, SourceManifest, Split, TOKENIZER, TokenFileRecord, VERSION, file_name,
};
use crate::options::DataOptions;
use crate::progress::{PreparationStage, Reporter};
use crate::source::{Document, Source};
use crate::tokenizer::Tokenizer;
use crate::tokens::{TokenWriter, cut_at, sift};

/// Builds a corpus in `dir`, which must be empty.
pub(crate) fn build(
    options: &DataOptions,
    sources: &[Source],
    sequence_length: usize,
    dir: &Path,
    reporter: &mut Reporter<'_>,
) -> Result<Manifest, Error> {
    let tokenizer = match &options.tokenizer {
        Some(path) => Tokenizer::load(path)?,
        None => train_tokenizer(options, sources, reporter)?,
    };
    tokenizer.save(&dir.join(TOKENIZER))?;
    reporter.begin(PreparationStage::Tokenizing, sources.iter().map(Source::bytes).sum());
    let mut tokenized = Vec::with_capacity(sources.len());
    let mut held_out = HashSet::new();
    for source in sources {
        let source = TokenizedSource::create(source, &tokenizer, options, dir, reporter)?;
        let share = holdout::share(options.validation_fraction, source.tokens());
        holdout::choose(&source.candidates, share, &mut held_out);
        tokenized.push(source);
    }
    // Only now is it known which documents any source holds out.
    let split = |source: TokenizedSource<'_>| source.split(&held_out, options, sequence_length);
    let manifest = Manifest {
        version: VERSION,
        tokenizer: tokenizer.fingerprint(),
        vocabulary: tokenizer.vocabulary(),
        end_of_text: tokenizer.end_of_text(),
        sources: tokenized.into_iter().map(split).collect::<Result<_, _>>()?,
    };
    manifest.save(dir)?;
    Ok(manifest)
}

fn train_tokenizer(
    options: &DataOptions,
    sources: &[Source],
    reporter: &mut Reporter<'_>,
) -> Result<Tokenizer, Error> {
    reporter.begin(PreparationStage::TrainingTokenizer, options.tokenizer_sample_bytes);
    let weights: f64 = options.sources.iter().map(|s| s.weight).sum();
    let mut texts = Vec::new();
    for source in sources {
        let share = source.options.weight / weights * options.tokenizer_sample_bytes as f64;
        for document in source.sample(share.ceil() as u64, options.strict) {
            let document = document?;
            reporter.advance(document.text.len() as u64);
            texts.push(document.text);
        }
    }
    Tokenizer::train(texts.into_iter(), options.vocabulary)
}

/// A source's tokens in two files: candidates for validation, and documents that are for training in any
/// case.
struct TokenizedSource<'a> {
    source: &'a Source,
    train_path: PathBuf,
    validation_path: PathBuf,
    /// The number of tokens in the training file.
    train_tokens: u64,
    /// The documents of the validation file, in the order of the file.
    candidates: Vec<Candidate>,
    documents: u64,
    bytes: u64,
    replaced_utf8: u64,
}

impl<'a> TokenizedSource<'a> {
    /// Tokenizes all documents of `source`.
    fn create(
        source: &'a Source,
        tokenizer: &Tokenizer,
        options: &DataOptions,
        dir: &Path,
        reporter: &mut Reporter<'_>,
    ) -> Result<Self, Error> {
        let [train_path, validation_path] =
            [Split::Train, Split::Validation].map(|split| dir.join(file_name(&source.options.name, split)));
        let mut sorter = DocumentSorter {
            tokenizer,
            bound: holdout::candidate_bound(options.validation_fraction),
            train_file: TokenWriter::create(&train_path)?,
            candidate_file: TokenWriter::create(&validation_path)?,
            candidates: Vec::new(),
        };
        let (mut documents, mut bytes, mut replaced_utf8) = (0, 0, 0);
        let (mut batch, mut batch_bytes) = (Vec::new(), 0);
        for document in source.documents(options.strict) {
            let document = document?;
            documents += 1;
            replaced_utf8 += document.replaced;
            bytes += document.text.len() as u64;
            batch_bytes += document.text.len();
            batch.push(document);
            if batch_bytes >= BATCH_BYTES {
                sorter.write(&mut batch)?;
                reporter.advance(std::mem::take(&mut batch_bytes) as u64);
            }
        }
        sorter.write(&mut batch)?;
        reporter.advance(batch_bytes as u64);
        if documents == 0 {
            let (name, path) = (source.options.name.clone(), source.options.path.clone());
            return Err(Error::Empty { name, path, files: source.files.len() });
        }
        sorter.candidate_file.finish()?;
        let (train_tokens, candidates) = (sorter.train_file.finish()?, sorter.candidates);
        Ok(Self {
            source,
            train_path,
            validation_path,
            train_tokens,
            candidates,
            documents,
            bytes,
            replaced_utf8,
        })
    }

    fn tokens(&self) -> u64 {
        self.train_tokens + self.candidates.iter().map(|candidate| candidate.tokens).sum::<u64>()
    }

    /// Moves the candidates that are not in `held_out` to the training file, or splits the source by
    /// position.
    fn split(
        self,
        held_out: &HashSet<u64>,
        options: &DataOptions,
        sequence_length: usize,
    ) -> Result<SourceManifest, Error> {
        let total = self.tokens();
        let is_held_out = |candidate: &Candidate| held_out.contains(&candidate.rank);
        let lengths = self.candidates.iter().map(|candidate| (candidate.tokens, is_held_out(candidate)));
        let by_document = lengths.clone().filter_map(|(tokens, held)| held.then_some(tokens)).sum();
        sift(&self.train_path, &self.validation_path, lengths)?;
        let share = holdout::share(options.validation_fraction, total);
        let one = sequence_length as u64 + 1;
        if total < 2 * one {
            let name = self.source.options.name.clone();
            return Err(Error::TooShort { name, tokens: total, needed: 2 * one, sequence_length });
        }
        let suffices = by_document >= one && total - by_document >= one;
        let (held_out, validation) = if suffices && holdout::is_plausible(by_document, share) {
            (HeldOut::Documents, by_document)
        } else {
            let tail = (share.ceil() as u64).max(one).min(total - one);
            cut_at(&self.train_path, &self.validation_path, total - tail)?;
            (HeldOut::Tail, tail)
        };
        let record = |tokens, path: &Path| {
            Ok::<_, Error>(TokenFileRecord { tokens, blake3: hash_file(path)?.to_hex().to_string() })
        };
        Ok(SourceManifest {
            name: self.source.options.name.clone(),
            weight: self.source.options.weight,
            files: self.source.files.len() as u64,
            documents: self.documents,
            bytes: self.bytes,
            replaced_utf8: self.replaced_utf8,
            held_out,
            train: record(total - validation, &self.train_path)?,
            validation: record(validation, &self.validation_path)?,
        })
    }
}

/// Writes tokenized documents to the file of the candidates or to the training file.
struct DocumentSorter<'a> {
    tokenizer: &'a Tokenizer,
    /// Documents with a rank below this bound are candidates.
    bound: u64,
    train_file: TokenWriter,
    candidate_file: TokenWriter,
    candidates: Vec<Candidate>,
}

impl DocumentSorter<'_> {
    fn write(&mut self, batch: &mut Vec<Document>) -> Result<(), Error> {
        let texts: Vec<&str> = batch.iter().map(|document| document.text.as_str()).collect();
        for (text, ids) in texts.iter().zip(self.tokenizer.encode_batch(&texts)?) {
            let rank = holdout::rank(text);
            if rank < self.bound {
                self.candidates.push(Candidate { rank, tokens: ids.len() as u64 + 1 });
                self.candidate_file.write(&ids, self.tokenizer.end_of_text())?;
            } else {
                self.train_file.write(&ids, self.tokenizer.end_of_text())?;
            }
        }
        batch.clear();
        Ok(())
    }
}
