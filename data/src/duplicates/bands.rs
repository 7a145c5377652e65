//! The bands of a signature.

use crate::words::mixed;

/// The chance of missing a pair of documents whose similarity is just the threshold.
const MISSED: f64 = 0.05;

/// A signature is cut into bands of `rows` values; documents that agree in a whole band are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Bands {
    pub(super) bands: usize,
    pub(super) rows: usize,
}

impl Bands {
    /// The longest bands with which a pair at the threshold is missed with a chance of at most 1 in 20:
    /// `(1 - threshold^rows)^bands`. Longer bands lead to fewer comparisons.
    pub(super) fn for_threshold(threshold: f64, permutations: usize) -> Self {
        let of_rows = |rows| Self { bands: permutations / rows, rows };
        let missed = |Self { bands, rows }: &Self| (1.0 - threshold.powi(*rows as i32)).powi(*bands as i32);
        (1..=permutations)
            .rev()
            .map(of_rows)
            .find(|bands| missed(bands) <= MISSED)
            .unwrap_or_else(|| of_rows(1))
    }

    /// The hash of each band of a signature.
    pub(super) fn hashes(&self, signature: &[u32]) -> impl Iterator<Item = u64> {
        let bands = signature.chunks_exact(self.rows);
        bands.map(|rows| rows.iter().fold(0, |hash, row| mixed(hash ^ u64::from(*row)).wrapping_add(1)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bands_are_as_long_as_the_threshold_allows() {
        for (threshold, permutations) in [(0.5, 128), (0.8, 128), (0.9, 256), (1.0, 16), (0.01, 8)] {
            let Bands { bands, rows } = Bands::for_threshold(threshold, permutations);
            assert!(bands >= 1 && bands * rows <= permutations, "{threshold}: {bands} x {rows}");
            let missed = |rows: usize| (1.0 - threshold.powf(rows as f64)).powf((permutations / rows) as f64);
            assert!(missed(rows) <= MISSED || rows == 1, "{threshold}: {}", missed(rows));
            assert!(rows == permutations || missed(rows + 1) > MISSED, "{threshold}");
        }
        assert_eq!(Bands::for_threshold(0.8, 128), Bands { bands: 18, rows: 7 });
    }
}
