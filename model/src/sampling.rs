//! The choice of a token from logits.

use volary_core::random::{Purpose, Stream};

/// How a continuation is drawn. The restrictions apply in the order of the fields, as in Hugging Face's
/// `generate`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// Only tokens below this bound are drawn: an embedding may have more rows than the tokenizer has tokens.
    pub vocabulary: usize,
    /// Logits of tokens that occurred before are divided by it where positive, and multiplied where negative
    /// (Keskar et al., arXiv 1909.05858, section 4.1). 1 changes nothing.
    pub repetition_penalty: f64,
    /// Subtracted from the logits of tokens that were generated before, as OpenAI's interface has it. 0
    /// changes nothing.
    pub presence_penalty: f64,
    /// The same, once for each time that the token was generated.
    pub frequency_penalty: f64,
    /// 0 takes the most likely token, 1 samples from the model's distribution.
    pub temperature: f64,
    /// Only this many of the most likely tokens are drawn; 0 for all.
    pub top_k: usize,
    /// Only the most likely tokens are drawn whose probabilities first reach this sum (Holtzman et al.,
    /// arXiv 1904.09751); 1 for all.
    pub top_p: f64,
    /// The seed of the draws.
    pub seed: u64,
    /// The number of the continuation among several of one prompt; each has draws of its own.
    pub choice: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            vocabulary: usize::MAX,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            temperature: 0.8,
            top_k: 0,
            top_p: 1.0,
            seed: 0,
            choice: 0,
        }
    }
}

/// The draws of one continuation.
#[derive(Debug)]
pub struct Sampler {
    sampling: Sampling,
    stream: Stream,
}

impl Sampler {
    /// The draws of a continuation from its first token on.
    #[must_use]
    pub fn new(sampling: Sampling) -> Self {
        let path = [sampling.choice];
        let path = if sampling.choice == 0 { &[] } else { path.as_slice() };
        Self { stream: Stream::new(sampling.seed, Purpose::Generate, path), sampling }
    }

    /// Draws a token from `logits` (nats) after the tokens of a prompt and those `generated` since; `None` if
    /// the logits are not finite.
    ///
    /// Temperature 0 takes the most likely token, the first of equal ones. The limits are exact: a
    /// temperature near 0 tends to the same, and a huge one draws all tokens alike.
    pub fn draw(&mut self, logits: &[f32], prompt: &[u32], generated: &[u32]) -> Option<u32> {
        let Sampling { temperature, vocabulary, .. } = self.sampling;
        let mut logits: Vec<f64> = logits.iter().take(vocabulary).map(|&logit| logit.into()).collect();
        self.penalize_repetitions(&mut logits, prompt, generated);
        self.penalize_generated(&mut logits, generated);
        let largest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        if !largest.is_finite() || logits.iter().any(|logit| logit.is_nan()) {
            return None;
        }
        if temperature == 0.0 {
            return logits.iter().position(|logit| *logit == largest).map(|at| at as u32);
        }
        // The difference to the largest, before the division: its exponent cannot overflow.
        let weights: Vec<f64> = logits.iter().map(|logit| ((logit - largest) / temperature).exp()).collect();
        let uniform = self.stream.next_f64();
        if self.sampling.top_k == 0 && self.sampling.top_p >= 1.0 {
            return Some(drawn(uniform, &weights, (0..weights.len()).filter(|&at| weights[at] > 0.0)));
        }
        Some(drawn(uniform, &weights, self.candidates(&weights).into_iter()))
    }

    fn penalize_repetitions(&self, logits: &mut [f64], prompt: &[u32], generated: &[u32]) {
        let penalty = self.sampling.repetition_penalty;
        if penalty == 1.0 {
            return;
        }
        let mut seen = [prompt, generated].concat();
        seen.sort_unstable();
        seen.dedup();
        for id in seen {
            if let Some(logit) = logits.get_mut(id as usize) {
                *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
            }
        }
    }

    fn penalize_generated(&self, logits: &mut [f64], generated: &[u32]) {
        let Sampling { presence_penalty, frequency_penalty, .. } = self.sampling;
        if (presence_penalty, frequency_penalty) == (0.0, 0.0) {
            return;
        }
        let mut seen = generated.to_vec();
        seen.sort_unstable();
        for same in seen.chunk_by(|a, b| a == b) {
            if let Some(logit) = logits.get_mut(same[0] as usize) {
                *logit -= presence_penalty + frequency_penalty * same.len() as f64;
            }
        }
    }

    /// The tokens that may be drawn, by their weights: at least one.
    fn candidates(&self, weights: &[f64]) -> Vec<usize> {
        let Sampling { top_k, top_p, .. } = self.sampling;
        let mut candidates: Vec<usize> = (0..weights.len()).filter(|&at| weights[at] > 0.0).collect();
        // Stable: of equal tokens, the first ones stay.
        candidates.sort_by(|&a, &b| weights[b].total_cmp(&weights[a]));
        if top_k > 0 {
            candidates.truncate(top_k);
        }
        let total: f64 = candidates.iter().map(|&at| weights[at]).sum();
        let mut sum = 0.0;
        let reaches = |&at: &usize| {
            sum += weights[at];
            sum >= top_p * total
        };
        if let Some(last) = candidates.iter().position(reaches) {
            candidates.truncate(last + 1);
        }
        candidates
    }
}

