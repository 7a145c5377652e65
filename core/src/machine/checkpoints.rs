//! When checkpoints are written, and the end of a run, which waits for its last one.

use super::state::{Checkpoint, Finish, Phase};
use super::{Effect, Machine, Notice};
use crate::ids::{NodeId, ShardId, Step};
use crate::messages::NodeCommand;
use std::collections::BTreeMap;

impl Machine {
    /// Begins a checkpoint if one is due; `last` asks for one at the end of the run.
    pub(super) fn checkpoint_if_due(&mut self, last: bool) {
        let every = self.settings.checkpoint.every;
        let in_turn = every > 0 && self.committed.is_multiple_of(every);
        if self.is_durable() || !(self.checkpoint_requested || last || in_turn) {
            return;
        }
        let passed = match &self.checkpoint {
            Some(writing) if writing.step == self.committed => return,
            Some(writing) => format!("the checkpoint of step {} is still being written", writing.step),
            // What was broken at an earlier step must not push out a healthy checkpoint.
            None if self.skipped_in_a_row > 0 && !last && !self.checkpoint_requested => {
                let (count, s) = (self.skipped_in_a_row, if self.skipped_in_a_row == 1 { "" } else { "s" });
                format!("{count} step{s} up to this one were skipped")
            }
            None => return self.begin_checkpoint(),
        };
        if in_turn && self.passed != Some(self.committed) {
            self.passed = Some(self.committed);
            self.notice(Notice::CheckpointPassed { step: self.committed, reason: passed });
        }
    }

    /// Whether nothing is committed after the last durable checkpoint.
    pub(super) fn is_durable(&self) -> bool {
        self.committed == self.durable.unwrap_or_default()
    }

    fn begin_checkpoint(&mut self) {
        self.checkpoint_requested = false;
        let (epoch, step) = (self.placement.epoch, self.committed);
        self.checkpoint_attempts += 1;
        let attempt = self.checkpoint_attempts;
        let shards = self.settings.architecture.shards().into_iter();
        let senders: BTreeMap<ShardId, NodeId> =
            shards.filter_map(|shard| Some((shard, self.checkpoint_sender(shard)?))).collect();
        let mut commands: BTreeMap<NodeId, Vec<ShardId>> = BTreeMap::new();
        for (&shard, node) in &senders {
            commands.entry(node.clone()).or_default().push(shard);
        }
        let nodes = commands.keys().cloned().collect();
        self.checkpoint = Some(Checkpoint { attempt, step, senders: nodes, elapsed_ms: 0 });
        let timeline = self.timeline;
        self.effects.push(Effect::OpenCheckpoint { attempt, step, epoch, timeline, senders });
        for (node, shards) in commands {
            self.effects
                .push(Effect::Send { node, message: NodeCommand::Checkpoint { epoch, step, shards } });
        }
    }

    /// The node that stores a shard: its owner, or another holder while the placement changes.
    fn checkpoint_sender(&self, shard: ShardId) -> Option<NodeId> {
        let holders = self.holders.get(&shard)?;
        let owner = self.placement.owner(shard).filter(|owner| holders.contains(*owner));
        owner.or_else(|| holders.first()).cloned()
    }

    pub(super) fn on_checkpoint_stored(&mut self, attempt: u64) {
        // An abandoned checkpoint that became durable after all does not count: if the run went back
        // meanwhile, the step may not exist.
        let Some(checkpoint) = self.checkpoint.take_if(|c| c.attempt == attempt) else { return };
        let step = checkpoint.step;
        self.durable = self.durable.max(Some(step));
        self.verified = self.durable;
        self.notice(Notice::Checkpoint { step });
        self.on_later_checkpoint(step, checkpoint.senders);
        self.release_drained();
        self.finish_when_durable();
    }

    /// A node cannot store a shard.
    pub(super) fn on_shard_not_stored(&mut self, node: &NodeId, step: Step, reason: &str) {
        if let Some(checkpoint) = self.checkpoint.take_if(|c| c.step == step && c.senders.contains(node)) {
            self.effects.push(Effect::DropCheckpoint { attempt: checkpoint.attempt });
            self.checkpoint_failed(step, format!("{node}: {reason}"));
        }
    }

    pub(super) fn on_checkpoint_failed(&mut self, attempt: u64, reason: String) {
        if let Some(checkpoint) = self.checkpoint.take_if(|c| c.attempt == attempt) {
            self.checkpoint_failed(checkpoint.step, reason);
        }
    }

    /// Abandons a checkpoint that takes too long, and repeats the last one of a run when its wait is over.
    pub(super) fn watch_checkpoint(&mut self, ms: u64) {
        if let Some(checkpoint) = &mut self.checkpoint {
            checkpoint.elapsed_ms = checkpoint.elapsed_ms.saturating_add(ms);
            let limit = self.settings.cluster.step_timeout_ms;
            if checkpoint.elapsed_ms >= limit {
                let (attempt, step) = (checkpoint.attempt, checkpoint.step);
                self.checkpoint = None;
                self.effects.push(Effect::DropCheckpoint { attempt });
                self.checkpoint_failed(step, format!("its shards did not arrive within {limit} ms"));
            }
        }
        if matches!(self.phase, Phase::Finishing(_)) && self.checkpoint.is_none() && self.retry.wait_ms == 0 {
            self.checkpoint_if_due(true);
        }
    }

    /// The next checkpoint follows in its turn; the last one of a run is repeated.
    fn checkpoint_failed(&mut self, step: Step, reason: String) {
        self.notice(Notice::CheckpointFailed { step, reason: reason.clone() });
        self.release_drained();
        let Phase::Finishing(finish) = &self.phase else { return };
        let why = match finish {
            Finish::GiveUp(why) => format!("{why}; "),
            Finish::Complete | Finish::Empty => String::new(),
        };
        match self.retry.after_failure() {
            Some(wait_ms) => self.retry.wait_ms = wait_ms,
            None => {
                let reason = format!("{why}the checkpoint of step {step} could not be written: {reason}");
                self.end(Effect::Fatal { reason });
            }
        }
    }

    /// Writes a checkpoint of the last committed step, then does what `finish` says.
    pub(super) fn finish(&mut self, finish: Finish) {
        self.phase = Phase::Finishing(finish);
        self.idle_ms = 0;
        self.checkpoint_if_due(true);
        self.finish_when_durable();
    }

    pub(super) fn finish_when_durable(&mut self) {
        let Phase::Finishing(finish) = &self.phase else { return };
        if self.checkpoint.is_some() {
            return;
        }
        if !self.is_durable() {
            return self.checkpoint_if_due(true);
        }
        match finish.clone() {
            Finish::Complete => self.end(Effect::Done),
            Finish::Empty => self.release_all(),
            Finish::GiveUp(reason) => self.end(Effect::Fatal { reason }),
        }
    }

    /// Ends a run that cannot go on. What the nodes hold is written to a checkpoint first.
    pub(super) fn give_up(&mut self, reason: String) {
        if self.is_durable() || self.lost_shard().is_some() {
            return self.end(Effect::Fatal { reason });
        }
        if !matches!(self.phase, Phase::Gathering(_)) {
            self.drop_step(&reason);
        }
        self.notice(Notice::GivingUp { step: self.committed, reason: reason.clone() });
        self.retry = super::Retry::default();
        self.finish(Finish::GiveUp(reason));
    }
}
