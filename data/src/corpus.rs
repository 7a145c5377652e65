//! From sources to a folder of token files: the tokenizer, the documents' tokens and their split.
//!
//! [`holdout`](crate::holdout) decides which documents are for validation. A source with too few documents
//! for that (the held-out ones would not fill a sequence, or would far exceed the share) is split by position
//! instead: its last `validation_fraction` of tokens, but at least one sequence, is for validation, and one
//! document may lie on both sides of the cut. Documents of all sources that nearly equal a held-out one are
//! neither for training nor for validation; see [`near_duplicates`](crate::near_duplicates).

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use crate::error::Error;
use crate::file_manifest::hash_file;
use crate::holdout::{self, Candidate};
use crate::limits::{BATCH_BYTES, MAX_NEAR_DUPLICATE_SHARE};
use crate::manifest::{
    HeldOut, Manifest, NearDuplicates, SourceManifest, Split, TOKENIZER, TokenFileRecord, VERSION, file_name,
};
use crate::near_duplicates::HeldOutRuns;
use crate::options::DataOptions;
use crate::progress::{PreparationStage, Reporter};
use crate::source::{Document, Source};
use crate::tokenizer::Tokenizer;
use crate::tokens::{Fate, TokenWriter, cut_at, distribute, for_each_document};

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
    let runs = held_out_runs(&tokenized, &held_out, options, sequence_length)?;
    let split = |source: TokenizedSource<'_>| source.split(&held_out, &runs, options, sequence_length);
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

