//! Training of a classifier from a positive and a negative source.

use rayon::prelude::*;

use super::classifier::{Classifier, Features};
use super::evaluation::{Evaluation, Scored};
use super::options::check_alpha;
use crate::document_hash::DocumentHash;
use crate::error::Error;
use crate::limits::{BATCH_BYTES, MAX_EPOCHS};
use crate::source::{Document, Source};

/// The rate of AdaGrad (Duchi et al., 2011), which divides each weight's steps by the root of the sum of its
/// squared gradients.
const RATE: f32 = 0.5;
/// Added to that root.
const EPSILON: f32 = 1e-6;

/// How a classifier is trained.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TrainingOptions {
    /// The longest n-gram, in words.
    pub ngram: usize,
    /// The logarithm to base 2 of the number of buckets.
    pub bucket_bits: u32,
    /// Passes over the training documents.
    pub epochs: u32,
    /// The share of the documents that the evaluation is on.
    pub held_out: f64,
    /// The most text of each kind, in bytes.
    pub sample_bytes: u64,
    /// The shape of the Pareto distribution by which the evaluation samples.
    pub alpha: f64,
}

impl Default for TrainingOptions {
    fn default() -> Self {
        Self { ngram: 2, bucket_bits: 18, epochs: 5, held_out: 0.1, sample_bytes: 64 << 20, alpha: 9.0 }
    }
}

/// A classifier with its evaluation.
#[derive(Clone, Debug, PartialEq)]
pub struct Trained {
    /// The classifier.
    pub classifier: Classifier,
    /// Its quality on documents that it was not trained on.
    pub evaluation: Evaluation,
}

/// A document of either kind.
struct Example {
    hash: DocumentHash,
    features: Features,
    is_positive: bool,
}

/// Trains a classifier by stochastic gradient descent on the logistic loss. Both kinds weigh the same,
/// whatever their numbers of documents. The result depends on the documents only, not on their order.
///
/// # Errors
/// [`Error::Option`] for options out of range, those of reading the sources, and [`Error::TooFewExamples`] if
/// a kind has no document for training or for the evaluation.
pub fn train(positive: &[Source], negative: &[Source], options: &TrainingOptions) -> Result<Trained, Error> {
    let fail = |option: &str, reason| Err(Error::Option { option: option.into(), reason });
    if !(options.held_out > 0.0 && options.held_out < 1.0) {
        return fail("held_out", format!("{}: expected more than 0 and less than 1", options.held_out));
    }
    if !(1..=MAX_EPOCHS).contains(&options.epochs) {
        return fail("epochs", format!("{}: expected 1 to {MAX_EPOCHS}", options.epochs));
    }
    check_alpha(options.alpha).map_err(|reason| Error::Option { option: "alpha".into(), reason })?;
    let mut classifier = Classifier::zero(options.ngram, options.bucket_bits)?;
    let mut examples = read(positive, true, &classifier, options)?;
    examples.extend(read(negative, false, &classifier, options)?);
    // The hash orders them, and copies count once.
    examples
        .sort_by_key(|example| (example.hash.training_order(), *example.hash.bytes(), example.is_positive));
    examples.dedup_by(|a, b| a.hash == b.hash && a.is_positive == b.is_positive);
    let (held_out, trained): (Vec<_>, Vec<_>) =
        examples.into_iter().partition(|example| example.hash.held_out_draw() < options.held_out);
    for (part, name) in [(&trained, "training"), (&held_out, "the evaluation")] {
        for (is_positive, kind) in [(true, "positive"), (false, "negative")] {
            if !part.iter().any(|example| example.is_positive == is_positive) {
                return Err(Error::TooFewExamples { kind, part: name });
            }
        }
    }
    descend(&mut classifier, &trained, options.epochs);
    let scored = held_out.iter().map(|example| Scored {
        score: classifier.score_of(&example.features),
        is_positive: example.is_positive,
    });
    let evaluation = Evaluation::of(scored.collect(), trained.len() as u64, options.alpha);
    Ok(Trained { classifier, evaluation })
}

/// The examples of one kind.
fn read(
    sources: &[Source],
    is_positive: bool,
    classifier: &Classifier,
    options: &TrainingOptions,
) -> Result<Vec<Example>, Error> {
    let mut examples = Vec::new();
    let share = options.sample_bytes / sources.len().max(1) as u64;
    for source in sources {
        let (mut batch, mut bytes) = (Vec::new(), 0);
        let example = |document: &Document| Example {
            hash: DocumentHash::of(&document.text),
            features: classifier.features(&document.text),
            is_positive,
        };
        for document in source.sample(share.max(1), false) {
            let document = document?;
            bytes += document.text.len();
            batch.push(document);
            if bytes >= BATCH_BYTES {
                examples.par_extend(batch.par_iter().map(example));
                batch.clear();
                bytes = 0;
            }
        }
        examples.par_extend(batch.par_iter().map(example));
    }
    Ok(examples)
}

fn descend(classifier: &mut Classifier, examples: &[Example], epochs: u32) {
    let positive = examples.iter().filter(|example| example.is_positive).count() as f64;
    let negative = examples.len() as f64 - positive;
    let mut squares = vec![0.0_f32; classifier.buckets()];
    let mut bias_square = 0.0_f32;
    for example in (0..epochs).flat_map(|_| examples) {
        let (target, weight) = match example.is_positive {
            true => (1.0, 0.5 * examples.len() as f64 / positive),
            false => (0.0, 0.5 * examples.len() as f64 / negative),
        };
        let error = (weight * (classifier.score_of(&example.features) - target)) as f32;
        classifier.adjust(&example.features, |bucket, value| {
            let gradient = error * value;
            let square = match bucket {
                Some(bucket) => &mut squares[bucket as usize],
                None => &mut bias_square,
            };
            *square += gradient * gradient;
            RATE * gradient / (square.sqrt() + EPSILON)
        });
    }
}
