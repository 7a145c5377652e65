//! What a supervisor finds on disk when it starts: nothing in a new run, the last state in one that resumes.

use volary_core::machine::{Committed, PersistentState, Restored};
use volary_core::messages::LastCommit;
use volary_storage::{Checkpoints, Result, Store, Table};

/// The key of the machine's persistent state in the store.
const CLUSTER: &str = "cluster";

/// The state of a run, as far as it is on disk.
pub(super) struct Recovery {
    pub(super) restored: Restored,
    /// The expert load of the last committed step, by MoE layer and expert.
    pub(super) load: Vec<Vec<u64>>,
    /// Whether the cluster had members, who may still hold their state.
    pub(super) restarted: bool,
}

impl Recovery {
    /// Reads the journal and the newest intact checkpoint. What is damaged, or newer than it, is removed;
    /// with no node left in memory, the journal too goes back to the checkpoint.
    pub(super) fn load(store: &Store, checkpoints: &Checkpoints, nodes_are_gone: bool) -> Result<Self> {
        let durable = checkpoints.latest_intact()?.map(|record| record.step);
        checkpoints.truncate_after(durable.unwrap_or_default())?;
        let mut persistent: PersistentState = store.get(Table::Facts, CLUSTER)?.unwrap_or_default();
        if nodes_are_gone {
            // No node holds the weights of later steps: those steps run again.
            store.truncate_after(durable.unwrap_or_default())?;
            persistent.members.clear();
        }
        let last: Option<Committed> = match store.last_committed()? {
            Some(step) => store.committed(step)?,
            None => None,
        };
        let load = last.as_ref().map(|committed| committed.load.clone()).unwrap_or_default();
        let restarted = !persistent.members.is_empty();
        let last = last.map(|c| LastCommit { epoch: c.epoch, step: c.step, update: c.update });
        Ok(Self { restored: Restored { durable, last, persistent }, load, restarted })
    }
}

/// Makes the machine's persistent state durable.
pub(super) fn persist(store: &Store, state: &PersistentState) -> Result<()> {
    store.put(Table::Facts, CLUSTER, state)
}
