//! The source and the window of each sequence: pure arithmetic without a cursor.
//!
//! Sequences are numbered through the whole run. A fixed pattern of [`MIXTURE_PERIOD`] slots assigns them to
//! sources; it is apportioned by the weights and shuffled by the seed. The n-th sequence of a source is the
//! n-th window in the order of that source, which is a new permutation of all its windows in every pass.

use volary_core::random::{Purpose, Stream};

use crate::limits::MIXTURE_PERIOD;
use crate::permutation::Permutation;

/// The assignment of sequences to sources.
#[derive(Clone, Debug)]
pub struct Mixture {
    /// For each slot, its source and the number of earlier slots of the same source.
    slots: Vec<(u32, u64)>,
    /// For each source, the number of its slots.
    per_period: Vec<u64>,
    seed: u64,
}

/// The origin of a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pick {
    /// The source's index.
    pub source: usize,
    /// The number of earlier sequences from the same source.
    pub occurrence: u128,
}

impl Mixture {
    /// The mixture of sources with these weights (positive and finite) for a seed.
    ///
    /// Every source gets at least one slot in a thousand, however small its weight.
    #[must_use]
    pub fn new(weights: &[f64], seed: u64) -> Self {
        let per_period = apportion(weights);
        let mut order: Vec<u32> = Vec::new();
        for (source, &count) in per_period.iter().enumerate() {
            order.extend(std::iter::repeat_n(source as u32, count as usize));
        }
        let mut stream = Stream::new(seed, Purpose::Mixture, &[]);
        for at in (1..order.len()).rev() {
            order.swap(at, stream.below(at as u64 + 1) as usize);
        }
        let mut seen = vec![0; weights.len()];
        let mut slots = Vec::with_capacity(order.len());
        for source in order {
            slots.push((source, seen[source as usize]));
            seen[source as usize] += 1;
        }
        Self { slots, per_period, seed }
    }

    /// The number of slots after which the pattern repeats.
    #[must_use]
    pub fn period(&self) -> usize {
        self.slots.len()
    }

    /// The source of sequence number `sequence` (from 0).
    #[must_use]
    pub fn pick(&self, sequence: u128) -> Pick {
        let period = self.slots.len() as u128;
        let (source, rank) = self.slots[(sequence % period) as usize];
        let per_period = u128::from(self.per_period[source as usize]);
        Pick { source: source as usize, occurrence: sequence / period * per_period + u128::from(rank) }
    }

    /// How many of the first `sequences` sequences are of a source.
    #[must_use]
    pub fn drawn(&self, source: usize, sequences: u128) -> u128 {
        let period = self.slots.len() as u128;
        let rest = &self.slots[..(sequences % period) as usize];
        let of_rest = rest.iter().filter(|(of, _)| *of as usize == source).count();
        sequences / period * u128::from(self.per_period[source]) + of_rest as u128
    }

    /// The window, of `windows`, of a source's `occurrence`-th sequence: each pass over the source visits
    /// every window once, each time in a different order.
    #[must_use]
    pub fn window(&self, pick: Pick, windows: u64) -> u64 {
        let pass = (pick.occurrence / u128::from(windows)) as u64;
        let index = (pick.occurrence % u128::from(windows)) as u64;
        Permutation::new(windows, self.seed, &[pick.source as u64, pass]).at(index)
    }
}

/// Apportions the slots by largest remainder: ties to the earlier source, at least one slot for each.
fn apportion(weights: &[f64]) -> Vec<u64> {
    let period = MIXTURE_PERIOD.max(weights.len()) as u64;
    let total: f64 = weights.iter().sum();
    let shares: Vec<f64> = weights.iter().map(|w| w / total * period as f64).collect();
    let mut counts: Vec<u64> = shares.iter().map(|share| (share.floor() as u64).max(1)).collect();
    let mut by_remainder: Vec<usize> = (0..weights.len()).collect();
    by_remainder.sort_by(|&a, &b| (shares[b] - counts[b] as f64).total_cmp(&(shares[a] - counts[a] as f64)));
    let mut next = by_remainder.iter().cycle();
    while counts.iter().sum::<u64>() < period {
        if let Some(&source) = next.next() {
            counts[source] += 1;
        }
    }
    while counts.iter().sum::<u64>() > period {
        // The largest sources give up the slots of the tiny ones.
        if let Some(largest) = counts.iter_mut().rev().max_by_key(|count| **count) {
            *largest -= 1;
        }
    }
    counts
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn slots_follow_the_weights_and_no_source_starves() {
        assert_eq!(apportion(&[1.0, 1.0]), [500, 500]);
        assert_eq!(apportion(&[1.0, 1.0, 1.0]), [334, 333, 333]);
        assert_eq!(apportion(&[3.0, 1.0]), [750, 250]);
        assert_eq!(apportion(&[1e9, 1e-9]), [999, 1]);
        assert_eq!(apportion(&vec![1.0; 2000]), vec![1; 2000]);
        assert_eq!(apportion(&[f64::MAX / 4.0, 1e-300, 1e-300]), [998, 1, 1]);
    }

    proptest! {
        #[test]
        fn proportions_hold_to_within_one_period(
            weights in prop::collection::vec(0.01f64..10.0, 1..6), seed: u64, count in 1u64..5000,
        ) {
            let mixture = Mixture::new(&weights, seed);
            let mut seen = vec![0u64; weights.len()];
            for sequence in 0..count {
                let pick = mixture.pick(u128::from(sequence));
                prop_assert_eq!(pick.occurrence, u128::from(seen[pick.source]));
                seen[pick.source] += 1;
            }
            for (source, seen) in seen.iter().enumerate() {
                prop_assert_eq!(mixture.drawn(source, u128::from(count)), u128::from(*seen));
            }
            let total: f64 = weights.iter().sum();
            for (weight, seen) in weights.iter().zip(seen) {
                let expected = weight / total * count as f64;
                prop_assert!((seen as f64 - expected).abs() <= mixture.period() as f64);
            }
        }

        #[test]
        fn every_pass_visits_every_window_exactly_once(windows in 1u64..400, seed: u64, pass in 0u64..1 << 40) {
            let mixture = Mixture::new(&[1.0], seed);
            let start = u128::from(pass) * u128::from(windows);
            let mut seen: Vec<_> = (0..u128::from(windows))
                .map(|n| mixture.window(Pick { source: 0, occurrence: start + n }, windows))
                .collect();
            seen.sort_unstable();
            prop_assert_eq!(seen, (0..windows).collect::<Vec<_>>());
        }
    }

    #[test]
    fn passes_have_different_orders() {
        let mixture = Mixture::new(&[1.0], 7);
        let pass = |pass: u128| -> Vec<u64> {
            (0..100).map(|n| mixture.window(Pick { source: 0, occurrence: pass * 100 + n }, 100)).collect()
        };
        assert_ne!(pass(0), pass(1));
        assert_ne!(pass(0), (0..100).collect::<Vec<_>>());
    }
}
