//! The actors' engine compared with the reference model, and bitwise with itself.
#![expect(clippy::expect_used, clippy::unwrap_used, reason = "tests")]

use std::collections::BTreeMap;
use tch::{Device, Kind, Tensor};
use volary_core::architecture::{Activation, Architecture, Family, SecondExpert};
use volary_core::compute::{Compute, LaneLoss};
use volary_core::dispatch::{Capacity, Dispatch};
use volary_core::options::{OnNan, TrainingOptions};
use volary_core::random::{Purpose, Stream};
use volary_core::update::{Moments, Update};
use volary_core::{ExpertId, Lane, LayerId, ShardId, Step};
use volary_model::engine::{Gradient, Shard};
use volary_model::reference::Reference;
use volary_model::{Glam, device};

/// Step 1, lane 0.
const FIRST: (Step, Lane) = (Step(1), Lane(0));
const ROUTER: ShardId = ShardId::Router { layer: LayerId(0) };

fn architecture() -> Architecture {
    Architecture {
        family: Family::Glam,
        vocabulary: 97,
        hidden: 24,
        layers: 4,
        heads: 3,
        head_dim: 8,
        kv_heads: None,
        feed_forward: 40,
        experts: 5,
        expert_hidden: Some(28),
        moe_first: Some(true),
        activation: Activation::Gelu,
        capacity: Capacity::Dropless,
        second_expert: SecondExpert::All,
        tied_embedding: None,
        rope_theta: 10_000.0,
        position_buckets: 8,
        position_distance: 12,
    }
}

fn training() -> TrainingOptions {
    TrainingOptions {
        steps: 10,
        lanes: 4,
        lane_group: 2,
        sequences_per_lane: 2,
        sequence_length: 17,
        optimizer: Default::default(),
        schedule: Default::default(),
        clip_norm: None,
        aux_loss: 0.01,
        on_nan: OnNan::GoBack,
        max_skipped_steps: 10,
        z_loss: 0.001,
    }
}

/// Runs the engine over one lane, as the actors do.
struct Driver {
    glam: Glam,
    a: Architecture,
    shards: BTreeMap<ShardId, Shard>,
}

impl Driver {
    fn new(a: Architecture, t: &TrainingOptions, kind: Kind) -> Self {
        let device = device::for_tests();
        let glam = Glam::with_kind(&a, t, 7, device, kind).expect("an engine");
        let shards = a.shards().into_iter().map(|id| (id, glam.initial(id).expect("a shard"))).collect();
        Self { glam, a, shards }
    }

    fn params(&self, id: ShardId) -> volary_model::engine::Params {
        self.glam.params(&self.shards[&id])
    }

