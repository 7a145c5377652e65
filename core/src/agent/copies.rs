//! Background copies of shards for a later placement.

use super::types::PendingCopy;
use super::{Agent, Effect, Failure};
use crate::ids::{ShardId, Step};
use crate::limits::{COPIES_IN_FLIGHT_MAX, COPY_ATTEMPTS_MAX};
use crate::messages::NodeReport;

impl Agent {
    /// Requests more shards, up to the limit in flight.
    pub(super) fn copy_more(&mut self) {
        let epoch = self.epoch;
        let mut room =
            COPIES_IN_FLIGHT_MAX.saturating_sub(self.pending_copies.values().filter(|c| c.requested).count());
        let mut copies = Vec::new();
        for (shard, pending) in self.pending_copies.iter_mut().filter(|(_, pending)| !pending.requested) {
            if room == 0 {
                break;
            }
            room -= 1;
            pending.requested = true;
            pending.attempts += 1;
            copies.push(Effect::Copy { epoch, shard: *shard, from: pending.from.clone() });
        }
        self.effects.extend(copies);
    }

    pub(super) fn on_copied(&mut self, shard: ShardId, outcome: Result<Step, Failure>) {
        let Some(pending) = self.pending_copies.get_mut(&shard) else { return };
        let (attempts, epoch) = (pending.attempts, self.epoch);
        match outcome {
            Ok(at)
                if at >= self.version
                    || at.next().through(self.version).all(|s| pending.stash.contains(&s)) =>
            {
                let replay: Vec<Step> = at.next().through(self.version).collect();
                self.pending_copies.remove(&shard);
                self.shards.insert(shard, at.max(self.version));
                self.push(Effect::Install { shard, version: at, replay });
                self.learned(vec![shard]);
                self.copy_more();
            }
            _ if attempts < COPY_ATTEMPTS_MAX => {
                pending.requested = false;
                pending.stash.clear();
                pending.from.rotate_left(1);
                self.copy_more();
            }
            Ok(at) => {
                let reason = format!(
                    "all copies of {shard} were at step {at} or earlier, and the run is at {}",
                    self.version
                );
                self.push(Effect::Report(NodeReport::CannotLearn { epoch, reason }));
            }
            Err(Failure { reason, .. }) => {
                self.push(Effect::Report(NodeReport::CannotLearn {
                    epoch,
                    reason: format!("{shard}: {reason}"),
                }));
            }
        }
    }

    /// Reports copies that are in memory.
    pub(super) fn learned(&mut self, shards: Vec<ShardId>) {
        if !shards.is_empty() {
            let (epoch, version) = (self.epoch, self.version);
            self.push(Effect::Report(NodeReport::Learned { epoch, version, shards }));
        }
    }

    /// Drops copies whose gradients of the step to apply are not here, and requests them again. A-4.
    pub(super) fn drop_missed(&mut self) {
        let missed: Vec<ShardId> =
            self.missed.iter().filter(|shard| self.shards.contains_key(shard)).copied().collect();
        self.drop_copies(missed);
    }

    /// A learner that was not prepared in time: the run goes on without it. A-4.
    pub(super) fn miss_step(&mut self, step: Step) {
        let copies: Vec<ShardId> = self.shards.keys().copied().collect();
        self.drop_copies(copies);
        // A copy under way may still come at this step or a later one.
        self.pending_copies.values_mut().for_each(|pending| pending.stash.clear());
        (self.version, self.prepared) = (step, None);
    }

    fn drop_copies(&mut self, shards: Vec<ShardId>) {
        if shards.is_empty() {
            return;
        }
        for shard in &shards {
            self.shards.remove(shard);
            if let Some(from) = self.sources.get(shard) {
                self.pending_copies.insert(*shard, PendingCopy::new(from.clone()));
            }
        }
        self.push(Effect::Release(shards));
    }

    /// A copied shard could not be installed: it is not here.
    pub(super) fn on_not_installed(&mut self, shard: ShardId, failure: Failure) {
        self.shards.remove(&shard);
        let epoch = self.epoch;
        let reason = format!("{shard}: {}", failure.reason);
        self.push(Effect::Report(NodeReport::CannotLearn { epoch, reason }));
    }

    /// Some shards may be a step ahead of others: none of them counts as held any more.
    pub(super) fn on_not_applied(&mut self, failure: &Failure) {
        let (epoch, version) = (self.epoch, self.version.previous());
        let all: Vec<ShardId> = std::mem::take(&mut self.shards).into_keys().collect();
        self.push(Effect::Release(all));
        self.push(Effect::Report(NodeReport::Behind { epoch, version, reason: failure.reason.clone() }));
    }
}
