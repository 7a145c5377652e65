//! [`Glam`]: the computations of a GLaM model on one device, for the actors.
//!
//! Dense layers and gates keep a piece of autograd graph between their forward and backward calls, from a detached
//! input to the output. Experts are differentiated by hand: the gradient of the input goes back at once, the weights'
//! is one product over a group of lanes when they have all come.

use crate::error::{Error, Result};
use crate::layers::{self, Attention, FeedForward, Gate, Positions};
use crate::optimizer;
pub use crate::weights::Shard;
use crate::weights::{host_bytes, parameters};
use std::sync::Mutex;
use tch::{Device, Kind, Tensor};
use volary_core::architecture::{Architecture, SecondExpert};
use volary_core::compute::{Compute, Computed, Gated, HostDtype, HostTensor};
use volary_core::dispatch::Dispatch;
use volary_core::messages::Norm;
use volary_core::options::TrainingOptions;
use volary_core::random::{Purpose, Stream};
use volary_core::schedule::Update;
use volary_core::{Lane, ShardId, Step};

/// A GLaM model's computations on one device.
#[derive(Debug)]
pub struct Glam {
    architecture: Architecture,
    training: TrainingOptions,
    seed: u64,
    device: Device,
    /// The kind of activations: f32 on CPU, bf16 on a GPU (GLaM, section 5.1).
    kind: Kind,
    positions: Mutex<Positions>,
}

/// What a forward call keeps.
#[derive(Debug)]
pub enum Saved {
    /// Nothing: validation.
    None,
    /// A piece of autograd graph.
    Segment {
        /// Detached input.
        x: Tensor,
        /// Parameters as leaves.
        leaves: Vec<Tensor>,
        /// Output.
        y: Tensor,
    },
    /// A gate, from its forward call to its backward call.
    Gate(Box<SavedGate>),
    /// An expert's rows.
    Expert {
        /// Input, `[rows, hidden]`.
        x: Tensor,
        /// Before the activation, `[rows, expert_hidden]`; after the backward call its gradient.
        h: Tensor,
        /// After the activation.
        a: Tensor,
        /// The gradient of the output, once it has come.
        dy: Option<Tensor>,
    },
}

/// What a gate keeps between its calls.
#[derive(Debug)]
pub struct SavedGate {
    x: Tensor,
    leaves: Vec<Tensor>,
    normed: Tensor,
    weights: Tensor,
    /// The auxiliary losses with their coefficients.
    penalty: Tensor,
    /// The experts' outputs per choice, `[tokens, hidden]`.
    outputs: Vec<Tensor>,
    /// The gradient of the gate weights, `[tokens, 2]`.
    d_weights: Option<Tensor>,
    /// The gradient that passes by the experts.
    residual: Option<Tensor>,
    train: bool,
}

/// A gradient of one shard, f32, in the order of its parameters.
#[derive(Debug)]
pub struct Gradient(pub(crate) Vec<Tensor>);

/// A cheap view of a shard's parameters.
#[derive(Debug)]
pub struct Params(pub(crate) Vec<Tensor>);

impl Params {
    /// Leaves of a new graph: lanes that run at the same time share the numbers and nothing else.
    fn leaves(&self, train: bool) -> Result<Vec<Tensor>> {
        self.0.iter().map(|p| Ok(p.f_detach()?.f_set_requires_grad(train)?)).collect()
    }
}

fn misuse(what: &str) -> Error {
    Error::Input(format!("{what} was called out of turn"))
}

/// Gradients of `scalar` for `inputs`, in their order.
fn gradients(scalar: &Tensor, inputs: &[&Tensor]) -> Result<Vec<Tensor>> {
    Ok(Tensor::f_run_backward(&[scalar], inputs, false, false)?)
}

impl Glam {
    /// The computations of a model on `device`.
    ///
    /// # Errors
    /// When the device cannot hold even the position tables.
    pub fn new(
        architecture: &Architecture,
        training: &TrainingOptions,
        seed: u64,
        device: Device,
    ) -> Result<Self> {
        let kind = if device.is_cuda() { Kind::BFloat16 } else { Kind::Float };
        Self::with_kind(architecture, training, seed, device, kind)
    }

