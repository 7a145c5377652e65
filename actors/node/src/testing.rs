//! A backend without libtorch, so that a whole cluster of real actors runs in one process, in milliseconds.
//!
//! [`FakeCompute`] is a small model in plain Rust with true gradients: every shard is one vector, every
//! operation is a loop over f32 in a fixed order. A step that is applied twice, left out, summed in another
//! order or applied to a stale replica shows in the bits of the losses and of the stored shards.
//! [`FakeDevice`] is the test's hand on it: it counts live tensors, slows calls down, holds them, and lets
//! them fail.
//!
//! ```
//! use volary_core::ShardId;
//! use volary_core::compute::Compute;
//! use volary_node::testing::{FakeCompute, FakeDevice};
//!
//! let device = FakeDevice::default();
//! let backend = FakeCompute::new(4, 2, 8, 7, device.clone());
//! let shard = backend.initial(ShardId::Embedding)?;
//! let x = backend.embed(backend.params(&shard), &[1, 2, 3, 4, 5, 6, 7, 8, 9])?;
//! assert_eq!(backend.export(&x)?.shape, [8, 4]);
//! assert_eq!(device.live_tensors(), 1);
//! # Ok::<(), volary_core::compute::ComputeError>(())
//! ```

mod device;
mod tensor;

pub use device::{FakeDevice, Hold, Operation};
pub use tensor::{FakeGradient, FakeTensor};
use tensor::{Live, add_rows};
use volary_core::compute::{
    Compute, ComputeError, Computed, Gated, HostDtype, HostTensor, LaneLoss, LossAndGradients,
};
use volary_core::dispatch::{Capacity, Dispatch, TOP_K};
use volary_core::messages::Norm;
use volary_core::random::{Purpose, Stream};
use volary_core::update::Update;
use volary_core::{Digest, Lane, LayerId, ShardId, Step};

/// How much a dense layer adds to its input.
const DENSE: f32 = 0.125;
/// How far the gate's score moves the weight of the first expert from one half.
const GATE: f32 = 0.25;
/// The optimizer's momentum.
const MOMENTUM: f32 = 0.875;

/// A small model in plain Rust.
pub struct FakeCompute {
    hidden: usize,
    experts: usize,
    /// Tokens per sequence.
    length: usize,
    seed: u64,
    device: FakeDevice,
}

/// Parameters and momentum of one shard, `[hidden]` each.
pub struct FakeShard {
    weights: Vec<f32>,
    momentum: Vec<f32>,
}

/// State between a forward and its backward call.
pub enum FakeSaved {
    /// Nothing, where no backward call follows.
    None,
    /// A dense layer's.
    Dense {
        /// Its input.
        x: FakeTensor,
        /// Its parameters.
        weights: Vec<f32>,
    },
    /// A gate's, then a combination's.
    Gate(Box<GateState>),
    /// An expert's.
    Expert {
        /// Its input.
        x: FakeTensor,
        /// The gradient of its output, after the backward call.
        dy: Option<FakeTensor>,
    },
}

/// What a gate saves.
pub struct GateState {
    x: FakeTensor,
    weights: Vec<f32>,
    /// The score of each token.
    scores: Vec<f32>,
    /// The experts' outputs in expert order, after the combination.
    outputs: Option<FakeTensor>,
    /// The gradient of the layer's output, after the backward combination.
    dy: Option<FakeTensor>,
}

impl GateState {
    /// The weights of a token's first and second expert; they add up to 1.
    fn gate_weights(&self, token: usize) -> [f32; TOP_K] {
        let score = self.scores[token];
        let first = 0.5 + GATE * score / (1.0 + score.abs());
        [first, 1.0 - first]
    }
}

fn wrong(what: &str) -> ComputeError {
    ComputeError(format!("{what} was called with another call's state"))
}

fn dot(left: &[f32], right: &[f32]) -> f32 {
    left.iter().zip(right).map(|(l, r)| l * r).sum()
}

impl FakeCompute {
    /// A model of width `hidden` with `experts` experts per MoE layer, on sequences of `length` tokens.
    #[must_use]
    pub fn new(hidden: usize, experts: usize, length: usize, seed: u64, device: FakeDevice) -> Self {
        Self { hidden, experts, length, seed, device }
    }

