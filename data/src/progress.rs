//! Progress of the preparation of a corpus.

use serde::{Deserialize, Serialize};

/// A stage of the preparation of a corpus; the variants are in the order of execution.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PreparationStage {
    /// Finding the sources' files and checking them against their manifests.
    Reading,
    /// Choosing the documents: the quality filter and the search for duplicates.
    Filtering,
    /// Reading the tokenizer's sample, then training the tokenizer.
    TrainingTokenizer,
    /// Converting the text to tokens.
    Tokenizing,
}

/// The progress of the preparation of a corpus within a stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// The stage.
    pub stage: PreparationStage,
    /// The text that this stage has processed, in bytes.
    pub done_bytes: u64,
    /// An estimate of the stage's text, in bytes; it grows if compressed files hold more than their size
    /// suggests.
    pub total_bytes: u64,
}

/// Reports progress to the caller of the preparation.
pub(crate) struct Reporter<'a> {
    report: &'a mut dyn FnMut(Progress),
    now: Progress,
}

impl<'a> Reporter<'a> {
    /// A reporter at the start of [`PreparationStage::Reading`].
    pub(crate) fn new(report: &'a mut dyn FnMut(Progress)) -> Self {
        let now = Progress { stage: PreparationStage::Reading, done_bytes: 0, total_bytes: 0 };
        let mut reporter = Self { report, now };
        reporter.advance(0);
        reporter
    }

    /// Enters a stage of about `total_bytes` bytes of text.
    pub(crate) fn begin(&mut self, stage: PreparationStage, total_bytes: u64) {
        self.now = Progress { stage, done_bytes: 0, total_bytes };
        self.advance(0);
    }

    /// Adds `bytes` bytes of processed text.
    pub(crate) fn advance(&mut self, bytes: u64) {
        self.now.done_bytes += bytes;
        self.now.total_bytes = self.now.total_bytes.max(self.now.done_bytes);
        (self.report)(self.now);
    }
}
