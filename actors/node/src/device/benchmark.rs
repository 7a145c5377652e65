//! The device benchmark: how fast a device computes at the run's shapes, measured before the node is
//! placed.
//!
//! Every thread of the device runs the same calls at the same time, since that is how it will be used. The
//! mean of several calls of each kind counts, as it does in training: a device that another process holds
//! to a part of its time has quick calls too.

use crate::device::executor::Executor;
use crate::error::{Error, Result};
use crate::limits::{BENCHMARK_SECONDS_MAX, BENCHMARK_TIME};
use parking_lot::Mutex;
use std::iter::Sum;
use std::ops::{Add, Mul};
use std::sync::Arc;
use std::time::Instant;
use volary_core::architecture::Architecture;
use volary_core::compute::{Compute, ComputeError, Computed, HostDtype};
use volary_core::costs::Costs;
use volary_core::dispatch::Dispatch;
use volary_core::options::TrainingOptions;
use volary_core::profile::{Profile, Rate};
use volary_core::update::{Moments, Update};
use volary_core::{ExpertId, Lane, LayerId, ShardId, Step};
use volary_telemetry::Meter;

/// Seconds of a forward call and of its backward call.
#[derive(Clone, Copy, Debug, Default)]
struct Timing {
    forward_s: f64,
    backward_s: f64,
}

impl Add for Timing {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self { forward_s: self.forward_s + other.forward_s, backward_s: self.backward_s + other.backward_s }
    }
}

impl Mul<f64> for Timing {
    type Output = Self;

    fn mul(self, factor: f64) -> Self {
        Self { forward_s: self.forward_s * factor, backward_s: self.backward_s * factor }
    }
}

impl Sum for Timing {
    fn sum<I: Iterator<Item = Self>>(timings: I) -> Self {
        timings.fold(Self::default(), Add::add)
    }
}

/// What one thread measured.
#[derive(Clone, Copy, Debug, Default)]
struct Times {
    /// One lane's dense part: embedding, loss, all layers, all gates.
    lane: Timing,
    /// One expert on its share of one lane's rows.
    expert: Timing,
    /// The sum of two gradients and the update of one expert, for each of the two.
    update_s: f64,
}

/// Benchmarks the device, and fills in the rates of a profile that has everything else.
///
/// # Errors
/// When one layer needs more memory or time than the benchmark may take, or a computation fails.
pub(crate) async fn benchmark<B: Compute>(
    executor: &Executor<B>,
    architecture: &Architecture,
    training: &TrainingOptions,
    profile: &mut Profile,
) -> Result<()> {
    let costs = Costs::new(architecture, training);
    if is_too_large(&costs, profile) {
        return Err(Error::TooLargeToBenchmark);
    }
    let shape = Shape { architecture: architecture.clone(), training: training.clone(), costs };
    let build = move |backend: &B| Ok(Arc::new(Sample::new(backend, shape)?));
    let sample = executor.run(&Meter::default(), build).await?;
    let threads = executor.threads();
    let meter = Meter::default();
    let runs = (0..threads).map(|_| {
        let sample = Arc::clone(&sample);
        executor.run(&meter, move |backend| Ok(sample.measure(backend)?))
    });
    let measured = futures::future::try_join_all(runs).await?;
    fill_in(profile, &sample.shape.costs, &measured);
    Ok(())
}

/// The rates that follow from the means over all threads.
fn fill_in(profile: &mut Profile, costs: &Costs, measured: &[Times]) {
    let threads = measured.len();
    let mean = 1.0 / threads as f64;
    let rate = |flops: f64, timing: Timing| Rate {
        forward: threads as f64 * flops / timing.forward_s.max(1e-9),
        backward: threads as f64 * 2.0 * flops / timing.backward_s.max(1e-9),
    };
    let lane = measured.iter().map(|times| times.lane).sum::<Timing>() * mean;
    profile.dense = rate(costs.lane_flops(costs.all_layers()), lane);
    profile.expert = profile.dense;
    profile.threads = threads;
    if costs.experts > 0 {
        let expert = measured.iter().map(|times| times.expert).sum::<Timing>() * mean;
        profile.expert = rate(rows(costs) as f64 * costs.expert_flops, expert);
        let update_s = measured.iter().map(|times| times.update_s).sum::<f64>() * mean;
        profile.update_bytes_per_s = threads as f64 * costs.expert_wire_bytes as f64 / update_s.max(1e-9);
    }
}

/// Whether one call of each kind exceeds this device's memory, or the benchmark's time by its own estimate.
fn is_too_large(costs: &Costs, profile: &Profile) -> bool {
    let layers = costs.all_layers();
    let layer = layers.iter().map(|layer| costs.stage_bytes(layer.alone(), profile.threads)).max();
    let bytes = layer.unwrap_or(0).saturating_add(costs.dense_bytes[0]).saturating_add(costs.expert_bytes);
    let flops = costs.lane_flops(layers) / layers.len().max(1) as f64;
    let experts = rows(costs) as f64 * costs.expert_flops;
    // Each kind is called a few times, with its update.
    bytes > profile.memory_bytes || 10.0 * profile.dense.seconds(flops + experts) > BENCHMARK_SECONDS_MAX
}