    fn tensor(&self, data: Vec<f32>) -> FakeTensor {
        FakeTensor::new(data, self.hidden, &self.device)
    }

    fn gradient(&self, values: Vec<f32>) -> FakeGradient {
        FakeGradient { values, live: Live::new(&self.device) }
    }

    /// The load over all layers has at least that of one layer.
    fn check_load(&self, dispatch: &Dispatch, load: &[u32]) -> Computed<()> {
        let of_layer = dispatch.counts.iter().zip(load).all(|(&count, &all)| count <= all as usize);
        let is_right = load.len() == self.experts && of_layer;
        is_right
            .then_some(())
            .ok_or_else(|| ComputeError(format!("the load of {:?}: {load:?}", dispatch.counts)))
    }

    /// Input and target ids of every position, sequence by sequence.
    fn positions<'a>(&self, tokens: &'a [u32]) -> impl Iterator<Item = (u32, u32)> + use<'a> {
        let rows = tokens.chunks_exact(self.length + 1);
        rows.flat_map(|row| row.windows(2).map(|pair| (pair[0], pair[1])))
    }
}

/// The factor that a token id embeds with.
fn embedding(id: u32) -> f32 {
    ((id % 17) + 1) as f32 / 17.0
}

/// A number that stands for a token as a target.
fn target(id: u32) -> f32 {
    (id % 13) as f32 / 13.0
}

impl Compute for FakeCompute {
    type Tensor = FakeTensor;
    type Shard = FakeShard;
    type Params = Vec<f32>;
    type Saved = FakeSaved;
    type Gradient = FakeGradient;

    fn arithmetic(&self) -> Computed<Digest> {
        Ok(Digest::of(b"loops over f32"))
    }

    fn initial(&self, shard: ShardId) -> Computed<FakeShard> {
        let path = shard.to_string().bytes().map(u64::from).collect::<Vec<_>>();
        let mut stream = Stream::new(self.seed, Purpose::Initial, &path);
        let weights = (0..self.hidden).map(|_| 0.5 + stream.next_f64() as f32).collect();
        Ok(FakeShard { weights, momentum: vec![0.0; self.hidden] })
    }

    fn load(&self, _: ShardId, bytes: &[u8]) -> Computed<FakeShard> {
        self.device.enter(Operation::Load)?;
        let (numbers, rest) = bytes.as_chunks::<4>();
        if numbers.len() != 2 * self.hidden || !rest.is_empty() {
            return Err(ComputeError(format!("a shard of {} bytes", bytes.len())));
        }
        let mut weights: Vec<f32> = numbers.iter().map(|&number| f32::from_le_bytes(number)).collect();
        let momentum = weights.split_off(self.hidden);
        Ok(FakeShard { weights, momentum })
    }

    fn store(&self, _: ShardId, _: Step, state: &FakeShard) -> Computed<Vec<u8>> {
        self.device.enter(Operation::Store)?;
        let numbers = state.weights.iter().chain(&state.momentum);
        Ok(numbers.flat_map(|number| number.to_le_bytes()).collect())
    }

    fn digest(&self, state: &FakeShard) -> Computed<Digest> {
        let numbers = state.weights.iter().chain(&state.momentum);
        Ok(Digest::of(&numbers.flat_map(|number| number.to_le_bytes()).collect::<Vec<_>>()))
    }

    fn is_finite(&self, state: &FakeShard) -> Computed<bool> {
        Ok(state.weights.iter().all(|weight| weight.is_finite()))
    }

    fn params(&self, state: &FakeShard) -> Vec<f32> {
        state.weights.clone()
    }

    fn embed(&self, params: Vec<f32>, tokens: &[u32]) -> Computed<FakeTensor> {
        self.device.enter(Operation::Embed)?;
        let row = |(id, _): (u32, u32)| params.iter().map(move |w| w * embedding(id)).collect::<Vec<_>>();
        Ok(self.tensor(self.positions(tokens).flat_map(row).collect()))
    }

