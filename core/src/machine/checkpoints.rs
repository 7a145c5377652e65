//! When checkpoints are written, and the end of a run, which waits for its last one.

use super::{ATTEMPTS_MAX, Effect, Machine, Notice, Phase};
use crate::ids::{NodeId, ShardId, Step};
use crate::messages::NodeCommand;
use std::collections::BTreeMap;

impl Machine {
    pub(super) fn checkpoint_if_due(&mut self, over: bool) {
        let every = self.settings.checkpoint.every;
        let due = self.checkpoint_wanted || over || (every > 0 && self.committed.is_multiple_of(every));
        let there = self.durable == Some(self.committed) || self.committed == Step(0);
        if !due || there || self.checkpointing.is_some() {
            return;
        }
        self.checkpoint_wanted = false;
        let (epoch, step) = (self.placement.epoch, self.committed);
        self.checkpointing = Some(step);
        self.checkpoint_ms = 0;
        let shards = self.settings.architecture.shards();
        let mut senders: BTreeMap<NodeId, Vec<ShardId>> = BTreeMap::new();
        for &shard in &shards {
            if let Some(owner) = self.placement.owner(shard) {
                senders.entry(owner.clone()).or_default().push(shard);
            }
        }
        self.effects.push(Effect::OpenCheckpoint { step, epoch, shards });
        for (node, shards) in senders {
            self.effects
                .push(Effect::Send { node, message: NodeCommand::Checkpoint { epoch, step, shards } });
        }
    }

    pub(super) fn on_checkpoint_stored(&mut self, step: Step) {
        // One that was given up and made it all the same may be gone again by now, if the run went back meanwhile.
        if self.checkpointing != Some(step) {
            return;
        }
        self.durable = self.durable.max(Some(step));
        self.notice(Notice::Checkpoint { step });
        self.checkpoint_ended(step);
    }

    pub(super) fn on_checkpoint_failed(&mut self, step: Step, reason: String) {
        self.notice(Notice::CheckpointFailed { step, reason: reason.clone() });
        if matches!(self.phase, Phase::Finishing)
            && self.checkpointing == Some(step)
            && step == self.committed
        {
            let reason = format!("the last checkpoint (step {step}) could not be written: {reason}");
            return self.end(Effect::Fatal { reason });
        }
        self.checkpoint_ended(step);
    }

    /// A checkpoint that does not come, for whatever reason, is given up; the last one of a run is begun again.
    pub(super) fn watch_checkpoint(&mut self, ms: u64) {
        let Some(step) = self.checkpointing else { return };
        self.checkpoint_ms = self.checkpoint_ms.saturating_add(ms);
        let limit = self.settings.cluster.step_timeout_ms;
        if self.checkpoint_ms < limit {
            return;
        }
        let reason = format!("its shards did not come within {limit} ms");
        self.effects.push(Effect::DropCheckpoint { step });
        self.notice(Notice::CheckpointFailed { step, reason: reason.clone() });
        self.attempts += 1;
        if self.attempts > ATTEMPTS_MAX {
            return self.end(Effect::Fatal { reason: format!("the checkpoint of step {step}: {reason}") });
        }
        self.checkpointing = None;
        if matches!(self.phase, Phase::Finishing) {
            // Somebody may not have heard of the last commit: a new epoch brings it.
            self.abort(&format!("the checkpoint of step {step}: {reason}"));
        }
    }

    pub(super) fn checkpoint_ended(&mut self, step: Step) {
        if self.checkpointing == Some(step) {
            self.checkpointing = None;
        }
        if matches!(self.phase, Phase::Finishing) {
            self.checkpoint_if_due(true);
            self.finish_when_durable();
        }
    }

    pub(super) fn finish_when_durable(&mut self) {
        if self.checkpointing.is_none() && (self.committed == Step(0) || self.durable == Some(self.committed))
        {
            self.end(Effect::Done);
        }
    }
}
