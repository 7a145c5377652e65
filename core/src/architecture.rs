//! The shape of a model, the GLaM paper's presets, and parameter counts.
//!
//! Source: GLaM (Du et al., arXiv 2112.06905), section 4 and table 4. Counts follow the paper's own
//! arithmetic: a gated dense feed-forward has three matrices, an expert has two, the token embedding is
//! counted once (tied). The other family is that of Hugging Face's `qwen3_moe` (Qwen3, arXiv 2505.09388,
//! section 2), whose experts have three.

mod presets;

pub use presets::{Preset, presets};

use crate::dispatch::{Capacity, TOP_K};
use crate::ids::{ExpertId, LayerId, LayerRange, ShardId};
use crate::invalid::InvalidValue;
use crate::limits::{DIMENSION_MAX, EXPERTS_MAX, LAYERS_MAX};
use serde::{Deserialize, Serialize};

/// The layers that a model is made of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Family {
    /// GLaM (arXiv 2112.06905): position biases, GEGLU, experts of two matrices, an output that shares the
    /// embedding.
    #[default]
    Glam,
    /// Hugging Face's `qwen3_moe` (Qwen3, arXiv 2505.09388, section 2) with experts in every other layer;
    /// without experts its dense sibling `qwen3`. Rotary positions, normalized queries and keys, grouped
    /// keys and values, SwiGLU everywhere.
    #[serde(alias = "qwen3")]
    Qwen3Moe,
}

/// The activation inside an expert.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// The paper's general description.
    #[default]
    Gelu,
    /// The default of the later public layers.
    Relu,
}

/// The policy for a token's second choice (GShard, section 2.2).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SecondExpert {
    /// Always kept.
    #[default]
    All,
    /// Kept with probability `min(1, 2 g2)`.
    Random,
}

/// The shape of a model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Architecture {
    /// The kind of layers.
    #[serde(default)]
    pub family: Family,
    /// Tokens in the vocabulary; at least those of the data's tokenizer.
    #[serde(default = "default_vocabulary")]
    pub vocabulary: usize,
    /// Width of the residual stream (the paper's M).
    pub hidden: usize,
    /// Transformer layers (L).
    pub layers: usize,
    /// Attention heads.
    pub heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// Heads of keys and values, each of which several query heads share; by default as many as `heads`.
    /// Qwen3 only.
    #[serde(default)]
    pub kv_heads: Option<usize>,
    /// Width of the dense, gated feed-forward (H).
    pub feed_forward: usize,
    /// Experts in each MoE layer (E); 0 makes every layer dense.
    #[serde(default)]
    pub experts: usize,
    /// Width of one expert; by default `feed_forward`, as in the paper.
    #[serde(default)]
    pub expert_hidden: Option<usize>,
    /// Whether the first of each pair of layers is the MoE one; otherwise the second. By default the first
    /// in GLaM, as in its public layers, and the second in Qwen3.
    #[serde(default)]
    pub moe_first: Option<bool>,
    /// The activation inside an expert. GLaM only: Qwen3's is SiLU.
    #[serde(default)]
    pub activation: Activation,
    /// The most tokens that an expert takes from one lane.
    #[serde(default = "dropless")]
    pub capacity: Capacity,
    /// The policy for the second choice.
    #[serde(default)]
    pub second_expert: SecondExpert,
    /// Whether the output shares the embedding. By default it does in GLaM, always, and not in Qwen3.
    #[serde(default)]
    pub tied_embedding: Option<bool>,
    /// The base of the rotary positions' wavelengths. Qwen3 only.
    #[serde(default = "default_theta")]
    pub rope_theta: f64,
    /// Buckets of the relative position bias (T5). GLaM only.
    #[serde(default = "default_buckets")]
    pub position_buckets: usize,
    /// The distance from which all positions share the last bucket.
    #[serde(default = "default_distance")]
    pub position_distance: usize,
}

fn dropless() -> Capacity {
    Capacity::Dropless
}
fn default_vocabulary() -> usize {
    4096
}
fn default_theta() -> f64 {
    10_000.0
}
fn default_buckets() -> usize {
    32
}
fn default_distance() -> usize {
    128
}

