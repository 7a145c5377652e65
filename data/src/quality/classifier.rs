//! The linear classifier, its features and its file.
//!
//! The features of a text are its n-grams of words and marks, hashed into a fixed number of buckets. A bucket
//! with count c has the value `ln(1 + c)`, and the values of a text have the Euclidean length 1: neither long
//! texts nor repeated words dominate. The score is the logistic function of the weighted sum. All of
//! it is computed in one order and has the same bits on every machine.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::Path;

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

use crate::error::Error;
use crate::limits::{BUCKET_BITS, MAX_CLASSIFIER_BYTES, MAX_NGRAM};
use crate::words::{Word, sequence_hash, words};

/// The version of the file and of the features.
const FORMAT: &str = "volary-quality-1";

/// A logistic model on hashed n-grams.
#[derive(Clone, Debug, PartialEq)]
pub struct Classifier {
    /// The longest n-gram, in words.
    ngram: usize,
    /// One for each bucket; their number is a power of two.
    weights: Vec<f32>,
    bias: f32,
}

/// The features of a text: buckets in ascending order, with their values.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Features(pub(super) Vec<(u32, f32)>);

/// The part of an n-gram in the score of a text.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Contribution {
    /// The n-gram as it first occurs.
    pub ngram: String,
    /// The number of times that it occurs, n-grams of the same bucket included.
    pub count: u32,
    /// Its term of the sum whose logistic function is the score: positive terms raise the score.
    pub weight: f64,
}

impl Classifier {
    /// A classifier that gives every text the score 0.5.
    ///
    /// # Errors
    /// [`Error::Option`] for an n-gram or a number of buckets out of range.
    pub(super) fn zero(ngram: usize, bucket_bits: u32) -> Result<Self, Error> {
        let fail = |option: &str, reason| Err(Error::Option { option: option.into(), reason });
        if !(1..=MAX_NGRAM).contains(&ngram) {
            return fail("ngram", format!("{ngram}: expected 1 to {MAX_NGRAM}"));
        }
        if !BUCKET_BITS.contains(&bucket_bits) {
            let (least, most) = (BUCKET_BITS.start(), BUCKET_BITS.end());
            return fail("bucket_bits", format!("{bucket_bits}: expected {least} to {most}"));
        }
        Ok(Self { ngram, weights: vec![0.0; 1 << bucket_bits], bias: 0.0 })
    }

    /// The features of a text.
    #[must_use]
    pub fn features(&self, text: &str) -> Features {
        let mut buckets = Vec::new();
        self.for_each_ngram(text, |bucket, _| buckets.push(bucket));
        buckets.sort_unstable();
        let runs = buckets.chunk_by(|a, b| a == b);
        let mut values: Vec<(u32, f32)> =
            runs.map(|run| (run[0], libm::logf(1.0 + run.len() as f32))).collect();
        let square: f64 = values.iter().map(|(_, value)| f64::from(*value).powi(2)).sum();
        let scale = square.sqrt().max(f64::MIN_POSITIVE).recip();
        values.iter_mut().for_each(|(_, value)| *value = (f64::from(*value) * scale) as f32);
        Features(values)
    }

    /// The score of a text, 0 to 1: the probability that it is curated, if both kinds are equally frequent.
    #[must_use]
    pub fn score(&self, text: &str) -> f64 {
        self.score_of(&self.features(text))
    }

    pub(super) fn score_of(&self, features: &Features) -> f64 {
        let term =
            |(bucket, value): &(u32, f32)| f64::from(self.weights[*bucket as usize]) * f64::from(*value);
        logistic(f64::from(self.bias) + features.0.iter().map(term).sum::<f64>())
    }