    fn lane(&self, tokens: &[u32]) -> (f64, BTreeMap<ShardId, Gradient>, usize) {
        let g = &self.glam;
        let mut grads = BTreeMap::new();
        let mut x = g.embed(self.params(ShardId::Embedding), tokens).unwrap();
        let mut segments = Vec::new();
        let mut dropped = 0;
        let mut load = vec![0; self.a.experts];
        for layer in self.a.layer_range().iter() {
            let (y, saved) = g.dense(layer, self.params(ShardId::Dense { layer }), x, true).unwrap();
            x = y;
            let mut moe = None;
            if self.a.is_moe(layer) {
                let gated = g.gate(layer, self.params(ShardId::Router { layer }), x, FIRST, true).unwrap();
                dropped += gated.dispatch.dropped;
                load.iter_mut().zip(&gated.dispatch.counts).for_each(|(all, count)| *all += *count as u32);
                let (mut outs, mut kept) = (Vec::new(), Vec::new());
                for (e, offset) in gated.dispatch.offsets().into_iter().enumerate() {
                    let rows = g.rows(&gated.rows, offset, gated.dispatch.counts[e]).unwrap();
                    let id = ShardId::Expert { layer, expert: ExpertId(e as u16) };
                    let (y, saved) = g.expert(self.params(id), rows, true).unwrap();
                    outs.push(y);
                    kept.push((id, saved));
                }
                let (y, saved) = g.combine(&gated.dispatch, gated.saved, outs).unwrap();
                x = y;
                moe = Some((gated.dispatch, saved, kept));
            }
            segments.push((layer, saved, moe));
        }
        let for_validation = self.glam.rows(&x, 0, x.size()[0] as usize).unwrap();
        let (by_sequence, none) =
            g.loss(self.params(ShardId::Embedding), for_validation, tokens, false).unwrap();
        let (LaneLoss { mean: loss, sequences }, back) =
            g.loss(self.params(ShardId::Embedding), x, tokens, true).unwrap();
        assert!(none.is_none() && sequences.is_empty());
        assert_eq!(by_sequence.mean.to_bits(), loss.to_bits(), "validation computes another loss");
        let sequences = by_sequence.sequences;
        let mean = sequences.iter().map(|loss| f64::from(*loss)).sum::<f64>() / sequences.len() as f64;
        // Two orders of summation of a few dozen f32 or bf16 values near 5.
        assert!((mean - loss).abs() < 1e-2, "{mean} {loss}");
        let (mut dx, head) = back.unwrap();
        for (layer, saved, moe) in segments.into_iter().rev() {
            if let Some((dispatch, saved, kept)) = moe {
                let (rows, saved) = g.combine_backward(&dispatch, saved, dx).unwrap();
                let mut inputs = Vec::new();
                for ((id, saved), offset) in kept.into_iter().zip(dispatch.offsets()) {
                    let ShardId::Expert { expert, .. } = id else { unreachable!() };
                    let dy = g.rows(&rows, offset, dispatch.counts[expert.index()]).unwrap();
                    let (dx, saved) = g.expert_backward(self.params(id), saved, dy).unwrap();
                    inputs.push(dx);
                    if let Some(gradient) = g.expert_gradient(vec![saved]).unwrap() {
                        grads.insert(id, gradient);
                    }
                }
                let (d, gradient) = g.gate_backward(&dispatch, saved, inputs, &load).unwrap();
                grads.insert(ShardId::Router { layer }, gradient);
                dx = d;
            }
            let (d, gradient) = g.dense_backward(saved, dx).unwrap();
            grads.insert(ShardId::Dense { layer }, gradient);
            dx = d;
        }
        grads.insert(ShardId::Embedding, g.embed_backward(head, dx, tokens).unwrap());
        (loss, grads, dropped)
    }
}

fn tokens(seed: u64, a: &Architecture, t: &TrainingOptions) -> Vec<u32> {
    let mut stream = Stream::new(seed, Purpose::Faults, &[]);
    let count = t.sequences_per_lane * (t.sequence_length + 1);
    (0..count).map(|_| stream.below(a.vocabulary as u64) as u32).collect()
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}

fn tensor_floats(t: &Tensor) -> Vec<f32> {
    Vec::try_from(t.flatten(0, -1).to_device(Device::Cpu)).unwrap()
}

fn relative_error(ours: &[f32], theirs: &[f32]) -> f64 {
    assert_eq!(ours.len(), theirs.len());
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|v| v * v).sum::<f64>().sqrt();
    let difference = norm(&mut ours.iter().zip(theirs).map(|(a, b)| f64::from(a - b)));
    difference / norm(&mut theirs.iter().map(|&v| f64::from(v))).max(1e-12)
}

/// The loss and all gradients, compared with autograd over the whole model. The relative tolerance is 2e-5:
/// the same f32 sums in another order, through four layers.
#[test]
fn loss_and_every_gradient_equal_autograd_on_the_whole_model() {
    use {Activation::*, Capacity::*, SecondExpert::*};
    let cases = [
        (1, Gelu, true, Dropless, All),
        (2, Relu, false, Dropless, All),
        (3, Gelu, true, Factor(1.0), All),
        (4, Gelu, false, Factor(0.5), Random),
        (5, Relu, true, Dropless, Random),
        (6, Gelu, true, Factor(2.0), Random),
    ];
    for (seed, activation, moe_first, capacity, second_expert) in cases {
        let (mut a, t) = (architecture(), training());
        (a.activation, a.moe_first, a.capacity, a.second_expert) =
            (activation, Some(moe_first), capacity, second_expert);
        assert_equals_autograd(seed, &a, &t);
    }
}