    /// As [`Glam::new`], with activations of a given kind.
    ///
    /// # Errors
    /// As [`Glam::new`].
    pub fn with_kind(
        architecture: &Architecture,
        training: &TrainingOptions,
        seed: u64,
        device: Device,
        kind: Kind,
    ) -> Result<Self> {
        let positions = Mutex::new(Positions::new(architecture, training.sequence_length, device)?);
        Ok(Self {
            architecture: architecture.clone(),
            training: training.clone(),
            seed,
            device,
            kind,
            positions,
        })
    }

    fn positions(&self) -> Positions {
        self.positions.lock().unwrap_or_else(std::sync::PoisonError::into_inner).shallow_clone()
    }

    /// A lane's input or target ids: `[tokens]`, i64, from rows of `sequence_length + 1`.
    fn ids(&self, tokens: &[u32], shift: usize) -> Result<Tensor> {
        let length = self.training.sequence_length;
        if !tokens.len().is_multiple_of(length + 1) || tokens.is_empty() {
            return Err(Error::Input(format!("{} tokens are no rows of {}", tokens.len(), length + 1)));
        }
        if let Some(id) = tokens.iter().find(|&&id| id as usize >= self.architecture.vocabulary) {
            let vocabulary = self.architecture.vocabulary;
            return Err(Error::Input(format!(
                "token {id} is outside the model's vocabulary of {vocabulary}"
            )));
        }
        let ids: Vec<i64> = tokens
            .chunks_exact(length + 1)
            .flat_map(|row| row[shift..shift + length].iter().map(|&t| t.into()))
            .collect();
        Ok(Tensor::f_from_slice(&ids)?.f_to_device(self.device)?)
    }

    fn index(&self, indices: &[i64]) -> Result<Tensor> {
        Ok(Tensor::f_from_slice(indices)?.f_to_device(self.device)?)
    }

    fn leaf(&self, x: &Tensor, train: bool) -> Result<Tensor> {
        Ok(x.f_detach()?.f_set_requires_grad(train)?)
    }

    /// For each choice the rows of `stacked` (in expert order) back in the order of tokens; zero where dropped.
    fn by_token(&self, dispatch: &Dispatch, stacked: Tensor) -> Result<Vec<Tensor>> {
        let kept = stacked.size()[0];
        let complete = dispatch.rows.iter().flatten().all(|&row| row >= 0);
        let source = if complete {
            stacked
        } else {
            let zero = stacked.f_new_zeros([1, stacked.size()[1]], (stacked.f_kind()?, self.device))?;
            Tensor::f_cat(&[stacked, zero], 0)?
        };
        let select = |rows: &Vec<i64>| {
            let rows: Vec<i64> = rows.iter().map(|&row| if row < 0 { kept } else { row }).collect();
            Ok(source.f_index_select(0, &self.index(&rows)?)?)
        };
        dispatch.rows.iter().map(select).collect()
    }

    fn dense_forward(&self, layer: u16, p: &[Tensor], x: &Tensor) -> Result<Tensor> {
        let [norm, qkv, output, position, rest @ ..] = p else { return Err(misuse("dense")) };
        let attended =
            Attention { norm, qkv, output, position }.forward(&self.architecture, &self.positions(), x)?;
        match rest {
            [norm, gate, up, down] => FeedForward { norm, gate, up, down }.forward(&attended),
            _ if self.architecture.is_moe(layer.into()) => Ok(attended),
            _ => Err(misuse("dense")),
        }
    }

    fn loss_inner(
        &self,
        p: &Params,
        x: &Tensor,
        tokens: &[u32],
        train: bool,
    ) -> Result<(f64, Option<(Tensor, Gradient)>)> {
        let x = self.leaf(x, train)?;
        let leaves = p.leaves(train)?;
        let logits = layers::logits(&x, &leaves[0], &leaves[1])?;
        let loss = layers::cross_entropy(&logits, &self.ids(tokens, 1)?)?;
        let value = loss.f_double_value(&[])?;
        if !train {
            return Ok((value, None));
        }
        let mut all = gradients(&loss, &[&x, &leaves[0], &leaves[1]])?;
        let dx = all.remove(0);
        Ok((value, Some((dx, Gradient(all)))))
    }

