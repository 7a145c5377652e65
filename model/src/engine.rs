//! [`Glam`]: the computations of a GLaM model (arXiv 2112.06905) on one device, for the actors.
//!
//! Dense layers and gates keep a segment of autograd graph between their forward and backward calls, from a
//! detached input to the output. Experts are differentiated by hand: the gradient of the input is returned at
//! once; that of the weights is one product over a group of lanes, as soon as all of them are complete.
//!
//! Shapes use the names of [`volary_core::compute`]: `tokens`, `hidden`, `rows`.

mod compute;
mod moe;

use crate::error::{Error, Result};
use crate::layers::{self, Attention, Positions};
use crate::optimizer;
pub use crate::weights::Shard;
use crate::weights::host_bytes;
use parking_lot::Mutex;
use tch::{Device, Kind, Tensor};
use volary_core::LayerId;
use volary_core::architecture::Architecture;
use volary_core::compute::LaneLoss;
use volary_core::options::TrainingOptions;
use volary_core::update::Update;

/// The computations of a GLaM model on one device; see [`Compute`](volary_core::compute::Compute) for the
/// methods.
///
/// ```no_run
/// use volary_core::architecture::presets;
/// use volary_core::compute::Compute;
/// use volary_core::options::TrainingOptions;
/// use volary_core::{LayerId, ShardId};
/// use volary_model::{Glam, device};
///
/// let (architecture, training) = (&presets()[0].architecture, TrainingOptions::new(100));
/// let glam = Glam::new(architecture, &training, 7, device::parse("auto")?)?;
/// let embedding = glam.initial(ShardId::Embedding)?;
/// let dense = glam.initial(ShardId::Dense { layer: LayerId(0) })?;
/// let tokens = vec![1; training.sequences_per_lane * (training.sequence_length + 1)];
/// let x = glam.embed(glam.params(&embedding), &tokens)?;
/// let (y, saved) = glam.dense(LayerId(0), glam.params(&dense), x, true)?;
/// assert_eq!(y.size(), [training.tokens_per_lane() as i64, architecture.hidden as i64]);
/// # drop(saved);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Glam {
    architecture: Architecture,
    training: TrainingOptions,
    seed: u64,
    device: Device,
    /// The kind of activations.
    kind: Kind,
    positions: Mutex<Positions>,
}

/// The state of a forward call for its backward call.
#[derive(Debug)]
pub enum Saved {
    /// Nothing, in validation.
    None,
    /// A segment of autograd graph of a dense layer.
    Segment {
        /// Detached input, `[tokens, hidden]`, activations.
        x: Tensor,
        /// Parameters as leaves of the graph, f32.
        leaves: Vec<Tensor>,
        /// Output, `[tokens, hidden]`, activations.
        y: Tensor,
    },
    /// A gate.
    Gate(Box<SavedGate>),
    /// An expert.
    Expert {
        /// Input, `[rows, hidden]`, activations.
        x: Tensor,
        /// Products with all matrices but the last, `[rows, expert_hidden]` each; after the backward call
        /// their gradients.
        h: Vec<Tensor>,
        /// What the last matrix is applied to, `[rows, expert_hidden]`.
        a: Tensor,
        /// Gradient of the output, `[rows, hidden]`, after the backward call.
        dy: Option<Tensor>,
    },
}

/// The state of a gate between its calls.
#[derive(Debug)]
pub struct SavedGate {
    /// Detached input, `[tokens, hidden]`, activations.
    x: Tensor,
    /// Parameters as leaves of the graph, f32.
    leaves: Vec<Tensor>,
    /// The normalized input, `[tokens, hidden]`, activations.
    normed: Tensor,
    /// The weights of both choices, `[tokens, 2]`, f32.
    weights: Tensor,
    /// The auxiliary losses with their coefficients, a scalar.
    penalty: Tensor,
    /// The means of the experts' probabilities, `[experts]`, f32, where the load of all layers is balanced
    /// together.
    mean: Option<Tensor>,
    /// The experts' outputs for each choice, `[tokens, hidden]`, activations.
    outputs: Vec<Tensor>,
    /// The gradient of `weights`, `[tokens, 2]`, f32.
    d_weights: Option<Tensor>,
    /// The gradient of the residual connection, `[tokens, hidden]`, activations.
    residual: Option<Tensor>,
    train: bool,
}

/// A gradient of one shard: a tensor per parameter, f32, in the order and shape of the parameters.
#[derive(Debug)]
pub struct Gradient(pub(crate) Vec<Tensor>);

/// A view of a shard's parameters, f32, which shares their memory.
#[derive(Debug)]
pub struct Params(pub(crate) Vec<Tensor>);

impl Params {
    /// Leaves of a new graph: concurrent lanes share the values only.
    pub(super) fn leaves(&self, train: bool) -> Result<Vec<Tensor>> {
        self.0.iter().map(|p| Ok(p.f_detach()?.f_set_requires_grad(train)?)).collect()
    }
}

/// The gradients of `scalar` with respect to `inputs`, in their order.
fn gradients(scalar: &Tensor, inputs: &[&Tensor]) -> Result<Vec<Tensor>> {
    Ok(Tensor::f_run_backward(&[scalar], inputs, false, false)?)
}

