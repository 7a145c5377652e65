//! Random draws that depend on their purpose, never on the process or the time.
//!
//! A [`Stream`] is a counter-based generator keyed by a seed and a path of numbers such as
//! (step, lane, layer). The mixer is SplitMix64's finalizer (Steele, Lea, Flood: "Fast splittable
//! pseudorandom number generators", OOPSLA 2014).

/// The purpose of a stream. It is part of the key, so that two purposes never share draws.
#[derive(Clone, Copy, Debug)]
#[repr(u64)]
pub enum Purpose {
    /// Initial weights.
    Initial = 1,
    /// The order of training sequences.
    Order = 2,
    /// The mixture of sources.
    Mixture = 3,
    /// The second expert's random policy.
    SecondExpert = 4,
    /// Sampling of generated text.
    Generate = 5,
    /// Fault schedules in tests.
    Faults = 6,
    /// Samples for telemetry.
    Telemetry = 7,
    /// The examples before a question in an evaluation.
    Examples = 8,
}

fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A counter-based stream of random numbers.
#[derive(Clone, Debug)]
pub struct Stream {
    key: u64,
    counter: u64,
}

impl Stream {
    /// The stream for `purpose` at `path` under `seed`.
    #[must_use]
    pub fn new(seed: u64, purpose: Purpose, path: &[u64]) -> Self {
        let mut key = mix(seed ^ 0x9e37_79b9_7f4a_7c15);
        for part in std::iter::once(purpose as u64).chain(path.iter().copied()) {
            key =
                mix(key.wrapping_add(0x9e37_79b9_7f4a_7c15) ^ mix(part.wrapping_add(0x632b_e59b_d9b4_e019)));
        }
        Self { key, counter: 0 }
    }

    /// The next 64 random bits.
    pub fn next_u64(&mut self) -> u64 {
        self.counter = self.counter.wrapping_add(1);
        mix(self.key.wrapping_add(self.counter.wrapping_mul(0x9e37_79b9_7f4a_7c15)))
    }

    /// The next number in `[0, 1)`, with 53 bits.
    pub fn next_f64(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// The next number in `0..bound`; `bound` must not be 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        ((u128::from(self.next_u64()) * u128::from(bound)) >> 64) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_keys_give_equal_draws_and_different_keys_different_ones() {
        let draw = |seed, purpose, path: &[u64]| Stream::new(seed, purpose, path).next_u64();
        assert_eq!(draw(1, Purpose::Order, &[2, 3]), draw(1, Purpose::Order, &[2, 3]));
        assert_ne!(draw(1, Purpose::Order, &[2, 3]), draw(1, Purpose::Order, &[3, 2]));
        assert_ne!(draw(1, Purpose::Order, &[2, 3]), draw(1, Purpose::Mixture, &[2, 3]));
        assert_ne!(draw(1, Purpose::Order, &[2, 3]), draw(2, Purpose::Order, &[2, 3]));
    }

    #[test]
    fn draws_are_spread_evenly() {
        let mut stream = Stream::new(7, Purpose::Initial, &[]);
        let mean = (0..100_000).map(|_| stream.next_f64()).sum::<f64>() / 100_000.0;
        // The mean of 100,000 uniform draws has a standard deviation of 0.0009.
        assert!((mean - 0.5).abs() < 0.005, "mean {mean}");
        let mut seen = [0u32; 10];
        (0..100_000).for_each(|_| seen[stream.below(10) as usize] += 1);
        assert!(seen.iter().all(|&n| (9_500..10_500).contains(&n)), "{seen:?}");
    }
}