    fn gate_inner(
        &self,
        layer: u16,
        p: &Params,
        x: &Tensor,
        at: (Step, Lane),
        train: bool,
    ) -> Result<Gated<Self>> {
        let x = self.leaf(x, train)?;
        let leaves = p.leaves(train)?;
        let gate = Gate::forward(&x, &leaves[0], &leaves[1])?;
        let tokens = x.size()[0] as usize;
        let column =
            |k: i64| -> Result<Vec<i64>> { Ok(Vec::try_from(gate.experts.f_select(1, k)?.f_contiguous()?)?) };
        let (first, mut second) = (column(0)?, column(1)?);
        if self.architecture.second_expert == SecondExpert::Random {
            let weights: Vec<f32> = Vec::try_from(gate.weights.f_detach()?.f_select(1, 1)?.f_contiguous()?)?;
            let path = [at.0, at.1.into(), layer.into()];
            let mut stream = Stream::new(self.seed, Purpose::SecondExpert, &path);
            for (choice, weight) in second.iter_mut().zip(weights) {
                if stream.next_f64() >= 2.0 * f64::from(weight) {
                    *choice = -1;
                }
            }
        }
        debug_assert_eq!(first.len(), tokens);
        let dispatch =
            Dispatch::new([&first, &second], self.architecture.experts, self.architecture.capacity);
        let rows = gate.normed.f_detach()?.f_index_select(0, &self.index(&dispatch.tokens)?)?;
        let aux_loss = gate.aux_loss.f_double_value(&[])?;
        let penalty = gate
            .aux_loss
            .f_mul_scalar(self.training.aux_loss)?
            .f_add(&gate.z_loss.f_mul_scalar(self.training.z_loss)?)?;
        let saved = SavedGate {
            x,
            leaves,
            normed: gate.normed,
            weights: gate.weights,
            penalty,
            outputs: Vec::new(),
            d_weights: None,
            residual: None,
            train,
        };
        Ok(Gated { dispatch, rows, saved: Saved::Gate(Box::new(saved)), aux_loss })
    }

    fn combine_inner(&self, d: &Dispatch, saved: Saved, outputs: &[Tensor]) -> Result<(Tensor, Saved)> {
        let Saved::Gate(mut gate) = saved else { return Err(misuse("combine")) };
        let chosen = self.by_token(d, Tensor::f_cat(outputs, 0)?)?;
        let weights = gate.weights.f_detach()?.f_to_kind(self.kind)?;
        let mut y = gate.x.f_detach()?;
        for (k, output) in chosen.iter().enumerate() {
            y = y.f_add(&output.f_mul(&weights.f_narrow(1, k as i64, 1)?)?)?;
        }
        if gate.train {
            gate.outputs = chosen;
            return Ok((y, Saved::Gate(gate)));
        }
        Ok((y, Saved::None))
    }

    fn combine_backward_inner(&self, d: &Dispatch, saved: Saved, dy: Tensor) -> Result<(Tensor, Saved)> {
        let Saved::Gate(mut gate) = saved else { return Err(misuse("combine_backward")) };
        let weights = gate.weights.f_detach()?.f_to_kind(self.kind)?;
        let (mut by_choice, mut d_weights) = (Vec::new(), Vec::new());
        for (k, output) in std::mem::take(&mut gate.outputs).iter().enumerate() {
            by_choice.push(dy.f_mul(&weights.f_narrow(1, k as i64, 1)?)?);
            let product = dy.f_mul(output)?.f_to_kind(Kind::Float)?;
            d_weights.push(product.f_sum_dim_intlist([-1i64].as_slice(), true, Kind::Float)?);
        }
        let tokens = d.rows[0].len();
        let mut order = vec![0i64; d.tokens.len()];
        for (k, rows) in d.rows.iter().enumerate() {
            for (token, &row) in rows.iter().enumerate().filter(|(_, row)| **row >= 0) {
                order[row as usize] = (k * tokens + token) as i64;
            }
        }
        let rows = Tensor::f_cat(&by_choice, 0)?.f_index_select(0, &self.index(&order)?)?;
        gate.d_weights = Some(Tensor::f_cat(&d_weights, 1)?);
        gate.residual = Some(dy);
        Ok((rows, Saved::Gate(gate)))
    }

