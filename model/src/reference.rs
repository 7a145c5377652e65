//! The whole model in one process, in one autograd graph: what the actors must equal.
//!
//! It shares the layers' functions with the actors' engine and nothing else: experts are picked with masks and added
//! back by index, gradients are autograd's, there are no lanes in flight and no messages.

use crate::error::{Error, Result};
use crate::layers::{self, Attention, FeedForward, Gate, Positions};
use crate::optimizer;
use crate::weights::Shard;
use std::collections::BTreeMap;
use tch::{Device, Kind, Tensor};
use volary_core::architecture::{Architecture, SecondExpert};
use volary_core::dispatch::Capacity;
use volary_core::options::TrainingOptions;
use volary_core::random::{Purpose, Stream};
use volary_core::{LayerId, ShardId, Step};

/// A whole model on one device.
#[derive(Debug)]
pub struct Reference {
    architecture: Architecture,
    training: TrainingOptions,
    device: Device,
    shards: BTreeMap<ShardId, Shard>,
}

/// What one forward pass found.
#[derive(Debug)]
pub struct Outcome {
    /// Mean cross-entropy, in nats per token.
    pub loss: f64,
    /// Mean over MoE layers of the load-balancing loss.
    pub aux_loss: f64,
    /// The gradient of every shard's parameters, in their order.
    pub gradients: BTreeMap<ShardId, Vec<Tensor>>,
}

impl Outcome {
    /// The gradients' numbers, row by row.
    ///
    /// # Errors
    /// When they cannot be copied to the host.
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
    /// The model before its first step.
    ///
    /// # Errors
    /// When it does not fit the device, or asks for what only the actors' engine does: dropped tokens.
    pub fn initial(
        architecture: &Architecture,
        training: &TrainingOptions,
        seed: u64,
        device: Device,
    ) -> Result<Self> {
        let shard = |id| Ok((id, Shard::initial(architecture, &training.optimizer, seed, id, device)?));
        let shards = architecture.shards().into_iter().map(shard).collect::<Result<_>>()?;
        Ok(Self { architecture: architecture.clone(), training: training.clone(), device, shards })
    }

    /// The model from the stored form of its shards, which `fetch` gives.
    ///
    /// # Errors
    /// When a shard is missing or does not fit the model.
    pub fn load(
        architecture: &Architecture,
        training: &TrainingOptions,
        device: Device,
        mut fetch: impl FnMut(ShardId) -> std::result::Result<Vec<u8>, String>,
    ) -> Result<Self> {
        let shard = |id| {
            let bytes = fetch(id).map_err(|reason| Error::Stored { shard: id, reason })?;
            Ok((id, Shard::load(architecture, &training.optimizer, id, &bytes, device)?))
        };
        let shards = architecture.shards().into_iter().map(shard).collect::<Result<_>>()?;
        Ok(Self { architecture: architecture.clone(), training: training.clone(), device, shards })
    }

    fn leaves(&self, train: bool) -> Result<Leaves> {
        let leaf = |t: &Tensor| -> Result<Tensor> { Ok(t.f_detach()?.f_set_requires_grad(train)?) };
        let of =
            |shard: &Shard| shard.slots.iter().map(|slot| leaf(&slot.weight)).collect::<Result<Vec<_>>>();
        self.shards.iter().map(|(&id, shard)| Ok((id, of(shard)?))).collect()
    }

    /// The residual stream after the last layer, `[tokens, hidden]`, and the sums of the auxiliary losses.
    fn forward(&self, leaves: &Leaves, ids: &Tensor, length: usize) -> Result<(Tensor, Vec<Gate>)> {
        let a = &self.architecture;
        let positions = Positions::new(a, length, self.device)?;
        let mut x = layers::embed(&leaves[&ShardId::Embedding][0], ids, Kind::Float)?;
        let mut gates = Vec::new();
        for layer in a.layer_range().iter() {
            let p = &leaves[&ShardId::Dense { layer }];
            let attention = Attention { norm: &p[0], qkv: &p[1], output: &p[2], position: &p[3] };
            x = attention.forward(a, &positions, &x)?;
            if a.is_moe(layer) {
                let (y, gate) = self.mixture(leaves, layer, &x)?;
                x = y;
                gates.push(gate);
            } else {
                x = FeedForward { norm: &p[4], gate: &p[5], up: &p[6], down: &p[7] }.forward(&x)?;
            }
        }
        Ok((x, gates))
    }

