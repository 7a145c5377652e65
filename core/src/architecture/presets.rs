//! The rows of GLaM's table 4 (Du et al., arXiv 2112.06905).

use super::{Activation, Architecture, Family, SecondExpert};
use crate::dispatch::Capacity;

/// A row of the paper's table 4.
#[derive(Clone, Debug)]
pub struct Preset {
    /// Its name in Volary.
    pub name: &'static str,
    /// Total parameters as the paper prints them.
    pub paper_parameters: &'static str,
    /// Activated parameters per token as the paper prints them.
    pub paper_activated: &'static str,
    /// The shape.
    pub architecture: Architecture,
}

/// The paper's table 4, in its order. It prints no vocabulary for the smaller rows: 32,000 reproduces their
/// figures, 256,000 (the paper's SentencePiece) those of 64B/64E.
#[must_use]
pub fn presets() -> Vec<Preset> {
    type Row = (&'static str, &'static str, &'static str, usize, usize, usize, usize, usize, usize);
    const ROWS: [Row; 11] = [
        ("0.1b", "130M", "130M", 12, 768, 3_072, 12, 64, 0),
        ("0.1b-64e", "1.9B", "145M", 12, 768, 3_072, 12, 64, 64),
        ("1.7b", "1.7B", "1.700B", 24, 2_048, 8_192, 16, 128, 0),
        ("1.7b-32e", "20B", "1.878B", 24, 2_048, 8_192, 16, 128, 32),
        ("1.7b-64e", "27B", "1.879B", 24, 2_048, 8_192, 16, 128, 64),
        ("1.7b-128e", "53B", "1.881B", 24, 2_048, 8_192, 16, 128, 128),
        ("1.7b-256e", "105B", "1.886B", 24, 2_048, 8_192, 16, 128, 256),
        ("8b", "8.7B", "8.7B", 32, 4_096, 16_384, 32, 128, 0),
        ("8b-64e", "143B", "9.8B", 32, 4_096, 16_384, 32, 128, 64),
        ("137b", "137B", "137B", 64, 8_192, 65_536, 128, 128, 0),
        ("64b-64e", "1.2T", "96.6B", 64, 8_192, 32_768, 128, 128, 64),
    ];
    ROWS.iter()
        .map(
            |&(
                name,
                paper_parameters,
                paper_activated,
                layers,
                hidden,
                feed_forward,
                heads,
                head_dim,
                experts,
            )| {
                let vocabulary = if name == "64b-64e" { 256_000 } else { 32_000 };
                let architecture = Architecture {
                    family: Family::Glam,
                    vocabulary,
                    hidden,
                    layers,
                    heads,
                    head_dim,
                    kv_heads: None,
                    feed_forward,
                    experts,
                    expert_hidden: None,
                    moe_first: None,
                    activation: Activation::Gelu,
                    capacity: Capacity::Factor(2.0),
                    second_expert: SecondExpert::All,
                    tied_embedding: None,
                    rope_theta: 10_000.0,
                    position_buckets: 32,
                    position_distance: 128,
                };
                Preset { name, paper_parameters, paper_activated, architecture }
            },
        )
        .collect()
}