    /// The n-grams of a text that weigh most, at most `most`, by the size of their terms.
    #[must_use]
    pub fn contributions(&self, text: &str, most: usize) -> Vec<Contribution> {
        let mut first: HashMap<u32, (String, u32)> = HashMap::new();
        self.for_each_ngram(text, |bucket, ngram| {
            let entry = first.entry(bucket);
            let words = || text[ngram[0].start..ngram[ngram.len() - 1].end].split_whitespace();
            entry.or_insert_with(|| (words().collect::<Vec<_>>().join(" "), 0)).1 += 1;
        });
        let contribution = |(bucket, value): &(u32, f32)| {
            let (ngram, count) = first.remove(bucket).unwrap_or_default();
            let weight = f64::from(self.weights[*bucket as usize]) * f64::from(*value);
            Contribution { ngram, count, weight }
        };
        let mut all: Vec<_> = self.features(text).0.iter().map(contribution).collect();
        all.sort_by(|a, b| b.weight.abs().total_cmp(&a.weight.abs()));
        all.truncate(most);
        all
    }

    fn for_each_ngram(&self, text: &str, mut visit: impl FnMut(u32, &[Word])) {
        let mask = self.weights.len() as u64 - 1;
        let words: Vec<Word> = words(text, true).collect();
        for start in 0..words.len() {
            for length in 1..=self.ngram.min(words.len() - start) {
                let ngram = &words[start..start + length];
                visit((sequence_hash(ngram) & mask) as u32, ngram);
            }
        }
    }

    pub(super) fn buckets(&self) -> usize {
        self.weights.len()
    }

    /// Moves the weights of some features and the bias.
    pub(super) fn adjust(&mut self, features: &Features, mut step: impl FnMut(Option<u32>, f32) -> f32) {
        for (bucket, value) in &features.0 {
            self.weights[*bucket as usize] -= step(Some(*bucket), *value);
        }
        self.bias -= step(None, 1.0);
    }

    /// Writes the classifier as a safetensors file: `weights`, F32 `[buckets]`, and `bias`, F32 `[1]`.
    ///
    /// # Errors
    /// [`Error::Write`].
    pub fn save(&self, path: &Path) -> Result<(), Error> {
        let bytes = |values: &[f32]| values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>();
        let (weights, bias) = (bytes(&self.weights), bytes(&[self.bias]));
        let failed = |error: safetensors::SafeTensorError| Error::write(path)(std::io::Error::other(error));
        let view = |shape, bytes| TensorView::new(Dtype::F32, shape, bytes).map_err(failed);
        let tensors = BTreeMap::from([
            ("bias", view(vec![1], &bias)?),
            ("weights", view(vec![self.weights.len()], &weights)?),
        ]);
        let metadata = [("format", FORMAT.to_string()), ("ngram", self.ngram.to_string())];
        let metadata = metadata.map(|(name, value)| (name.to_string(), value)).into();
        let file = safetensors::serialize(tensors, Some(metadata)).map_err(failed)?;
        fs::write(path, file).map_err(Error::write(path))
    }

    /// Reads a classifier.
    ///
    /// # Errors
    /// [`Error::Read`], and [`Error::Classifier`] for a file that is none.
    pub fn load(path: &Path) -> Result<Self, Error> {
        let fail = |reason: String| Error::Classifier { path: path.to_path_buf(), reason };
        let size = fs::metadata(path).map_err(Error::read(path))?.len();
        if size > MAX_CLASSIFIER_BYTES {
            return Err(fail(format!("{size} bytes: expected at most {MAX_CLASSIFIER_BYTES}")));
        }
        Self::from_bytes(&fs::read(path).map_err(Error::read(path))?).map_err(fail)
    }

