//! A small model with random weights, and a tokenizer.
#![allow(clippy::expect_used, unreachable_pub, dead_code, reason = "tests; not every file uses everything")]

use std::rc::Rc;
use volary_core::architecture::{Architecture, presets};
use volary_core::compute::Compute;
use volary_core::options::TrainingOptions;
use volary_core::{ShardId, Step};
use volary_data::Tokenizer;
use volary_model::decoder::Decoder;
use volary_model::reference::Reference;
use volary_model::{Glam, device};

pub const CONTEXT: usize = 48;
pub const VOCABULARY: usize = 300;

pub struct Model {
    pub decoder: Rc<Decoder>,
    pub reference: Reference,
    pub tokenizer: Tokenizer,
}

impl Model {
    pub fn new(seed: u64) -> Self {
        device::single_thread();
        let a = Architecture {
            vocabulary: VOCABULARY,
            hidden: 24,
            layers: 2,
            heads: 3,
            head_dim: 8,
            feed_forward: 40,
            experts: 5,
            expert_hidden: Some(28),
            ..presets().swap_remove(1).architecture
        };
        let training = TrainingOptions { sequence_length: CONTEXT, ..TrainingOptions::new(1) };
        let cpu = || device::parse("cpu").expect("a device");
        let glam = Glam::new(&a, &training, seed, cpu()).expect("an engine");
        let fetch = |id: ShardId| glam.store(id, Step(0), &glam.initial(id)?);
        Self {
            decoder: Rc::new(Decoder::load(&a, CONTEXT, cpu(), fetch).expect("a decoder")),
            reference: Reference::load(&a, &training, seed, cpu(), fetch).expect("a model"),
            tokenizer: tokenizer(),
        }
    }
}

/// A byte-level tokenizer with some merges.
pub fn tokenizer() -> Tokenizer {
    let text = |n: usize| format!("the quick {n} brown foxes, the lazy dogs and the naïve café; the end.\n");
    let tokenizer = Tokenizer::train((0..40).map(text), VOCABULARY).expect("a tokenizer");
    assert!(tokenizer.vocabulary() > 257, "no merges");
    tokenizer
}

/// The log-probabilities of a row of logits, in nats.
pub fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|logit| f64::from(logit - largest).exp()).sum();
    logits.iter().map(|logit| f64::from(logit - largest) - sum.ln()).collect()
}