/// As above, for the other family: grouped keys and values, an output of its own or not, with experts or
/// dense.
#[test]
fn loss_and_every_gradient_of_qwen3_equal_autograd_on_the_whole_model() {
    for (seed, kv_heads, experts, tied) in [(1, 2, 5, false), (2, 4, 3, true), (3, 1, 0, false)] {
        let (a, t) = (qwen3(kv_heads, experts, tied), TrainingOptions { aux_loss: 0.1, ..training() });
        assert_equals_autograd(seed, &a, &t);
    }
}

fn qwen3(kv_heads: usize, experts: usize, tied: bool) -> Architecture {
    Architecture {
        family: Family::Qwen3Moe,
        heads: 4,
        head_dim: 6,
        kv_heads: Some(kv_heads),
        experts,
        moe_first: None,
        tied_embedding: Some(tied),
        ..architecture()
    }
}

fn assert_equals_autograd(seed: u64, a: &Architecture, t: &TrainingOptions) {
    let tokens = tokens(seed, a, t);
    let (loss, grads, _) = Driver::new(a.clone(), t, Kind::Float).lane(&tokens);
    // On the host, whatever the engine's device.
    let reference = Reference::initial(a, t, 7, Device::Cpu).unwrap();
    let reference = reference.lane(&tokens, FIRST, true).unwrap();
    assert!((loss - reference.loss).abs() < 1e-5, "seed {seed}: {loss} against {}", reference.loss);
    for (id, theirs) in &reference.gradients {
        let Some(ours) = grads.get(id) else {
            assert!(
                theirs.iter().all(|g| g.abs().sum(Kind::Float).double_value(&[]) == 0.0),
                "{id} has no gradient"
            );
            continue;
        };
        let ours = Glam::gradient_bytes(ours).unwrap();
        assert_eq!(ours.len(), theirs.len(), "{id}");
        for (index, (ours, theirs)) in ours.iter().zip(theirs).enumerate() {
            let error = relative_error(&floats(ours), &tensor_floats(theirs));
            assert!(error < 2e-5, "seed {seed}, {id}, parameter {index}: relative error {error}");
        }
    }
}

/// bf16 has 8 bits of mantissa: a product of dozens of terms is accurate to a few percent.
#[test]
fn bf16_activations_stay_near_f32() {
    let (a, t) = (architecture(), training());
    let tokens = tokens(3, &a, &t);
    let (wide, _, _) = Driver::new(a.clone(), &t, Kind::Float).lane(&tokens);
    let (narrow, _, _) = Driver::new(a, &t, Kind::BFloat16).lane(&tokens);
    assert!((wide - narrow).abs() < 0.05, "{wide} against {narrow}");
}

#[test]
fn concurrent_lanes_give_the_same_bits() {
    let a = architecture();
    // Also long enough for several blocks of a GPU, which add in a fixed order or not.
    for (kind, sequences, length) in [(Kind::Float, 2, 17), (Kind::Float, 8, 250), (Kind::BFloat16, 8, 250)] {
        let t = TrainingOptions { sequences_per_lane: sequences, sequence_length: length, ..training() };
        let tokens = tokens(4, &a, &t);
        let run = || {
            device::single_thread();
            // Another engine with the same seed, as on a second node.
            let (loss, grads, _) = Driver::new(a.clone(), &t, kind).lane(&tokens);
            let bytes = |g: &Gradient| Glam::gradient_bytes(g).unwrap();
            (loss, grads.iter().map(|(id, g)| (*id, bytes(g))).collect::<BTreeMap<_, _>>())
        };
        let (loss, quiet) = run();
        let results: Vec<_> = std::thread::scope(|scope| {
            let handles: Vec<_> = (0..4).map(|_| scope.spawn(run)).collect();
            handles.into_iter().map(|h| h.join().unwrap()).collect()
        });
        for (other, grads) in results {
            assert_eq!(loss.to_bits(), other.to_bits(), "{kind:?}");
            let differ: Vec<_> =
                quiet.iter().filter(|(id, bytes)| grads[id] != **bytes).map(|(id, _)| id).collect();
            assert!(differ.is_empty(), "{kind:?}: {differ:?} differ");
        }
    }
}