/// Rows that an expert gets from one lane under an even load.
fn rows(costs: &Costs) -> usize {
    ((costs.rows_per_lane() / costs.experts.max(1) as f64) as usize).max(1)
}

/// The shapes of the run.
struct Shape {
    architecture: Architecture,
    training: TrainingOptions,
    costs: Costs,
}

/// One shard of each kind in its initial state. Behind locks: a shard may be sent to another thread, and
/// not be shared with it.
struct Sample<B: Compute> {
    shape: Shape,
    /// Token ids of one lane, `[sequences, sequence_length + 1]`.
    tokens: Vec<u32>,
    embedding: Mutex<B::Shard>,
    /// A layer of each kind, and how many layers are of this kind.
    layers: Vec<(LayerId, usize, Mutex<B::Shard>)>,
    moe: Option<MoeSample<B>>,
}

/// The gate and the first expert of the first MoE layer.
struct MoeSample<B: Compute> {
    layer: LayerId,
    layers: usize,
    router: Mutex<B::Shard>,
    expert_id: ShardId,
    expert: Mutex<B::Shard>,
}

impl<B: Compute> Sample<B> {
    fn new(backend: &B, shape: Shape) -> Computed<Self> {
        let initial = |shard: ShardId| backend.initial(shard).map(Mutex::new);
        let Shape { architecture, training, costs } = &shape;
        let all = costs.all_layers();
        let mut layers = Vec::new();
        for moe in [false, true] {
            let mut alike = all.iter().filter(|&layer| architecture.is_moe(layer) == moe);
            if let Some(layer) = alike.next() {
                layers.push((layer, 1 + alike.count(), initial(ShardId::Dense { layer })?));
            }
        }
        let first = architecture.moe_layers().next().filter(|_| costs.experts > 0);
        let moe = match first {
            Some(layer) => {
                let expert_id = ShardId::Expert { layer, expert: ExpertId(0) };
                Some(MoeSample {
                    layer,
                    layers: architecture.moe_layers().count(),
                    router: initial(ShardId::Router { layer })?,
                    expert_id,
                    expert: initial(expert_id)?,
                })
            }
            None => None,
        };
        let length = training.sequences_per_lane * (training.sequence_length + 1);
        let tokens = (0..length).map(|i| (i * 7919 % architecture.vocabulary) as u32).collect();
        Ok(Self { tokens, embedding: initial(ShardId::Embedding)?, layers, moe, shape })
    }

    /// Times every kind of computation, on one thread.
    fn measure(&self, backend: &B) -> Computed<Times> {
        let mut lane = self.time_head(backend)?;
        for (layer, count, shard) in &self.layers {
            lane = lane + self.time_layer(backend, *layer, shard)? * *count as f64;
        }
        let mut times = Times { lane, ..Times::default() };
        if let Some(moe) = &self.moe {
            times.lane = times.lane + self.time_router(backend, moe)? * moe.layers as f64;
            times.expert = self.time_expert(backend, moe)?;
            times.update_s = self.time_update(backend, moe)?;
        }
        Ok(times)
    }

    fn embed(&self, backend: &B) -> Computed<B::Tensor> {
        backend.embed(params(backend, &self.embedding), &self.tokens)
    }

    /// Embedding and loss.
    fn time_head(&self, backend: &B) -> Computed<Timing> {
        mean(|| {
            let start = Instant::now();
            let x = self.embed(backend)?;
            let embedded = start.elapsed().as_secs_f64();
            let (_, gradients) = backend.loss(params(backend, &self.embedding), x, &self.tokens, true)?;
            let no_gradient = || ComputeError("the loss has no gradient".into());
            let (dx, gradient) = gradients.ok_or_else(no_gradient)?;
            // The loss and its gradient are one call, of which a third counts as forward.
            let loss = start.elapsed().as_secs_f64() - embedded;
            backend.embed_backward(gradient, dx, &self.tokens)?;
            let backward = start.elapsed().as_secs_f64() - embedded - loss;
            Ok(Timing { forward_s: embedded + loss / 3.0, backward_s: backward + loss * 2.0 / 3.0 })
        })
    }

    fn time_layer(&self, backend: &B, layer: LayerId, shard: &Mutex<B::Shard>) -> Computed<Timing> {
        mean(|| {
            let (x, dy) = (self.embed(backend)?, self.embed(backend)?);
            time(
                || backend.dense(layer, params(backend, shard), x, true),
                |(_, saved)| backend.dense_backward(saved, dy),
            )
        })
    }

