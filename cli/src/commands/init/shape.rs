//! Shapes of models between and below the paper's.

use crate::units::InvalidQuantity;
use volary_core::architecture::{Architecture, presets};
use volary_core::dispatch::Capacity;

/// The widths of the residual stream among which a size chooses.
const HIDDEN: [usize; 16] =
    [64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 2560, 3072, 4096, 6144, 8192];
/// The width from which a head has 64 values instead of 32, and a vocabulary 32,000 tokens instead of 4,096.
const LARGE: usize = 512;
/// A dense feed-forward is four times as wide as the residual stream, as in the paper.
const FEED_FORWARD: usize = 4;
/// More parameters than any model has.
const PARAMETERS_MAX: f64 = 1e15;
/// The fewest layers, and the most of the paper's models.
const LAYERS: (usize, usize) = (4, 64);

/// A number of parameters: `100m`, `1.9b`.
pub(super) fn parameters(text: &str) -> Result<u64, InvalidQuantity> {
    let invalid = || InvalidQuantity {
        found: text.to_owned(),
        expected: "a number of parameters such as 100m or 1.9b",
    };
    let lower = text.trim().to_ascii_lowercase();
    let units = [('k', 1e3), ('m', 1e6), ('b', 1e9), ('t', 1e12)];
    let with_unit = units.iter().find_map(|(unit, factor)| Some((lower.strip_suffix(*unit)?, *factor)));
    let (number, factor) = with_unit.unwrap_or((&lower, 1.0));
    let value = factor * number.parse::<f64>().map_err(|_| invalid())?;
    if !(1.0..PARAMETERS_MAX).contains(&value) {
        return Err(invalid());
    }
    Ok(value as u64)
}

/// The shapes of all sizes, the smallest first: an MoE layer in every other layer, 16 experts of the small
/// and 64 of the large ones.
pub(super) fn ladder() -> Vec<Architecture> {
    let Some(paper) = presets().into_iter().next() else { return Vec::new() };
    let shape = |hidden: usize| {
        let is_large = hidden >= LARGE;
        let head_dim = if is_large { 64 } else { 32 };
        // The paper's grow in depth with the width: 12 layers at 768, 64 at 8,192.
        let layers = (hidden / 64).next_multiple_of(2).clamp(LAYERS.0, LAYERS.1);
        Architecture {
            vocabulary: if is_large { 32_000 } else { 4096 },
            hidden,
            layers,
            heads: hidden / head_dim,
            head_dim,
            feed_forward: FEED_FORWARD * hidden,
            experts: if is_large { 64 } else { 16 },
            capacity: if is_large { Capacity::Factor(2.0) } else { Capacity::Dropless },
            ..paper.architecture.clone()
        }
    };
    HIDDEN.into_iter().map(shape).collect()
}

/// The shape whose number of parameters is nearest, as a ratio.
pub(super) fn of_size(parameters: u64) -> Option<Architecture> {
    let distance = |shape: &Architecture| (shape.parameters() as f64 / parameters as f64).ln().abs();
    ladder().into_iter().min_by(|a, b| distance(a).total_cmp(&distance(b)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units_and_other_texts_are_named() {
        for (text, expected) in [("100m", 100_000_000), ("1.9B", 1_900_000_000), ("5000", 5000), ("4k", 4000)]
        {
            assert_eq!(parameters(text), Ok(expected));
        }
        for text in ["", "m", "1.9gb", "-3m", "0", "1e30", "nan", "2x", "1 m"] {
            let error = parameters(text).expect_err(text).to_string();
            assert!(error.contains("100m"), "{text}: {error}");
        }
    }

    #[test]
    fn every_shape_is_valid_and_larger_than_the_one_before() {
        let shapes = ladder();
        for pair in shapes.windows(2) {
            assert!(pair[0].parameters() < pair[1].parameters(), "{pair:?}");
        }
        assert!(shapes.iter().all(|shape| shape.check().is_ok()));
        let paper = presets().into_iter().find(|preset| preset.name == "0.1b-64e").expect("a preset");
        assert_eq!(of_size(1_900_000_000), Some(paper.architecture));
    }
}
