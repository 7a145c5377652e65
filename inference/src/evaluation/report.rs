//! Means with their standard errors.

use super::answers;
use super::likelihood::Likelihood;
use super::task::{Choice, Completion, Kind, Task};
use serde::{Serialize, Serializer};
use std::collections::BTreeMap;

/// A number with its standard error.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Estimate {
    /// The number.
    pub value: f64,
    /// Its standard error over records; absent with fewer than two of them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub standard_error: Option<f64>,
}

/// What is measured on a task.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Metric {
    /// The share of questions whose right choice is the most likely one.
    Accuracy,
    /// The same by log-likelihood per token.
    AccuracyPerToken,
    /// The same by log-likelihood per byte of the choice.
    AccuracyPerByte,
    /// The share of completions that are an answer, but for case, punctuation and articles.
    ExactMatch,
    /// The mean F1 of the words of completion and answer.
    F1,
    /// The mean log-likelihood of the right answer, in nats.
    LogLikelihood,
    /// Its log-likelihood per token, in nats.
    LogLikelihoodPerToken,
    /// Its log-likelihood per byte, in nats.
    LogLikelihoodPerByte,
    /// The perplexity per token.
    PerplexityPerToken,
    /// The perplexity per byte.
    PerplexityPerByte,
    /// The perplexity per word.
    PerplexityPerWord,
    /// Bits per byte.
    BitsPerByte,
}

impl Metric {
    /// The name in tables and in JSON.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Accuracy => "accuracy",
            Self::AccuracyPerToken => "accuracy_per_token",
            Self::AccuracyPerByte => "accuracy_per_byte",
            Self::ExactMatch => "exact_match",
            Self::F1 => "f1",
            Self::LogLikelihood => "log_likelihood",
            Self::LogLikelihoodPerToken => "log_likelihood_per_token",
            Self::LogLikelihoodPerByte => "log_likelihood_per_byte",
            Self::PerplexityPerToken => "perplexity_per_token",
            Self::PerplexityPerByte => "perplexity_per_byte",
            Self::PerplexityPerWord => "perplexity_per_word",
            Self::BitsPerByte => "bits_per_byte",
        }
    }
}

impl Serialize for Metric {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

/// The scores on one task.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// The task's name.
    pub task: String,
    /// `multiple choice`, `completion` or `text`.
    pub kind: &'static str,
    /// The number of records.
    pub records: usize,
    /// The number of examples before each question.
    pub shots: usize,
    /// Prompts that were longer than the model's context.
    pub truncated: usize,
    /// The metrics.
    pub metrics: BTreeMap<Metric, Estimate>,
    /// What each record adds to the numerator and the denominator of a metric.
    #[serde(skip)]
    parts: BTreeMap<Metric, Vec<(f64, f64)>>,
}

impl Report {
    pub(super) fn new(task: &Task, shots: usize) -> Self {
        let kind = match task.kind {
            Kind::Choices(_) => "multiple choice",
            Kind::Completions(_) => "completion",
            Kind::Texts(_) => "text",
        };
        Self {
            task: task.name.clone(),
            kind,
            records: task.len(),
            // There may be no more other records.
            shots: shots.min(task.len() - 1),
            truncated: 0,
            metrics: BTreeMap::new(),
            parts: BTreeMap::new(),
        }
    }

    fn add(&mut self, metric: Metric, amount: f64, of: f64) {
        self.parts.entry(metric).or_default().push((amount, of));
    }

    pub(super) fn add_choice(&mut self, record: &Choice, likelihoods: &[Likelihood]) {
        let bytes = record.choices.iter().map(|choice| choice.len() as f64);
        let per_byte: Vec<f64> = likelihoods.iter().zip(bytes).map(|(l, bytes)| l.nats / bytes).collect();
        let per_token: Vec<f64> = likelihoods.iter().map(|l| l.nats / l.tokens as f64).collect();
        let plain: Vec<f64> = likelihoods.iter().map(|l| l.nats).collect();
        for (metric, scores) in [
            (Metric::Accuracy, plain),
            (Metric::AccuracyPerToken, per_token),
            (Metric::AccuracyPerByte, per_byte),
        ] {
            let is_right = first_largest(&scores) == Some(record.answer);
            self.add(metric, f64::from(u8::from(is_right)), 1.0);
        }
        self.add_likelihood(&record.choices[record.answer], &likelihoods[record.answer]);
    }

    pub(super) fn add_likelihood(&mut self, answer: &str, likelihood: &Likelihood) {
        self.add(Metric::LogLikelihood, likelihood.nats, 1.0);
        self.add(Metric::LogLikelihoodPerToken, likelihood.nats, likelihood.tokens as f64);
        self.add(Metric::LogLikelihoodPerByte, likelihood.nats, answer.len() as f64);
    }

