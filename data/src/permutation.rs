//! A keyed permutation of `0..n` for any n, computed for one index at a time.
//!
//! A Feistel network permutes the numbers of an even count of bits; a result outside `0..n` re-enters the
//! network until it is inside (cycle walking; Black and Rogaway: "Ciphers with arbitrary finite domains",
//! 2002).

use volary_core::random::{Purpose, Stream};

const ROUNDS: u64 = 4;

/// A permutation of `0..count`.
#[derive(Clone, Debug)]
pub struct Permutation {
    count: u64,
    /// Half the bits of the network; `count <= 4^half_bits < 4 * count`, so the walk is short.
    half_bits: u32,
    keys: [u64; ROUNDS as usize],
}

impl Permutation {
    /// The permutation of `0..count` (`count` must not be 0) for the key `seed` and `path`.
    #[must_use]
    pub fn new(count: u64, seed: u64, path: &[u64]) -> Self {
        let bits = u64::BITS - (count - 1).leading_zeros();
        let mut stream = Stream::new(seed, Purpose::Order, path);
        Self { count, half_bits: bits.div_ceil(2), keys: std::array::from_fn(|_| stream.next_u64()) }
    }

    /// The image of `index`, which must be below `count`.
    #[must_use]
    pub fn at(&self, index: u64) -> u64 {
        if self.half_bits == 0 {
            return index;
        }
        let mut value = self.permute_bits(index);
        while value >= self.count {
            value = self.permute_bits(value);
        }
        value
    }

    fn permute_bits(&self, value: u64) -> u64 {
        let mask = (1u64 << self.half_bits) - 1;
        let (mut left, mut right) = (value >> self.half_bits, value & mask);
        for key in self.keys {
            let mixed = Stream::new(key, Purpose::Order, &[right]).next_u64() & mask;
            (left, right) = (right, left ^ mixed);
        }
        (left << self.half_bits) | right
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn small_counts_are_permuted() {
        for count in 1..=300 {
            let permutation = Permutation::new(count, 3, &[count]);
            let mut all: Vec<_> = (0..count).map(|index| permutation.at(index)).collect();
            all.sort_unstable();
            assert_eq!(all, (0..count).collect::<Vec<_>>(), "count {count}");
        }
    }

    proptest! {
        #[test]
        fn huge_counts_stay_in_range_and_apart(count in 1u64..=u64::MAX, seed: u64, a: u64, b: u64) {
            let permutation = Permutation::new(count, seed, &[]);
            let (a, b) = (a % count, b % count);
            prop_assert!(permutation.at(a) < count);
            prop_assert_eq!(permutation.at(a) == permutation.at(b), a == b);
        }
    }
}