    /// Every expert in turn on the tokens that chose it, weighted and added back.
    fn mixture(&self, leaves: &Leaves, layer: LayerId, x: &Tensor) -> Result<(Tensor, Gate)> {
        let a = &self.architecture;
        if a.capacity != Capacity::Dropless || a.second_expert != SecondExpert::All {
            return Err(Error::Input(
                "the reference model knows only dropless gating that keeps both experts".into(),
            ));
        }
        let router = &leaves[&ShardId::Router { layer }];
        let gate = Gate::forward(x, &router[0], &router[1])?;
        let mut y = x.shallow_clone();
        for expert in a.expert_ids() {
            let p = &leaves[&ShardId::Expert { layer, expert }];
            let chosen = gate.experts.f_eq(i64::from(expert.0))?;
            let tokens = chosen.f_any_dim(1, false)?.f_nonzero()?.f_squeeze_dim(1)?;
            if tokens.size()[0] == 0 {
                continue;
            }
            let weight = gate.weights.f_mul(&chosen.f_to_kind(Kind::Float)?)?;
            let weight =
                weight.f_sum_dim_intlist([1i64].as_slice(), true, Kind::Float)?.f_index_select(0, &tokens)?;
            let rows = gate.normed.f_index_select(0, &tokens)?;
            let inner = layers::activate(a.activation, &layers::project(&rows, &p[0])?)?;
            y = y.f_index_add(0, &tokens, &layers::project(&inner, &p[1])?.f_mul(&weight)?)?;
        }
        Ok((y, gate))
    }

    /// Loss and, with `train`, every gradient of one lane; `tokens` is `[sequences, sequence_length + 1]`.
    ///
    /// # Errors
    /// When the tokens do not fit the model.
    pub fn lane(&self, tokens: &[u32], train: bool) -> Result<Outcome> {
        let length = self.training.sequence_length;
        let leaves = self.leaves(train)?;
        let ids = |shift: usize| -> Result<Tensor> {
            let rows = tokens.chunks_exact(length + 1);
            let ids: Vec<i64> =
                rows.flat_map(|row| row[shift..shift + length].iter().map(|&t| t.into())).collect();
            Ok(Tensor::f_from_slice(&ids)?.f_to_device(self.device)?)
        };
        let (x, gates) = self.forward(&leaves, &ids(0)?, length)?;
        let embedding = &leaves[&ShardId::Embedding];
        let cross_entropy =
            layers::cross_entropy(&layers::logits(&x, &embedding[0], &embedding[1])?, &ids(1)?)?;
        let mut total = cross_entropy.shallow_clone();
        let mut aux_loss = 0.0;
        for gate in &gates {
            aux_loss += gate.aux_loss.f_double_value(&[])? / gates.len() as f64;
            total = total.f_add(&gate.aux_loss.f_mul_scalar(self.training.aux_loss)?)?;
            total = total.f_add(&gate.z_loss.f_mul_scalar(self.training.z_loss)?)?;
        }
        let loss = cross_entropy.f_double_value(&[])?;
        let gradients = if train { Self::backward(&total, &leaves)? } else { BTreeMap::new() };
        Ok(Outcome { loss, aux_loss, gradients })
    }

