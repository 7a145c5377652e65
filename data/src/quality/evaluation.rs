//! The evaluation of a classifier on held-out documents.

use serde::Serialize;

use super::sampling::keep_probability;
use crate::limits::CALIBRATION_BINS;

/// A held-out document.
#[derive(Clone, Copy, Debug)]
pub(super) struct Scored {
    pub(super) score: f64,
    pub(super) is_positive: bool,
}

/// The quality of a classifier. Shares count both kinds as equally frequent, as the training does: the
/// precision among pages of which one in a hundred is curated is another.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Evaluation {
    /// Documents for training.
    pub trained: u64,
    /// Held-out positive documents.
    pub positive: u64,
    /// Held-out negative documents.
    pub negative: u64,
    /// The share of positive documents among those with a score of at least 0.5.
    pub precision: f64,
    /// The share of the positive documents with a score of at least 0.5.
    pub recall: f64,
    /// The probability that a positive document has a higher score than a negative one (half of the ties).
    pub area_under_curve: f64,
    /// The share of the positive documents that the sampling keeps, in expectation.
    pub kept_positive: f64,
    /// The share of the negative documents that the sampling keeps, in expectation.
    pub kept_negative: f64,
    /// The documents by score, in [`CALIBRATION_BINS`] bins of equal width; empty bins are left out.
    pub calibration: Vec<CalibrationBin>,
}

/// The documents with scores in one interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct CalibrationBin {
    /// The smallest score of the interval.
    pub from: f64,
    /// The end of the interval.
    pub to: f64,
    /// The number of documents.
    pub documents: u64,
    /// Their mean score.
    pub mean_score: f64,
    /// The share of positive documents; equal to the mean score if the scores are probabilities.
    pub positive_share: f64,
}

impl Evaluation {
    /// Both kinds must occur.
    pub(super) fn of(mut scored: Vec<Scored>, trained: u64, alpha: f64) -> Self {
        scored.sort_by(|a, b| a.score.total_cmp(&b.score));
        let count = |matches: &dyn Fn(&Scored) -> bool| scored.iter().filter(|s| matches(s)).count() as f64;
        let positive = count(&|s| s.is_positive);
        let negative = count(&|s| !s.is_positive);
        let weight = |s: &Scored| if s.is_positive { 1.0 / positive } else { 1.0 / negative };
        let recall = count(&|s| s.is_positive && s.score >= 0.5) / positive;
        let false_share = count(&|s| !s.is_positive && s.score >= 0.5) / negative;
        let kept = |is_positive: bool| {
            let of_kind = scored.iter().filter(|s| s.is_positive == is_positive);
            of_kind.map(|s| keep_probability(s.score, alpha) * weight(s)).sum()
        };
        Self {
            trained,
            positive: positive as u64,
            negative: negative as u64,
            precision: if recall > 0.0 { recall / (recall + false_share) } else { 0.0 },
            recall,
            area_under_curve: area_under_curve(&scored) / (positive * negative),
            kept_positive: kept(true),
            kept_negative: kept(false),
            calibration: calibration(&scored, weight),
        }
    }
}

/// The number of pairs of a positive and a negative document in which the positive one has the higher score;
/// ties count half. `scored` is in the order of the scores.
fn area_under_curve(scored: &[Scored]) -> f64 {
    let (mut negatives_below, mut pairs) = (0.0, 0.0);
    for equal in scored.chunk_by(|a, b| a.score == b.score) {
        let positives = equal.iter().filter(|s| s.is_positive).count() as f64;
        let negatives = equal.len() as f64 - positives;
        pairs += positives * (negatives_below + 0.5 * negatives);
        negatives_below += negatives;
    }
    pairs
}

fn calibration(scored: &[Scored], weight: impl Fn(&Scored) -> f64) -> Vec<CalibrationBin> {
    let bins = CALIBRATION_BINS as f64;
    let number = |s: &Scored| ((s.score * bins) as usize).min(CALIBRATION_BINS - 1);
    let bin = |members: &[Scored]| {
        let total: f64 = members.iter().map(&weight).sum();
        let mean = |value: &dyn Fn(&Scored) -> f64| {
            members.iter().map(|s| weight(s) * value(s)).sum::<f64>() / total
        };
        CalibrationBin {
            from: number(&members[0]) as f64 / bins,
            to: (number(&members[0]) + 1) as f64 / bins,
            documents: members.len() as u64,
            mean_score: mean(&|s| s.score),
            positive_share: mean(&|s| f64::from(u8::from(s.is_positive))),
        }
    };
    scored.chunk_by(|a, b| number(a) == number(b)).map(bin).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn evaluation(documents: &[(f64, bool)]) -> Evaluation {
        let scored = documents.iter().map(|&(score, is_positive)| Scored { score, is_positive });
        Evaluation::of(scored.collect(), 0, 9.0)
    }

    #[test]
    fn shares_count_both_kinds_as_equally_frequent() {
        // Of 2 positive documents 1 is found; of 4 negative ones 1 is taken for positive.
        let found =
            evaluation(&[(0.9, true), (0.2, true), (0.8, false), (0.1, false), (0.1, false), (0.3, false)]);
        assert_eq!(found.recall, 0.5);
        assert!((found.precision - 0.5 / 0.75).abs() < 1e-12);
        // Positive above negative: 0.9 above all 4, 0.2 above 2.
        assert!((found.area_under_curve - 6.0 / 8.0).abs() < 1e-12);
        assert_eq!((found.positive, found.negative), (2, 4));
    }

    #[test]
    fn ties_count_half_and_a_perfect_classifier_has_area_one() {
        assert_eq!(evaluation(&[(0.5, true), (0.5, false)]).area_under_curve, 0.5);
        let perfect = evaluation(&[(1.0, true), (0.0, false), (1.0, true)]);
        assert_eq!((perfect.area_under_curve, perfect.precision, perfect.recall), (1.0, 1.0, 1.0));
        assert_eq!(perfect.kept_positive, 1.0);
        assert!((perfect.kept_negative - 1.0 / 512.0).abs() < 1e-12);
    }

    #[test]
    fn bins_hold_every_document_once() {
        let documents: Vec<_> = (0..=100).map(|n| (f64::from(n) / 100.0, n % 3 == 0)).collect();
        let found = evaluation(&documents);
        assert_eq!(found.calibration.len(), CALIBRATION_BINS);
        assert_eq!(found.calibration.iter().map(|bin| bin.documents).sum::<u64>(), 101);
        for bin in &found.calibration {
            assert!((bin.from..=bin.to).contains(&bin.mean_score), "{bin:?}");
        }
    }
}
