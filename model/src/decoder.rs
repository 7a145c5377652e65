//! The model one token after the other, for generation and scoring.
//!
//! The keys and values of earlier tokens stay in a [`Cache`], so that a new token costs one row of every
//! product. One pass takes new tokens of many sequences at once: their rows go through the projections and
//! the experts together, and only attention looks at each sequence by itself.
//!
//! Every token goes to both of its experts: neither capacity nor the random second expert applies, since a
//! text must not depend on what else is in a batch. It depends on the batch in the last bits only, since
//! products of other shapes add in another order.
//!
//! | file | content |
//! | --- | --- |
//! | `cache` | keys and values of earlier tokens |
//! | `attention` | attention of new tokens to the cache |
//! | `mixture` | the experts of a layer |

mod attention;
mod cache;
mod mixture;

pub use cache::Cache;

use crate::error::{Error, Result};
use crate::layers;
use crate::limits::SCORED_ROWS;
use crate::weights::load_weights;
use attention::{Attention, Queries};
use mixture::Mixture;
use std::error::Error as StdError;
use tch::{Device, Kind, Tensor};
use volary_core::architecture::Architecture;
use volary_core::{ExpertId, LayerId, ShardId};

/// The weights of a model on one device, without optimizer state.
#[derive(Debug)]
pub struct Decoder {
    architecture: Architecture,
    context: usize,
    device: Device,
    /// `[vocabulary, hidden]`.
    embedding: Tensor,
    /// The table of the output, `[vocabulary, hidden]`: maybe `embedding` itself.
    output: Tensor,
    /// `[hidden]`.
    norm: Tensor,
    layers: Vec<Layer>,
}

#[derive(Debug)]
struct Layer {
    attention: Attention,
    rest: Rest,
}

/// What follows attention.
#[derive(Debug)]
enum Rest {
    /// Norm, gate, up and down.
    FeedForward([Tensor; 4]),
    Mixture(Mixture),
}

/// The new tokens of one sequence.
#[derive(Clone, Copy, Debug)]
pub struct Input<'a> {
    /// The sequence's slot in the cache; each at most once in a pass.
    pub slot: usize,
    /// At least one token. Several must fit into the context with those before them.
    pub tokens: &'a [u32],
    /// The tokens to score.
    pub scoring: Option<Scoring>,
}

/// The scoring of new tokens under the model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Scoring {
    /// The index of the first scored token. The first token of a pass has no score, since what precedes it is
    /// not part of the pass.
    pub from: usize,
    /// How many of the most likely tokens are reported beside it.
    pub top: usize,
}

/// The result of a pass for one sequence.
#[derive(Clone, Debug, PartialEq)]
pub struct Output {
    /// The logits of the token after the last one: `[vocabulary]`, nats up to a constant.
    pub logits: Vec<f32>,
    /// The scores of the tokens from [`Scoring::from`] on.
    pub scores: Vec<Score>,
    /// The experts of every new token: `[MoE layers][tokens]`, each with the first and the second choice.
    pub experts: Vec<Vec<[ExpertId; 2]>>,
}

/// How likely a token is after those before it.
#[derive(Clone, Debug, PartialEq)]
pub struct Score {
    /// Its log-probability, in nats.
    pub log_probability: f32,
    /// Whether no other token is more likely.
    pub is_greedy: bool,
    /// The most likely tokens with their log-probabilities, the most likely first.
    pub top: Vec<(u32, f32)>,
}