    fn gate_backward_inner(
        &self,
        d: &Dispatch,
        saved: Saved,
        inputs: &[Tensor],
    ) -> Result<(Tensor, Gradient)> {
        let Saved::Gate(gate) = saved else { return Err(misuse("gate_backward")) };
        let (Some(d_weights), Some(residual)) = (gate.d_weights, gate.residual) else {
            return Err(misuse("gate_backward"));
        };
        let [first, second] =
            self.by_token(d, Tensor::f_cat(inputs, 0)?)?.try_into().map_err(|_| misuse("gate_backward"))?;
        let scalar = gate
            .normed
            .f_mul(&first.f_add(&second)?)?
            .f_sum(Kind::Float)?
            .f_add(&gate.weights.f_mul(&d_weights)?.f_sum(Kind::Float)?)?
            .f_add(&gate.penalty)?;
        let mut all = gradients(&scalar, &[&gate.x, &gate.leaves[0], &gate.leaves[1]])?;
        let dx = all.remove(0).f_add(&residual)?;
        Ok((dx, Gradient(all)))
    }

    fn expert_inner(&self, p: &Params, x: Tensor, train: bool) -> Result<(Tensor, Saved)> {
        let h = layers::project(&x, &p.0[0])?;
        let a = layers::activate(self.architecture.activation, &h)?;
        let y = layers::project(&a, &p.0[1])?;
        Ok((y, if train { Saved::Expert { x, h, a, dy: None } } else { Saved::None }))
    }

    fn expert_backward_inner(&self, p: &Params, saved: Saved, dy: Tensor) -> Result<(Tensor, Saved)> {
        let Saved::Expert { x, h, a, .. } = saved else { return Err(misuse("expert_backward")) };
        let transposed = |m: &Tensor| -> Result<Tensor> { Ok(m.f_to_kind(self.kind)?.f_transpose(0, 1)?) };
        let da = dy.f_matmul(&transposed(&p.0[1])?)?;
        let dh = layers::activate_backward(self.architecture.activation, &h, &da)?;
        let dx = dh.f_matmul(&transposed(&p.0[0])?)?;
        Ok((dx, Saved::Expert { x, h: dh, a, dy: Some(dy) }))
    }

    fn expert_gradient_inner(lanes: Vec<Saved>) -> Result<Option<Gradient>> {
        let (mut xs, mut hs, mut activated, mut ys) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for lane in lanes {
            let Saved::Expert { x, h, a, dy: Some(dy) } = lane else { return Err(misuse("expert_gradient")) };
            if x.size()[0] > 0 {
                xs.push(x);
                hs.push(h);
                activated.push(a);
                ys.push(dy);
            }
        }
        if xs.is_empty() {
            return Ok(None);
        }
        let product = |left: &[Tensor], right: &[Tensor]| -> Result<Tensor> {
            let left = Tensor::f_cat(left, 0)?.f_transpose(0, 1)?;
            Ok(left.f_matmul(&Tensor::f_cat(right, 0)?)?.f_to_kind(Kind::Float)?)
        };
        Ok(Some(Gradient(vec![product(&xs, &hs)?, product(&activated, &ys)?])))
    }

    fn apply_inner(
        &self,
        state: &mut Shard,
        gradient: Option<Gradient>,
        step: Step,
        update: Update,
    ) -> Result<()> {
        if !update.apply {
            return Ok(());
        }
        let mut given = gradient.map(|g| g.0.into_iter());
        for slot in &mut state.slots {
            let gradient = match given.as_mut().map(Iterator::next) {
                Some(Some(mut gradient)) => gradient.f_mul_scalar_(update.scale)?,
                Some(None) => return Err(Error::Input("a gradient has too few tensors".into())),
                // An expert that no token met in the whole step: its gradient is zero.
                None => slot.weight.f_zeros_like()?,
            };
            optimizer::update(&self.training.optimizer, slot, gradient, step, update.rate)?;
        }
        Ok(())
    }
}

impl Compute for Glam {
    type Tensor = Tensor;
    type Shard = Shard;
    type Params = Params;
    type Saved = Saved;
    type Gradient = Gradient;

