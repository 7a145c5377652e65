//! The costs of a model at a run's shapes: operations, bytes of state and bytes on the wire.
//!
//! Operations are counted as two per parameter and token (GLaM, section 4), plus attention's products over
//! half the sequence; bytes as f32. Activation memory is an estimate of the tensors that one lane saves for
//! its backward pass.

use crate::architecture::Architecture;
use crate::dispatch::TOP_K;
use crate::ids::{ExpertId, LayerId, LayerRange, ShardId};
use crate::limits::{COPIES_IN_FLIGHT_MAX, STASH_BYTES_MAX, STASH_MIN, STASH_STEPS_MAX};
use crate::options::{Optimizer, TrainingOptions};

/// Bytes of an f32, in memory and on the wire.
const F32_BYTES: u64 = 4;
/// Gradients of a shard in memory at the same time, at least: the sum, and one to add.
const GRADIENTS_MIN: u64 = 2;
/// Parts of an expert's gradient that are made at a time, besides the sums that wait in the tree.
const EXPERT_LEAVES: usize = 1;

/// The costs of a run's model at its shapes.
#[derive(Clone, Debug, PartialEq)]
pub struct Costs {
    /// Lanes of the run.
    pub lanes: u32,
    /// Lanes that share one leaf of an expert's gradient.
    pub lane_group: u32,
    /// Tokens in a lane.
    pub tokens_per_lane: usize,
    /// The layers that have experts.
    pub moe_layers: Vec<LayerId>,
    /// Experts in each of them.
    pub experts: usize,
    /// Forward operations of one token in each layer's dense part; the first layer includes the embedding and
    /// the loss.
    pub dense_flops: Vec<f64>,
    /// Forward operations of one row in one expert.
    pub expert_flops: f64,
    /// Memory of each layer's dense part on a holder: parameters and optimizer state; the first layer
    /// includes the embedding.
    pub dense_bytes: Vec<u64>,
    /// Gradients of each shard that there is room for, at least.
    gradients_min: u64,
    /// Memory of one expert on a holder, with the rows of a lane group.
    pub expert_bytes: u64,
    /// A gradient of each layer's dense part on the wire.
    pub dense_wire_bytes: Vec<u64>,
    /// A gradient of one expert on the wire.
    pub expert_wire_bytes: u64,
    /// Activations that one lane in flight saves of each layer.
    pub activation_bytes: Vec<u64>,
    /// The residual stream of one lane on the wire.
    pub lane_wire_bytes: u64,
    /// One row to or from an expert on the wire.
    pub row_wire_bytes: u64,
}

impl Costs {
    /// The costs of a run.
    #[must_use]
    pub fn new(a: &Architecture, training: &TrainingOptions) -> Self {
        let tokens = training.tokens_per_lane();
        let (hidden, length) = (a.hidden as u64, training.sequence_length as u64);
        let state = match training.optimizer {
            // The factored second moment is one row and one column: less than a hundredth.
            Optimizer::Adafactor { .. } => 1,
            Optimizer::Adamw { .. } => 3,
        };
        // While a checkpoint is written, a shard's stored form waits beside its last gradient.
        let least = GRADIENTS_MIN.max(1 + state);
        let held = |parameters: u64, gradients: u64| parameters * F32_BYTES * (state + gradients.max(least));
        let width = (a.heads * a.head_dim) as u64;
        let mut costs = Self {
            lanes: training.lanes,
            lane_group: training.lane_group,
            tokens_per_lane: tokens,
            moe_layers: a.moe_layers().collect(),
            experts: a.experts,
            dense_flops: Vec::new(),
            expert_flops: 0.0,
            dense_bytes: Vec::new(),
            gradients_min: least,
            expert_bytes: 0,
            dense_wire_bytes: Vec::new(),
            expert_wire_bytes: 0,
            activation_bytes: Vec::new(),
            lane_wire_bytes: tokens as u64 * hidden * F32_BYTES,
            row_wire_bytes: hidden * F32_BYTES,
        };
        if a.experts > 0 {
            let parameters = a.shard_parameters(ShardId::Expert { layer: LayerId(0), expert: ExpertId(0) });
            costs.expert_flops = 2.0 * parameters as f64;
            // Besides its state: the rows of a lane group, whose lanes wait for each other, with saved
            // activations and gradients.
            let rows = TOP_K * tokens * training.lane_group.max(1) as usize;
            let rows = rows.div_ceil(a.experts);
            let per_row = (3 * hidden + a.expert_matrices() as u64 * a.expert_width() as u64) * F32_BYTES;
            let groups = training.lanes.div_ceil(training.lane_group.max(1));
            let gradients = live_gradients(groups, EXPERT_LEAVES);
            costs.expert_bytes = held(parameters, gradients) + rows as u64 * per_row;
            costs.expert_wire_bytes = parameters * F32_BYTES;
        }
        for layer in a.layer_range().iter() {
            let moe = a.is_moe(layer);
            let mut parameters = a.shard_parameters(ShardId::Dense { layer });
            if moe {
                parameters += a.shard_parameters(ShardId::Router { layer });
            }
            let embedding = if layer == LayerId(0) { a.shard_parameters(ShardId::Embedding) } else { 0 };
            // An embedding of its own is only read.
            let read = if a.is_tied() || embedding == 0 { 0 } else { a.vocabulary as u64 * hidden };
            // Scores and their sum over values: two products over half the sequence.
            let attention = 2.0 * width as f64 * (length + 1) as f64;
            costs.dense_flops.push(2.0 * (parameters + embedding - read) as f64 + attention);
            costs.dense_bytes.push((parameters + embedding) * F32_BYTES * state);
            costs.dense_wire_bytes.push((parameters + embedding) * F32_BYTES);
            let inner = if moe {
                TOP_K as u64 * (2 * hidden + a.expert_matrices() as u64 * a.expert_width() as u64)
            } else {
                3 * a.feed_forward as u64
            };
            let head = if layer == LayerId(0) { a.vocabulary as u64 } else { 0 };
            let numbers =
                6 * hidden + width + a.qkv_width() as u64 + 2 * a.heads as u64 * length + inner + head;
            costs.activation_bytes.push(tokens as u64 * numbers * F32_BYTES);
        }
        costs
    }

