//! The function (seed, step, lane) -> tokens over a prepared corpus.

use std::path::Path;

use crate::error::Error;
use crate::manifest::{Manifest, Part};
use crate::mixture::{Mixture, Pick};
use crate::tokenizer::Tokenizer;
use crate::tokens::TokenFile;

/// A prepared corpus, cut into sequences and dealt to the lanes of every step.
///
/// It has no cursor: what a lane trains on at a step depends on the corpus, the shape and the seed only, so any node can
/// ask for any lane of any step in any order. Window w of a source is its tokens from `w * sequence_length` on, one more than
/// the sequence length: inputs and targets overlap by one.
#[derive(Debug)]
pub struct Dataset {
    manifest: Manifest,
    tokenizer: Tokenizer,
    mixture: Mixture,
    train: Vec<TokenFile>,
    validation: Vec<TokenFile>,
    sequence_length: usize,
    sequences_per_lane: usize,
    lanes: u32,
}

impl Dataset {
    /// Opens the corpus that [`prepare`](crate::prepare()) left in `dir`, for sequences of `sequence_length` tokens,
    /// `sequences_per_lane` in each of `lanes` lanes.
    ///
    /// Files are checked for their length; [`Manifest::verify`] compares their content too.
    pub fn open(
        dir: &Path,
        sequence_length: usize,
        sequences_per_lane: usize,
        lanes: u32,
        seed: u64,
    ) -> Result<Self, Error> {
        if sequence_length == 0 || sequences_per_lane == 0 || lanes == 0 {
            let reason = "the sequence length, the sequences per lane and the lanes must not be 0";
            return Err(Error::OutOfRange(reason.into()));
        }
        let manifest = Manifest::open(dir)?;
        for source in &manifest.sources {
            if !source.suits(sequence_length) {
                return Err(Error::TooShort {
                    name: source.name.clone(),
                    tokens: source.train.tokens + source.validation.tokens,
                    needed: 2 * (sequence_length as u64 + 1),
                    sequence_length,
                });
            }
        }
        let open = |part| manifest.sources.iter().map(move |s| TokenFile::open(&dir.join(s.file_name(part))));
        let train = open(Part::Train).collect::<Result<_, _>>()?;
        let validation = open(Part::Validation).collect::<Result<_, _>>()?;
        let weights: Vec<f64> = manifest.sources.iter().map(|source| source.weight).collect();
        Ok(Self {
            tokenizer: manifest.load_tokenizer(dir)?,
            mixture: Mixture::new(&weights, seed),
            manifest,
            train,
            validation,
            sequence_length,
            sequences_per_lane,
            lanes,
        })
    }

    /// The tokens that `lane` trains on at `step` (counted from 1): `[sequences_per_lane, sequence_length + 1]`,
    /// row-major.
    pub fn lane(&self, step: u64, lane: u32) -> Result<Vec<u32>, Error> {
        let step = step.checked_sub(1).ok_or_else(|| Error::OutOfRange("steps are counted from 1".into()))?;
        self.sequences(step, lane, &self.train, |mixture, pick, windows| mixture.window(pick, windows))
    }

    /// The tokens that `lane` validates with in `round` (counted from 0), in the shape of [`lane`](Self::lane).
    ///
    /// Sources take turns as in training; each source's windows come in plain order and start over at the end.
    pub fn validation(&self, round: u64, lane: u32) -> Result<Vec<u32>, Error> {
        let in_order = |_: &Mixture, pick: Pick, windows| (pick.occurrence % u128::from(windows)) as u64;
        self.sequences(round, lane, &self.validation, in_order)
    }

    /// How many rounds, over all lanes, hold as many sequences as there are validation windows; at least 1.
    #[must_use]
    pub fn validation_rounds(&self) -> u64 {
        let windows: u64 = self.validation.iter().map(|file| self.windows(file)).sum();
        windows.div_ceil((self.sequences_per_lane as u64).saturating_mul(u64::from(self.lanes))).max(1)
    }

    /// How many steps, over all lanes, hold as many sequences as there are training windows; at least 1.
    #[must_use]
    pub fn steps_per_pass(&self) -> u64 {
        let windows: u64 = self.train.iter().map(|file| self.windows(file)).sum();
        windows.div_ceil((self.sequences_per_lane as u64).saturating_mul(u64::from(self.lanes))).max(1)
    }

    /// The tokenizer of the corpus.
    #[must_use]
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// The manifest of the corpus.
    #[must_use]
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The length of a sequence's input, in tokens.
    #[must_use]
    pub fn sequence_length(&self) -> usize {
        self.sequence_length
    }

    /// The number of sequences in a lane.
    #[must_use]
    pub fn sequences_per_lane(&self) -> usize {
        self.sequences_per_lane
    }

    /// The number of lanes.
    #[must_use]
    pub fn lanes(&self) -> u32 {
        self.lanes
    }

    fn windows(&self, file: &TokenFile) -> u64 {
        (file.tokens - 1) / self.sequence_length as u64
    }

    fn sequences(
        &self,
        turn: u64,
        lane: u32,
        files: &[TokenFile],
        window: impl Fn(&Mixture, Pick, u64) -> u64,
    ) -> Result<Vec<u32>, Error> {
        if lane >= self.lanes {
            return Err(Error::OutOfRange(format!("lane {lane} of {} lanes, counted from 0", self.lanes)));
        }
        let row = self.sequence_length + 1;
        let mut ids = Vec::with_capacity(self.sequences_per_lane * row);
        let first =
            (u128::from(turn) * u128::from(self.lanes) + u128::from(lane)) * self.sequences_per_lane as u128;
        for sequence in first..first + self.sequences_per_lane as u128 {
            let pick = self.mixture.pick(sequence);
            let file = &files[pick.source];
            let window = window(&self.mixture, pick, self.windows(file));
            file.read(window * self.sequence_length as u64, row, self.manifest.vocabulary, &mut ids)?;
        }
        Ok(ids)
    }
}
