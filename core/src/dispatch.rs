//! Dispatch: from the top-2 choices of a lane's tokens to contiguous batches per expert, and back.
//!
//! The gate chooses; this module only counts. A lane's *assignments* are sorted by expert, then by choice
//! (first choices before second ones), then by token, so that an expert's batch is a contiguous range of rows
//! whose order depends on the routing only. With a capacity, assignments at or beyond it are dropped in that
//! same order (GShard, arXiv 2006.16668, algorithm 1: second choices queue after all kept first choices).

use serde::{Deserialize, Serialize};

/// Experts per token.
pub const TOP_K: usize = 2;

/// The most tokens that an expert takes from one lane.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Capacity {
    /// No limit: no token is ever dropped.
    Dropless,
    /// `tokens / experts * factor`, rounded up. 2.0 leaves no slack for top-2 (GShard's definition).
    Factor(f64),
}

impl Capacity {
    /// The most rows that one expert takes from a lane of `tokens` tokens.
    #[must_use]
    pub fn rows(self, tokens: usize, experts: usize) -> usize {
        match self {
            Self::Dropless => usize::MAX,
            Self::Factor(factor) => ((tokens as f64 / experts as f64) * factor).ceil().max(1.0) as usize,
        }
    }
}

/// The dispatch of one lane's tokens in one MoE layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dispatch {
    /// Rows for each expert; their sum is the number of kept assignments.
    pub counts: Vec<usize>,
    /// For each kept assignment, in expert order: the token whose row it carries.
    pub tokens: Vec<i64>,
    /// For each choice (first, second) and token: the row of its assignment, or -1 when it was dropped.
    pub rows: [Vec<i64>; TOP_K],
    /// Assignments dropped by the capacity.
    pub dropped: usize,
}

impl Dispatch {
    /// Sorts the choices of a lane. `choices[k][t]` is token `t`'s `k`-th expert; a negative number
    /// means that the token makes no such choice (the second expert's random policy).
    #[must_use]
    pub fn new(choices: [&[i64]; TOP_K], experts: usize, capacity: Capacity) -> Self {
        let tokens = choices[0].len();
        let limit = capacity.rows(tokens, experts);
        let mut batches: Vec<Vec<(usize, usize)>> = vec![Vec::new(); experts];
        let mut dropped = 0;
        for (choice, chosen) in choices.iter().enumerate() {
            for (token, &expert) in chosen.iter().enumerate() {
                let Some(batch) = usize::try_from(expert).ok().and_then(|expert| batches.get_mut(expert))
                else {
                    continue;
                };
                if batch.len() < limit {
                    batch.push((choice, token));
                } else {
                    dropped += 1;
                }
            }
        }
        let mut rows = [vec![-1; tokens], vec![-1; tokens]];
        let mut order = Vec::with_capacity(tokens * TOP_K);
        for &(choice, token) in batches.iter().flatten() {
            rows[choice][token] = order.len() as i64;
            order.push(token as i64);
        }
        Self { counts: batches.iter().map(Vec::len).collect(), tokens: order, rows, dropped }
    }

    /// The first row of each expert's batch.
    #[must_use]
    pub fn offsets(&self) -> Vec<usize> {
        self.counts
            .iter()
            .scan(0, |next, count| {
                let offset = *next;
                *next += count;
                Some(offset)
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn choices() -> impl Strategy<Value = (usize, Vec<i64>, Vec<i64>)> {
        (2usize..9, 0usize..60).prop_flat_map(|(experts, tokens)| {
            let pair = (0..experts as i64, 1..experts as i64);
            proptest::collection::vec(pair, tokens).prop_map(move |pairs| {
                let first = pairs.iter().map(|p| p.0).collect();
                // The second choice is another expert, or sometimes none.
                let second = pairs
                    .iter()
                    .enumerate()
                    .map(|(t, p)| if t % 7 == 3 { -1 } else { (p.0 + p.1) % experts as i64 })
                    .collect();
                (experts, first, second)
            })
        })
    }

    proptest! {
            #[test]
            fn every_kept_token_reaches_its_experts_and_capacity_is_respected(
                (experts, first, second) in choices(), factor in 0.3f64..3.0, dropless: bool,
            ) {
                let capacity = if dropless { Capacity::Dropless } else { Capacity::Factor(factor) };
                let dispatch = Dispatch::new([&first, &second], experts, capacity);
                let offsets = dispatch.offsets();
                let mut kept = 0;
                for (k, chosen) in [&first, &second].into_iter().enumerate() {
                    for (token, &expert) in chosen.iter().enumerate() {
                        let row = dispatch.rows[k][token];
                        if row < 0 { continue }
                        kept += 1;
                        let e = expert as usize;
                        prop_assert_eq!(dispatch.tokens[row as usize], token as i64);
                        prop_assert!((offsets[e]..offsets[e] + dispatch.counts[e]).contains(&(row as usize)));
                    }
                }
                prop_assert_eq!(kept, dispatch.tokens.len());
                prop_assert_eq!(kept, dispatch.counts.iter().sum::<usize>());
                let made = first.iter().chain(&second).filter(|&&e| e >= 0).count();
                prop_assert_eq!(made, kept + dispatch.dropped);
                let limit = capacity.rows(first.len(), experts);
                prop_assert!(dispatch.counts.iter().all(|&n| n <= limit));
                if dropless { prop_assert_eq!(dispatch.dropped, 0) }
            }

    /// No second choice is kept where a first choice of the same expert is dropped.
            #[test]
            fn second_choices_queue_after_all_first_choices((experts, first, second) in choices(), factor in 0.3f64..2.0) {
                let dispatch = Dispatch::new([&first, &second], experts, Capacity::Factor(factor));
                for e in 0..experts as i64 {
                    let refused = first.iter().zip(&dispatch.rows[0]).any(|(&c, &row)| c == e && row < 0);
                    let taken = second.iter().zip(&dispatch.rows[1]).any(|(&c, &row)| c == e && row >= 0);
                    prop_assert!(!(refused && taken));
                }
            }
        }

    #[test]
    fn an_expert_without_tokens_has_an_empty_batch() {
        let dispatch = Dispatch::new([&[2, 2], &[0, 0]], 4, Capacity::Dropless);
        assert_eq!(dispatch.counts, [2, 0, 2, 0]);
        assert_eq!(dispatch.tokens, [0, 1, 0, 1]);
        assert_eq!(dispatch.offsets(), [0, 2, 2, 4]);
    }
}