#[test]
fn capacity_drops_tokens_and_what_remains_is_the_residual() {
    let (mut a, t) = (architecture(), training());
    a.capacity = Capacity::Factor(0.5);
    let driver = Driver::new(a.clone(), &t, Kind::Float);
    let (loss, _, dropped) = driver.lane(&tokens(5, &a, &t));
    assert!(dropped > 0 && loss.is_finite());
    // Without any capacity the layer is the identity.
    let g = &driver.glam;
    let x = Tensor::randn([6, a.hidden as i64], (Kind::Float, device::for_tests()));
    let gated = g.gate(LayerId(0), driver.params(ROUTER), x.shallow_clone(), FIRST, true).unwrap();
    let none = [-1i64; 6];
    let empty = Dispatch::new([&none, &none], a.experts, Capacity::Dropless);
    let nothing = Tensor::zeros([0, a.hidden as i64], (Kind::Float, device::for_tests()));
    let (y, _) = g.combine(&empty, gated.saved, vec![nothing]).unwrap();
    assert_eq!(tensor_floats(&y), tensor_floats(&x));
}

/// With identity experts the layer adds the normalized input, since gate weights sum to 1.
#[test]
fn gate_weights_of_kept_tokens_sum_to_one() {
    let (a, t) = (architecture(), training());
    let driver = Driver::new(a.clone(), &t, Kind::Float);
    let x = Tensor::randn([40, a.hidden as i64], (Kind::Float, device::for_tests()));
    let gated = driver.glam.gate(LayerId(0), driver.params(ROUTER), x.shallow_clone(), FIRST, true).unwrap();
    let outputs = vec![gated.rows.shallow_clone()];
    let dispatch = gated.dispatch.clone();
    let (y, _) = driver.glam.combine(&dispatch, gated.saved, outputs).unwrap();
    let added = tensor_floats(&(y - &x));
    let mut normed = vec![0f32; added.len()];
    let rows = tensor_floats(&gated.rows);
    for (row, &token) in dispatch.tokens.iter().enumerate() {
        let (from, to) = (row * a.hidden, token as usize * a.hidden);
        normed[to..to + a.hidden].copy_from_slice(&rows[from..from + a.hidden]);
    }
    assert!(relative_error(&added, &normed) < 1e-5);
    for token in 0..40 {
        let chosen: Vec<_> = (0..a.experts)
            .filter(|&e| {
                let start = dispatch.offsets()[e];
                dispatch.tokens[start..start + dispatch.counts[e]].contains(&token)
            })
            .collect();
        assert_eq!(chosen.len(), 2, "token {token} goes to two distinct experts");
    }
}

