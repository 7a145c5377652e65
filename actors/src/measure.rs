//! What a node finds out about itself before it is placed: how fast its device computes at the run's shapes, and how fast
//! its link to the supervisor is.
//!
//! Every thread of the device does the same at the same time, since that is how it will be used. Of each kind of computation
//! the mean of several calls counts, as it does in training: a device that is held to a part of its time by somebody else
//! has quick calls too.

use crate::executor::Executor;
use crate::limits::{MEASURE, PROBE_BYTES, PROBE_MAX};
use crate::wire;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use volary_core::ShardId;
use volary_core::architecture::Architecture;
use volary_core::compute::{Compute, ComputeError, Computed};
use volary_core::costs::Costs;
use volary_core::options::TrainingOptions;
use volary_core::profile::{Profile, Rate};
use volary_core::schedule::Update;
use volary_telemetry::Meter;
use volary_transport::{Dtype, Frame, Kind, Link, Part, TraceHeader};

/// What the device takes for one lane's dense part, for one expert's share of it, and for the update of an expert.
#[derive(Clone, Copy, Debug, Default)]
struct Times {
    dense: [f64; 2],
    expert: [f64; 2],
    update: f64,
}

/// How long measuring may take by an estimate; what takes longer is learned while it trains.
const SECONDS_MAX: f64 = 20.0;

/// Whether one call of everything is too much for this device's memory or patience.
fn is_too_large(costs: &Costs, profile: &Profile) -> bool {
    let layer = (0..costs.layers()).map(|layer| costs.stage_bytes(layer..layer + 1, profile.threads)).max();
    let bytes = layer.unwrap_or(0).saturating_add(costs.dense_bytes[0]).saturating_add(costs.expert_bytes);
    let flops = costs.lane_flops(0..costs.layers()) / f64::from(costs.layers().max(1));
    let experts = rows(costs) as f64 * costs.expert_flops;
    // Each kind is called a few times, with its update.
    bytes > profile.memory_bytes || 10.0 * profile.dense.seconds(flops + experts) > SECONDS_MAX
}

/// Measures the device, and fills in a profile that has everything else.
pub(crate) async fn device<B: Compute>(
    executor: &Executor<B>,
    a: &Architecture,
    training: &TrainingOptions,
    profile: &mut Profile,
) -> Computed<()> {
    let costs = Costs::new(a, training);
    if is_too_large(&costs, profile) {
        return Err(ComputeError("one layer is too large to be tried out".into()));
    }
    let own = Arc::new(
        executor
            .run(&Meter::default(), {
                let (a, experts) = (a.clone(), costs.experts > 0);
                move |backend| Model::new(backend, &a, experts)
            })
            .await?,
    );
    let threads = executor.threads();
    let meter = Meter::default();
    let all = (0..threads).map(|_| {
        let (own, a, training) = (Arc::clone(&own), a.clone(), training.clone());
        executor.run(&meter, move |backend| own.measure(backend, &a, &training))
    });
    let all = futures::future::try_join_all(all).await?;
    let of_all = |of: fn(&Times) -> f64| all.iter().map(of).sum::<f64>() / threads as f64;
    let rate = |flops: f64, forward: f64, backward: f64| Rate {
        forward: threads as f64 * flops / forward.max(1e-9),
        backward: threads as f64 * 2.0 * flops / backward.max(1e-9),
    };
    let lane = costs.lane_flops(0..costs.layers());
    profile.dense = rate(lane, of_all(|t| t.dense[0]), of_all(|t| t.dense[1]));
    profile.expert = profile.dense;
    profile.threads = threads;
    if costs.experts > 0 {
        let rows = rows(&costs) as f64 * costs.expert_flops;
        profile.expert = rate(rows, of_all(|t| t.expert[0]), of_all(|t| t.expert[1]));
        profile.update_bytes_per_s =
            threads as f64 * costs.expert_wire as f64 / of_all(|t| t.update).max(1e-9);
    }
    Ok(())
}

/// Rows that an expert gets from a lane when all get as many.
fn rows(costs: &Costs) -> usize {
    ((costs.rows_per_lane() / costs.experts.max(1) as f64) as usize).max(1)
}

/// One shard of each kind, as it is before the first step. Behind locks: a shard may go to another thread, and not be
/// shared with it.
struct Model<B: Compute> {
    embedding: Mutex<B::Shard>,
    /// A layer of each kind, with how many there are.
    layers: Vec<(u16, usize, Mutex<B::Shard>)>,
    router: Option<(u16, usize, Mutex<B::Shard>)>,
    expert: Option<(ShardId, Mutex<B::Shard>)>,
}

fn params<B: Compute>(backend: &B, shard: &Mutex<B::Shard>) -> B::Params {
    backend.params(&shard.lock().unwrap_or_else(PoisonError::into_inner))
}