/// The token among `candidates` to which a uniform number from 0 to 1 leads, by their weights.
fn drawn(uniform: f64, weights: &[f64], candidates: impl Iterator<Item = usize> + Clone) -> u32 {
    let total: f64 = candidates.clone().map(|at| weights[at]).sum();
    let mut left = uniform * total;
    let mut drawn = 0;
    for at in candidates {
        // After rounding errors, the last possible token.
        drawn = at;
        left -= weights[at];
        if left < 0.0 {
            break;
        }
    }
    drawn as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(logits: &[f32], sampling: Sampling) -> Vec<usize> {
        let mut sampler = Sampler::new(Sampling { seed: 1, ..sampling });
        let mut counts = vec![0; logits.len()];
        for _ in 0..2000 {
            counts[sampler.draw(logits, &[], &[]).unwrap() as usize] += 1;
        }
        counts
    }

    fn at(temperature: f64) -> Sampling {
        Sampling { temperature, ..Sampling::default() }
    }

    #[test]
    fn temperatures_near_zero_take_the_most_likely_token() {
        for temperature in [0.0, f64::MIN_POSITIVE, 1e-300, 1e-3] {
            assert_eq!(counts(&[1.0, 3.0, 2.0], at(temperature)), [0, 2000, 0], "{temperature}");
        }
        assert_eq!(counts(&[1.0, 2.0, 2.0], at(0.0)), [0, 2000, 0]);
    }

    #[test]
    fn huge_temperatures_draw_all_tokens_alike() {
        for temperature in [1e9, f64::MAX] {
            // Three standard deviations of a binomial draw: 3 * sqrt(2000 * 2/9) = 63.
            let counts = counts(&[1.0, 300.0, 2.0], at(temperature));
            assert!(counts.iter().all(|count| count.abs_diff(667) < 64), "{temperature}: {counts:?}");
        }
    }

    #[test]
    fn at_temperature_one_tokens_are_drawn_by_their_probabilities() {
        let counts = counts(&[0.25_f32.ln(), 0.75_f32.ln(), f32::NEG_INFINITY], at(1.0));
        // Three standard deviations: 3 * sqrt(2000 * 3/16) = 58.
        assert!(counts[0].abs_diff(500) < 59 && counts[2] == 0, "{counts:?}");
    }

    #[test]
    fn only_the_most_likely_tokens_are_drawn() {
        let logits = [0.1_f32, 0.4, 0.2, 0.3].map(f32::ln);
        // The kept tokens, of 0.4, 0.3, 0.2 and 0.1.
        for (top_k, top_p, kept) in
            [(2, 1.0, 2), (0, 0.65, 2), (0, 0.71, 3), (0, 0.0, 1), (3, 0.7, 2), (9, 1.0, 4), (1, 0.5, 1)]
        {
            let counts = counts(&logits, Sampling { top_k, top_p, ..at(1.0) });
            let drawn = [1, 3, 2, 0].map(|token| counts[token] > 0);
            let expected = [0, 1, 2, 3].map(|rank| rank < kept);
            assert_eq!(drawn, expected, "top_k {top_k}, top_p {top_p}: {counts:?}");
        }
    }

    #[test]
    fn tokens_that_occurred_before_become_less_likely() {
        let draw = |logits: &[f32], before: &[u32]| {
            Sampler::new(Sampling { repetition_penalty: 2.0, ..at(0.0) }).draw(logits, before, &[])
        };
        assert_eq!(draw(&[1.0, 1.5, 0.0], &[]), Some(1));
        // However often: 1.5 / 2 < 1.
        assert_eq!(draw(&[1.0, 1.5, 0.0], &[1, 1]), Some(0));
        // Negative logits move away from 0; other ids do not exist.
        assert_eq!(draw(&[-1.0, -1.5], &[0, 7]), Some(1));
    }

    #[test]
    fn the_choices_of_one_seed_differ() {
        let draws = |choice| {
            let mut sampler = Sampler::new(Sampling { choice, ..at(1.0) });
            (0..20).map(|_| sampler.draw(&[0.0; 9], &[], &[]).unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(draws(1), draws(1));
        assert_ne!(draws(0), draws(1));
    }

    #[test]
    fn a_broken_model_draws_nothing() {
        let mut sampler = Sampler::new(at(1.0));
        for logits in [vec![f32::NAN, 1.0], vec![f32::INFINITY, 1.0], vec![f32::NEG_INFINITY], vec![]] {
            assert_eq!(sampler.draw(&logits, &[], &[]), None, "{logits:?}");
        }
    }

    #[test]
    fn generated_tokens_become_less_likely_by_presence_and_by_number() {
        let draw = |presence_penalty, frequency_penalty, prompt: &[u32], generated: &[u32]| {
            let sampling = Sampling { presence_penalty, frequency_penalty, ..at(0.0) };
            Sampler::new(sampling).draw(&[3.0, 2.0, 1.0], prompt, generated).unwrap()
        };
        assert_eq!(draw(0.0, 0.0, &[], &[0, 0, 1]), 0);
        // The prompt does not count.
        assert_eq!(draw(2.0, 2.0, &[0, 0], &[]), 0);
        assert_eq!(draw(1.5, 0.0, &[], &[0, 0]), 1);
        // Once per token: 3 - 2 * 0.9 is below 2, 3 - 0.9 above it.
        assert_eq!((draw(0.0, 0.9, &[], &[0]), draw(0.0, 0.9, &[], &[0, 0])), (0, 1));
        assert_eq!(draw(1.5, 0.0, &[], &[0, 1]), 0);
        // A negative one rewards.
        assert_eq!(draw(-1.5, 0.0, &[], &[1]), 1);
    }
}