/// Entropy, choices and weights of the gate, compared with scalars in double precision. The tolerance is that
/// of f32 sums over 24 numbers.
#[test]
fn a_gate_reports_its_entropy_choices_and_weights() {
    let (a, t) = (architecture(), training());
    let driver = Driver::new(a.clone(), &t, Kind::Float);
    let id = ShardId::Router { layer: LayerId(2) };
    let stored = driver.glam.store(id, Step(0), &driver.shards[&id]).expect("bytes");
    let stored = safetensors::SafeTensors::deserialize(&stored).expect("safetensors");
    let find = |shape: &[usize]| {
        // The optimizer's state may have the same shape; its name is that of the parameter with a suffix.
        let same = stored.tensors().into_iter().filter(|(_, tensor)| tensor.shape() == shape);
        let found = same.min_by_key(|(name, _)| (name.matches('.').count(), name.clone()));
        floats(found.expect("a parameter of this shape").1.data())
    };
    let (gain, gate) = (find(&[a.hidden]), find(&[a.hidden, a.experts]));
    let mut stream = Stream::new(11, Purpose::Faults, &[]);
    let x: Vec<f32> = (0..40 * a.hidden).map(|_| (stream.next_f64() * 4.0 - 2.0) as f32).collect();
    let input = Tensor::from_slice(&x).reshape([40, a.hidden as i64]).to_device(device::for_tests());
    let gated = driver.glam.gate(LayerId(2), driver.params(id), input, FIRST, true).expect("a gate");
    let weights = driver.glam.gate_weights(&gated.saved, &(0..40).collect::<Vec<_>>()).expect("weights");
    let mut entropy = 0.0;
    for (token, row) in x.chunks(a.hidden).enumerate() {
        let square = row.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / a.hidden as f64;
        let normed =
            row.iter().zip(&gain).map(|(&v, &g)| f64::from(v) * f64::from(g) / (square + 1e-6).sqrt());
        let mut logits = vec![0.0; a.experts];
        for (index, value) in normed.enumerate() {
            let weights = &gate[index * a.experts..][..a.experts];
            logits.iter_mut().zip(weights).for_each(|(logit, &w)| *logit += value * f64::from(w));
        }
        let total: f64 = logits.iter().map(|logit| logit.exp()).sum();
        let p: Vec<f64> = logits.iter().map(|logit| logit.exp() / total).collect();
        entropy -= p.iter().map(|p| p * p.ln()).sum::<f64>() / 40.0;
        let mut order: Vec<usize> = (0..a.experts).collect();
        order.sort_by(|&i, &j| p[j].total_cmp(&p[i]));
        let sum = p[order[0]] + p[order[1]];
        for k in 0..2 {
            assert_eq!(gated.choices[k][token], order[k] as i64, "choice {k} of token {token}");
            assert!((weights[token][k] - p[order[k]] / sum).abs() < 1e-5, "weight {k} of token {token}");
        }
    }
    assert!((gated.entropy - entropy).abs() < 1e-5, "{} and {entropy}", gated.entropy);
    assert!(entropy > 0.5 && entropy < (a.experts as f64).ln());
}

#[test]
fn the_random_policy_drops_the_same_second_choices_on_every_node() {
    let (mut a, t) = (architecture(), training());
    a.second_expert = SecondExpert::Random;
    let driver = Driver::new(a.clone(), &t, Kind::Float);
    let x = Tensor::randn([200, a.hidden as i64], (Kind::Float, device::for_tests()));
    let gate = |lane| {
        driver
            .glam
            .gate(LayerId(0), driver.params(ROUTER), x.shallow_clone(), (Step(3), Lane(lane)), false)
            .unwrap()
            .dispatch
    };
    assert_eq!(gate(1), gate(1));
    assert_ne!(gate(1), gate(2));
    assert!(gate(1).tokens.len() < 400);
}

#[test]
fn an_expert_without_tokens_has_an_empty_output_and_no_gradient() {
    let (a, t) = (architecture(), training());
    let driver = Driver::new(a.clone(), &t, Kind::Float);
    let id = ShardId::Expert { layer: LayerId(0), expert: ExpertId(0) };
    let empty = || Tensor::zeros([0, a.hidden as i64], (Kind::Float, device::for_tests()));
    let (y, saved) = driver.glam.expert(driver.params(id), empty(), true).unwrap();
    assert_eq!(y.size(), [0, a.hidden as i64]);
    let (dx, saved) = driver.glam.expert_backward(driver.params(id), saved, empty()).unwrap();
    assert_eq!(dx.size(), [0, a.hidden as i64]);
    assert!(driver.glam.expert_gradient(vec![saved]).unwrap().is_none());
}

#[test]
fn a_stored_shard_loads_to_the_same_bits_and_refuses_another_model() {
    let (a, t) = (architecture(), training());
    let mut driver = Driver::new(a.clone(), &t, Kind::Float);
    let (_, grads, _) = driver.lane(&tokens(6, &a, &t));
    let update = Update { apply: true, rate: 0.01, scale: 1.0, moments: Moments::Decay(0.0) };
    for (id, gradient) in grads {
        let shard = driver.shards.get_mut(&id).unwrap();
        driver.glam.apply(id, shard, Some(gradient), update).unwrap();
    }
    for (&id, shard) in &driver.shards {
        let bytes = driver.glam.store(id, Step(1), shard).unwrap();
        let back = driver.glam.load(id, &bytes).unwrap();
        assert_eq!(bytes, driver.glam.store(id, Step(1), &back).unwrap(), "{id}");
        let other = ShardId::Dense { layer: LayerId(99) };
        assert!(driver.glam.load(other, &bytes).unwrap_err().to_string().contains("does not fit"));
        assert!(driver.glam.load(id, &bytes[..bytes.len() / 2]).is_err());
    }
    let mut wider = a;
    wider.hidden = 32;
    let other = Glam::new(&wider, &t, 7, device::for_tests()).unwrap();
    let id = ShardId::Expert { layer: LayerId(0), expert: ExpertId(1) };
    let error = other.load(id, &driver.glam.store(id, Step(1), &driver.shards[&id]).unwrap()).unwrap_err();
    assert!(error.to_string().contains("this model expects"), "{error}");
}

