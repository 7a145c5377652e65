//! The whole model in one process and one autograd graph, which the actors must equal.
//!
//! It shares only the functions of the layers with the actors' engine: experts are selected with masks and
//! added back by index, gradients come from autograd, and there are no messages.

mod routing;

use crate::error::{Error, Result};
use crate::layers::{self, Attention, Gate, Positions, expert};
use crate::optimizer;
use crate::weights::Shard;
use routing::Routing;
use std::collections::BTreeMap;
use std::error::Error as StdError;
use tch::{Device, Kind, Tensor};
use volary_core::architecture::{Architecture, Family};
use volary_core::options::TrainingOptions;
use volary_core::update::{Moments, Update};
use volary_core::{Lane, LayerId, ShardId, Step};

/// A whole model on one device.
///
/// ```no_run
/// use volary_core::Step;
/// use volary_core::architecture::presets;
/// use volary_core::options::TrainingOptions;
/// use volary_model::device;
/// use volary_model::reference::Reference;
///
/// let (architecture, training) = (&presets()[0].architecture, TrainingOptions::new(100));
/// let mut model = Reference::initial(architecture, &training, 7, device::parse("cpu")?)?;
/// let lane = vec![1; training.sequences_per_lane * (training.sequence_length + 1)];
/// let loss = model.step(&[lane], Step(1))?;
/// let logits = model.logits(&[1, 2, 3])?;
/// # drop((loss, logits));
/// # Ok::<(), volary_model::Error>(())
/// ```
#[derive(Debug)]
pub struct Reference {
    architecture: Architecture,
    training: TrainingOptions,
    seed: u64,
    device: Device,
    shards: BTreeMap<ShardId, Shard>,
}

/// The result of one pass over a lane.
#[derive(Debug)]
pub struct Outcome {
    /// Mean cross-entropy, in nats per token.
    pub loss: f64,
    /// Mean over MoE layers of the load-balancing loss (GShard, section 2.2).
    pub aux_loss: f64,
    /// The gradients of every shard: a tensor per parameter, f32, in the order of the parameters. Empty
    /// without `train`.
    pub gradients: BTreeMap<ShardId, Vec<Tensor>>,
}

impl Outcome {
    /// The values of the gradients, row-major.
    ///
    /// # Errors
    /// [`Error::Torch`] when libtorch cannot copy them to the host.
    pub fn gradient_values(&self) -> Result<BTreeMap<ShardId, Vec<Vec<f32>>>> {
        let values = |t: &Tensor| -> Result<Vec<f32>> {
            Ok(Vec::try_from(t.f_to_device(Device::Cpu)?.f_flatten(0, -1)?)?)
        };
        self.gradients
            .iter()
            .map(|(&id, list)| Ok((id, list.iter().map(values).collect::<Result<_>>()?)))
            .collect()
    }
}

type Leaves = BTreeMap<ShardId, Vec<Tensor>>;

impl Reference {
    /// The model before its first step, from the run's seed.
    ///
    /// # Errors
    /// [`Error::Torch`] when the device has no memory for it.
    pub fn initial(
        architecture: &Architecture,
        training: &TrainingOptions,
        seed: u64,
        device: Device,
    ) -> Result<Self> {
        let shard = |id| Ok((id, Shard::initial(architecture, &training.optimizer, seed, id, device)?));
        let shards = architecture.shards().into_iter().map(shard).collect::<Result<_>>()?;
        Ok(Self { architecture: architecture.clone(), training: training.clone(), seed, device, shards })
    }

    /// The model from the stored form of its shards, which `fetch` reads. `seed` is that of the run.
    ///
    /// # Errors
    /// [`Error::Fetch`] with an error of `fetch`; [`Error::Stored`] or [`Error::SafeTensors`] when a shard
    /// does not fit the model.
    pub fn load<E: Into<Box<dyn StdError + Send + Sync>>>(
        architecture: &Architecture,
        training: &TrainingOptions,
        seed: u64,
        device: Device,
        mut fetch: impl FnMut(ShardId) -> std::result::Result<Vec<u8>, E>,
    ) -> Result<Self> {
        let shard = |id| {
            let bytes = fetch(id).map_err(|error| Error::Fetch { shard: id, source: error.into() })?;
            Ok((id, Shard::load(architecture, &training.optimizer, id, &bytes, device)?))
        };
        let shards = architecture.shards().into_iter().map(shard).collect::<Result<_>>()?;
        Ok(Self { architecture: architecture.clone(), training: training.clone(), seed, device, shards })
    }

    fn leaves(&self, train: bool) -> Result<Leaves> {
        let leaf = |t: &Tensor| -> Result<Tensor> { Ok(t.f_detach()?.f_set_requires_grad(train)?) };
        let of =
            |shard: &Shard| shard.slots.iter().map(|slot| leaf(&slot.weight)).collect::<Result<Vec<_>>>();
        self.shards.iter().map(|(&id, shard)| Ok((id, of(shard)?))).collect()
    }