impl<B: Compute> Model<B> {
    fn new(backend: &B, a: &Architecture, experts: bool) -> Computed<Self> {
        let make = |shard: ShardId| Ok::<_, ComputeError>(Mutex::new(backend.initial(shard)?));
        let mut layers = Vec::new();
        for moe in [false, true] {
            let mut own = (0..a.layers).filter(|&layer| a.is_moe(layer) == moe);
            if let Some(layer) = own.next() {
                layers.push((layer as u16, 1 + own.count(), make(ShardId::Dense { layer: layer as u16 })?));
            }
        }
        let first = a.moe_layers().next().map(|layer| layer as u16).filter(|_| experts);
        let router = match first {
            Some(layer) => Some((layer, a.moe_layers().count(), make(ShardId::Router { layer })?)),
            None => None,
        };
        let expert = match first.map(|layer| ShardId::Expert { layer, expert: 0 }) {
            Some(shard) => Some((shard, make(shard)?)),
            None => None,
        };
        Ok(Self { embedding: make(ShardId::Embedding)?, layers, router, expert })
    }

    /// The mean of several calls of everything, on one thread.
    fn measure(&self, backend: &B, a: &Architecture, training: &TrainingOptions) -> Computed<Times> {
        let rows_of = training.sequence_length + 1;
        let tokens: Vec<u32> =
            (0..training.sequences_per_lane * rows_of).map(|i| (i * 7919 % a.vocabulary) as u32).collect();
        let mut times = Times::default();
        let mut add = |kind: fn(&mut Times) -> &mut [f64; 2], count: usize, [forward, backward]: [f64; 2]| {
            let sum = kind(&mut times);
            *sum = [sum[0] + count as f64 * forward, sum[1] + count as f64 * backward];
        };
        let embed = || backend.embed(params(backend, &self.embedding), &tokens);
        let head = mean(|| {
            let start = Instant::now();
            let x = embed()?;
            let embedded = start.elapsed();
            let (_, back) = backend.loss(params(backend, &self.embedding), x, &tokens, true)?;
            let (dx, gradient) = back.ok_or_else(|| ComputeError("no gradient of the loss".into()))?;
            let lost = start.elapsed();
            backend.embed_backward(gradient, dx, &tokens)?;
            // The loss and its gradient are one call: a third of it is the way forward.
            let both = (lost - embedded).as_secs_f64();
            let back = (start.elapsed() - lost).as_secs_f64();
            Ok([embedded.as_secs_f64() + both / 3.0, back + both * 2.0 / 3.0])
        })?;
        add(|times| &mut times.dense, 1, head);
        for (layer, count, shard) in &self.layers {
            let own = mean(|| {
                let (x, dy) = (embed()?, embed()?);
                timed(
                    || backend.dense(*layer, params(backend, shard), x, true),
                    |(_, saved)| backend.dense_backward(saved, dy),
                )
            })?;
            add(|times| &mut times.dense, *count, own);
        }
        if let Some((layer, count, shard)) = &self.router {
            let gate = mean(|| {
                let (x, dy) = (embed()?, embed()?);
                let forward = || {
                    let gated = backend.gate(*layer, params(backend, shard), x, (1, 0), true)?;
                    let offsets = gated.dispatch.offsets();
                    let counts = gated.dispatch.counts.iter().enumerate();
                    let cut = counts.map(|(e, &count)| backend.rows(&gated.rows, offsets[e], count));
                    let outputs = cut.collect::<Computed<Vec<_>>>()?;
                    let (_, saved) = backend.combine(&gated.dispatch, gated.saved, outputs)?;
                    Ok((gated.dispatch, saved))
                };
                timed(forward, |(dispatch, saved)| {
                    let (rows, saved) = backend.combine_backward(&dispatch, saved, dy)?;
                    let offsets = dispatch.offsets();
                    let counts = dispatch.counts.iter().enumerate();
                    let cut = counts.map(|(e, &count)| backend.rows(&rows, offsets[e], count));
                    let inputs = cut.collect::<Computed<Vec<_>>>()?;
                    backend.gate_backward(&dispatch, saved, inputs)
                })
            })?;
            add(|times| &mut times.dense, *count, gate);
        }
        if let Some((shard, state)) = &self.expert {
            let count = rows(&Costs::new(a, training));
            let group = training.lane_group.max(1) as usize;
            let own = mean(|| {
                let x = row_block(backend, a, count)?;
                let dy = row_block(backend, a, count)?;
                timed(
                    || backend.expert(params(backend, state), x, true),
                    |(_, saved)| {
                        let (_, saved) = backend.expert_backward(params(backend, state), saved, dy)?;
                        backend.expert_gradient(vec![saved])
                    },
                )
            })?;
            add(|times| &mut times.expert, 1, own);
            let update = mean(|| self.update(backend, *shard, state, a, count * group))?;
            times.update = update[0];
        }
        Ok(times)
    }

