//! The choice of a token from logits.

use volary_core::random::Stream;

/// The sampling of a continuation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// The maximum number of new tokens.
    pub max_tokens: usize,
    /// 0 takes the most likely token, 1 samples from the model's distribution.
    pub temperature: f64,
    /// The seed of the draws.
    pub seed: u64,
    /// The token that ends the text, and is not part of it.
    pub stop: Option<u32>,
    /// Only tokens below this bound are drawn: an embedding may have more rows than the tokenizer has tokens.
    pub vocabulary: usize,
}

impl Default for Sampling {
    fn default() -> Self {
        Self { max_tokens: 64, temperature: 0.8, seed: 0, stop: None, vocabulary: usize::MAX }
    }
}

/// Draws a token from `logits` (nats); `None` if the logits are not finite.
///
/// Temperature 0 takes the most likely token, the first of equal ones. The limits are exact: a temperature
/// near 0 tends to the same, and a huge one draws all tokens alike.
pub(crate) fn draw(logits: &[f64], temperature: f64, stream: &mut Stream) -> Option<u32> {
    let largest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if !largest.is_finite() || logits.iter().any(|logit| logit.is_nan()) {
        return None;
    }
    if temperature == 0.0 {
        return logits.iter().position(|logit| *logit == largest).map(|at| at as u32);
    }
    // The difference to the largest, before the division: its exponent cannot overflow.
    let weights: Vec<f64> = logits.iter().map(|logit| ((logit - largest) / temperature).exp()).collect();
    let mut left = stream.next_f64() * weights.iter().sum::<f64>();
    let mut drawn = 0;
    for (at, weight) in weights.iter().enumerate().filter(|(_, weight)| **weight > 0.0) {
        // After rounding errors, the last possible token.
        drawn = at;
        left -= weight;
        if left < 0.0 {
            break;
        }
    }
    Some(drawn as u32)
}

#[cfg(test)]
mod tests {
    use volary_core::random::{Purpose, Stream};

    use super::*;

    fn counts(logits: &[f64], temperature: f64) -> Vec<usize> {
        let mut stream = Stream::new(1, Purpose::Generate, &[]);
        let mut counts = vec![0; logits.len()];
        for _ in 0..2000 {
            counts[draw(logits, temperature, &mut stream).unwrap() as usize] += 1;
        }
        counts
    }

    #[test]
    fn temperatures_near_zero_take_the_most_likely_token() {
        for temperature in [0.0, f64::MIN_POSITIVE, 1e-300, 1e-3] {
            assert_eq!(counts(&[1.0, 3.0, 2.0], temperature), [0, 2000, 0], "{temperature}");
        }
        assert_eq!(counts(&[1.0, 2.0, 2.0], 0.0), [0, 2000, 0]);
    }

    #[test]
    fn huge_temperatures_draw_all_tokens_alike() {
        for temperature in [1e9, f64::MAX] {
            // Three standard deviations of a binomial draw: 3 * sqrt(2000 * 2/9) = 63.
            let counts = counts(&[1.0, 300.0, 2.0], temperature);
            assert!(counts.iter().all(|count| count.abs_diff(667) < 64), "{temperature}: {counts:?}");
        }
    }

    #[test]
    fn at_temperature_one_tokens_are_drawn_by_their_probabilities() {
        let counts = counts(&[0.25_f64.ln(), 0.75_f64.ln(), f64::NEG_INFINITY], 1.0);
        // Three standard deviations: 3 * sqrt(2000 * 3/16) = 58.
        assert!(counts[0].abs_diff(500) < 59 && counts[2] == 0, "{counts:?}");
    }

    #[test]
    fn a_broken_model_draws_nothing() {
        let mut stream = Stream::new(1, Purpose::Generate, &[]);
        for logits in [vec![f64::NAN, 1.0], vec![f64::INFINITY, 1.0], vec![f64::NEG_INFINITY], vec![]] {
            assert_eq!(draw(&logits, 1.0, &mut stream), None, "{logits:?}");
        }
    }
}
