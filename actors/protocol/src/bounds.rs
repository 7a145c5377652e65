//! Whether what a model sends fits into messages and frames: checked before a run starts.

use crate::limits::{LANE_BYTES_MAX, VARINT_BYTES};
use volary_core::architecture::Architecture;
use volary_core::options::{Optimizer, TrainingOptions};
use volary_core::{ExpertId, InvalidValue, LayerId, ShardId};
use volary_transport::limits::{CONTROL_BYTES_MAX, PART_BYTES_MAX};

/// Checks that every frame and message of a run stays within the bounds of the transport.
///
/// # Errors
/// The option that makes one too large.
pub fn check(model: &Architecture, training: &TrainingOptions) -> Result<(), InvalidValue> {
    check_shards(model, training)?;
    let length = training.sequence_length;
    let tokens = training.sequences_per_lane.saturating_mul(length.saturating_add(1)) as u64;
    if tokens.saturating_mul(VARINT_BYTES) > LANE_BYTES_MAX {
        let most = LANE_BYTES_MAX / VARINT_BYTES;
        let expected = format!("sequences_per_lane x (sequence_length + 1) of at most {most} tokens");
        return Err(InvalidValue::new("training.sequence_length", length, expected));
    }
    let rows = (training.tokens_per_lane() as u64).saturating_mul(2 * 4 * model.hidden as u64);
    if rows > PART_BYTES_MAX {
        let expected = format!("rows of one lane for the experts of at most {PART_BYTES_MAX} bytes");
        return Err(InvalidValue::new("training.sequences_per_lane", training.sequences_per_lane, expected));
    }
    let (one, all) = (report_bytes(model, training), CONTROL_BYTES_MAX as u64);
    let norms = (model.shards().len() as u64).saturating_mul(SHARD_REPORT_BYTES);
    let most = all.saturating_sub(norms) / one;
    if u64::from(training.lanes) > most {
        let expected = format!("at most {most} lanes: their reports must fit into one message");
        return Err(InvalidValue::new("training.lanes", training.lanes, expected));
    }
    Ok(())
}

/// Bytes of one shard in a report, at most: its norm and its digest, each with the shard's number.
const SHARD_REPORT_BYTES: u64 = 32 + 48;
/// Bytes of one lane's report besides its loads, at most.
const LANE_REPORT_BYTES: u64 = 64;

/// Bytes of one lane's report, at most.
fn report_bytes(model: &Architecture, training: &TrainingOptions) -> u64 {
    let layers = model.moe_layers().count() as u64;
    let sequences = (training.sequences_per_lane as u64).saturating_mul(4);
    sequences.saturating_add(LANE_REPORT_BYTES) + layers * (1 + model.experts as u64) * VARINT_BYTES
}

/// A stored shard is one part of a frame, as is the largest tensor of a gradient.
fn check_shards(model: &Architecture, training: &TrainingOptions) -> Result<(), InvalidValue> {
    let copies = match training.optimizer {
        // The second moment of a matrix is one row and one column, that of a vector as long as itself.
        Optimizer::Adafactor { .. } => 2,
        Optimizer::Adamw { .. } => 3,
    };
    let expert = ShardId::Expert { layer: LayerId(0), expert: ExpertId(0) };
    let shards = [
        ("model.vocabulary", model.vocabulary, ShardId::Embedding),
        ("model.feed_forward", model.feed_forward, expert),
    ];
    let layers = model.layer_range().iter();
    let layers = layers.map(|layer| ("model.hidden", model.hidden, ShardId::Dense { layer }));
    for (key, value, shard) in shards.into_iter().chain(layers) {
        let bytes = model.shard_parameters(shard).saturating_mul(4 * copies);
        if bytes > PART_BYTES_MAX {
            let (most, gib) = (PART_BYTES_MAX >> 30, bytes as f64 / (1u64 << 30) as f64);
            let expected = format!("a smaller one: the state of {shard} takes {gib:.1} GiB, at most {most}");
            return Err(InvalidValue::new(key, value, expected));
        }
    }
    Ok(())
}

#[cfg(test)]
#[path = "bounds_tests.rs"]
mod tests;