    /// One addition and one step of the optimizer.
    fn update(
        &self,
        backend: &B,
        shard: ShardId,
        state: &Mutex<B::Shard>,
        a: &Architecture,
        rows: usize,
    ) -> Computed<[f64; 2]> {
        let gradient = || {
            let (x, dy) = (row_block(backend, a, rows)?, row_block(backend, a, rows)?);
            let (_, saved) = backend.expert(params(backend, state), x, true)?;
            let (_, saved) = backend.expert_backward(params(backend, state), saved, dy)?;
            let gradient = backend.expert_gradient(vec![saved])?;
            gradient.ok_or_else(|| ComputeError("an expert with rows has no gradient".into()))
        };
        let (left, right) = (gradient()?, gradient()?);
        let mut own = backend.initial(shard)?;
        let start = Instant::now();
        let sum = backend.add(left, right)?;
        let update = Update { apply: true, rate: 1e-6, scale: 1.0 };
        backend.apply(shard, &mut own, Some(sum), 1, update)?;
        Ok([start.elapsed().as_secs_f64() / 2.0, 0.0])
    }
}

/// Rows for an expert with numbers in them: `[count, hidden]`.
fn row_block<B: Compute>(backend: &B, a: &Architecture, count: usize) -> Computed<B::Tensor> {
    let numbers = (0..count * a.hidden).map(|i| ((i % 251) as f32 - 125.0) / 500.0);
    let data: Vec<u8> = numbers.flat_map(f32::to_le_bytes).collect();
    backend.import(volary_core::compute::HostDtype::F32, &[count, a.hidden], &data)
}

/// Seconds of a forward call and of its backward call.
fn timed<T, U>(
    forward: impl FnOnce() -> Computed<T>,
    backward: impl FnOnce(T) -> Computed<U>,
) -> Computed<[f64; 2]> {
    let start = Instant::now();
    let kept = forward()?;
    let turned = start.elapsed();
    backward(kept)?;
    Ok([turned.as_secs_f64(), (start.elapsed() - turned).as_secs_f64()])
}

/// The mean of as many calls as there is time for, beside the first one: the first call of anything is slow.
fn mean(mut call: impl FnMut() -> Computed<[f64; 2]>) -> Computed<[f64; 2]> {
    call()?;
    let start = Instant::now();
    let (mut sum, mut calls) = ([0.0; 2], 0.0);
    while calls == 0.0 || start.elapsed() < MEASURE {
        let [forward, backward] = call()?;
        sum = [sum[0] + forward, sum[1] + backward];
        calls += 1.0;
    }
    Ok([sum[0] / calls, sum[1] / calls])
}

/// A link's round trip, and the bytes per second that it carries in one direction.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LinkProbe {
    pub(crate) round_trip: Duration,
    pub(crate) bandwidth: f64,
}

/// Frames with which a link is measured.
const PROBES: usize = 4;

/// Measures a link with a few frames, of which the quickest counts: the first ones find out how fast the link may go, and any of
/// them may wait for a device that computes. What else this node sends meanwhile, as `sent` counts it, goes the same way and
/// counts as well.
pub(crate) async fn link(link: &Link, sent: impl Fn() -> u64) -> Option<LinkProbe> {
    let part =
        Part { dtype: Dtype::U8, shape: vec![PROBE_BYTES as u64], data: vec![0u8; PROBE_BYTES].into() };
    let meta = wire::frame(Kind::Probe, 0, 0, &(), Vec::new()).ok()?.meta;
    let probe = Frame {
        kind: Kind::Probe,
        epoch: 0,
        step: 0,
        trace: TraceHeader::default(),
        meta,
        parts: vec![part],
    };
    let mut best: Option<LinkProbe> = None;
    // The way itself: a probe fills the queues before a slow link, and what it waits there is its own time on the wire.
    let mut round_trip = link.stats().round_trip;
    for _ in 0..PROBES {
        let (start, before) = (Instant::now(), sent());
        tokio::time::timeout(PROBE_MAX, link.request(probe.clone())).await.ok()?.ok()?;
        round_trip = round_trip.min(link.stats().round_trip);
        let seconds = start.elapsed().saturating_sub(round_trip).as_secs_f64().max(1e-6);
        let bytes = sent().saturating_sub(before).max(PROBE_BYTES as u64);
        let bandwidth = (bytes as f64 / seconds).max(best.map_or(0.0, |before| before.bandwidth));
        best = Some(LinkProbe { round_trip, bandwidth });
    }
    best
}