    fn initial(&self, shard: ShardId) -> Computed<Shard> {
        Ok(Shard::initial(&self.architecture, &self.training.optimizer, self.seed, shard, self.device)?)
    }

    fn load(&self, shard: ShardId, bytes: &[u8]) -> Computed<Shard> {
        Ok(Shard::load(&self.architecture, &self.training.optimizer, shard, bytes, self.device)?)
    }

    fn store(&self, shard: ShardId, version: Step, state: &Shard) -> Computed<Vec<u8>> {
        Ok(state.store(shard, version)?)
    }

    fn params(&self, state: &Shard) -> Params {
        Params(state.slots.iter().map(|slot| slot.weight.shallow_clone()).collect())
    }

    fn embed(&self, params: Params, tokens: &[u32]) -> Computed<Tensor> {
        Ok(layers::embed(&params.0[0], &self.ids(tokens, 0)?, self.kind)?)
    }

    fn loss(
        &self,
        params: Params,
        x: Tensor,
        tokens: &[u32],
        train: bool,
    ) -> Computed<(f64, Option<(Tensor, Gradient)>)> {
        Ok(self.loss_inner(&params, &x, tokens, train)?)
    }

    fn embed_backward(&self, gradient: Gradient, dx: Tensor, tokens: &[u32]) -> Computed<Gradient> {
        let inner = || -> Result<Gradient> {
            let scale = (self.architecture.hidden as f64).sqrt();
            let dx = dx.f_to_kind(Kind::Float)?.f_mul_scalar(scale)?;
            let vocabulary = self.architecture.vocabulary as i64;
            let ids = self.ids(tokens, 0)?;
            let input = Tensor::f_embedding_dense_backward(&dx, &ids, vocabulary, -1, false)?;
            let mut parts: Vec<Tensor> = gradient.0.iter().map(Tensor::shallow_clone).collect();
            let _ = parts[0].f_add_(&input)?;
            Ok(Gradient(parts))
        };
        Ok(inner()?)
    }

    fn dense(&self, layer: u16, params: Params, x: Tensor, train: bool) -> Computed<(Tensor, Saved)> {
        let inner = || -> Result<_> {
            if !train {
                return Ok((tch::no_grad(|| self.dense_forward(layer, &params.0, &x))?, Saved::None));
            }
            let x = self.leaf(&x, true)?;
            let leaves = params.leaves(true)?;
            let y = self.dense_forward(layer, &leaves, &x)?;
            Ok((y.f_detach()?, Saved::Segment { x, leaves, y }))
        };
        Ok(inner()?)
    }

    fn dense_backward(&self, saved: Saved, dy: Tensor) -> Computed<(Tensor, Gradient)> {
        let inner = || -> Result<_> {
            let Saved::Segment { x, leaves, y } = saved else { return Err(misuse("dense_backward")) };
            let inputs: Vec<&Tensor> = std::iter::once(&x).chain(&leaves).collect();
            let mut all = gradients(&y.f_mul(&dy)?.f_sum(Kind::Float)?, &inputs)?;
            let dx = all.remove(0);
            Ok((dx, Gradient(all)))
        };
        Ok(inner()?)
    }

    fn gate(
        &self,
        layer: u16,
        params: Params,
        x: Tensor,
        at: (Step, Lane),
        train: bool,
    ) -> Computed<Gated<Self>> {
        Ok(self.gate_inner(layer, &params, &x, at, train)?)
    }

    fn combine(&self, dispatch: &Dispatch, saved: Saved, outputs: Vec<Tensor>) -> Computed<(Tensor, Saved)> {
        Ok(tch::no_grad(|| self.combine_inner(dispatch, saved, &outputs))?)
    }

    fn combine_backward(&self, dispatch: &Dispatch, saved: Saved, dy: Tensor) -> Computed<(Tensor, Saved)> {
        Ok(tch::no_grad(|| self.combine_backward_inner(dispatch, saved, dy))?)
    }

    fn gate_backward(
        &self,
        dispatch: &Dispatch,
        saved: Saved,
        inputs: Vec<Tensor>,
    ) -> Computed<(Tensor, Gradient)> {
        Ok(self.gate_backward_inner(dispatch, saved, &inputs)?)
    }

