//! What a supervisor finds on disk when it starts: nothing in a new run, the last state in one that resumes.

use crate::error::{Error, Result};
use crate::limits::MEMBERS_PER_RECORD;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use volary_core::machine::{Committed, PersistentState, Restored};
use volary_core::messages::LastCommit;
use volary_core::{Epoch, NodeId, Step};
use volary_storage::{Checkpoints, Store, Table, reconcile};

/// The key of the machine's persistent state among the facts of the store.
pub(super) const CLUSTER: &str = "cluster";

/// The beginning of the keys of further members.
const MEMBERS: &str = "cluster.members.";

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
        let mut persistent = load_state(store)?;
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
    Ok(load_state(store)?.members)
}

/// The machine's persistent state, as far as it fits into one record: further members are in records of their
/// own, which the first one names.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct StoredState {
    state: PersistentState,
    /// Records with further members.
    pages: usize,
}

impl StoredState {
    /// Writes all but the first record. The state is that of before until the first record is written.
    pub(super) fn prepare(store: &Store, mut state: PersistentState) -> volary_storage::Result<Self> {
        let further = state.members.split_off(state.members.len().min(MEMBERS_PER_RECORD));
        let pages = further.chunks(MEMBERS_PER_RECORD);
        let count = pages.len();
        for (number, page) in pages.enumerate() {
            store.put(Table::Facts, &page_key(state.epoch, number), &page)?;
        }
        Ok(Self { state, pages: count })
    }

    /// Removes records of states before this one, once it is written.
    pub(super) fn tidy_up(&self, store: &Store) -> volary_storage::Result<()> {
        let own: BTreeSet<String> =
            (0..self.pages).map(|number| page_key(self.state.epoch, number)).collect();
        for name in store.names(Table::Facts)? {
            if name.starts_with(MEMBERS) && !own.contains(&name) {
                store.remove(Table::Facts, &name)?;
            }
        }
        Ok(())
    }
}

/// The key of a record with members of a state.
fn page_key(epoch: Epoch, number: usize) -> String {
    format!("{MEMBERS}{}.{number}", epoch.0)
}

fn load_state(store: &Store) -> Result<PersistentState> {
    let StoredState { mut state, pages } = store.get(Table::Facts, CLUSTER)?.unwrap_or_default();
    for number in 0..pages {
        let page: Option<Vec<NodeId>> = store.get(Table::Facts, &page_key(state.epoch, number))?;
        state.members.extend(page.unwrap_or_default());
    }
    Ok(state)
}

/// The last checkpoint that all replicas agreed on.
fn last_agreed(store: &Store) -> volary_storage::Result<Option<Step>> {
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
///
/// # Errors
/// The store's.
pub fn persist(store: &Store, state: PersistentState) -> volary_storage::Result<()> {
    let stored = StoredState::prepare(store, state)?;
    store.put(Table::Facts, CLUSTER, &stored)?;
    stored.tidy_up(store)
}

#[cfg(test)]
mod tests {
    use super::*;
    use volary_storage::RunDir;

    #[test]
    fn the_members_of_a_cluster_of_any_size_are_stored_and_found() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&RunDir::create(folder.path().join("run")).unwrap()).unwrap();
        for (epoch, count) in [(1, 3), (2, MEMBERS_PER_RECORD), (3, 10_000), (4, 2_500), (4, 0)] {
            let name = |number: usize| NodeId::new(format!("{number:0100}"));
            let members: Vec<NodeId> = (0..count).map(name).collect();
            let state = PersistentState { epoch: Epoch(epoch), members, ..PersistentState::default() };
            persist(&store, state.clone()).unwrap();
            assert_eq!(load_state(&store).unwrap(), state);
            let pages = count.div_ceil(MEMBERS_PER_RECORD).saturating_sub(1);
            assert_eq!(store.names(Table::Facts).unwrap().len(), 1 + pages, "{count} members");
        }
    }
}