impl Score {
    /// The score of a token by the logits before it, with the `top` most likely tokens.
    #[must_use]
    pub fn by_logits(logits: &[f32], token: u32, top: usize) -> Self {
        let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = logits.iter().map(|logit| f64::from(logit - largest).exp()).sum();
        let log_probability = |logit: f32| (f64::from(logit - largest) - sum.ln()) as f32;
        let own = logits.get(token as usize).copied().unwrap_or(f32::NEG_INFINITY);
        let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
        let by_logit = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
        if top > 0 && top < ids.len() {
            ids.select_nth_unstable_by(top - 1, by_logit);
        }
        ids.truncate(top);
        ids.sort_by(by_logit);
        Self {
            log_probability: log_probability(own),
            is_greedy: own >= largest,
            top: ids.into_iter().map(|id| (id, log_probability(logits[id as usize]))).collect(),
        }
    }
}

impl Decoder {
    /// The model from the stored form of its shards, which `fetch` reads, with room for `context` tokens per
    /// sequence.
    ///
    /// # Errors
    /// [`Error::Fetch`] with an error of `fetch`; [`Error::Stored`] or [`Error::SafeTensors`] when a shard
    /// does not fit the model.
    pub fn load<E: Into<Box<dyn StdError + Send + Sync>>>(
        architecture: &Architecture,
        context: usize,
        device: Device,
        mut fetch: impl FnMut(ShardId) -> std::result::Result<Vec<u8>, E>,
    ) -> Result<Self> {
        let a = architecture;
        let mut weights = |id: ShardId| -> Result<Vec<Tensor>> {
            let bytes = fetch(id).map_err(|error| Error::Fetch { shard: id, source: error.into() })?;
            load_weights(a, id, &bytes, device)
        };
        let mut layers = Vec::with_capacity(a.layers);
        for layer in a.layer_range().iter() {
            layers.push(Layer::load(a, layer, context, device, &mut weights)?);
        }
        let tables = weights(ShardId::Embedding)?;
        let [embedding, norm, output] = [0, 1, layers::output_place(a)].map(|at| tables[at].shallow_clone());
        Ok(Self { architecture: a.clone(), context, device, embedding, output, norm, layers })
    }

    /// The same model for another thread: the weights share their memory.
    #[must_use]
    pub fn share(&self) -> Self {
        Self {
            architecture: self.architecture.clone(),
            context: self.context,
            device: self.device,
            embedding: self.embedding.shallow_clone(),
            output: self.output.shallow_clone(),
            norm: self.norm.shallow_clone(),
            layers: self.layers.iter().map(Layer::share).collect(),
        }
    }

    /// Whether it computes on the CPU.
    #[must_use]
    pub fn is_on_cpu(&self) -> bool {
        self.device == Device::Cpu
    }

    /// The longest sequence, in tokens.
    #[must_use]
    pub fn context(&self) -> usize {
        self.context
    }

    /// The number of token ids.
    #[must_use]
    pub fn vocabulary(&self) -> usize {
        self.architecture.vocabulary
    }

    /// Checks that a prompt can be read into an empty slot.
    ///
    /// # Errors
    /// [`Error::EmptyPrompt`], [`Error::Vocabulary`] or [`Error::Context`].
    pub fn check_prompt(&self, tokens: &[u32]) -> Result<()> {
        let vocabulary = self.vocabulary();
        if tokens.is_empty() {
            return Err(Error::EmptyPrompt);
        }
        if let Some(&id) = tokens.iter().find(|&&id| id as usize >= vocabulary) {
            return Err(Error::Vocabulary { id, vocabulary });
        }
        let (found, context) = (tokens.len(), self.context);
        if found > context { Err(Error::Context { context, found }) } else { Ok(()) }
    }

    /// An empty cache for `slots` sequences.
    ///
    /// # Errors
    /// [`Error::Torch`] when the device has no memory for it.
    pub fn cache(&self, slots: usize) -> Result<Cache> {
        Cache::new(&self.architecture, self.context, slots, self.device)
    }

