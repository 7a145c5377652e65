//! Positions matter: a model learns what only the distance between tokens tells.
#![expect(clippy::expect_used, reason = "tests")]

use tch::Device;
use volary_core::Step;
use volary_core::architecture::presets;
use volary_core::options::{Optimizer, TrainingOptions};
use volary_core::random::{Purpose, Stream};
use volary_core::schedule::Schedule;
use volary_model::reference::Reference;

const SYMBOLS: usize = 16;
const PERIOD: usize = 4;
const LENGTH: usize = 32;
const SEQUENCES: usize = 8;
const STEPS: u64 = 240;

/// Sequences that repeat four random symbols: the next one is that four places back, and nothing else about
/// the earlier tokens tells which of the four it is.
fn lane(random: &mut Stream) -> Vec<u32> {
    let sequence = |random: &mut Stream| {
        let mut symbols: Vec<u32> = (0..SYMBOLS as u32).collect();
        let period: Vec<u32> =
            (0..PERIOD).map(|_| symbols.swap_remove(random.below(symbols.len() as u64) as usize)).collect();
        period.into_iter().cycle().take(LENGTH + 1).collect::<Vec<_>>()
    };
    (0..SEQUENCES).flat_map(|_| sequence(random)).collect()
}

/// The loss over the last ten steps, nats per token.
fn final_loss(optimizer: Optimizer, rate: f64) -> f64 {
    let mut a = presets().swap_remove(1).architecture;
    (a.vocabulary, a.hidden, a.layers, a.heads, a.head_dim) = (SYMBOLS, 32, 2, 2, 16);
    (a.feed_forward, a.experts) = (64, 2);
    let training = TrainingOptions {
        lanes: 1,
        sequences_per_lane: SEQUENCES,
        sequence_length: LENGTH,
        optimizer,
        schedule: Schedule::InverseSquareRoot { rate, constant_steps: STEPS, warmup_steps: 0 },
        ..TrainingOptions::new(STEPS)
    };
    let mut model = Reference::initial(&a, &training, 3, Device::Cpu).expect("a model");
    let mut random = Stream::new(31, Purpose::Faults, &[]);
    let losses: Vec<f64> = Step(1)
        .through(Step(STEPS))
        .map(|step| model.step(&[lane(&mut random)], step).expect("a step"))
        .collect();
    losses[losses.len() - 10..].iter().sum::<f64>() / 10.0
}

/// Three of 32 targets cannot be known: the loss comes down to 3/32 ln 16 = 0.26. Without positions each of
/// the other targets is one of four: 1.5 in all.
#[test]
fn the_model_learns_what_only_the_distance_of_tokens_tells() {
    volary_model::device::single_thread();
    let adamw = Optimizer::Adamw { beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weight_decay: 0.1 };
    for (optimizer, rate) in [(Optimizer::default(), 0.03), (adamw, 0.01)] {
        let loss = final_loss(optimizer, rate);
        assert!(loss < 0.5, "{optimizer:?}: {loss} nats after {STEPS} steps");
    }
}