    fn backward(total: &Tensor, leaves: &Leaves) -> Result<BTreeMap<ShardId, Vec<Tensor>>> {
        // Through `.grad`, since an expert that no token met is no part of the graph.
        total.f_backward()?;
        let of = |leaf: &Tensor| -> Result<Tensor> {
            let grad = leaf.f_grad()?;
            Ok(if grad.defined() { grad } else { leaf.f_zeros_like()?.f_detach()? })
        };
        leaves.iter().map(|(&id, list)| Ok((id, list.iter().map(of).collect::<Result<_>>()?))).collect()
    }

    /// A plain training step: lanes one after the other, gradients summed, one update. Returns the mean loss.
    ///
    /// # Errors
    /// As [`Reference::lane`].
    pub fn step(&mut self, lanes: &[Vec<u32>], step: Step) -> Result<f64> {
        let mut sums: BTreeMap<ShardId, Vec<Tensor>> = BTreeMap::new();
        let mut loss = 0.0;
        for tokens in lanes {
            let outcome = self.lane(tokens, true)?;
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
        let rate = self.training.schedule.rate(step, self.training.steps);
        let mean = 1.0 / lanes.len() as f64;
        tch::no_grad(|| -> Result<()> {
            for (id, gradients) in sums {
                let Some(shard) = self.shards.get_mut(&id) else { continue };
                for (slot, mut gradient) in shard.slots.iter_mut().zip(gradients) {
                    let gradient = gradient.f_mul_scalar_(mean)?;
                    optimizer::update(&self.training.optimizer, slot, gradient, step, rate)?;
                }
            }
            Ok(())
        })?;
        Ok(loss)
    }

    /// Continues `prompt` token by token until `stop` or `max_tokens`; temperature 0 takes the likeliest.
    ///
    /// # Errors
    /// When the prompt is empty or does not fit the model.
    pub fn generate(
        &self,
        prompt: &[u32],
        max_tokens: usize,
        temperature: f64,
        seed: u64,
        stop: Option<u32>,
    ) -> Result<Vec<u32>> {
        if prompt.is_empty() {
            return Err(Error::Input("the prompt is empty".into()));
        }
        if let Some(id) = prompt.iter().find(|&&id| id as usize >= self.architecture.vocabulary) {
            return Err(Error::Input(format!("the prompt's token {id} is outside the model's vocabulary")));
        }
        let mut stream = Stream::new(seed, Purpose::Generate, &[]);
        let mut tokens = prompt.to_vec();
        let leaves = self.leaves(false)?;
        for _ in 0..max_tokens {
            let window = &tokens[tokens.len().saturating_sub(self.training.sequence_length)..];
            let next = tch::no_grad(|| self.next_token(&leaves, window, temperature, &mut stream))?;
            if Some(next) == stop {
                break;
            }
            tokens.push(next);
        }
        Ok(tokens.split_off(prompt.len()))
    }

    fn next_token(
        &self,
        leaves: &Leaves,
        window: &[u32],
        temperature: f64,
        stream: &mut Stream,
    ) -> Result<u32> {
        let ids: Vec<i64> = window.iter().map(|&t| t.into()).collect();
        let (x, _) =
            self.forward(leaves, &Tensor::f_from_slice(&ids)?.f_to_device(self.device)?, ids.len())?;
        let last = x.f_narrow(0, ids.len() as i64 - 1, 1)?;
        let embedding = &leaves[&ShardId::Embedding];
        let logits = layers::logits(&last, &embedding[0], &embedding[1])?.f_squeeze_dim(0)?;
        if temperature <= 0.0 {
            return Ok(logits.f_argmax(0, false)?.f_int64_value(&[])? as u32);
        }
        let probabilities =
            logits.f_div_scalar(temperature)?.f_softmax(0, Kind::Double)?.f_to_device(Device::Cpu)?;
        let probabilities: Vec<f64> = Vec::try_from(probabilities)?;
        let mut left = stream.next_f64() * probabilities.iter().sum::<f64>();
        let drawn = probabilities.iter().position(|p| {
            left -= p;
            left < 0.0
        });
        Ok(drawn.unwrap_or(probabilities.len() - 1) as u32)
    }
}