    fn expert(&self, params: Params, x: Tensor, train: bool) -> Computed<(Tensor, Saved)> {
        Ok(tch::no_grad(|| self.expert_inner(&params, x, train))?)
    }

    fn expert_backward(&self, params: Params, saved: Saved, dy: Tensor) -> Computed<(Tensor, Saved)> {
        Ok(tch::no_grad(|| self.expert_backward_inner(&params, saved, dy))?)
    }

    fn expert_gradient(&self, lanes: Vec<Saved>) -> Computed<Option<Gradient>> {
        Ok(tch::no_grad(|| Self::expert_gradient_inner(lanes))?)
    }

    fn add(&self, left: Gradient, right: Gradient) -> Computed<Gradient> {
        let add = |(mut l, r): (Tensor, Tensor)| -> Result<Tensor> { Ok(l.f_add_(&r)?) };
        if left.0.len() != right.0.len() {
            return Err(Error::Input("two gradients of unlike shards were added".into()).into());
        }
        Ok(tch::no_grad(|| left.0.into_iter().zip(right.0).map(add).collect::<Result<_>>().map(Gradient))?)
    }

    fn norm(&self, gradient: &Gradient) -> Computed<Norm> {
        let mut squared = 0.0;
        for tensor in &gradient.0 {
            let square =
                || -> Result<f64> { Ok(tensor.f_square()?.f_sum(Kind::Double)?.f_double_value(&[])?) };
            squared += tch::no_grad(square)?;
        }
        Ok(Norm { squared, finite: f64::is_finite(squared) })
    }

    fn apply(
        &self,
        _shard: ShardId,
        state: &mut Shard,
        gradient: Option<Gradient>,
        step: Step,
        update: Update,
    ) -> Computed<()> {
        Ok(tch::no_grad(|| self.apply_inner(state, gradient, step, update))?)
    }

    fn rows(&self, x: &Tensor, start: usize, length: usize) -> Computed<Tensor> {
        Ok(x.f_narrow(0, start as i64, length as i64).map_err(Error::from)?)
    }

    fn concatenate(&self, parts: Vec<Tensor>) -> Computed<Tensor> {
        Ok(Tensor::f_cat(&parts, 0).map_err(Error::from)?)
    }

    fn export(&self, x: &Tensor) -> Computed<HostTensor> {
        Ok(crate::host::export(x)?)
    }

    fn import(&self, dtype: HostDtype, shape: &[usize], data: &[u8]) -> Computed<Tensor> {
        Ok(crate::host::import(dtype, shape, data, self.device)?)
    }

    fn export_gradient(&self, gradient: &Gradient) -> Computed<Vec<HostTensor>> {
        gradient.0.iter().map(|tensor| self.export(tensor)).collect()
    }

    fn import_gradient(
        &self,
        shard: ShardId,
        parts: &[(HostDtype, Vec<usize>, &[u8])],
    ) -> Computed<Gradient> {
        let expected = parameters(&self.architecture, shard);
        if expected.len() != parts.len() {
            return Err(
                Error::Input(format!("a gradient of {shard} came with {} tensors", parts.len())).into()
            );
        }
        let convert = |(parameter, (dtype, shape, data)): (
            &crate::weights::Parameter,
            &(HostDtype, Vec<usize>, &[u8]),
        )| {
            let same = parameter.shape.iter().map(|&n| n as usize).eq(shape.iter().copied());
            if !same || *dtype != HostDtype::F32 {
                let (name, wanted) = (parameter.name, &parameter.shape);
                return Err(Error::Input(format!(
                    "a gradient of {shard} came with {name} as {shape:?}, not {wanted:?}"
                )));
            }
            crate::host::import(*dtype, shape, data, self.device)
        };
        Ok(Gradient(expected.iter().zip(parts).map(convert).collect::<Result<_>>()?))
    }
}

impl Glam {
    /// The bytes of every tensor of a gradient, for comparisons to the bit.
    ///
    /// # Errors
    /// When libtorch cannot copy them.
    pub fn gradient_bytes(gradient: &Gradient) -> Result<Vec<Vec<u8>>> {
        gradient.0.iter().map(host_bytes).collect()
    }
}