    /// The number of layers.
    #[must_use]
    pub fn layers(&self) -> u16 {
        self.dense_flops.len() as u16
    }

    /// All layers.
    #[must_use]
    pub fn all_layers(&self) -> LayerRange {
        LayerId::range(0..self.layers())
    }

    /// Forward operations of one lane in the dense parts of some layers.
    #[must_use]
    pub fn lane_flops(&self, layers: LayerRange) -> f64 {
        self.dense_flops[layers.indices()].iter().sum::<f64>() * self.tokens_per_lane as f64
    }

    /// Rows that a lane sends to the experts of one layer, if none is dropped.
    #[must_use]
    pub fn rows_per_lane(&self) -> f64 {
        (TOP_K * self.tokens_per_lane) as f64
    }

    /// Forward operations of all experts in one step.
    #[must_use]
    pub fn all_expert_flops(&self) -> f64 {
        f64::from(self.lanes) * self.rows_per_lane() * self.moe_layers.len() as f64 * self.expert_flops
    }

    /// Memory for the dense parts of some layers, with `in_flight` lanes at a time.
    #[must_use]
    pub fn stage_bytes(&self, layers: LayerRange, in_flight: usize) -> u64 {
        let state: u64 = self.dense_bytes[layers.indices()].iter().sum();
        let gradient: u64 = self.dense_wire_bytes[layers.indices()].iter().sum();
        let copies = live_gradients(self.lanes, in_flight).max(self.gradients_min);
        let activations: u64 = self.activation_bytes[layers.indices()].iter().sum();
        state
            .saturating_add(gradient.saturating_mul(copies))
            .saturating_add(activations.saturating_mul(in_flight as u64))
    }
}

/// The most gradients of one shard in memory at a time, of a sum over `leaves`: one of each lane in flight,
/// one that is being added, and one for each level of the tree.
#[must_use]
pub fn live_gradients(leaves: u32, in_flight: usize) -> u64 {
    let levels = u64::from(u32::BITS - leaves.max(1).leading_zeros());
    u64::from(leaves).min(in_flight as u64 + 1 + levels)
}

/// Steps whose gradients a node keeps for a shard that it is copying: as many as fit into
/// [`STASH_BYTES_MAX`] for all copies in flight, and no fewer than [`STASH_MIN`].
#[must_use]
pub fn stash_steps(shard_parameters: u64) -> usize {
    let each = STASH_BYTES_MAX / COPIES_IN_FLIGHT_MAX as u64;
    let steps = each / (shard_parameters * F32_BYTES).max(1);
    usize::try_from(steps).unwrap_or(usize::MAX).clamp(STASH_MIN, STASH_STEPS_MAX)
}

/// Lanes in flight beyond one per thread, so that one lane's rows on the wire overlap with another's compute.
pub const LANES_AHEAD: usize = 1;

/// Lanes that a device has in flight at a time.
#[must_use]
pub fn lanes_in_flight(threads: usize) -> usize {
    threads.saturating_add(LANES_AHEAD)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// For experts and embeddings of every size between a thousand and a billion parameters.
    #[test]
    fn gradients_kept_for_copies_stay_within_their_budget() {
        for exponent in 10..30 {
            let parameters = 1u64 << exponent;
            let steps = stash_steps(parameters) as u64;
            let bytes = steps * parameters * F32_BYTES * COPIES_IN_FLIGHT_MAX as u64;
            let (min, max) = (STASH_MIN as u64, STASH_STEPS_MAX as u64);
            assert!(steps >= min && steps <= max, "{steps}");
            assert!(bytes <= STASH_BYTES_MAX || steps == min, "{parameters}: {steps} steps");
            let one_more = (steps + 1) * parameters * F32_BYTES * COPIES_IN_FLIGHT_MAX as u64;
            assert!(
                one_more > STASH_BYTES_MAX || steps == max,
                "{parameters}: {steps} steps, and room for more"
            );
        }
    }
}
