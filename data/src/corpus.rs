//! From sources to a folder of token files: the tokenizer, the documents' tokens, and what is held out.
//!
//! A document is held out for validation by the hash of its text, so that equal documents are on the same side
//! and training never sees a held-out one, whatever source it comes from. A source with too few documents for that (the
//! held-out ones would not fill a sequence, or far exceed their share) is parted by position instead: its last
//! `validation_fraction` of tokens, but at least one sequence, is held out, and a document may lie on both sides of the cut.

use std::path::Path;

use crate::error::Error;
use crate::limits::BATCH_BYTES;
use crate::manifest::{
    HeldOut, Manifest, Part, SourceManifest, Split, TOKENIZER, VERSION, file_name, hash_file,
};
use crate::options::DataOptions;
use crate::prepare::{Progress, Stage};
use crate::source::{Document, Source};
use crate::tokenizer::Tokenizer;
use crate::tokens::{TokenWriter, repart};

/// A source may hold out this many times its share by hash before it is parted by position.
const MOST_SHARES: f64 = 4.0;

/// Tells the caller about progress, in bytes of text.
pub(crate) struct Report<'a> {
    pub(crate) progress: &'a mut dyn FnMut(Progress),
    pub(crate) stage: Stage,
    pub(crate) done_bytes: u64,
    pub(crate) total_bytes: u64,
}

impl Report<'_> {
    pub(crate) fn begin(&mut self, stage: Stage, total_bytes: u64) {
        (self.stage, self.done_bytes, self.total_bytes) = (stage, 0, total_bytes);
        self.advance(0);
    }

    fn advance(&mut self, bytes: u64) {
        self.done_bytes += bytes;
        // Compressed files hold more text than their size foretold.
        let total_bytes = self.total_bytes.max(self.done_bytes);
        (self.progress)(Progress { stage: self.stage, done_bytes: self.done_bytes, total_bytes });
    }
}

/// Builds a corpus in `dir`, which must be empty.
pub(crate) fn build(
    options: &DataOptions,
    sources: &[Source],
    sequence_length: usize,
    dir: &Path,
    report: &mut Report<'_>,
) -> Result<Manifest, Error> {
    let tokenizer = match &options.tokenizer {
        Some(path) => Tokenizer::load(path)?,
        None => train_tokenizer(options, sources, report)?,
    };
    tokenizer.save(&dir.join(TOKENIZER))?;
    report.begin(Stage::Tokenizing, sources.iter().map(Source::bytes).sum());
    let mut manifest = Manifest {
        version: VERSION,
        tokenizer: tokenizer.fingerprint(),
        vocabulary: tokenizer.vocabulary(),
        end_of_text: tokenizer.end_of_text(),
        sources: Vec::new(),
    };
    for source in sources {
        let work = Tokenising { options, source, tokenizer: &tokenizer, dir };
        manifest.sources.push(work.run(sequence_length, report)?);
    }
    manifest.save(dir)?;
    Ok(manifest)
}

fn train_tokenizer(
    options: &DataOptions,
    sources: &[Source],
    report: &mut Report<'_>,
) -> Result<Tokenizer, Error> {
    report.begin(Stage::TrainingTokenizer, options.tokenizer_sample_bytes);
    let weights: f64 = options.sources.iter().map(|s| s.weight).sum();
    let mut texts = Vec::new();
    for source in sources {
        let share = source.options.weight / weights * options.tokenizer_sample_bytes as f64;
        for document in source.sample(share.ceil() as u64, options.strict) {
            let document = document?;
            report.advance(document.text.len() as u64);
            texts.push(document.text);
        }
    }
    Tokenizer::train(texts.into_iter(), options.vocabulary)
}

/// Whether a document is held out: its hash, as a fraction of all hashes, is below `fraction`.
fn is_held_out(text: &str, fraction: f64) -> bool {
    let hash = blake3::hash(text.as_bytes());
    let first = hash.as_bytes().first_chunk::<8>().map_or(0, |bytes| u64::from_le_bytes(*bytes));
    // 2^64; the quotient is in 0..=1.
    (first as f64 / 18_446_744_073_709_551_616.0) < fraction
}

/// The tokenising of one source.
struct Tokenising<'a> {
    options: &'a DataOptions,
    source: &'a Source,
    tokenizer: &'a Tokenizer,
    dir: &'a Path,
}

impl Tokenising<'_> {
    fn run(&self, sequence_length: usize, report: &mut Report<'_>) -> Result<SourceManifest, Error> {
        let [train_path, validation_path] = [Part::Train, Part::Validation]
            .map(|part| self.dir.join(file_name(&self.source.options.name, part)));
        let mut files = [TokenWriter::create(&train_path)?, TokenWriter::create(&validation_path)?];
        let (mut documents, mut bytes, mut replaced_utf8) = (0, 0, 0);
        let (mut batch, mut batch_bytes) = (Vec::new(), 0);
        for document in self.source.documents(self.options.strict) {
            let document = document?;
            documents += 1;
            replaced_utf8 += document.replaced;
            bytes += document.text.len() as u64;
            batch_bytes += document.text.len();
            batch.push(document);
            if batch_bytes >= BATCH_BYTES {
                self.flush(&mut batch, &mut files)?;
                report.advance(std::mem::take(&mut batch_bytes) as u64);
            }
        }
        self.flush(&mut batch, &mut files)?;
        report.advance(batch_bytes as u64);
        if documents == 0 {
            let (name, path) = (self.source.options.name.clone(), self.source.options.path.clone());
            return Err(Error::Empty { name, path, files: self.source.files.len() });
        }
        let [train, validation] = files;
        let (train, validation) = (train.finish()?, validation.finish()?);
        let (held_out, held) = self.hold_out(train, validation, sequence_length)?;
        if held_out == HeldOut::Tail {
            repart(&train_path, &validation_path, train + validation - held)?;
        }
        Ok(SourceManifest {
            name: self.source.options.name.clone(),
            weight: self.source.options.weight,
            files: self.source.files.len() as u64,
            documents,
            bytes,
            replaced_utf8,
            held_out,
            train: Split { tokens: train + validation - held, blake3: hash_file(&train_path)? },
            validation: Split { tokens: held, blake3: hash_file(&validation_path)? },
        })
    }

    fn flush(&self, batch: &mut Vec<Document>, files: &mut [TokenWriter; 2]) -> Result<(), Error> {
        let texts: Vec<&str> = batch.iter().map(|document| document.text.as_str()).collect();
        for (text, ids) in texts.iter().zip(self.tokenizer.encode_batch(&texts)?) {
            let part = usize::from(is_held_out(text, self.options.validation_fraction));
            files[part].write(&ids, self.tokenizer.end_of_text())?;
        }
        batch.clear();
        Ok(())
    }

    /// How the source's tokens are parted, and how many are held out, given what the hashes have held out.
    fn hold_out(&self, train: u64, validation: u64, sequence_length: usize) -> Result<(HeldOut, u64), Error> {
        let (total, one) = (train + validation, sequence_length as u64 + 1);
        if total < 2 * one {
            let name = self.source.options.name.clone();
            return Err(Error::TooShort { name, tokens: total, needed: 2 * one, sequence_length });
        }
        let share = self.options.validation_fraction * total as f64;
        let plausible = validation as f64 <= MOST_SHARES * share;
        if validation >= one && train >= one && plausible {
            return Ok((HeldOut::Documents, validation));
        }
        Ok((HeldOut::Tail, (share.ceil() as u64).max(one).min(total - one)))
    }
}
