//! Moving averages of the experts' loads, and the number of replicas that they call for.

use crate::ids::{ExpertId, LayerId, ShardId};
use std::collections::BTreeMap;

/// Weight of the newest measurement in a moving average.
const NEWEST_WEIGHT: f64 = 0.2;
/// Distance of an expert's load above the next number of replicas before it gets one more, in replicas.
const MORE_ABOVE: f64 = 0.25;
/// Distance below the present number of replicas before an expert loses one.
const FEWER_BELOW: f64 = 1.25;

/// Measurements of the experts.
#[derive(Debug, Default)]
pub(super) struct Balance {
    /// Share of each expert in its layer's tokens times the experts of the layer: 1 when even.
    load: BTreeMap<ShardId, f64>,
    /// Experts with more replicas than the run's replication.
    pub(super) extra_replicas: BTreeMap<ShardId, usize>,
    /// Commits so far.
    pub(super) commits: u64,
}

/// A change of an expert's number of replicas.
struct Change {
    shard: ShardId,
    replicas: usize,
    load: f64,
}

/// The moving average after a measurement.
pub(super) fn average(before: Option<f64>, measured: f64) -> f64 {
    before.map_or(measured, |before| before + NEWEST_WEIGHT * (measured - before))
}

impl Balance {
    /// Takes the kept assignments of one layer's experts in one step.
    pub(super) fn record_load(&mut self, layer: LayerId, counts: &[u64]) {
        let total: u64 = counts.iter().sum();
        for (expert, &count) in (0..).map(ExpertId).zip(counts) {
            let share = count as f64 * counts.len() as f64 / total.max(1) as f64;
            let load = self.load.entry(ShardId::Expert { layer, expert }).or_insert(share);
            *load = average(Some(*load), share);
        }
    }

    /// Gives an expert with twice its share of tokens the replicas of the run, and one with more of them
    /// more, up to one on each of `nodes` nodes. Returns the reason for a change.
    pub(super) fn update_replicas(&mut self, replication: usize, nodes: usize) -> Option<String> {
        let changes: Vec<Change> =
            self.load.keys().filter_map(|shard| self.change_of(*shard, replication, nodes)).collect();
        for change in &changes {
            if change.replicas > replication {
                self.extra_replicas.insert(change.shard, change.replicas);
            } else {
                self.extra_replicas.remove(&change.shard);
            }
        }
        let others = changes.len().saturating_sub(1);
        let Change { shard, replicas, load } =
            changes.into_iter().max_by(|a, b| a.load.total_cmp(&b.load))?;
        Some(format!(
            "{shard} has {load:.1} times its even share of tokens and gets {replicas} replicas ({others} other experts change)"
        ))
    }

    fn change_of(&self, shard: ShardId, replication: usize, nodes: usize) -> Option<Change> {
        let load = *self.load.get(&shard)?;
        let now = self.extra_replicas.get(&shard).copied().unwrap_or(replication).max(1);
        let wanted = load / 2.0 * replication as f64;
        let next = match () {
            () if wanted > now as f64 + MORE_ABOVE => now + 1,
            () if wanted < now as f64 - FEWER_BELOW => now - 1,
            () => now,
        };
        let replicas = next.clamp(replication, nodes.max(replication));
        (replicas != now).then_some(Change { shard, replicas, load })
    }
}