    fn from_bytes(bytes: &[u8]) -> Result<Self, String> {
        let (_, metadata) = SafeTensors::read_metadata(bytes).map_err(|error| error.to_string())?;
        let value = |name| metadata.metadata().as_ref().and_then(|all| all.get(name)).map(String::as_str);
        let format = value("format").unwrap_or("none");
        if format != FORMAT {
            return Err(format!("has the format {format:?}, but this program reads {FORMAT:?}"));
        }
        let ngram = value("ngram").and_then(|text| text.parse().ok()).unwrap_or(0);
        let tensors = SafeTensors::deserialize(bytes).map_err(|error| error.to_string())?;
        let floats = |name| {
            let view = tensors.tensor(name).map_err(|error| error.to_string())?;
            if view.dtype() != Dtype::F32 || view.shape().len() != 1 {
                return Err(format!("{name}: expected F32 [n], found {:?} {:?}", view.dtype(), view.shape()));
            }
            let values: Vec<f32> =
                view.data().as_chunks().0.iter().map(|four| f32::from_le_bytes(*four)).collect();
            match values.iter().all(|value| value.is_finite()) {
                true => Ok(values),
                false => Err(format!("{name} holds a value that is not finite")),
            }
        };
        let (weights, bias) = (floats("weights")?, floats("bias")?);
        let bits = weights.len().checked_ilog2().filter(|bits| weights.len() == 1 << bits);
        let (Some(bits), &[bias]) = (bits, &bias[..]) else {
            return Err(format!("{} weights and {} biases", weights.len(), bias.len()));
        };
        // The bounds are those of a new classifier.
        let zero = Self::zero(ngram, bits).map_err(|error| error.to_string())?;
        Ok(Self { weights, bias, ..zero })
    }
}

/// The logistic function, with the same bits on all machines.
fn logistic(sum: f64) -> f64 {
    1.0 / (1.0 + libm::exp(-sum))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn classifier() -> Classifier {
        let mut classifier = Classifier::zero(2, 14).unwrap();
        let features = classifier.features("a good sentence");
        classifier.adjust(&features, |bucket, value| if bucket.is_some() { -value } else { 0.25 });
        classifier
    }

    #[test]
    fn the_values_of_a_text_have_length_one_and_grow_with_the_logarithm_of_the_count() {
        let classifier = Classifier::zero(1, 20).unwrap();
        let Features(values) = classifier.features("word word word other");
        assert_eq!(values.len(), 2);
        let length: f64 = values.iter().map(|(_, v)| f64::from(*v).powi(2)).sum();
        assert!((length - 1.0).abs() < 1e-6, "{values:?}");
        let mut sizes: Vec<_> = values.iter().map(|(_, v)| *v).collect();
        sizes.sort_by(f32::total_cmp);
        assert!((f64::from(sizes[1] / sizes[0]) - 2.0).abs() < 1e-6, "ln 4 / ln 2: {values:?}");
        assert_eq!(classifier.features(" \n"), Features(Vec::new()));
    }

    #[test]
    fn the_score_is_the_logistic_function_of_the_contributions_and_the_bias() {
        let classifier = classifier();
        let text = "A good sentence, and a bad one";
        let parts = classifier.contributions(text, usize::MAX);
        let sum = f64::from(classifier.bias) + parts.iter().map(|part| part.weight).sum::<f64>();
        assert!((classifier.score(text) - 1.0 / (1.0 + (-sum).exp())).abs() < 1e-12);
        let top = classifier.contributions(text, 3);
        assert!(top.iter().any(|part| part.ngram == "good sentence" && part.count == 1), "{top:?}");
        assert_eq!(classifier.score(""), logistic(f64::from(classifier.bias)));
    }

    #[test]
    fn a_saved_classifier_is_the_same_when_loaded() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("q.safetensors");
        classifier().save(&path).unwrap();
        assert_eq!(Classifier::load(&path).unwrap(), classifier());
    }

    #[test]
    fn files_that_are_no_classifiers_are_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("q.safetensors");
        let mut broken = classifier();
        broken.weights[7] = f32::NAN;
        broken.save(&path).unwrap();
        let error = Classifier::load(&path).unwrap_err().to_string();
        assert!(error.contains("q.safetensors") && error.contains("not finite"), "{error}");
        broken.weights[7] = 0.0;
        broken.weights.truncate(1000);
        broken.save(&path).unwrap();
        assert!(Classifier::load(&path).unwrap_err().to_string().contains("1000 weights"));
        for bytes in [&b"text"[..], &[0xff; 64], &[]] {
            fs::write(&path, bytes).unwrap();
            assert!(matches!(Classifier::load(&path), Err(Error::Classifier { .. })));
        }
        assert!(matches!(Classifier::load(&folder.path().join("none")), Err(Error::Read { .. })));
    }
}