    /// The residual stream after the last layer, `[tokens, hidden]`, and the gates. `ids` are `[tokens]`,
    /// i64, in sequences of `length`.
    fn forward(
        &self,
        leaves: &Leaves,
        ids: &Tensor,
        length: usize,
        routing: Routing,
    ) -> Result<(Tensor, Vec<Gate>)> {
        let a = &self.architecture;
        let positions = Positions::new(a, length, self.device)?;
        let mut x = layers::embed(a, &leaves[&ShardId::Embedding][0], ids, Kind::Float)?;
        let mut gates = Vec::new();
        for layer in a.layer_range().iter() {
            let p = &leaves[&ShardId::Dense { layer }];
            let (attention, rest) = Attention::of(a, p)?;
            x = attention.forward(a, &positions, &x)?;
            if a.is_moe(layer) {
                let (y, gate) = self.mixture(leaves, layer, &x, routing)?;
                x = y;
                gates.push(gate);
            } else {
                x = layers::feed_forward(a.family, rest, &x)?;
            }
        }
        Ok((x, gates))
    }

    /// An MoE layer: each expert on its tokens, with the residual; `[tokens, hidden]` to `[tokens, hidden]`.
    fn mixture(
        &self,
        leaves: &Leaves,
        layer: LayerId,
        x: &Tensor,
        routing: Routing,
    ) -> Result<(Tensor, Gate)> {
        let a = &self.architecture;
        let router = &leaves[&ShardId::Router { layer }];
        let gate = Gate::forward(a.family, x, &router[0], &router[1])?;
        let kept = routing.kept(a, layer, &gate)?;
        let is_kept = kept.f_gt(0.0)?;
        let mut y = x.shallow_clone();
        for expert in a.expert_ids() {
            let p = &leaves[&ShardId::Expert { layer, expert }];
            let chosen = gate.experts.f_eq(i64::from(expert.0))?.f_logical_and(&is_kept)?;
            let tokens = chosen.f_any_dim(1, false)?.f_nonzero()?.f_squeeze_dim(1)?;
            if tokens.size()[0] == 0 {
                continue;
            }
            let weight = gate.weights.f_mul(&chosen.f_to_kind(Kind::Float)?)?;
            let weight =
                weight.f_sum_dim_intlist([1i64].as_slice(), true, Kind::Float)?.f_index_select(0, &tokens)?;
            let rows = gate.normed.f_index_select(0, &tokens)?;
            let output = expert::forward(a, p, &rows)?.y;
            y = y.f_index_add(0, &tokens, &output.f_mul(&weight)?)?;
        }
        Ok((y, gate))
    }

    /// The loss and, with `train`, the gradients of one lane of a step. `tokens` are
    /// `[sequences, sequence_length + 1]`, row by row.
    ///
    /// # Errors
    /// [`Error::Torch`] when libtorch fails.
    pub fn lane(&self, tokens: &[u32], (step, lane): (Step, Lane), train: bool) -> Result<Outcome> {
        let length = self.training.sequence_length;
        let leaves = self.leaves(train)?;
        let ids = |shift: usize| -> Result<Tensor> {
            let rows = tokens.chunks_exact(length + 1);
            let ids: Vec<i64> =
                rows.flat_map(|row| row[shift..shift + length].iter().map(|&t| t.into())).collect();
            Ok(Tensor::f_from_slice(&ids)?.f_to_device(self.device)?)
        };
        let routing = Routing::Lane { seed: self.seed, step, lane };
        let (x, gates) = self.forward(&leaves, &ids(0)?, length, routing)?;
        let embedding = &leaves[&ShardId::Embedding];
        let cross_entropy = layers::cross_entropy(&self.output(embedding, &x)?, &ids(1)?)?;
        let mut total = cross_entropy.shallow_clone();
        let mut aux_loss = 0.0;
        for gate in &gates {
            aux_loss += gate.aux_loss.f_double_value(&[])? / gates.len() as f64;
            total = total.f_add(&gate.z_loss.f_mul_scalar(self.training.z_loss)?)?;
        }
        if let Some(balance) = self.balance(&gates)? {
            total = total.f_add(&balance.f_mul_scalar(self.training.aux_loss)?)?;
        }
        let loss = cross_entropy.f_double_value(&[])?;
        let gradients = if train { Self::backward(&total, &leaves)? } else { BTreeMap::new() };
        Ok(Outcome { loss, aux_loss, gradients })
    }

