//! The choice of the documents of a corpus before they are tokenized: the quality filter, then duplicates.

use std::path::Path;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::document_hash::DocumentHash;
use crate::duplicates::{Copies, Duplicates, Search};
use crate::error::Error;
use crate::limits::BATCH_BYTES;
use crate::options::DataOptions;
use crate::progress::{PreparationStage, Reporter};
use crate::quality::{Classifier, is_kept};
use crate::source::{Document, Source};

/// The documents that were left out of a source, by reason.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dropped {
    /// By the quality filter.
    pub low_quality: Count,
    /// Equal to an earlier document of any source.
    pub exact_copies: Count,
    /// Nearly equal to an earlier document of any source.
    pub near_copies: Count,
}

impl Dropped {
    /// Whether all documents were kept.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// A number of documents and their text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Count {
    /// The number of documents.
    pub documents: u64,
    /// The length of their text, in bytes of UTF-8.
    pub bytes: u64,
}

impl Count {
    fn add(&mut self, bytes: usize) {
        self.documents += 1;
        self.bytes += bytes as u64;
    }
}

/// The kept documents of all sources. What is kept follows from the text and the options: not from the number
/// of threads.
#[derive(Default, Serialize, Deserialize)]
pub(crate) struct Selection {
    /// For each source and document, whether it is kept; without sources, all are.
    kept: Vec<Vec<bool>>,
    dropped: Vec<Dropped>,
    /// The report of the search for duplicates.
    pub(crate) duplicates: Option<Duplicates>,
}

impl Selection {
    /// Reads all sources once, unless no filter is asked for. Files of the search are below `dir` and are
    /// removed again.
    pub(crate) fn of(
        options: &DataOptions,
        sources: &[Source],
        dir: &Path,
        reporter: &mut Reporter<'_>,
    ) -> Result<Self, Error> {
        if options.quality.is_none() && options.duplicates.is_none() {
            return Ok(Self::default());
        }
        reporter.begin(PreparationStage::Filtering, sources.iter().map(Source::bytes).sum());
        let files = tempfile::tempdir_in(dir).map_err(Error::write(dir))?;
        let mut selector = Selector {
            filter: QualityFilter::load(options)?,
            search: options.duplicates.as_ref().map(|o| Search::create(o, files.path())).transpose()?,
            candidates: Vec::new(),
            selection: Self::default(),
        };
        for source in sources {
            selector.read(source, options.strict, reporter)?;
        }
        selector.finish()
    }

    /// Whether a document is kept.
    pub(crate) fn keeps(&self, source: usize, document: usize) -> bool {
        self.kept.get(source).is_none_or(|kept| kept.get(document).is_none_or(|kept| *kept))
    }

    /// What was left out of a source.
    pub(crate) fn dropped(&self, source: usize) -> Dropped {
        self.dropped.get(source).copied().unwrap_or_default()
    }
}

/// The quality filter of a run.
pub(crate) struct QualityFilter<'a> {
    options: Option<(&'a crate::quality::QualityOptions, Classifier)>,
}

impl<'a> QualityFilter<'a> {
    /// The filter of the options; one that keeps everything if there is none.
    pub(crate) fn load(options: &'a DataOptions) -> Result<Self, Error> {
        let load = |options: &'a crate::quality::QualityOptions| {
            Classifier::load(&options.classifier).map(|classifier| (options, classifier))
        };
        Ok(Self { options: options.quality.as_ref().map(load).transpose()? })
    }

    /// Whether a document of a source is kept.
    pub(crate) fn keeps(&self, source: &str, hash: &DocumentHash, text: &str) -> bool {
        let Some((options, classifier)) = &self.options else { return true };
        !options.filters(source) || is_kept(hash, classifier.score(text), options.alpha)
    }
}

/// A document that the quality filter has kept.
struct Candidate {
    source: usize,
    document: usize,
    bytes: usize,
}

struct Selector<'a> {
    filter: QualityFilter<'a>,
    search: Option<Search<'a>>,
    /// The documents in the search, by their numbers.
    candidates: Vec<Candidate>,
    selection: Selection,
}

impl Selector<'_> {
    fn read(&mut self, source: &Source, strict: bool, reporter: &mut Reporter<'_>) -> Result<(), Error> {
        self.selection.kept.push(Vec::new());
        self.selection.dropped.push(Dropped::default());
        let (mut batch, mut bytes) = (Vec::new(), 0);
        for document in source.documents(strict) {
            let document = document?;
            bytes += document.text.len();
            batch.push(document);
            if bytes >= BATCH_BYTES {
                self.add(&source.options.name, &batch)?;
                batch.clear();
                reporter.advance(std::mem::take(&mut bytes) as u64);
            }
        }
        self.add(&source.options.name, &batch)?;
        reporter.advance(bytes as u64);
        Ok(())
    }

    /// Adds documents of the newest source. Threads share the work on each; the order is that of the source.
    fn add(&mut self, source: &str, batch: &[Document]) -> Result<(), Error> {
        let look = |document: &Document| -> Option<Option<Copies>> {
            let hash = DocumentHash::of(&document.text);
            let keeps = self.filter.keeps(source, &hash, &document.text);
            keeps.then(|| self.search.as_ref().map(|search| search.prepare(hash, &document.text)))
        };
        let looked: Vec<_> = batch.par_iter().map(look).collect();
        let number = self.selection.kept.len() - 1;
        let (kept, dropped) = (&mut self.selection.kept[number], &mut self.selection.dropped[number]);
        for (document, found) in batch.iter().zip(looked) {
            kept.push(found.is_some());
            match (found, &mut self.search) {
                (Some(Some(copies)), Some(search)) => {
                    search.add(&copies, &document.origin)?;
                    let bytes = document.text.len();
                    self.candidates.push(Candidate { source: number, document: kept.len() - 1, bytes });
                }
                (Some(_), _) => {}
                (None, _) => dropped.low_quality.add(document.text.len()),
            }
        }
        Ok(())
    }

    fn finish(self) -> Result<Selection, Error> {
        let Self { search, candidates, mut selection, .. } = self;
        let Some(search) = search else { return Ok(selection) };
        let (mut forest, origins) = search.finish()?;
        for (number, candidate) in (0..).zip(&candidates) {
            let Some(is_exact) = forest.dropped(number) else { continue };
            selection.kept[candidate.source][candidate.document] = false;
            let dropped = &mut selection.dropped[candidate.source];
            let count = if is_exact { &mut dropped.exact_copies } else { &mut dropped.near_copies };
            count.add(candidate.bytes);
        }
        selection.duplicates = Some(forest.report(|number| origins.get(number))?);
        Ok(selection)
    }
}
