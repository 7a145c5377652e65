//! When checkpoints are written, and the end of a run, which waits for its last one.

use super::state::{Checkpoint, Phase};
use super::{Effect, Machine, Notice};
use crate::ids::{NodeId, ShardId, Step};
use crate::limits::ATTEMPTS_MAX;
use crate::messages::NodeCommand;
use std::collections::BTreeMap;

impl Machine {
    /// Begins a checkpoint if one is due; `last` asks for one at the end of the run.
    pub(super) fn checkpoint_if_due(&mut self, last: bool) {
        let every = self.settings.checkpoint.every;
        let due = self.checkpoint_requested || last || (every > 0 && self.committed.is_multiple_of(every));
        let durable = self.durable == Some(self.committed) || self.committed == Step(0);
        if !due || durable || self.checkpoint.is_some() {
            return;
        }
        self.checkpoint_requested = false;
        let (epoch, step) = (self.placement.epoch, self.committed);
        self.checkpoint = Some(Checkpoint { step, elapsed_ms: 0 });
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

    /// Whether the checkpoint of `step` is being written.
    pub(super) fn is_writing_checkpoint(&self, step: Step) -> bool {
        self.checkpoint.is_some_and(|checkpoint| checkpoint.step == step)
    }

    pub(super) fn on_checkpoint_stored(&mut self, step: Step) {
        // An abandoned checkpoint that became durable after all does not count: if the run went back
        // meanwhile, the step may not exist.
        if !self.is_writing_checkpoint(step) {
            return;
        }
        self.durable = self.durable.max(Some(step));
        self.notice(Notice::Checkpoint { step });
        self.end_checkpoint(step);
    }

    pub(super) fn on_checkpoint_failed(&mut self, step: Step, reason: String) {
        self.notice(Notice::CheckpointFailed { step, reason: reason.clone() });
        let last = matches!(self.phase, Phase::Finishing) && step == self.committed;
        if last && self.is_writing_checkpoint(step) {
            let reason = format!("the last checkpoint (step {step}) could not be written: {reason}");
            return self.end(Effect::Fatal { reason });
        }
        self.end_checkpoint(step);
    }

    /// Abandons a checkpoint that takes too long. The last one of a run starts over.
    pub(super) fn watch_checkpoint(&mut self, ms: u64) {
        let Some(checkpoint) = &mut self.checkpoint else { return };
        checkpoint.elapsed_ms = checkpoint.elapsed_ms.saturating_add(ms);
        let Checkpoint { step, elapsed_ms } = *checkpoint;
        let limit = self.settings.cluster.step_timeout_ms;
        if elapsed_ms < limit {
            return;
        }
        let reason = format!("its shards did not arrive within {limit} ms");
        self.effects.push(Effect::DropCheckpoint { step });
        self.notice(Notice::CheckpointFailed { step, reason: reason.clone() });
        self.retry.attempts += 1;
        if self.retry.attempts > ATTEMPTS_MAX {
            return self.end(Effect::Fatal { reason: format!("the checkpoint of step {step}: {reason}") });
        }
        self.checkpoint = None;
        if matches!(self.phase, Phase::Finishing) {
            // A node may have missed the last commit: a new epoch brings it.
            self.abort(&format!("the checkpoint of step {step}: {reason}"));
        }
    }

    fn end_checkpoint(&mut self, step: Step) {
        self.checkpoint.take_if(|checkpoint| checkpoint.step == step);
        if matches!(self.phase, Phase::Finishing) {
            self.checkpoint_if_due(true);
            self.finish_when_durable();
        }
    }

    pub(super) fn finish_when_durable(&mut self) {
        let durable = self.committed == Step(0) || self.durable == Some(self.committed);
        if durable && self.checkpoint.is_none() {
            self.end(Effect::Done);
        }
    }
}