    fn loss(
        &self,
        params: Vec<f32>,
        x: FakeTensor,
        tokens: &[u32],
        train: bool,
    ) -> Computed<LossAndGradients<Self>> {
        self.device.enter(Operation::Loss)?;
        let (count, width) = (x.row_count() as f32, self.hidden as f32);
        let (mut loss, mut dx, mut dw) = (0.0, Vec::new(), vec![0.0; self.hidden]);
        let mut errors = Vec::new();
        for ((_, next), row) in self.positions(tokens).zip(x.each_row()) {
            let error = dot(row, &params) / width - target(next);
            loss += error * error / count;
            errors.push(error * error);
            let slope = 2.0 * error / count / width;
            dx.extend(params.iter().map(|w| slope * w));
            dw.iter_mut().zip(row).for_each(|(dw, x)| *dw += slope * x);
        }
        let gradients = train.then(|| (self.tensor(dx), self.gradient(dw)));
        let mean = |errors: &[f32]| errors.iter().sum::<f32>() / errors.len() as f32;
        let sequences = if train { Vec::new() } else { errors.chunks(self.length).map(mean).collect() };
        Ok((LaneLoss { mean: loss.into(), sequences }, gradients))
    }

    fn embed_backward(
        &self,
        gradient: FakeGradient,
        dx: FakeTensor,
        tokens: &[u32],
    ) -> Computed<FakeGradient> {
        let mut values = gradient.values;
        for ((id, _), row) in self.positions(tokens).zip(dx.each_row()) {
            values.iter_mut().zip(row).for_each(|(dw, dx)| *dw += dx * embedding(id));
        }
        Ok(self.gradient(values))
    }

    fn dense(
        &self,
        _: LayerId,
        params: Vec<f32>,
        x: FakeTensor,
        train: bool,
    ) -> Computed<(FakeTensor, FakeSaved)> {
        self.device.enter(Operation::Dense)?;
        let y = x.map_rows(|row| row.iter().zip(&params).map(|(x, w)| x + DENSE * w * x).collect());
        let saved = if train { FakeSaved::Dense { x, weights: params } } else { FakeSaved::None };
        Ok((self.tensor(y), saved))
    }

    fn dense_backward(&self, saved: FakeSaved, dy: FakeTensor) -> Computed<(FakeTensor, FakeGradient)> {
        self.device.enter(Operation::DenseBackward)?;
        let FakeSaved::Dense { x, weights } = saved else { return Err(wrong("dense_backward")) };
        let mut dw = vec![0.0; self.hidden];
        for (x, dy) in x.each_row().zip(dy.each_row()) {
            dw.iter_mut().zip(x.iter().zip(dy)).for_each(|(dw, (x, dy))| *dw += DENSE * x * dy);
        }
        let dx = dy.map_rows(|row| row.iter().zip(&weights).map(|(dy, w)| dy + DENSE * w * dy).collect());
        Ok((self.tensor(dx), self.gradient(dw)))
    }

    fn gate(
        &self,
        _: LayerId,
        params: Vec<f32>,
        x: FakeTensor,
        _: (Step, Lane),
        _: bool,
    ) -> Computed<Gated<Self>> {
        self.device.enter(Operation::Gate)?;
        let scores: Vec<f32> = x.each_row().map(|row| dot(row, &params)).collect();
        let experts = self.experts as u64;
        let mut choices: [Vec<i64>; TOP_K] = Default::default();
        for score in &scores {
            // Steps of the score route tokens all over the experts, and are flat almost everywhere.
            let bucket = (score * 16.0).floor() as i64;
            let mut draw = Stream::new(bucket as u64, Purpose::SecondExpert, &[]);
            let first = draw.below(experts);
            let other = (experts > 1).then(|| (first + 1 + draw.below(experts - 1)) % experts);
            choices[0].push(first as i64);
            choices[1].push(other.map_or(-1, |expert| expert as i64));
        }
        let dispatch = Dispatch::new([&choices[0], &choices[1]], self.experts, Capacity::Dropless);
        let rows = dispatch.tokens.iter().flat_map(|&token| x.row(token as usize).to_vec()).collect();
        let share = |count: &usize| (*count as f64 / dispatch.tokens.len().max(1) as f64).powi(2);
        let aux_loss = self.experts as f64 * dispatch.counts.iter().map(share).sum::<f64>();
        let state = GateState { x, weights: params, scores, outputs: None, dy: None };
        let (rows, saved) = (self.tensor(rows), FakeSaved::Gate(Box::new(state)));
        Ok(Gated { dispatch, choices, rows, saved, aux_loss, entropy: std::f64::consts::LN_2 })
    }