/// The runs of the documents that the sources hold out.
fn held_out_runs(
    sources: &[TokenizedSource<'_>],
    held_out: &HashSet<u64>,
    options: &DataOptions,
    sequence_length: usize,
) -> Result<HeldOutRuns, Error> {
    let mut runs = HeldOutRuns::new();
    for source in
        sources.iter().filter(|source| source.splits_by_document(held_out, options, sequence_length))
    {
        let lengths = source.candidates.iter().map(|candidate| candidate.tokens);
        for_each_document(&source.validation_path, lengths, |number, ids| {
            if held_out.contains(&source.candidates[number].rank) {
                runs.add(ids);
            }
        })?;
    }
    Ok(runs.finish())
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
    /// The lengths of the training file's documents, in tokens.
    train_lengths: Vec<u32>,
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
            train_lengths: Vec::new(),
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
        sorter.train_file.finish()?;
        Ok(Self {
            source,
            train_path,
            validation_path,
            train_lengths: sorter.train_lengths,
            candidates: sorter.candidates,
            documents,
            bytes,
            replaced_utf8,
        })
    }

    fn tokens(&self) -> u64 {
        let candidates = self.candidates.iter().map(|candidate| candidate.tokens);
        self.train_lengths.iter().map(|length| u64::from(*length)).chain(candidates).sum()
    }

    /// The number of tokens in documents that some source holds out.
    fn held_out_tokens(&self, held_out: &HashSet<u64>) -> u64 {
        let candidates = self.candidates.iter().filter(|candidate| held_out.contains(&candidate.rank));
        candidates.map(|candidate| candidate.tokens).sum()
    }

    /// Whether the held-out documents make a plausible validation text, and leave one for training.
    fn splits_by_document(
        &self,
        held_out: &HashSet<u64>,
        options: &DataOptions,
        sequence_length: usize,
    ) -> bool {
        let (total, by_document) = (self.tokens(), self.held_out_tokens(held_out));
        let one = sequence_length as u64 + 1;
        by_document >= one
            && total - by_document >= one
            && holdout::is_plausible(by_document, holdout::share(options.validation_fraction, total))
    }

    /// Moves the candidates that are not in `held_out` to the training file and leaves out near-duplicates,
    /// or splits the source by position.
    fn split(
        self,
        held_out: &HashSet<u64>,
        runs: &HeldOutRuns,
        options: &DataOptions,
        sequence_length: usize,
    ) -> Result<SourceManifest, Error> {
        let total = self.tokens();
        let one = sequence_length as u64 + 1;
        if total < 2 * one {
            let name = self.source.options.name.clone();
            return Err(Error::TooShort { name, tokens: total, needed: 2 * one, sequence_length });
        }
        let by_document = self.splits_by_document(held_out, options, sequence_length);
        let mut fates = self.fates(held_out, runs)?;
        let mut near_duplicates = near_duplicates(&fates);
        let rest = total - self.held_out_tokens(held_out) - near_duplicates.tokens;
        near_duplicates.left_out = by_document
            && rest >= one
            && near_duplicates.tokens as f64 <= MAX_NEAR_DUPLICATE_SHARE * total as f64;
        if !near_duplicates.left_out {
            let keep = |fate: &mut (u64, Fate)| {
                if fate.1 == Fate::Neither {
                    fate.1 = Fate::Training;
                }
            };
            fates.iter_mut().flatten().for_each(keep);
        }
        distribute(&self.train_path, &self.validation_path, [&fates[0], &fates[1]])?;
        let tokens_of = |fate| fates.iter().flatten().filter(|f| f.1 == fate).map(|f| f.0).sum::<u64>();
        let (mut train, mut validation) = (tokens_of(Fate::Training), tokens_of(Fate::Validation));
        if !by_document {
            let share = holdout::share(options.validation_fraction, total);
            validation = (share.ceil() as u64).max(one).min(total - one);
            train = total - validation;
            cut_at(&self.train_path, &self.validation_path, train)?;
        }
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
            skipped: self.source.skipped.clone(),
            held_out: if by_document { HeldOut::Documents } else { HeldOut::Tail },
            near_duplicates,
            train: record(train, &self.train_path)?,
            validation: record(validation, &self.validation_path)?,
        })
    }

    /// The fates of the training file's documents and of the candidates, with their lengths in tokens.
    fn fates(&self, held_out: &HashSet<u64>, runs: &HeldOutRuns) -> Result<[Vec<(u64, Fate)>; 2], Error> {
        let lengths = self.train_lengths.iter().map(|length| u64::from(*length));
        let mut of_train: Vec<_> = lengths.map(|length| (length, Fate::Training)).collect();
        let fate = |candidate: &Candidate| match held_out.contains(&candidate.rank) {
            true => (candidate.tokens, Fate::Validation),
            false => (candidate.tokens, Fate::Training),
        };
        let mut of_candidates: Vec<_> = self.candidates.iter().map(fate).collect();
        if !runs.is_empty() {
            for (path, fates) in
                [(&self.train_path, &mut of_train), (&self.validation_path, &mut of_candidates)]
            {
                let lengths: Vec<_> = fates.iter().map(|(length, _)| *length).collect();
                for_each_document(path, lengths.into_iter(), |number, ids| {
                    let fate = &mut fates[number].1;
                    if *fate == Fate::Training && runs.has_near_duplicate_of(ids) {
                        *fate = Fate::Neither;
                    }
                })?;
            }
        }
        Ok([of_train, of_candidates])
    }
}

/// The documents that are neither for training nor for validation.
fn near_duplicates(fates: &[Vec<(u64, Fate)>; 2]) -> NearDuplicates {
    let mut found = NearDuplicates::default();
    for (tokens, _) in fates.iter().flatten().filter(|(_, fate)| *fate == Fate::Neither) {
        found.documents += 1;
        found.tokens += tokens;
    }
    found
}

/// Writes tokenized documents to the file of the candidates or to the training file.
struct DocumentSorter<'a> {
    tokenizer: &'a Tokenizer,
    /// Documents with a rank below this bound are candidates.
    bound: u64,
    train_file: TokenWriter,
    train_lengths: Vec<u32>,
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
                self.train_lengths.push(ids.len() as u32 + 1);
                self.train_file.write(&ids, self.tokenizer.end_of_text())?;
            }
        }
        batch.clear();
        Ok(())
    }
}
