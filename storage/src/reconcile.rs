//! What a supervisor does first with the journal and the catalogue, which a crash may have left apart.

use crate::checkpoint::Checkpoints;
use crate::disk::Disk;
use crate::error::Result;
use crate::journal::Store;
use volary_core::{Step, Timeline};

/// What [`reconcile`] found and did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reconciled {
    /// The database had lost the end of the journal. The run continues after this checkpoint, and no
    /// committed step is lost.
    pub rebased: Option<Step>,
    /// Checkpoints of steps that a return to an earlier one has undone. They are removed.
    pub abandoned: Vec<Step>,
}

/// Reconciles the catalogue with the journal of a run in its present `timeline`: a checkpoint after the last
/// committed step is of this timeline, so that the database has lost the steps up to it; or of an earlier
/// one, so that it is void.
///
/// # Errors
/// [`Error::Database`](crate::Error::Database), [`Error::Io`](crate::Error::Io) or a damaged record.
pub fn reconcile<D: Disk>(
    store: &Store,
    checkpoints: &Checkpoints<D>,
    timeline: Timeline,
) -> Result<Reconciled> {
    let mut report = Reconciled::default();
    let committed = store.last_committed()?.unwrap_or_default();
    for step in checkpoints.steps()?.into_iter().rev().take_while(|step| *step > committed) {
        if checkpoints.at(step)?.timeline < timeline {
            checkpoints.discard(step)?;
            report.abandoned.push(step);
        } else if report.rebased.is_none() {
            store.rebase(step)?;
            report.rebased = Some(step);
        }
    }
    Ok(report)
}