impl Glam {
    /// The computations of a model on `device`: activations are f32 on a CPU and bf16 on a GPU (GLaM, section
    /// 5.1). `seed` is that of the run.
    ///
    /// # Errors
    /// [`Error::Torch`] when the device has no memory for the position tables.
    pub fn new(
        architecture: &Architecture,
        training: &TrainingOptions,
        seed: u64,
        device: Device,
    ) -> Result<Self> {
        let kind = if device.is_cuda() { Kind::BFloat16 } else { Kind::Float };
        Self::with_kind(architecture, training, seed, device, kind)
    }

    /// As [`Glam::new`], with activations of `kind`.
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

    pub(super) fn positions(&self) -> Positions {
        self.positions.lock().shallow_clone()
    }

    /// A lane's input ids (`shift` 0) or target ids (`shift` 1): `[tokens]`, i64, from rows of
    /// `sequence_length + 1`.
    pub(super) fn ids(&self, tokens: &[u32], shift: usize) -> Result<Tensor> {
        let length = self.training.sequence_length;
        if !tokens.len().is_multiple_of(length + 1) || tokens.is_empty() {
            return Err(Error::TokenCount { row: length + 1, found: tokens.len() });
        }
        let vocabulary = self.architecture.vocabulary;
        if let Some(&id) = tokens.iter().find(|&&id| id as usize >= vocabulary) {
            return Err(Error::Vocabulary { id, vocabulary });
        }
        let ids: Vec<i64> = tokens
            .chunks_exact(length + 1)
            .flat_map(|row| row[shift..shift + length].iter().map(|&t| t.into()))
            .collect();
        Ok(Tensor::f_from_slice(&ids)?.f_to_device(self.device)?)
    }

    pub(super) fn index(&self, indices: &[i64]) -> Result<Tensor> {
        Ok(Tensor::f_from_slice(indices)?.f_to_device(self.device)?)
    }

    pub(super) fn leaf(&self, x: &Tensor, train: bool) -> Result<Tensor> {
        Ok(x.f_detach()?.f_set_requires_grad(train)?)
    }

    pub(super) fn dense_forward(&self, layer: LayerId, p: &[Tensor], x: &Tensor) -> Result<Tensor> {
        let a = &self.architecture;
        let (attention, rest) = Attention::of(a, p)?;
        let attended = attention.forward(a, &self.positions(), x)?;
        if a.is_moe(layer) { Ok(attended) } else { layers::feed_forward(a.family, rest, &attended) }
    }

    pub(super) fn loss_inner(
        &self,
        p: &Params,
        x: &Tensor,
        tokens: &[u32],
        train: bool,
    ) -> Result<(LaneLoss, Option<(Tensor, Gradient)>)> {
        let x = self.leaf(x, train)?;
        let leaves = p.leaves(train)?;
        let output = layers::output_place(&self.architecture);
        let logits = layers::logits(&x, &leaves[output], &leaves[1])?;
        let targets = self.ids(tokens, 1)?;
        let loss = layers::cross_entropy(&logits, &targets)?;
        let mean = loss.f_double_value(&[])?;
        if !train {
            let length = self.training.sequence_length as i64;
            let sequences = layers::sequence_cross_entropy(&logits, &targets, length)?;
            return Ok((LaneLoss { mean, sequences: Vec::try_from(sequences)? }, None));
        }
        let mut all = gradients(&loss, &[&x, &leaves[output], &leaves[1]])?;
        let dx = all.remove(0);
        if output > 0 {
            // The input's table has no part in the output.
            let of_output = std::mem::replace(&mut all[0], leaves[0].f_detach()?.f_zeros_like()?);
            all.push(of_output);
        }
        Ok((LaneLoss { mean, sequences: Vec::new() }, Some((dx, Gradient(all)))))
    }

    pub(super) fn apply_inner(
        &self,
        state: &mut Shard,
        gradient: Option<Gradient>,
        update: Update,
    ) -> Result<()> {
        if !update.apply {
            return Ok(());
        }
        let (expected, found) = (state.slots.len(), gradient.as_ref().map_or(0, |g| g.0.len()));
        let mut tensors = gradient.map(|g| g.0.into_iter());
        for slot in &mut state.slots {
            let gradient = match tensors.as_mut().map(Iterator::next) {
                Some(Some(mut gradient)) => gradient.f_mul_scalar_(update.scale)?,
                Some(None) => return Err(Error::GradientTensors { expected, found }),
                // The gradient of an expert without any token in the step is zero.
                None => slot.weight.f_zeros_like()?,
            };
            optimizer::update(&self.training.optimizer, slot, &gradient, &update)?;
        }
        Ok(())
    }
}

impl Glam {
    /// The bytes of every tensor of a gradient, row-major and little-endian, for bitwise comparisons.
    ///
    /// # Errors
    /// [`Error::Torch`] when libtorch cannot copy them to the host.
    pub fn gradient_bytes(gradient: &Gradient) -> Result<Vec<Vec<u8>>> {
        gradient.0.iter().map(host_bytes).collect()
    }
}
