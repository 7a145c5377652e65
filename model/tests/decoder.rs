//! The decoder, token by token and in batches, against the reference model on the whole sequence.
#![expect(clippy::expect_used, reason = "tests")]

use volary_core::architecture::{Activation, Architecture, Family, presets};
use volary_core::compute::Compute;
use volary_core::options::TrainingOptions;
use volary_core::random::{Purpose, Stream};
use volary_core::{ShardId, Step};
use volary_model::decoder::{Decoder, Input, Score, Scoring};
use volary_model::reference::Reference;
use volary_model::{Error, Glam};

/// More than the rows that a cache begins with.
const CONTEXT: usize = 72;
/// Logits are near 1; two orders of f32 additions over 64 rows and a few layers.
const TOLERANCE: f32 = 2e-4;

fn architecture(layers: usize, activation: Activation, moe_first: bool) -> Architecture {
    let mut a = presets().swap_remove(1).architecture;
    (a.vocabulary, a.hidden, a.layers, a.heads, a.head_dim) = (61, 24, layers, 3, 8);
    (a.feed_forward, a.experts, a.expert_hidden) = (40, 5, Some(28));
    (a.position_buckets, a.position_distance) = (8, 12);
    (a.activation, a.moe_first) = (activation, Some(moe_first));
    a
}

fn qwen3(kv_heads: usize, tied: bool) -> Architecture {
    let a = architecture(3, Activation::Gelu, false);
    let (family, kv_heads, tied_embedding) = (Family::Qwen3Moe, Some(kv_heads), Some(tied));
    Architecture { family, heads: 4, head_dim: 6, kv_heads, tied_embedding, ..a }
}

/// Both models with the same random weights, position biases included.
fn models(a: &Architecture, seed: u64) -> (Decoder, Reference) {
    let device = volary_model::device::for_tests();
    let training = TrainingOptions { sequence_length: CONTEXT, ..TrainingOptions::new(1) };
    let glam = Glam::new(a, &training, seed, device).expect("an engine");
    let fetch = |id: ShardId| -> Result<Vec<u8>, volary_core::compute::ComputeError> {
        let mut bytes = glam.store(id, Step(1), &glam.initial(id)?)?;
        let header = 8 + u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes")) as usize;
        let mut noise = Stream::new(seed, Purpose::Faults, &[bytes.len() as u64]);
        for number in bytes[header..].chunks_exact_mut(4) {
            let value = f32::from_le_bytes((&*number).try_into().expect("four bytes"));
            let value = value + 0.2 * (noise.next_f64() as f32 - 0.5);
            number.copy_from_slice(&value.to_le_bytes());
        }
        Ok(bytes)
    };
    let decoder = Decoder::load(a, CONTEXT, device, fetch).expect("a decoder");
    let reference = Reference::load(a, &training, seed, device, fetch).expect("a model");
    (decoder, reference)
}

fn tokens(stream: &mut Stream, count: usize) -> Vec<u32> {
    (0..count).map(|_| stream.below(61) as u32).collect()
}

fn assert_near(ours: &[f32], theirs: &[f32], what: &str) {
    assert_eq!(ours.len(), theirs.len(), "{what}");
    for (a, b) in ours.iter().zip(theirs) {
        // Not `>=`: NaN is no number near another.
        assert!((a - b).abs() < TOLERANCE, "{what}: {a}, expected {b}");
    }
}

#[test]
fn any_cut_of_any_sequences_into_passes_gives_the_reference_models_logits() {
    for seed in 0..10 {
        let activation = if seed % 2 == 0 { Activation::Gelu } else { Activation::Relu };
        let a = match seed {
            0..6 => architecture(2 + 2 * (seed as usize % 2), activation, seed % 3 == 0),
            _ => qwen3(1 << (seed % 3), seed % 2 == 0),
        };
        let (decoder, reference) = models(&a, seed);
        let mut stream = Stream::new(seed, Purpose::Faults, &[1]);
        let sequences: Vec<Vec<u32>> = (0..4)
            .map(|_| {
                let count = 2 + stream.below(CONTEXT as u64 - 1) as usize;
                tokens(&mut stream, count)
            })
            .collect();
        let expected: Vec<Vec<Vec<f32>>> =
            sequences.iter().map(|tokens| reference.logits(tokens).expect("logits")).collect();
        let mut cache = decoder.cache(4).expect("a cache");
        let mut read = [0; 4];
        while (0..4).any(|slot| read[slot] < sequences[slot].len()) {
            // Some sequences wait; of the others one token, or several.
            let mut parts = Vec::new();
            for slot in 0..4 {
                let left = sequences[slot].len() - read[slot];
                let most = [0, 1, 1, left.min(17)][stream.below(4) as usize];
                if most.min(left) > 0 {
                    parts.push((slot, read[slot]..read[slot] + most.min(left)));
                }
            }
            let inputs: Vec<Input<'_>> = parts
                .iter()
                .map(|(slot, part)| {
                    let scoring = Some(Scoring { from: 1, top: 3 });
                    Input { slot: *slot, tokens: &sequences[*slot][part.clone()], scoring }
                })
                .collect();
            let outputs = decoder.advance(&mut cache, &inputs).expect("a pass");
            for ((slot, part), output) in parts.into_iter().zip(outputs) {
                let what = format!("seed {seed}, sequence {slot}, tokens {part:?}");
                let rows = &expected[slot];
                assert_near(&output.logits, &rows[part.end - 1], &what);
                assert_eq!(output.scores.len(), part.len() - 1);
                for (at, score) in (part.start + 1..part.end).zip(&output.scores) {
                    let (log_probabilities, greedy) = log_softmax(&rows[at - 1]);
                    let token = sequences[slot][at];
                    assert_near(&[score.log_probability], &[log_probabilities[token as usize]], &what);
                    let by_logits = Score::by_logits(&rows[at - 1], token, 3);
                    assert_near(&[score.log_probability], &[by_logits.log_probability], &what);
                    for (ours, theirs) in score.top.iter().zip(&by_logits.top) {
                        assert_near(&[ours.1], &[theirs.1], &what);
                    }
                    assert_eq!((by_logits.top.len(), by_logits.top[0].0), (3, greedy), "{what}");
                    // Which of two equal tokens is the most likely one is a matter of rounding.
                    let best = log_probabilities[greedy as usize];
                    let ours = log_probabilities[token as usize];
                    assert!(score.top.len() == 3, "{what}");
                    assert_near(&[log_probabilities[score.top[0].0 as usize]], &[best], &what);
                    if (best - ours).abs() > TOLERANCE || greedy == token && score.top[0].0 == greedy {
                        assert_eq!(score.is_greedy, greedy == token, "{what}");
                    }
                }
                assert!(output.experts.iter().all(|layer| layer.len() == part.len()), "{what}");
                assert_eq!(output.experts.len(), a.moe_layers().count());
                read[slot] = part.end;
            }
        }
    }
}

