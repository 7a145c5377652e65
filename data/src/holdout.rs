//! The choice of the documents that are held out for validation.
//!
//! The *rank* of a document is a part of the hash of its text. Each source holds out
//! documents in the order of their ranks until their tokens reach the requested share of the source's tokens.
//! Files differ in length by orders of magnitude, so a fixed share of the *documents* would often be a small
//! part of that share of the tokens.
//!
//! A document that one source holds out is held out of every source, so training never reads a validation
//! document. Only documents of low rank are candidates: the memory for the choice is a small part of the
//! corpus.

use std::collections::HashSet;

use crate::limits::{MAX_CANDIDATE_SHARES, MAX_HELD_OUT_SHARES};

/// A document that may be held out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Candidate {
    /// The document's rank.
    pub(crate) rank: u64,
    /// Its length, in tokens with the end of text.
    pub(crate) tokens: u64,
}

/// The ranks of candidates are below this bound; 0 if nothing is to be held out.
pub(crate) fn candidate_bound(fraction: f64) -> u64 {
    // 2^64; the conversion saturates.
    ((fraction * MAX_CANDIDATE_SHARES).min(1.0) * 18_446_744_073_709_551_616.0) as u64
}

/// The number of tokens to hold out of `total` tokens, as a fraction of them.
pub(crate) fn share(fraction: f64, total: u64) -> f64 {
    fraction * total as f64
}

/// Whether `tokens` held-out tokens are acceptable for a share of `share` tokens.
pub(crate) fn is_plausible(tokens: u64, share: f64) -> bool {
    tokens as f64 <= MAX_HELD_OUT_SHARES * share
}

/// Adds the ranks of the documents that one source holds out to `held_out`.
///
/// Nothing is added if whole documents would far exceed the share: such a source is split by position.
pub(crate) fn choose(candidates: &[Candidate], share: f64, held_out: &mut HashSet<u64>) {
    let mut by_rank = candidates.to_vec();
    by_rank.sort_unstable();
    let mut tokens = 0;
    let mut chosen = Vec::new();
    for candidate in by_rank {
        // Copies of a document follow one another and are held out together.
        if tokens as f64 >= share && chosen.last() != Some(&candidate.rank) {
            break;
        }
        tokens += candidate.tokens;
        chosen.push(candidate.rank);
    }
    if is_plausible(tokens, share) {
        held_out.extend(chosen);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(candidates: &[(u64, u64)], share: f64) -> Vec<u64> {
        let candidates: Vec<_> =
            candidates.iter().map(|&(rank, tokens)| Candidate { rank, tokens }).collect();
        let mut held_out = HashSet::new();
        choose(&candidates, share, &mut held_out);
        let mut ranks: Vec<_> = held_out.into_iter().collect();
        ranks.sort_unstable();
        ranks
    }

    #[test]
    fn documents_are_held_out_by_rank_until_the_share_is_reached() {
        assert_eq!(chosen(&[(5, 10), (1, 10), (3, 10)], 15.0), [1, 3]);
        assert_eq!(chosen(&[(5, 10), (1, 10), (3, 10)], 20.0), [1, 3]);
        assert_eq!(chosen(&[(5, 10), (1, 10), (3, 10)], 100.0), [1, 3, 5]);
        assert_eq!(chosen(&[(5, 10), (1, 10)], 0.0), [0; 0]);
    }

    #[test]
    fn copies_of_a_document_count_and_stay_together() {
        assert_eq!(chosen(&[(1, 10), (1, 10), (2, 10)], 15.0), [1]);
        assert_eq!(chosen(&[(1, 10), (1, 10), (2, 10)], 25.0), [1, 2]);
    }

    #[test]
    fn a_document_far_longer_than_the_share_is_not_held_out() {
        assert_eq!(chosen(&[(1, 41), (2, 5)], 10.0), [0; 0]);
        assert_eq!(chosen(&[(1, 40), (2, 5)], 10.0), [1]);
    }

    #[test]
    fn the_bound_covers_several_shares_and_saturates() {
        assert_eq!(candidate_bound(0.0), 0);
        assert_eq!(candidate_bound(0.5), u64::MAX);
        let covered = candidate_bound(0.01) as f64 / u64::MAX as f64;
        assert!((covered - 0.01 * MAX_CANDIDATE_SHARES).abs() < 1e-9, "{covered}");
    }
}