    fn gate_weights(&self, saved: &FakeSaved, tokens: &[usize]) -> Computed<Vec<[f64; TOP_K]>> {
        let FakeSaved::Gate(state) = saved else { return Err(wrong("gate_weights")) };
        Ok(tokens.iter().map(|&token| state.gate_weights(token).map(f64::from)).collect())
    }

    fn combine(
        &self,
        dispatch: &Dispatch,
        saved: FakeSaved,
        outputs: Vec<FakeTensor>,
    ) -> Computed<(FakeTensor, FakeSaved)> {
        self.device.enter(Operation::Combine)?;
        let FakeSaved::Gate(mut state) = saved else { return Err(wrong("combine")) };
        let outputs = self.concatenate(outputs)?;
        let mut y = state.x.to_vec();
        for (token, y) in y.chunks_exact_mut(self.hidden).enumerate() {
            for (k, weight) in state.gate_weights(token).into_iter().enumerate() {
                if let Ok(row) = usize::try_from(dispatch.rows[k][token]) {
                    y.iter_mut().zip(outputs.row(row)).for_each(|(y, out)| *y += weight * out);
                }
            }
        }
        state.outputs = Some(outputs);
        Ok((self.tensor(y), FakeSaved::Gate(state)))
    }

    fn combine_backward(
        &self,
        dispatch: &Dispatch,
        saved: FakeSaved,
        dy: FakeTensor,
    ) -> Computed<(FakeTensor, FakeSaved)> {
        let FakeSaved::Gate(mut state) = saved else { return Err(wrong("combine_backward")) };
        let mut rows = vec![0.0; dispatch.tokens.len() * self.hidden];
        for (token, dy) in dy.each_row().enumerate() {
            for (k, weight) in state.gate_weights(token).into_iter().enumerate() {
                if let Ok(row) = usize::try_from(dispatch.rows[k][token]) {
                    let into = &mut rows[row * self.hidden..(row + 1) * self.hidden];
                    into.iter_mut().zip(dy).for_each(|(into, dy)| *into = weight * dy);
                }
            }
        }
        state.dy = Some(dy);
        Ok((self.tensor(rows), FakeSaved::Gate(state)))
    }

    fn gate_backward(
        &self,
        dispatch: &Dispatch,
        saved: FakeSaved,
        inputs: Vec<FakeTensor>,
        load: &[u32],
    ) -> Computed<(FakeTensor, FakeGradient)> {
        let FakeSaved::Gate(state) = saved else { return Err(wrong("gate_backward")) };
        self.check_load(dispatch, load)?;
        let (Some(outputs), Some(dy)) = (&state.outputs, &state.dy) else {
            return Err(wrong("gate_backward"));
        };
        let inputs = self.concatenate(inputs)?;
        let (mut dx, mut dw) = (dy.to_vec(), vec![0.0; self.hidden]);
        for (token, dx) in dx.chunks_exact_mut(self.hidden).enumerate() {
            // The weights of the two experts add up to 1: the score moves them against each other.
            let mut slope = 0.0;
            for (k, sign) in [1.0, -1.0].into_iter().enumerate() {
                if let Ok(row) = usize::try_from(dispatch.rows[k][token]) {
                    slope += sign * dot(outputs.row(row), dy.row(token));
                    dx.iter_mut().zip(inputs.row(row)).for_each(|(dx, d)| *dx += d);
                }
            }
            let flatness = 1.0 + state.scores[token].abs();
            slope *= GATE / (flatness * flatness);
            dx.iter_mut().zip(&state.weights).for_each(|(dx, w)| *dx += slope * w);
            dw.iter_mut().zip(state.x.row(token)).for_each(|(dw, x)| *dw += slope * x);
        }
        Ok((self.tensor(dx), self.gradient(dw)))
    }

    fn expert(&self, params: Vec<f32>, x: FakeTensor, train: bool) -> Computed<(FakeTensor, FakeSaved)> {
        self.device.enter(Operation::Expert)?;
        let y = x.map_rows(|row| row.iter().zip(&params).map(|(x, w)| x * w).collect());
        let saved = if train { FakeSaved::Expert { x, dy: None } } else { FakeSaved::None };
        Ok((self.tensor(y), saved))
    }

