//! The function (seed, step, lane) -> tokens over a prepared corpus.

use std::path::Path;

use volary_core::{Lane, Step};

use crate::error::Error;
use crate::manifest::{Manifest, Split};
use crate::mixture::{Mixture, Pick};
use crate::tokenizer::Tokenizer;
use crate::tokens::TokenFile;

/// A prepared corpus, cut into sequences that are assigned to the lanes of every step.
///
/// A dataset has no cursor: the tokens of a lane depend on the corpus, the shape, the seed and the step only,
/// so lanes can be read in any order. Window `w` of a source begins at token `w * sequence_length` and has
/// one token more than a sequence: inputs and targets overlap by one.
///
/// ```
/// use volary_core::{Lane, Step};
/// use volary_data::{DataOptions, Dataset, SourceOptions, prepare};
///
/// let dir = tempfile::tempdir()?;
/// let text: String = (0..300).map(|n| format!("Line {n} of a small book.\n")).collect();
/// let book = dir.path().join("book.txt");
/// std::fs::write(&book, text)?;
///
/// let options = DataOptions {
///     sources: vec![SourceOptions::new("book", book.to_string_lossy())],
///     vocabulary: 300,
///     cache: Some(dir.path().join("cache")),
///     ..DataOptions::default()
/// };
/// let (run, sequence_length, sequences_per_lane, lanes, seed) = (dir.path().join("run"), 16, 2, 4, 7);
/// prepare(&options, sequence_length, &run, &mut |_progress| {})?;
///
/// let data = Dataset::open(&run, sequence_length, sequences_per_lane, lanes, seed)?;
/// let tokens = data.lane(Step(1), Lane(3))?;
/// assert_eq!(tokens.len(), sequences_per_lane * (sequence_length + 1));
/// assert_eq!(tokens, data.lane(Step(1), Lane(3))?);
/// println!("{}", data.tokenizer().decode(&tokens[..sequence_length + 1])?);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
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

/// The bits of a document's number below those of its source.
const DOCUMENT_BITS: u32 = 48;

/// The window of a validation sequence.
fn in_file_order(pick: Pick, windows: u64) -> u64 {
    (pick.occurrence % u128::from(windows)) as u64
}

impl Dataset {
    /// Opens the corpus that [`prepare`](crate::prepare()) left in `dir`, for sequences of `sequence_length`
    /// tokens, `sequences_per_lane` in each of `lanes` lanes.
    ///
    /// Only the lengths of files are checked; [`Manifest::verify`] compares their content.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] for a shape with a 0, [`Error::TooShort`] for a source without a whole sequence;
    /// as [`Manifest::open`] and [`Manifest::load_tokenizer`].
    pub fn open(
        dir: &Path,
        sequence_length: usize,
        sequences_per_lane: usize,
        lanes: u32,
        seed: u64,
    ) -> Result<Self, Error> {
        if sequence_length == 0 || sequences_per_lane == 0 || lanes == 0 {
            let reason = "the sequence length, the sequences per lane and the number of lanes must not be 0";
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
        let open =
            |split| manifest.sources.iter().map(move |s| TokenFile::open(&dir.join(s.file_name(split))));
        let train = open(Split::Train).collect::<Result<_, _>>()?;
        let validation = open(Split::Validation).collect::<Result<_, _>>()?;
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

    /// The training tokens of `lane` at `step` (from 1): `[sequences_per_lane, sequence_length + 1]`,
    /// row-major.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] for step 0 and for a lane beyond the shape; [`Error::Read`] and
    /// [`Error::Damaged`] for a token file that cannot be read or holds tokens beyond the vocabulary.
    pub fn lane(&self, step: Step, lane: Lane) -> Result<Vec<u32>, Error> {
        let step =
            step.0.checked_sub(1).ok_or_else(|| Error::OutOfRange("step 0: the first step is 1".into()))?;
        self.sequences(step, lane.0, &self.train, |mixture, pick, windows| mixture.window(pick, windows))
    }

    /// The validation tokens of `lane` in `round` (from 0), in the shape of [`lane`](Self::lane).
    ///
    /// Sources alternate as in training; the windows of each source are in file order and repeat after the
    /// last one.
    ///
    /// # Errors
    /// As [`lane`](Self::lane).
    pub fn validation(&self, round: u64, lane: Lane) -> Result<Vec<u32>, Error> {
        self.sequences(round, lane.0, &self.validation, |_, pick, windows| in_file_order(pick, windows))
    }

    /// The documents of the sequences of [`validation`](Self::validation) in the first `rounds` rounds: of
    /// each round and lane, `[sequences_per_lane]`. A sequence belongs to the document of its first token.
    ///
    /// # Errors
    /// [`Error::Read`].
    pub fn validation_documents(&self, rounds: u64) -> Result<Vec<Vec<u64>>, Error> {
        let ends = self.validation.iter().map(|file| file.ends(self.manifest.end_of_text));
        let ends = ends.collect::<Result<Vec<_>, _>>()?;
        let document = |sequence: u128| {
            let pick = self.mixture.pick(sequence);
            let window = in_file_order(pick, self.windows(&self.validation[pick.source]));
            let start = window * self.sequence_length as u64;
            let number = ends[pick.source].partition_point(|end| *end <= start);
            (pick.source as u64) << DOCUMENT_BITS | number as u64
        };
        let lane = |lane: u128| {
            let first = lane * self.sequences_per_lane as u128;
            (first..first + self.sequences_per_lane as u128).map(document).collect()
        };
        Ok((0..u128::from(rounds) * u128::from(self.lanes)).map(lane).collect())
    }

    /// How often each source has been read after the data of `steps` steps: its name, and its sequences so
    /// far as a multiple of its windows.
    #[must_use]
    pub fn epochs(&self, steps: u64) -> Vec<(String, f64)> {
        let per_step = self.sequences_per_lane as u128 * u128::from(self.lanes);
        self.manifest.epochs(&self.mixture, u128::from(steps) * per_step, self.sequence_length)
    }

    /// The number of rounds, over all lanes, with as many sequences as there are validation windows; at least
    /// 1.
    #[must_use]
    pub fn validation_rounds(&self) -> u64 {
        let windows: u64 = self.validation.iter().map(|file| self.windows(file)).sum();
        windows.div_ceil((self.sequences_per_lane as u64).saturating_mul(u64::from(self.lanes))).max(1)
    }

    /// The number of steps, over all lanes, with as many sequences as there are training windows; at least 1.
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
            return Err(Error::OutOfRange(format!("lane {lane}: expected a lane below {}", self.lanes)));
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