impl Architecture {
    /// Whether layer `layer` has experts.
    #[must_use]
    pub fn is_moe(&self, layer: LayerId) -> bool {
        let first = self.moe_first.unwrap_or(self.family == Family::Glam);
        self.experts > 0 && layer.index().is_multiple_of(2) == first
    }

    /// Whether the output shares the embedding.
    #[must_use]
    pub fn is_tied(&self) -> bool {
        self.tied_embedding.unwrap_or(self.family == Family::Glam)
    }

    /// Heads of keys and values.
    #[must_use]
    pub fn kv_heads(&self) -> usize {
        self.kv_heads.unwrap_or(self.heads)
    }

    /// Columns of the projection to queries, keys and values.
    #[must_use]
    pub fn qkv_width(&self) -> usize {
        (self.heads + 2 * self.kv_heads()) * self.head_dim
    }

    /// All layers.
    #[must_use]
    pub fn layer_range(&self) -> LayerRange {
        LayerId::range(0..self.layers as u16)
    }

    /// The experts of each MoE layer.
    pub fn expert_ids(
        &self,
    ) -> impl DoubleEndedIterator<Item = ExpertId> + ExactSizeIterator + Clone + use<> {
        ExpertId::first(self.experts as u16)
    }

    /// The layers that have experts.
    pub fn moe_layers(&self) -> impl Iterator<Item = LayerId> + '_ {
        self.layer_range().iter().filter(|&layer| self.is_moe(layer))
    }

    /// Width of one expert.
    #[must_use]
    pub fn expert_width(&self) -> usize {
        self.expert_hidden.unwrap_or(self.feed_forward)
    }

    /// Every shard of the model, in the fixed order.
    #[must_use]
    pub fn shards(&self) -> Vec<ShardId> {
        let mut shards = vec![ShardId::Embedding];
        for layer in self.layer_range().iter() {
            shards.push(ShardId::Dense { layer });
            if self.is_moe(layer) {
                shards.push(ShardId::Router { layer });
                shards.extend(self.expert_ids().map(|expert| ShardId::Expert { layer, expert }));
            }
        }
        shards.sort_unstable();
        shards
    }

    /// Parameters of one shard, norms and position biases included.
    #[must_use]
    pub fn shard_parameters(&self, shard: ShardId) -> u64 {
        let (hidden, width) = (self.hidden as u64, (self.heads * self.head_dim) as u64);
        match shard {
            ShardId::Embedding => {
                let tables = if self.is_tied() { 1 } else { 2 };
                tables * self.vocabulary as u64 * hidden + hidden
            }
            ShardId::Dense { layer } => {
                let positions = match self.family {
                    Family::Glam => self.position_buckets * self.heads,
                    // The norms of queries and keys.
                    Family::Qwen3Moe => 2 * self.head_dim,
                };
                let products = hidden * (self.qkv_width() as u64 + width);
                let attention = products + hidden + positions as u64;
                let feed_forward =
                    if self.is_moe(layer) { 0 } else { 3 * hidden * self.feed_forward as u64 + hidden };
                attention + feed_forward
            }
            ShardId::Router { .. } => hidden * self.experts as u64 + hidden,
            ShardId::Expert { .. } => self.expert_matrices() as u64 * hidden * self.expert_width() as u64,
        }
    }

    /// Matrices of one expert: up and down, and in Qwen3 a gate.
    #[must_use]
    pub fn expert_matrices(&self) -> usize {
        match self.family {
            Family::Glam => 2,
            Family::Qwen3Moe => 3,
        }
    }

    /// All parameters.
    #[must_use]
    pub fn parameters(&self) -> u64 {
        self.shards().into_iter().map(|shard| self.shard_parameters(shard)).sum()
    }

    /// Parameters that one token activates: all but those of the experts that it is not routed to.
    #[must_use]
    pub fn activated_parameters(&self) -> u64 {
        let expert = ShardId::Expert { layer: LayerId(0), expert: ExpertId(0) };
        let idle = self.moe_layers().count() * self.experts.saturating_sub(TOP_K);
        self.parameters() - idle as u64 * self.shard_parameters(expert)
    }

    /// Floating-point operations of one token's forward pass: two per activated parameter, the embedding
    /// counted as the output product, plus attention's two products over half the sequence on average.
    #[must_use]
    pub fn flops_per_token(&self, sequence_length: usize) -> u64 {
        let attention = 2 * self.layers * self.heads * self.head_dim * (sequence_length + 1);
        // An embedding of its own is only read.
        let read = if self.is_tied() { 0 } else { self.vocabulary * self.hidden };
        2 * (self.activated_parameters() - read as u64) + attention as u64
    }

    /// Checks the bounds of all values.
    ///
    /// # Errors
    /// The first value that is out of its bounds.
    pub fn check(&self) -> Result<(), InvalidValue> {
        let positive = [
            ("vocabulary", self.vocabulary),
            ("hidden", self.hidden),
            ("layers", self.layers),
            ("heads", self.heads),
            ("head_dim", self.head_dim),
            ("feed_forward", self.feed_forward),
            ("expert_hidden", self.expert_width()),
        ];
        for (key, value) in positive {
            if value == 0 || value > DIMENSION_MAX {
                let expected = format!("a number from 1 to {DIMENSION_MAX}");
                return Err(InvalidValue::new(format!("model.{key}"), value, expected));
            }
        }
        if self.experts == 1 || self.experts > EXPERTS_MAX {
            let expected = format!("0 (dense) or 2 to {EXPERTS_MAX}");
            return Err(InvalidValue::new("model.experts", self.experts, expected));
        }
        if self.layers > LAYERS_MAX {
            return Err(InvalidValue::new("model.layers", self.layers, format!("at most {LAYERS_MAX}")));
        }
        self.check_family()?;
        match self.capacity {
            Capacity::Factor(factor) if !(factor.is_finite() && factor > 0.0) => {
                let found = format!("{{ factor = {factor} }}");
                Err(InvalidValue::new("model.capacity", found, "a positive number"))
            }
            _ => Ok(()),
        }
    }

    /// Checks what only one family has.
    fn check_family(&self) -> Result<(), InvalidValue> {
        let fail = |key: &str, found: &dyn std::fmt::Display, expected: String| {
            Err(InvalidValue::new(format!("model.{key}"), found, expected))
        };
        let glam = "for model.family = \"glam\"";
        match self.family {
            Family::Glam => {
                if let Some(heads) = self.kv_heads.filter(|&heads| heads != self.heads) {
                    return fail("kv_heads", &heads, format!("{} {glam}", self.heads));
                }
                if !self.is_tied() {
                    return fail("tied_embedding", &false, format!("true {glam}"));
                }
                if self.position_buckets < 2 || self.position_distance <= self.position_buckets / 2 {
                    let buckets = self.position_buckets;
                    let expected = format!(
                        "more than half of model.position_buckets = {buckets}, which must be at least 2"
                    );
                    return fail("position_distance", &self.position_distance, expected);
                }
            }
            Family::Qwen3Moe => {
                let qwen = "for model.family = \"qwen3_moe\"";
                let (heads, kv_heads) = (self.heads, self.kv_heads());
                if kv_heads == 0 || !heads.is_multiple_of(kv_heads) {
                    return fail("kv_heads", &kv_heads, format!("a divisor of model.heads = {heads}"));
                }
                if !self.head_dim.is_multiple_of(2) {
                    return fail("head_dim", &self.head_dim, format!("an even number {qwen}"));
                }
                if !(self.rope_theta.is_finite() && self.rope_theta > 1.0) {
                    return fail("rope_theta", &self.rope_theta, "a number above 1".into());
                }
                if self.moe_first == Some(true) {
                    return fail("moe_first", &true, format!("false {qwen}"));
                }
                if self.capacity != Capacity::Dropless {
                    return fail("capacity", &"a factor", format!("\"dropless\" {qwen}"));
                }
                if self.second_expert != SecondExpert::All {
                    return fail("second_expert", &"random", format!("\"all\" {qwen}"));
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
