//! The supervisor's disk.

use std::collections::{BTreeMap, BTreeSet};
use volary_core::machine::{Committed, PersistentState, Restored};
use volary_core::messages::LastCommit;
use volary_core::{ShardId, Step};

/// State that survives the supervisor's process.
#[derive(Debug, Default)]
pub(crate) struct Disk {
    pub(crate) journal: BTreeMap<Step, Committed>,
    /// The bits of loss and rate of every step that was ever committed: a repeated step must give the same.
    pub(crate) ever: BTreeMap<Step, (u64, u64)>,
    pub(crate) persistent: PersistentState,
    pub(crate) durable: Option<Step>,
    pub(crate) agreed: Option<Step>,
    /// Checkpoints that hold a corrupted copy.
    pub(crate) bad: BTreeSet<Step>,
    pub(crate) pending: Option<PendingCheckpoint>,
}

/// A checkpoint that is being written.
#[derive(Debug)]
pub(crate) struct PendingCheckpoint {
    pub(crate) attempt: u64,
    pub(crate) step: Step,
    pub(crate) wanted: BTreeSet<ShardId>,
    pub(crate) stored: BTreeSet<ShardId>,
}

impl Disk {
    pub(crate) fn last_step(&self) -> Step {
        self.journal.last_key_value().map(|(step, _)| *step).unwrap_or_default()
    }

    pub(crate) fn restored(&self) -> Restored {
        let last = self.journal.values().last();
        Restored {
            durable: self.durable,
            agreed: self.agreed,
            skipped_in_a_row: self.journal.values().rev().take_while(|step| !step.update.apply).count()
                as u64,
            last: last.map(|c| LastCommit { epoch: c.epoch, step: c.step, update: c.update }),
            persistent: self.persistent.clone(),
        }
    }
}
