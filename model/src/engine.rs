//! [`Glam`]: the computations of a GLaM model on one device, for the actors.
//!
//! Dense layers and gates keep a piece of autograd graph between their forward and backward calls, from a detached
//! input to the output. Experts are differentiated by hand: the gradient of the input goes back at once, the weights'
//! is one product over a group of lanes when they have all come.

mod compute;
mod moe;

use crate::error::{Error, Result};
use crate::layers::{self, Attention, FeedForward, Positions};
use crate::optimizer;
pub use crate::weights::Shard;
use crate::weights::host_bytes;
use std::sync::Mutex;
use tch::{Device, Kind, Tensor};
use volary_core::architecture::Architecture;
use volary_core::options::TrainingOptions;
use volary_core::schedule::Update;
use volary_core::{LayerId, Step};

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
    pub(super) fn leaves(&self, train: bool) -> Result<Vec<Tensor>> {
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

    pub(super) fn positions(&self) -> Positions {
        self.positions.lock().unwrap_or_else(std::sync::PoisonError::into_inner).shallow_clone()
    }

    /// A lane's input or target ids: `[tokens]`, i64, from rows of `sequence_length + 1`.
    pub(super) fn ids(&self, tokens: &[u32], shift: usize) -> Result<Tensor> {
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

    pub(super) fn index(&self, indices: &[i64]) -> Result<Tensor> {
        Ok(Tensor::f_from_slice(indices)?.f_to_device(self.device)?)
    }

    pub(super) fn leaf(&self, x: &Tensor, train: bool) -> Result<Tensor> {
        Ok(x.f_detach()?.f_set_requires_grad(train)?)
    }

    pub(super) fn dense_forward(&self, layer: LayerId, p: &[Tensor], x: &Tensor) -> Result<Tensor> {
        let [norm, qkv, output, position, rest @ ..] = p else { return Err(misuse("dense")) };
        let attended =
            Attention { norm, qkv, output, position }.forward(&self.architecture, &self.positions(), x)?;
        match rest {
            [norm, gate, up, down] => FeedForward { norm, gate, up, down }.forward(&attended),
            _ if self.architecture.is_moe(layer) => Ok(attended),
            _ => Err(misuse("dense")),
        }
    }

    pub(super) fn loss_inner(
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

    pub(super) fn apply_inner(
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

impl Glam {
    /// The bytes of every tensor of a gradient, for comparisons to the bit.
    ///
    /// # Errors
    /// When libtorch cannot copy them.
    pub fn gradient_bytes(gradient: &Gradient) -> Result<Vec<Vec<u8>>> {
        gradient.0.iter().map(host_bytes).collect()
    }
}