    pub(super) fn add_completion(&mut self, record: &Completion, text: &str) {
        let is_exact = answers::is_exact(text, &record.answers);
        self.add(Metric::ExactMatch, f64::from(u8::from(is_exact)), 1.0);
        self.add(Metric::F1, answers::f1(text, &record.answers), 1.0);
    }

    pub(super) fn add_text(&mut self, text: &str, likelihood: &Likelihood) {
        let (bytes, words) = (text.len() as f64, text.split_whitespace().count() as f64);
        self.add(Metric::PerplexityPerToken, -likelihood.nats, likelihood.tokens as f64);
        self.add(Metric::PerplexityPerByte, -likelihood.nats, bytes);
        self.add(Metric::BitsPerByte, -likelihood.nats / std::f64::consts::LN_2, bytes);
        self.add(Metric::PerplexityPerWord, -likelihood.nats, words);
    }

    /// Computes the metrics from their parts.
    pub(super) fn finish(mut self) -> Self {
        for (metric, parts) in std::mem::take(&mut self.parts) {
            let Some(ratio) = ratio(&parts) else { continue };
            let is_exponent = matches!(
                metric,
                Metric::PerplexityPerToken | Metric::PerplexityPerByte | Metric::PerplexityPerWord
            );
            let estimate = if is_exponent { ratio.exponential() } else { ratio };
            self.metrics.insert(metric, estimate);
        }
        self
    }
}

impl Estimate {
    /// `exp` of it, with the error of the first order.
    fn exponential(self) -> Self {
        let value = self.value.exp();
        Self { value, standard_error: self.standard_error.map(|error| error * value) }
    }
}

/// A ratio of two sums over records with its standard error (Cochran, *Sampling Techniques*, equation 6.13,
/// without the correction for finite populations); that of a mean where all denominators are 1. `None` where
/// the denominators are 0.
fn ratio(parts: &[(f64, f64)]) -> Option<Estimate> {
    let (amounts, of): (f64, f64) =
        parts.iter().fold((0.0, 0.0), |sum, part| (sum.0 + part.0, sum.1 + part.1));
    if of == 0.0 {
        return None;
    }
    let value = amounts / of;
    let count = parts.len() as f64;
    let squares: f64 = parts.iter().map(|(amount, of)| (amount - value * of).powi(2)).sum();
    let standard_error = (parts.len() > 1).then(|| (count / (count - 1.0) * squares).sqrt() / of);
    Some(Estimate { value, standard_error })
}

/// The index of the largest score, the first of equal ones.
fn first_largest(scores: &[f64]) -> Option<usize> {
    let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    scores.iter().position(|score| *score == largest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_error_of_a_mean_is_that_of_the_textbook() {
        let parts: Vec<(f64, f64)> = [1.0, 2.0, 3.0, 4.0].map(|amount| (amount, 1.0)).to_vec();
        let estimate = ratio(&parts).expect("a ratio");
        assert_eq!(estimate.value, 2.5);
        // The deviation of 1, 2, 3, 4 is sqrt(5/3), and there are four of them.
        let error = estimate.standard_error.expect("an error");
        assert!((error - (5.0_f64 / 3.0).sqrt() / 2.0).abs() < 1e-12, "{error}");
        assert_eq!(ratio(&[(1.0, 2.0)]), Some(Estimate { value: 0.5, standard_error: None }));
        assert_eq!(ratio(&[(1.0, 0.0)]), None);
    }

    #[test]
    fn the_error_of_a_perplexity_is_that_of_its_logarithm_times_it() {
        let estimate = Estimate { value: 2.0, standard_error: Some(0.1) }.exponential();
        assert_eq!(estimate.value, 2.0_f64.exp());
        assert_eq!(estimate.standard_error, Some(0.1 * 2.0_f64.exp()));
    }

    #[test]
    fn normalizations_can_choose_differently() {
        let choices = vec!["a very long choice".to_owned(), "no".to_owned()];
        let record = Choice { prompt: String::new(), choices, answer: 0 };
        let task = Task { name: "t".into(), kind: Kind::Choices(vec![record.clone()]) };
        let likelihood = |nats, tokens| Likelihood { nats, tokens, is_greedy: false };
        let mut report = Report::new(&task, 0);
        // Per token -3 and -2, per byte -0.5 and -1.
        report.add_choice(&record, &[likelihood(-9.0, 3), likelihood(-2.0, 1)]);
        let values = |report: Report| report.metrics.into_values().map(|e| e.value).collect::<Vec<_>>();
        assert_eq!(values(report.finish()), [0.0, 0.0, 1.0, -9.0, -3.0, -0.5]);
    }
}
