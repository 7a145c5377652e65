//! MinHash signatures.

use crate::words::{Word, mixed, sequence_hash, words};

/// The hash functions of the signatures, the same in every run.
pub(super) struct Signer {
    /// The length of the n-grams, in words.
    ngram: usize,
    /// Factor and offset of each function `h -> (factor * h + offset) >> 32` (multiply-shift; Dietzfelbinger
    /// et al., 1997).
    functions: Vec<(u64, u64)>,
}

/// The smallest hash of a document's n-grams under each function; empty for a document without words.
pub(super) type Signature = Vec<u32>;

impl Signer {
    pub(super) fn new(ngram: usize, permutations: usize) -> Self {
        let number = |n: u64| mixed(n.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let functions = (1..=permutations as u64).map(|n| (number(2 * n) | 1, number(2 * n + 1)));
        Self { ngram, functions: functions.collect() }
    }

    pub(super) fn sign(&self, text: &str) -> Signature {
        let words: Vec<Word> = words(text, false).collect();
        if words.is_empty() {
            return Vec::new();
        }
        // A text that is shorter than an n-gram is one.
        let mut ngrams: Vec<u64> = words.windows(self.ngram.min(words.len())).map(sequence_hash).collect();
        ngrams.sort_unstable();
        ngrams.dedup();
        let smallest = |(factor, offset): &(u64, u64)| {
            let hashes =
                ngrams.iter().map(|hash| (hash.wrapping_mul(*factor).wrapping_add(*offset) >> 32) as u32);
            hashes.min().unwrap_or(u32::MAX)
        };
        self.functions.iter().map(smallest).collect()
    }
}

/// The estimated Jaccard similarity of the documents of two signatures of one length.
pub(super) fn similarity(a: &[u32], b: &[u32]) -> f64 {
    let equal = a.iter().zip(b).filter(|(a, b)| a == b).count();
    equal as f64 / a.len().max(1) as f64
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// The exact similarity by sets of n-grams, within five standard errors.
        #[test]
        fn the_estimate_is_the_jaccard_similarity(
            text in prop::collection::vec(0..60_u32, 20..200),
            edits in prop::collection::vec((0..200_usize, 0..60_u32), 0..30),
        ) {
            let mut edited = text.clone();
            for (at, word) in edits {
                let length = edited.len();
                edited[at % length] = word;
            }
            let set = |words: &[u32]| words.windows(3).map(<[u32]>::to_vec).collect::<HashSet<_>>();
            let (a, b) = (set(&text), set(&edited));
            let exact = a.intersection(&b).count() as f64 / a.union(&b).count() as f64;
            let spell = |words: &[u32]| words.iter().map(|w| format!("w{w} ")).collect::<String>();
            let signer = Signer::new(3, 512);
            let estimate = similarity(&signer.sign(&spell(&text)), &signer.sign(&spell(&edited)));
            let error = (exact * (1.0 - exact) / 512.0).sqrt();
            prop_assert!((estimate - exact).abs() <= 5.0 * error + 1e-9, "{estimate}, exactly {exact}");
        }
    }

    #[test]
    fn case_marks_and_spaces_do_not_matter_and_texts_without_words_have_no_signature() {
        let signer = Signer::new(5, 16);
        assert_eq!(signer.sign("One two, three"), signer.sign("one\ttwo -- THREE!"));
        assert_ne!(signer.sign("one two three"), signer.sign("three two one"));
        assert_eq!(signer.sign(" -- !"), [0; 0]);
    }
}