    /// Appends new tokens to sequences. The outputs are in the order of `inputs`.
    ///
    /// A sequence may grow beyond the context token by token: each then attends to the last `context` tokens.
    ///
    /// # Errors
    /// [`Error::EmptyPrompt`], [`Error::Vocabulary`] or [`Error::Context`] for an input that cannot be
    /// appended; [`Error::OutOfTurn`] for a slot that the cache does not have or that is named twice;
    /// [`Error::Torch`] when libtorch fails. The sequences stay as they were.
    pub fn advance(&self, cache: &mut Cache, inputs: &[Input<'_>]) -> Result<Vec<Output>> {
        self.check(cache, inputs)?;
        let longest = inputs.iter().map(|input| cache.length(input.slot) + input.tokens.len()).max();
        cache.reserve(longest.unwrap_or(0))?;
        let outputs = tch::no_grad(|| self.pass(cache, inputs))?;
        for input in inputs {
            cache.extend(input.slot, input.tokens.len());
        }
        Ok(outputs)
    }

    fn check(&self, cache: &Cache, inputs: &[Input<'_>]) -> Result<()> {
        for (at, input) in inputs.iter().enumerate() {
            let is_twice = inputs[..at].iter().any(|other| other.slot == input.slot);
            if is_twice || input.slot >= cache.slots() {
                return Err(Error::OutOfTurn("Decoder::advance"));
            }
            self.check_prompt(input.tokens)?;
            let found = cache.length(input.slot) + input.tokens.len();
            if input.tokens.len() > 1 && found > self.context {
                return Err(Error::Context { context: self.context, found });
            }
        }
        Ok(())
    }

    fn pass(&self, cache: &Cache, inputs: &[Input<'_>]) -> Result<Vec<Output>> {
        if inputs.is_empty() {
            return Ok(Vec::new());
        }
        let ids: Vec<i64> =
            inputs.iter().flat_map(|input| input.tokens.iter().map(|&id| i64::from(id))).collect();
        let ids = Tensor::f_from_slice(&ids)?.f_to_device(self.device)?;
        let parts: Vec<(usize, usize)> =
            inputs.iter().map(|input| (input.slot, input.tokens.len())).collect();
        let queries = Queries::new(&self.architecture, cache, &parts, self.device)?;
        let mut x = layers::embed(&self.architecture, &self.embedding, &ids, Kind::Float)?;
        let mut experts = Vec::new();
        for (place, layer) in self.layers.iter().enumerate() {
            x = layer.attention.forward(&self.architecture, cache.layer(place), &queries, &x)?;
            x = match &layer.rest {
                Rest::FeedForward(p) => layers::feed_forward(self.architecture.family, p, &x)?,
                Rest::Mixture(mixture) => {
                    let (y, chosen) = mixture.forward(&self.architecture, &x)?;
                    experts.push(chosen);
                    y
                }
            };
        }
        // One product for the last rows of all inputs.
        let ends = parts.iter().scan(0, |end, (_, count)| {
            *end += *count as i64;
            Some(*end - 1)
        });
        let ends = Tensor::f_from_slice(&ends.collect::<Vec<i64>>())?.f_to_device(self.device)?;
        let last = self.logits(&x.f_index_select(0, &ends)?)?.f_to_device(Device::Cpu)?;
        let (mut start, mut number) = (0, 0);
        let output = |input: &Input<'_>| {
            let rows = start..start + input.tokens.len();
            (start, number) = (rows.end, number + 1);
            Ok(Output {
                logits: Vec::try_from(last.f_get(number - 1)?)?,
                scores: self.scores(&x, rows.start, input)?,
                experts: experts.iter().map(|chosen| chosen[rows.clone()].to_vec()).collect(),
            })
        };
        inputs.iter().map(output).collect()
    }

    fn logits(&self, x: &Tensor) -> Result<Tensor> {
        layers::logits(x, &self.output, &self.norm)
    }

    /// The scores of an input whose first row in `x` is `start`.
    fn scores(&self, x: &Tensor, start: usize, input: &Input<'_>) -> Result<Vec<Score>> {
        let Some(scoring) = input.scoring else { return Ok(Vec::new()) };
        let from = scoring.from.max(1);
        let mut scores = Vec::with_capacity(input.tokens.len().saturating_sub(from));
        let targets = input.tokens.get(from..).unwrap_or_default();
        // In parts: all rows by the whole vocabulary could be gigabytes.
        for (part, targets) in targets.chunks(SCORED_ROWS).enumerate() {
            // A token's score stands in the row of the token before it.
            let row = start + from - 1 + part * SCORED_ROWS;
            let logits = self.logits(&x.f_narrow(0, row as i64, targets.len() as i64)?)?;
            scores.extend(score_rows(&logits, targets, scoring.top)?);
        }
        Ok(scores)
    }
}

/// The scores of `targets` by the rows of `logits`, `[targets, vocabulary]`.
fn score_rows(logits: &Tensor, targets: &[u32], top: usize) -> Result<Vec<Score>> {
    let table = logits.f_log_softmax(-1, Kind::Float)?;
    let ids: Vec<i64> = targets.iter().map(|&id| i64::from(id)).collect();
    let ids = Tensor::f_from_slice(&ids)?.f_to_device(table.device())?.f_unsqueeze(1)?;
    let own: Vec<f32> =
        Vec::try_from(table.f_gather(1, &ids, false)?.f_squeeze_dim(1)?.f_to_device(Device::Cpu)?)?;
    let wide = (top.max(1) as i64).min(table.size()[1]);
    let (values, indices) = table.f_topk(wide, -1, true, true)?;
    let values: Vec<f32> = Vec::try_from(values.f_flatten(0, -1)?.f_to_device(Device::Cpu)?)?;
    let indices: Vec<i64> = Vec::try_from(indices.f_flatten(0, -1)?.f_to_device(Device::Cpu)?)?;
    let rows = values.chunks(wide as usize).zip(indices.chunks(wide as usize));
    let score = |(log_probability, (values, indices)): (f32, (&[f32], &[i64]))| Score {
        log_probability,
        is_greedy: values.first().is_some_and(|best| log_probability >= *best),
        top: indices.iter().map(|&id| id as u32).zip(values.iter().copied()).take(top).collect(),
    };
    Ok(own.into_iter().zip(rows).map(score).collect())
}

impl Layer {
    fn share(&self) -> Self {
        let rest = match &self.rest {
            Rest::FeedForward(p) => Rest::FeedForward(p.each_ref().map(Tensor::shallow_clone)),
            Rest::Mixture(mixture) => Rest::Mixture(mixture.share()),
        };
        Self { attention: self.attention.share(), rest }
    }

    fn load(
        a: &Architecture,
        layer: LayerId,
        context: usize,
        device: Device,
        weights: &mut impl FnMut(ShardId) -> Result<Vec<Tensor>>,
    ) -> Result<Self> {
        let (dense, router) = (ShardId::Dense { layer }, ShardId::Router { layer });
        let mut tensors = weights(dense)?;
        let rest = tensors.split_off(tensors.len().min(Attention::tensors(a)));
        let attention = Attention::new(a, tensors, context, device)?;
        if !a.is_moe(layer) {
            return Ok(Self { attention, rest: Rest::FeedForward(exactly(dense, rest)?) });
        }
        let [norm, gate] = exactly(router, weights(router)?)?;
        let expert = |expert| weights(ShardId::Expert { layer, expert });
        let experts = a.expert_ids().map(expert).collect::<Result<_>>()?;
        Ok(Self { attention, rest: Rest::Mixture(Mixture { norm, gate, experts }) })
    }
}

/// The tensors of a shard by number.
fn exactly<const N: usize>(shard: ShardId, tensors: Vec<Tensor>) -> Result<[Tensor; N]> {
    tensors.try_into().map_err(|found: Vec<Tensor>| Error::Stored {
        shard,
        reason: format!("it has {} tensors, expected {N}", found.len()),
    })
}