    /// The gate, and the combination of rows that come back as they went.
    fn time_router(&self, backend: &B, moe: &MoeSample<B>) -> Computed<Timing> {
        let cut = |dispatch: &Dispatch, rows: &B::Tensor| {
            let offsets = dispatch.offsets();
            let counts = dispatch.counts.iter().enumerate();
            counts.map(|(e, &count)| backend.rows(rows, offsets[e], count)).collect::<Computed<Vec<_>>>()
        };
        mean(|| {
            let (x, dy) = (self.embed(backend)?, self.embed(backend)?);
            let forward = || {
                let at = (Step(1), Lane(0));
                let gated = backend.gate(moe.layer, params(backend, &moe.router), x, at, true)?;
                let outputs = cut(&gated.dispatch, &gated.rows)?;
                let (_, saved) = backend.combine(&gated.dispatch, gated.saved, outputs)?;
                Ok((gated.dispatch, saved))
            };
            time(forward, |(dispatch, saved)| {
                let (rows, saved) = backend.combine_backward(&dispatch, saved, dy)?;
                let inputs = cut(&dispatch, &rows)?;
                let load: Vec<u32> = dispatch.counts.iter().map(|&count| count as u32).collect();
                backend.gate_backward(&dispatch, saved, inputs, &load)
            })
        })
    }

    /// One expert on its share of one lane's rows.
    fn time_expert(&self, backend: &B, moe: &MoeSample<B>) -> Computed<Timing> {
        let count = rows(&self.shape.costs);
        mean(|| {
            let (x, dy) = (self.rows(backend, count)?, self.rows(backend, count)?);
            time(
                || backend.expert(params(backend, &moe.expert), x, true),
                |(_, saved)| {
                    let (_, saved) = backend.expert_backward(params(backend, &moe.expert), saved, dy)?;
                    backend.expert_gradient(vec![saved])
                },
            )
        })
    }

    /// The sum of two gradients of an expert and one step of the optimizer: half of both.
    fn time_update(&self, backend: &B, moe: &MoeSample<B>) -> Computed<f64> {
        let count = rows(&self.shape.costs) * self.shape.training.lane_group.max(1) as usize;
        let gradient = || {
            let (x, dy) = (self.rows(backend, count)?, self.rows(backend, count)?);
            let (_, saved) = backend.expert(params(backend, &moe.expert), x, true)?;
            let (_, saved) = backend.expert_backward(params(backend, &moe.expert), saved, dy)?;
            let gradient = backend.expert_gradient(vec![saved])?;
            gradient.ok_or_else(|| ComputeError("an expert with rows has no gradient".into()))
        };
        let timing = mean(|| {
            let (left, right) = (gradient()?, gradient()?);
            let mut state = backend.initial(moe.expert_id)?;
            let start = Instant::now();
            let sum = backend.add(left, right)?;
            let moments = Moments::at(&self.shape.training.optimizer, Step(1));
            let update = Update { apply: true, rate: 1e-6, scale: 1.0, moments };
            backend.apply(moe.expert_id, &mut state, Some(sum), update)?;
            Ok(Timing { forward_s: start.elapsed().as_secs_f64() / 2.0, backward_s: 0.0 })
        })?;
        Ok(timing.forward_s)
    }

    /// Rows for an expert with varied numbers, `[count, hidden]`, f32.
    fn rows(&self, backend: &B, count: usize) -> Computed<B::Tensor> {
        let hidden = self.shape.architecture.hidden;
        let numbers = (0..count * hidden).map(|i| ((i % 251) as f32 - 125.0) / 500.0);
        let data: Vec<u8> = numbers.flat_map(f32::to_le_bytes).collect();
        backend.import(HostDtype::F32, &[count, hidden], &data)
    }
}

fn params<B: Compute>(backend: &B, shard: &Mutex<B::Shard>) -> B::Params {
    backend.params(&shard.lock())
}

/// Times a forward call and its backward call.
fn time<T, U>(
    forward: impl FnOnce() -> Computed<T>,
    backward: impl FnOnce(T) -> Computed<U>,
) -> Computed<Timing> {
    let start = Instant::now();
    let kept = forward()?;
    let forward_s = start.elapsed().as_secs_f64();
    backward(kept)?;
    Ok(Timing { forward_s, backward_s: start.elapsed().as_secs_f64() - forward_s })
}

/// The mean of as many calls as there is time for. The first call warms up and does not count.
fn mean(mut call: impl FnMut() -> Computed<Timing>) -> Computed<Timing> {
    call()?;
    let start = Instant::now();
    let (mut sum, mut calls) = (Timing::default(), 0.0);
    while calls == 0.0 || start.elapsed() < BENCHMARK_TIME {
        sum = sum + call()?;
        calls += 1.0;
    }
    Ok(sum * (1.0 / calls))
}