    fn expert_backward(
        &self,
        params: Vec<f32>,
        saved: FakeSaved,
        dy: FakeTensor,
    ) -> Computed<(FakeTensor, FakeSaved)> {
        self.device.enter(Operation::ExpertBackward)?;
        let FakeSaved::Expert { x, .. } = saved else { return Err(wrong("expert_backward")) };
        let dx = dy.map_rows(|row| row.iter().zip(&params).map(|(dy, w)| dy * w).collect());
        Ok((self.tensor(dx), FakeSaved::Expert { x, dy: Some(dy) }))
    }

    fn expert_gradient(&self, lanes: Vec<FakeSaved>) -> Computed<Option<FakeGradient>> {
        self.device.enter(Operation::ExpertGradient)?;
        let (mut dw, mut rows) = (vec![0.0; self.hidden], 0);
        for saved in lanes {
            let FakeSaved::Expert { x, dy: Some(dy) } = saved else { return Err(wrong("expert_gradient")) };
            rows += x.row_count();
            for (x, dy) in x.each_row().zip(dy.each_row()) {
                dw.iter_mut().zip(x.iter().zip(dy)).for_each(|(dw, (x, dy))| *dw += x * dy);
            }
        }
        Ok((rows > 0).then(|| self.gradient(dw)))
    }

    fn add(&self, left: FakeGradient, right: FakeGradient) -> Computed<FakeGradient> {
        self.device.enter(Operation::Add)?;
        Ok(self.gradient(add_rows(&left.values, &right.values)))
    }

    fn norm(&self, gradient: &FakeGradient) -> Computed<Norm> {
        self.device.enter(Operation::Norm)?;
        let squared = gradient.values.iter().map(|g| f64::from(*g) * f64::from(*g)).sum::<f64>();
        Ok(Norm { squared, finite: squared.is_finite() })
    }

    fn apply(
        &self,
        _: ShardId,
        state: &mut FakeShard,
        gradient: Option<FakeGradient>,
        update: Update,
    ) -> Computed<()> {
        self.device.enter(Operation::Apply)?;
        if !update.apply {
            return Ok(());
        }
        for (i, (weight, momentum)) in state.weights.iter_mut().zip(&mut state.momentum).enumerate() {
            let slope = gradient.as_ref().map_or(0.0, |gradient| gradient.values[i]);
            *momentum = MOMENTUM * *momentum + update.scale as f32 * slope;
            *weight -= update.rate as f32 * *momentum;
        }
        Ok(())
    }

    fn rows(&self, x: &FakeTensor, start: usize, length: usize) -> Computed<FakeTensor> {
        Ok(x.slice(start, length))
    }

    fn concatenate(&self, parts: Vec<FakeTensor>) -> Computed<FakeTensor> {
        Ok(self.tensor(parts.iter().flat_map(FakeTensor::to_vec).collect()))
    }

    fn export(&self, x: &FakeTensor) -> Computed<HostTensor> {
        let data = x.to_vec().into_iter().flat_map(f32::to_le_bytes).collect();
        Ok(HostTensor { dtype: HostDtype::F32, shape: vec![x.row_count(), self.hidden], data })
    }

    fn import(&self, _: HostDtype, _: &[usize], data: &[u8]) -> Computed<FakeTensor> {
        Ok(self.tensor(data.as_chunks::<4>().0.iter().map(|&number| f32::from_le_bytes(number)).collect()))
    }

    fn export_gradient(&self, gradient: &FakeGradient) -> Computed<Vec<HostTensor>> {
        let data = gradient.values.iter().flat_map(|number| number.to_le_bytes()).collect();
        Ok(vec![HostTensor { dtype: HostDtype::F32, shape: vec![self.hidden], data }])
    }

    fn import_gradient(
        &self,
        shard: ShardId,
        parts: &[(HostDtype, Vec<usize>, &[u8])],
    ) -> Computed<FakeGradient> {
        match parts {
            [(_, shape, data)] if *shape == [self.hidden] => {
                let numbers = data.as_chunks::<4>().0.iter();
                Ok(self.gradient(numbers.map(|&number| f32::from_le_bytes(number)).collect()))
            }
            _ => Err(ComputeError(format!("{} tensors are no gradient of {shard}", parts.len()))),
        }
    }
}

#[cfg(test)]
mod tests;