/// The log-probabilities of a row, and the most likely token.
fn log_softmax(logits: &[f32]) -> (Vec<f32>, u32) {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|logit| f64::from(logit - largest).exp()).sum();
    let greedy = logits.iter().position(|logit| *logit == largest).expect("a largest");
    (logits.iter().map(|logit| logit - largest - sum.ln() as f32).collect(), greedy as u32)
}

/// In a model of one layer, keys and values depend on one token each, so that a window over a long sequence
/// is the reference model on the window.
#[test]
fn beyond_the_context_a_token_attends_to_the_last_ones() {
    let qwen3 = Architecture { layers: 1, ..qwen3(2, false) };
    for a in [architecture(1, Activation::Gelu, false), qwen3] {
        let (decoder, reference) = models(&a, 3);
        let mut stream = Stream::new(3, Purpose::Faults, &[2]);
        let long = tokens(&mut stream, 3 * CONTEXT);
        let other = tokens(&mut stream, 3 * CONTEXT);
        let mut cache = decoder.cache(2).expect("a cache");
        let first = Input { slot: 1, tokens: &long[..CONTEXT - 5], scoring: None };
        decoder.advance(&mut cache, &[first]).expect("a pass");
        for end in CONTEXT - 4..=long.len() {
            let ours = Input { slot: 1, tokens: &long[end - 1..end], scoring: None };
            // Beside a sequence of another length.
            let beside = Input { slot: 0, tokens: &other[end - 1..end], scoring: None };
            let outputs = decoder.advance(&mut cache, &[beside, ours]).expect("a pass");
            let window = &long[end.saturating_sub(CONTEXT)..end];
            let expected = reference.logits(window).expect("logits");
            assert_near(&outputs[1].logits, &expected[window.len() - 1], &format!("{end} tokens"));
        }
        assert_eq!(cache.length(1), long.len());
    }
}

#[test]
fn a_cleared_slot_knows_nothing_of_its_last_sequence() {
    let (decoder, _) = models(&architecture(2, Activation::Gelu, true), 5);
    let mut stream = Stream::new(5, Purpose::Faults, &[3]);
    let (before, after) = (tokens(&mut stream, CONTEXT), tokens(&mut stream, 9));
    let pass = |caches: &mut volary_model::decoder::Cache, tokens: &[u32]| {
        let input = Input { slot: 0, tokens, scoring: None };
        decoder.advance(caches, &[input]).expect("a pass")
    };
    let (mut used, mut fresh) = (decoder.cache(1).expect("a cache"), decoder.cache(1).expect("a cache"));
    pass(&mut used, &before);
    used.clear(0);
    assert_eq!(pass(&mut used, &after), pass(&mut fresh, &after));
}

#[test]
fn input_that_cannot_be_appended_is_an_error_and_changes_nothing() {
    let (decoder, _) = models(&architecture(2, Activation::Gelu, true), 7);
    let mut cache = decoder.cache(2).expect("a cache");
    let input = |slot, tokens| Input { slot, tokens, scoring: None };
    let long = [1; CONTEXT + 1];
    let mut fails = |inputs: &[Input<'_>]| decoder.advance(&mut cache, inputs).expect_err("an error");
    assert!(matches!(fails(&[input(0, &[])]), Error::EmptyPrompt));
    assert!(matches!(fails(&[input(0, &[1]), input(1, &[61])]), Error::Vocabulary { id: 61, .. }));
    let error = fails(&[input(0, &long)]);
    assert_eq!(error.to_string(), "73 tokens are more than the model's context of 72");
    assert!(matches!(fails(&[input(0, &[1]), input(0, &[2])]), Error::OutOfTurn(_)));
    assert!(matches!(fails(&[input(2, &[1])]), Error::OutOfTurn(_)));
    assert_eq!((cache.length(0), cache.length(1)), (0, 0));
    assert_eq!(decoder.advance(&mut cache, &[]).expect("nothing to do"), []);
}
