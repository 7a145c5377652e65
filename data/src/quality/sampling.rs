//! The rule that keeps documents by their scores.

use crate::document_hash::DocumentHash;

/// The probability that a document of `score` (0 to 1) is kept: that of a sample above `1 - score` from a
/// Pareto distribution of shape `alpha` that starts at 0, `(2 - score)^-alpha`. A score of 1 is kept always,
/// and one of 0 with probability 2^-9 for `alpha` 9.
#[must_use]
pub fn keep_probability(score: f64, alpha: f64) -> f64 {
    // The library's functions have the same bits on all machines, the system's do not.
    libm::pow(2.0 - score.clamp(0.0, 1.0), -alpha)
}

/// Whether the document is kept. The hash of its text draws the sample: copies have one fate, in every source
/// and on every machine.
#[must_use]
pub fn is_kept(hash: &DocumentHash, score: f64, alpha: f64) -> bool {
    hash.sampling_draw() < keep_probability(score, alpha)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// NumPy's `pareto(9)` is what GPT-3's appendix compares with `1 - score`: the quantile function of the
    /// distribution that starts at 0, applied to uniform draws.
    #[test]
    fn documents_are_kept_as_often_as_pareto_samples_exceed_the_score() {
        for score in [0.0, 0.3, 0.8, 0.99, 1.0] {
            let draws = 40_000;
            let (mut kept, mut exceeding) = (0, 0);
            for number in 0..draws {
                let hash = DocumentHash::of(&format!("document {number}"));
                kept += i32::from(is_kept(&hash, score, 9.0));
                let uniform = 1.0 - (f64::from(number) + 0.5) / f64::from(draws);
                let sample = uniform.powf(-1.0 / 9.0) - 1.0;
                exceeding += i32::from(sample > 1.0 - score);
            }
            let difference = f64::from(kept - exceeding).abs() / f64::from(draws);
            // Four standard errors of a share.
            assert!(difference <= 4.0 * 0.5 / f64::from(draws).sqrt(), "{score}: {kept} and {exceeding}");
        }
        assert_eq!(keep_probability(1.0, 9.0), 1.0);
        assert_eq!(keep_probability(0.0, 9.0), 1.0 / 512.0);
    }
}