    /// The load-balancing loss: in GLaM the sum over layers, in Qwen3 that of all layers' tokens together.
    fn balance(&self, gates: &[Gate]) -> Result<Option<Tensor>> {
        if gates.is_empty() {
            return Ok(None);
        }
        let of_layers = |of: fn(&Gate) -> &Tensor| gates.iter().map(of).collect::<Vec<_>>();
        Ok(Some(match self.architecture.family {
            Family::Glam => Tensor::f_stack(&of_layers(|gate| &gate.aux_loss), 0)?.f_sum(Kind::Float)?,
            Family::Qwen3Moe => {
                let experts = self.architecture.experts as i64;
                let chosen = Tensor::f_cat(&of_layers(|gate| &gate.experts), 0)?.f_one_hot(experts)?;
                let share =
                    chosen.f_to_kind(Kind::Float)?.f_mean_dim([0i64].as_slice(), false, Kind::Float)?;
                let share = share.f_sum_dim_intlist([0i64].as_slice(), false, Kind::Float)?;
                let all = Tensor::f_cat(&of_layers(|gate| &gate.probabilities), 0)?;
                let mean = all.f_mean_dim([0i64].as_slice(), false, Kind::Float)?;
                share.f_mul(&mean)?.f_sum(Kind::Float)?.f_mul_scalar(experts as f64)?
            }
        }))
    }

    /// The logits, `[tokens, vocabulary]`, of the residual stream.
    fn output(&self, embedding: &[Tensor], x: &Tensor) -> Result<Tensor> {
        layers::logits(x, &embedding[layers::output_place(&self.architecture)], &embedding[1])
    }

    fn backward(total: &Tensor, leaves: &Leaves) -> Result<BTreeMap<ShardId, Vec<Tensor>>> {
        // Through `.grad`, since an expert without tokens is not part of the graph.
        total.f_backward()?;
        let of = |leaf: &Tensor| -> Result<Tensor> {
            let grad = leaf.f_grad()?;
            Ok(if grad.defined() { grad } else { leaf.f_zeros_like()?.f_detach()? })
        };
        leaves.iter().map(|(&id, list)| Ok((id, list.iter().map(of).collect::<Result<_>>()?))).collect()
    }

    /// A plain training step: the lanes in sequence, their mean gradient, one update. Returns the mean loss,
    /// in nats per token.
    ///
    /// # Errors
    /// As [`Reference::lane`].
    pub fn step(&mut self, lanes: &[Vec<u32>], step: Step) -> Result<f64> {
        let mut sums: BTreeMap<ShardId, Vec<Tensor>> = BTreeMap::new();
        let mut loss = 0.0;
        for (tokens, lane) in lanes.iter().zip(Lane::first(lanes.len() as u32)) {
            let outcome = self.lane(tokens, (step, lane), true)?;
            loss += outcome.loss / lanes.len() as f64;
            for (id, gradients) in outcome.gradients {
                match sums.entry(id) {
                    std::collections::btree_map::Entry::Vacant(entry) => {
                        entry.insert(gradients);
                    }
                    std::collections::btree_map::Entry::Occupied(mut entry) => {
                        for (sum, gradient) in entry.get_mut().iter_mut().zip(gradients) {
                            let _ = sum.f_add_(&gradient)?;
                        }
                    }
                }
            }
        }
        let Self { training, .. } = self;
        let update = Update {
            apply: true,
            rate: training.schedule.rate(step, training.steps),
            scale: 1.0 / lanes.len() as f64,
            moments: Moments::at(&training.optimizer, step),
        };
        tch::no_grad(|| -> Result<()> {
            for (id, gradients) in sums {
                let Some(shard) = self.shards.get_mut(&id) else { continue };
                for (slot, mut gradient) in shard.slots.iter_mut().zip(gradients) {
                    let gradient = gradient.f_mul_scalar_(update.scale)?;
                    optimizer::update(&self.training.optimizer, slot, &gradient, &update)?;
                }
            }
            Ok(())
        })?;
        Ok(loss)
    }

    /// The logits after every token of a sequence of any length, `[tokens, vocabulary]`. Neither capacity nor
    /// the random second expert applies, as in generation.
    ///
    /// # Errors
    /// [`Error::EmptyPrompt`], or [`Error::Torch`] when libtorch fails.
    pub fn logits(&self, tokens: &[u32]) -> Result<Vec<Vec<f32>>> {
        if tokens.is_empty() {
            return Err(Error::EmptyPrompt);
        }
        let ids: Vec<i64> = tokens.iter().map(|&t| t.into()).collect();
        let input = Tensor::f_from_slice(&ids)?.f_to_device(self.device)?;
        let leaves = self.leaves(false)?;
        let logits = tch::no_grad(|| -> Result<Tensor> {
            let (x, _) = self.forward(&leaves, &input, ids.len(), Routing::Free)?;
            let embedding = &leaves[&ShardId::Embedding];
            self.output(embedding, &x)
        })?;
        Ok(Vec::try_from(logits.f_to_device(Device::Cpu)?)?)
    }
}
