//! Small runs and nodes for the simulation.

use volary_core::architecture::presets;
use volary_core::costs::Costs;
use volary_core::machine::Settings;
use volary_core::options::{CheckpointOptions, ClusterOptions, TrainingOptions, ValidationOptions};
use volary_core::profile::Profile;
use volary_core::{LayerId, NodeId};

/// A small run: two layers, four experts, six lanes.
#[must_use]
pub fn settings(steps: u64, nodes: usize, replication: usize) -> Settings {
    let mut architecture = presets().swap_remove(1).architecture;
    (architecture.layers, architecture.experts) = (2, 4);
    Settings {
        architecture,
        training: TrainingOptions {
            lanes: 6,
            lane_group: 2,
            sequences_per_lane: 1,
            sequence_length: 8,
            ..TrainingOptions::new(steps)
        },
        cluster: ClusterOptions { nodes, replication, step_timeout_ms: 10_000, ..ClusterOptions::default() },
        checkpoint: CheckpointOptions { every: 5, keep: 2, store: None },
        validation: ValidationOptions { every: 7, rounds: 2 },
        stay: false,
    }
}

/// [`settings`] with four layers, for [`room_for_half`].
#[must_use]
pub fn deep_settings(steps: u64, nodes: usize, replication: usize) -> Settings {
    let mut settings = settings(steps, nodes, replication);
    settings.architecture.layers = 4;
    settings
}

/// A node with room for two of the four layers of [`deep_settings`] and for some experts, in one of two zones
/// by its number.
#[must_use]
pub fn room_for_half(node: &NodeId) -> Profile {
    let settings = deep_settings(1, 1, 1);
    let costs = Costs::new(&settings.architecture, &settings.training);
    let number: usize = node.0.trim_start_matches('n').parse().unwrap_or_default();
    let half = |layers| costs.stage_bytes(LayerId::range(layers), 2);
    Profile {
        memory_bytes: half(0..2).max(half(2..4)) + 5 * costs.expert_bytes,
        zone: format!("zone-{}", number % 2),
        ..Profile::relative(1.0)
    }
}
