//! Numbers that are not finite: steps that are skipped, and runs that break.
//!
//! A step whose gradients hold NaN or infinity is skipped: its update is not applied (GLaM, section 6). Many
//! in a row, or weights that are not finite themselves, mean that the run is broken; `training.on_nan` says
//! what follows.

use super::state::Phase;
use super::{Effect, Machine, Notice, PersistentState};
use crate::ids::{NodeId, ShardId, Step};
use crate::limits::RETURNS_MAX;
use crate::options::OnNan;

impl Machine {
    /// Counts skipped steps in a row; any other step ends the row.
    pub(super) fn count_skipped(&mut self, is_applied: bool) {
        self.skipped_in_a_row = if is_applied { 0 } else { self.skipped_in_a_row + 1 };
    }

    /// A node was to store a shard for a checkpoint, and its weights are not finite: no checkpoint may hold
    /// them.
    pub(super) fn on_not_finite(&mut self, step: Step, shard: ShardId) {
        let reason = format!("the weights of {shard} are not finite");
        if let Some(checkpoint) = self.checkpoint.take_if(|checkpoint| checkpoint.step == step) {
            self.effects.push(Effect::DropCheckpoint { attempt: checkpoint.attempt });
            self.notice(Notice::CheckpointFailed { step, reason: reason.clone() });
            self.broken_weights = Some(reason);
            self.release_drained();
            if matches!(self.phase, Phase::Finishing(_)) {
                self.end_broken();
            }
        }
    }

    /// Why the run is broken, if it is.
    pub(super) fn broken(&self) -> Option<String> {
        let most = self.settings.training.max_skipped_steps;
        let skipped = || {
            let reason = format!("{most} steps in a row were skipped: their gradients were not finite");
            (self.skipped_in_a_row >= most).then_some(reason)
        };
        self.broken_weights.clone().or_else(skipped)
    }

    /// At a boundary between steps: follows `training.on_nan` if the run is broken. Returns whether it did.
    pub(super) fn handle_broken(&mut self, over: bool) -> bool {
        let Some(reason) = self.broken() else { return false };
        match self.settings.training.on_nan {
            _ if self.stopping => self.broken_weights.is_some() && self.end_broken(),
            // Skipping heals no weights.
            OnNan::Skip if self.broken_weights.is_none() && !over => false,
            OnNan::Skip | OnNan::Stop => self.end_broken(),
            OnNan::GoBack => {
                let checkpoint = self.durable.unwrap_or_default();
                if self.data_skips.returns_to(checkpoint) >= RETURNS_MAX {
                    return self.end_broken();
                }
                let broken = (self.committed.0 - checkpoint.0).max(self.skipped_in_a_row);
                self.data_skips.add(checkpoint, broken);
                let (from, to, data) =
                    (self.committed, checkpoint, self.data_skips.data_step(checkpoint.next()));
                let notice = Notice::WentBackFromNan { from, to, data, reason: reason.clone() };
                self.go_back(notice);
                self.place(&reason);
                true
            }
        }
    }

    /// Ends a broken run. What the nodes hold is not written: it must not push out a healthy checkpoint.
    fn end_broken(&mut self) -> bool {
        let Some(why) = self.broken() else { return false };
        let checkpoint = self.durable.unwrap_or_default();
        let returns = self.data_skips.returns_to(checkpoint);
        let again = match returns {
            0 => String::new(),
            _ => format!(" again, after {returns} returns to the checkpoint of step {checkpoint}"),
        };
        let reason = format!(
            "the run is broken{again}: {why} (last step {}); a lower learning rate, `training.clip_norm` or other \
             data may help",
            self.committed
        );
        self.end(Effect::Fatal { reason });
        true
    }

    /// Goes back to the newest checkpoint, or to the seed: no state in memory counts any more.
    pub(super) fn go_back(&mut self, notice: Notice) {
        let checkpoint = self.durable.unwrap_or_default();
        self.timeline = self.timeline.next();
        self.notice(notice);
        if let Some(abandoned) = self.checkpoint.take() {
            self.effects.push(Effect::DropCheckpoint { attempt: abandoned.attempt });
        }
        let state = self.persistent(self.placement.members.clone());
        self.effects.push(Effect::GoBack { step: checkpoint, state });
        self.last = None;
        self.committed = checkpoint;
        self.validated = self.validated.filter(|&step| step <= checkpoint);
        // No checkpoint is written while steps are skipped.
        (self.skipped_in_a_row, self.broken_weights) = (0, None);
        self.holders.clear();
        self.away.clear();
        self.forget_comparisons();
    }

    /// The state of the cluster that outlives this process.
    pub(super) fn persistent(&self, members: Vec<NodeId>) -> PersistentState {
        let (epoch, timeline) = (self.placement.epoch, self.timeline);
        PersistentState { epoch, timeline, members, data_skips: self.data_skips.clone() }
    }
}