/// On a GPU, against the host: replicas of one shard on unlike devices stay equal.
#[test]
fn updates_and_norms_are_the_same_bits_on_every_device() {
    let (a, mut t) = (architecture(), training());
    let adamw = serde_json::from_str(r#"{"kind": "adamw"}"#).expect("an optimizer");
    for optimizer in [t.optimizer, adamw] {
        t.optimizer = optimizer;
        let engines = [device::for_tests(), Device::Cpu].map(|device| Glam::new(&a, &t, 7, device).unwrap());
        let mut driver = Driver::new(a.clone(), &t, Kind::Float);
        let mut copies: BTreeMap<_, _> =
            a.shards().into_iter().map(|id| (id, engines[1].initial(id).unwrap())).collect();
        for step in (1..=3).map(Step) {
            let update = Update::decide(1.0, true, &t, step).0;
            for (id, gradient) in driver.lane(&tokens(step.0, &a, &t)).1 {
                let host = engines[0].export_gradient(&gradient).unwrap();
                let parts: Vec<_> =
                    host.iter().map(|g| (g.dtype, g.shape.clone(), g.data.as_slice())).collect();
                let copied = engines[1].import_gradient(id, &parts).unwrap();
                let norms = [engines[0].norm(&gradient), engines[1].norm(&copied)];
                let [ours, theirs] = norms.map(|norm| norm.unwrap().squared.to_bits());
                assert_eq!(ours, theirs, "{id} at step {step}");
                let shard = driver.shards.get_mut(&id).unwrap();
                let copy = copies.get_mut(&id).unwrap();
                engines[0].apply(id, shard, Some(gradient), update).unwrap();
                engines[1].apply(id, copy, Some(copied), update).unwrap();
                let [ours, theirs] = [engines[0].digest(shard), engines[1].digest(copy)].map(Result::unwrap);
                assert_eq!(ours, theirs, "{id} at step {step}");
            }
        }
    }
}

#[test]
fn a_token_outside_the_vocabulary_is_one_clear_error() {
    let (a, t) = (architecture(), training());
    let driver = Driver::new(a.clone(), &t, Kind::Float);
    let mut tokens = tokens(8, &a, &t);
    tokens[3] = 97;
    let error = driver.glam.embed(driver.params(ShardId::Embedding), &tokens).unwrap_err();
    assert_eq!(error.to_string(), "token 97 is outside the model's vocabulary of 97");
}

#[test]
fn products_are_the_same_bits_at_any_alignment_row_count_and_order() {
    let device = device::for_tests();
    tch::manual_seed(11);
    for (rows, inner, columns) in [(37, 128, 512), (64, 512, 128), (1, 128, 384), (200, 64, 48)] {
        let x = Tensor::randn([rows, inner], (Kind::Float, device));
        let w = Tensor::randn([inner, columns], (Kind::Float, device));
        let expected = tensor_floats(&x.matmul(&w));
        for offset in 1..4 {
            let shifted = |t: &Tensor| {
                let line = Tensor::zeros([t.numel() as i64 + offset], (Kind::Float, device));
                let view = line.narrow(0, offset, t.numel() as i64).view(t.size().as_slice());
                view.shallow_clone().copy_(t);
                view
            };
            let bits = |v: &[f32]| v.iter().map(|f| f.to_bits()).collect::<Vec<_>>();
            assert_eq!(
                bits(&tensor_floats(&shifted(&x).matmul(&shifted(&w)))),
                bits(&expected),
                "offset {offset}"
            );
        }
    }
}
