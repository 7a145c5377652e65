#![expect(clippy::expect_used, reason = "tests")]

use super::*;

const HIDDEN: usize = 3;
const TOKENS: [u32; 10] = [3, 14, 15, 9, 26, 5, 35, 8, 9, 7];

fn backend(device: FakeDevice) -> FakeCompute {
    FakeCompute::new(HIDDEN, 2, 4, 7, device)
}

/// One dense layer, one MoE layer and the loss: the loss, and the gradient of the embedding.
fn lane(backend: &FakeCompute, embedding: &FakeShard) -> Computed<(f64, Vec<f32>)> {
    let layer = LayerId(0);
    let initial = |shard| backend.initial(shard).map(|state| backend.params(&state));
    let dense = initial(ShardId::Dense { layer })?;
    let router = initial(ShardId::Router { layer })?;
    let experts: Vec<Vec<f32>> = (0..2)
        .map(|expert| initial(ShardId::Expert { layer, expert: volary_core::ExpertId(expert) }))
        .collect::<Computed<_>>()?;
    let x = backend.embed(backend.params(embedding), &TOKENS)?;
    let (x, saved_dense) = backend.dense(layer, dense, x, true)?;
    let gated = backend.gate(layer, router, x, (Step(1), Lane(0)), true)?;
    let offsets = gated.dispatch.offsets();
    let (mut outputs, mut saved_experts) = (Vec::new(), Vec::new());
    for (e, params) in experts.iter().enumerate() {
        let rows = backend.rows(&gated.rows, offsets[e], gated.dispatch.counts[e])?;
        let (y, saved) = backend.expert(params.clone(), rows, true)?;
        outputs.push(y);
        saved_experts.push(saved);
    }
    let (y, saved_gate) = backend.combine(&gated.dispatch, gated.saved, outputs)?;
    let (loss, gradients) = backend.loss(backend.params(embedding), y, &TOKENS, true)?;
    let (dy, gradient) = gradients.expect("training");
    let (rows, saved_gate) = backend.combine_backward(&gated.dispatch, saved_gate, dy)?;
    let mut inputs = Vec::new();
    for (e, saved) in saved_experts.into_iter().enumerate() {
        let dy = backend.rows(&rows, offsets[e], gated.dispatch.counts[e])?;
        inputs.push(backend.expert_backward(experts[e].clone(), saved, dy)?.0);
    }
    let load: Vec<u32> = gated.dispatch.counts.iter().map(|&count| count as u32).collect();
    let (dx, _) = backend.gate_backward(&gated.dispatch, saved_gate, inputs, &load)?;
    let (dx, _) = backend.dense_backward(saved_dense, dx)?;
    Ok((loss.mean, backend.embed_backward(gradient, dx, &TOKENS)?.values))
}

/// The tolerance is that of a central difference in f32: rounding of the loss over twice the distance.
#[test]
fn gradients_are_those_of_a_finite_difference() {
    let backend = backend(FakeDevice::default());
    let shard = backend.initial(ShardId::Embedding).expect("a shard");
    let (_, gradient) = lane(&backend, &shard).expect("a lane");
    for i in 0..HIDDEN {
        let shifted = |by: f32| {
            let mut weights = shard.weights.clone();
            weights[i] += by;
            let moved = FakeShard { weights, momentum: vec![0.0; HIDDEN] };
            lane(&backend, &moved).expect("a lane").0
        };
        let distance = 1e-4;
        let slope = (shifted(distance) - shifted(-distance)) / (2.0 * f64::from(distance));
        let difference = (slope - f64::from(gradient[i])).abs();
        assert!(difference < 0.02 * slope.abs() + 0.01, "{i}: {slope} against {}", gradient[i]);
    }
}

#[test]
fn every_tensor_is_counted_and_none_outlives_its_lane() {
    let device = FakeDevice::default();
    let backend = backend(device.clone());
    let shard = backend.initial(ShardId::Embedding).expect("a shard");
    lane(&backend, &shard).expect("a lane");
    assert!(device.live_tensors_max() > 5);
    assert_eq!(device.live_tensors(), 0);
}

#[test]
fn a_stored_shard_loads_bit_for_bit() {
    let backend = backend(FakeDevice::default());
    let mut shard = backend.initial(ShardId::Embedding).expect("a shard");
    let gradient = Some(backend.gradient(vec![0.3; HIDDEN]));
    let update =
        Update { apply: true, rate: 0.1, scale: 0.5, moments: volary_core::update::Moments::Decay(0.0) };
    backend.apply(ShardId::Embedding, &mut shard, gradient, update).expect("an update");
    let bytes = backend.store(ShardId::Embedding, Step(1), &shard).expect("bytes");
    let loaded = backend.load(ShardId::Embedding, &bytes).expect("a shard");
    assert_eq!((loaded.weights, loaded.momentum), (shard.weights, shard.momentum));
    assert!(backend.load(ShardId::Embedding, &bytes[1..]).is_err());
}
