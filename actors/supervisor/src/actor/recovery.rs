//! What a supervisor finds on disk when it starts: nothing in a new run, the last state in one that resumes.

use crate::error::{Error, Result};
use volary_core::machine::{Committed, PersistentState, Restored};
use volary_core::messages::LastCommit;
use volary_core::{NodeId, Step};
use volary_storage::{Checkpoints, Store, Table, reconcile};

/// The key of the machine's persistent state among the facts of the store.
pub(super) const CLUSTER: &str = "cluster";

/// The key of the last checkpoint that all replicas agreed on.
pub(super) const AGREED: &str = "agreed_checkpoint";

/// The state of a run, as far as it is on disk.
pub(super) struct Recovery {
    pub(super) restored: Restored,
    /// The expert load of the last committed step, by MoE layer and expert.
    pub(super) load: Vec<Vec<u64>>,
    /// Whether the cluster had members, who may still hold their state.
    pub(super) restarted: bool,
}

impl Recovery {
    /// Reads the end of the journal and the catalogue, and reconciles them. It reads no checkpoint: nodes
    /// that return with their state need none, and the machine asks for one before it is loaded.
    pub(super) fn load(
        store: &Store,
        checkpoints: &Checkpoints,
        nodes_are_gone: bool,
        max_skipped_steps: u64,
    ) -> Result<Self> {
        let mut persistent: PersistentState = store.get(Table::Facts, CLUSTER)?.unwrap_or_default();
        let reconciled = reconcile(store, checkpoints, persistent.timeline)?;
        if let Some(step) = reconciled.rebased {
            tracing::warn!(%step, "the journal has lost its end; the run continues after its checkpoint");
        }
        for step in reconciled.abandoned {
            tracing::info!(%step, "a checkpoint of an earlier timeline is removed");
        }
        if nodes_are_gone {
            persistent.members.clear();
        }
        let last: Option<Committed> = match store.last_committed()? {
            Some(step) => store.committed(step)?,
            None => None,
        };
        let load = last.as_ref().map(|committed| committed.load.clone()).unwrap_or_default();
        let restarted = !persistent.members.is_empty();
        let last = last.map(|c| LastCommit { epoch: c.epoch, step: c.step, update: c.update });
        let durable = checkpoints.latest()?.map(|record| record.step);
        let agreed = last_agreed(store)?.filter(|step| checkpoints.at(*step).is_ok());
        let skipped_in_a_row = match &last {
            Some(last) => skipped_until(store, last.step, max_skipped_steps)?,
            None => 0,
        };
        Ok(Self {
            restored: Restored { durable, agreed, last, skipped_in_a_row, persistent },
            load,
            restarted,
        })
    }
}

/// The number of skipped steps up to `last` in the journal, at most `most`.
fn skipped_until(store: &Store, last: Step, most: u64) -> Result<u64> {
    for count in 0..most.min(last.0) {
        let committed: Option<Committed> = store.committed(Step(last.0 - count))?;
        if committed.is_none_or(|committed| committed.update.apply) {
            return Ok(count);
        }
    }
    Ok(most.min(last.0))
}

/// The members of the last placement, which may return.
pub(crate) fn last_members(store: &Store) -> Result<Vec<NodeId>> {
    let persistent: PersistentState = store.get(Table::Facts, CLUSTER)?.unwrap_or_default();
    Ok(persistent.members)
}

/// The last checkpoint that all replicas agreed on.
pub(crate) fn last_agreed(store: &Store) -> volary_storage::Result<Option<Step>> {
    store.get(Table::Facts, AGREED)
}

/// The newest intact checkpoint up to `step`, by all of its bytes.
///
/// # Errors
/// A damaged checkpoint, unless an operator has allowed the run to go back past it: then it is set aside. A
/// failed read, which may pass.
pub(super) fn newest_intact(
    checkpoints: &Checkpoints,
    step: Step,
    may_go_back: bool,
) -> Result<Option<Step>> {
    let steps = checkpoints.steps()?.into_iter().filter(|at| *at <= step);
    for step in steps.rev() {
        match checkpoints.verify(step) {
            Ok(()) => return Ok(Some(step)),
            Err(damage) if damage.is_damage() && may_go_back => {
                tracing::error!(%step, %damage, "a damaged checkpoint is set aside: the run goes back past it");
                checkpoints.set_aside(step)?;
            }
            Err(damage) if damage.is_damage() => return Err(Error::DamagedCheckpoint { step, damage }),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(None)
}

/// Makes the machine's persistent state durable.
pub(super) fn persist(store: &Store, state: &PersistentState) -> volary_storage::Result<()> {
    store.put(Table::Facts, CLUSTER, state)
}
