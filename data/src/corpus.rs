//! From sources to a folder of token files: the tokenizer, the documents' tokens and their split.
//!
//! [`holdout`](crate::holdout) decides which documents are for validation. A source with too few documents
//! for that (the held-out ones would not fill a sequence, or would far exceed the share) is split by position
//! instead: its last `validation_fraction` of tokens, but at least one sequence, is for validation, and one
//! document may lie on both sides of the cut. Documents of all sources that nearly equal a held-out one are
//! neither for training nor for validation; see [`near_duplicates`](crate::near_duplicates).

use std::collections::HashSet;
use std::path::Path;

use crate::document_hash::DocumentHash;
use crate::error::Error;
use crate::file_manifest::hash_file;
use crate::holdout::{self, Candidate};
use crate::limits::MAX_NEAR_DUPLICATE_SHARE;
use crate::manifest::{HeldOut, Manifest, NearDuplicates, SourceManifest, TokenFileRecord, VERSION};
use crate::near_duplicates::HeldOutRuns;
use crate::options::DataOptions;
use crate::progress::{PreparationStage, Reporter};
use crate::selection::{QualityFilter, Selection};
use crate::source::Source;
use crate::tokenized::{Kept, TokenizedSource};
use crate::tokenizer::Tokenizer;
use crate::tokens::{Fate, cut_at, distribute, for_each_document};
use crate::unfinished::Unfinished;

/// Builds a corpus in `dir`, which is empty or holds an earlier attempt at the same corpus.
pub(crate) fn build(
    options: &DataOptions,
    sources: &[Source],
    sequence_length: usize,
    dir: &Path,
    reporter: &mut Reporter<'_>,
) -> Result<Manifest, Error> {
    let unfinished = Unfinished::open(dir)?;
    let selection = unfinished.selection(|| Selection::of(options, sources, dir, reporter))?;
    let tokenizer = unfinished.tokenizer(|| match &options.tokenizer {
        Some(path) => Tokenizer::load(path),
        None => train_tokenizer(options, sources, reporter),
    })?;
    reporter.begin(PreparationStage::Tokenizing, sources.iter().map(Source::bytes).sum());
    let mut tokenized = Vec::with_capacity(sources.len());
    let mut held_out = HashSet::new();
    for (number, source) in sources.iter().enumerate() {
        let kept = Kept { selection: &selection, source: number };
        let source = TokenizedSource::create(source, &kept, &tokenizer, options, dir, reporter)?;
        let share = holdout::share(options.validation_fraction, source.tokens());
        holdout::choose(&source.candidates, share, &mut held_out);
        tokenized.push(source);
    }
    unfinished.begin_split()?;
    // Only now is it known which documents any source holds out.
    let runs = held_out_runs(&tokenized, &held_out, options, sequence_length)?;
    let split = |source: TokenizedSource<'_>| source.split(&held_out, &runs, options, sequence_length);
    let manifest = Manifest {
        version: VERSION,
        tokenizer: tokenizer.fingerprint(),
        vocabulary: tokenizer.vocabulary(),
        end_of_text: tokenizer.end_of_text(),
        sources: tokenized.into_iter().map(split).collect::<Result<_, _>>()?,
        duplicates: selection.duplicates,
    };
    manifest.save(dir)?;
    unfinished.finish(&manifest)?;
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
    let filter = QualityFilter::load(options)?;
    for source in sources {
        let share = source.options.weight / weights * options.tokenizer_sample_bytes as f64;
        for document in source.sample(share.ceil() as u64, options.strict) {
            let document = document?;
            reporter.advance(document.text.len() as u64);
            let hash = DocumentHash::of(&document.text);
            if filter.keeps(&source.options.name, &hash, &document.text) {
                texts.push(document.text);
            }
        }
    }
    Tokenizer::train(texts.into_iter(), options.vocabulary)
}

impl TokenizedSource<'_> {
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
            documents: self.counts.documents,
            bytes: self.counts.bytes,
            replaced_utf8: self.counts.replaced_utf8,
            skipped: self.source.skipped.clone(),
            bad_records: self.counts.bad_records,
            dropped: self.dropped,
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
