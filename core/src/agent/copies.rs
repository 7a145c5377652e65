//! Background copies of shards for a later placement.

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
                self.push(Effect::Report(NodeReport::Learned { epoch, shards: vec![shard] }));
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
}
