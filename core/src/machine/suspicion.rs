//! Nodes that failed: since the last commit, and suspended ones.

use crate::ids::NodeId;
use crate::limits::{
    FAILURES_MAX, PAUSE_MS, REPORTS_MAX, SUSPENSION_DOUBLINGS_MAX, SUSPENSION_MAX_MS, SUSPENSION_MS,
};
use std::collections::{BTreeMap, BTreeSet};

/// Failures and their consequences in time.
#[derive(Debug, Default)]
pub(super) struct Suspicion {
    /// Reports of unreachable nodes since the last commit, by reporter and suspect.
    reports: BTreeMap<(NodeId, NodeId), u32>,
    /// Failures of each node by itself since the last commit.
    failures: BTreeMap<NodeId, u32>,
    /// Milliseconds left of each suspension.
    suspended_ms: BTreeMap<NodeId, u64>,
    /// Suspensions of each node so far.
    suspensions: BTreeMap<NodeId, u32>,
    paused_ms: u64,
}

impl Suspicion {
    /// Forgets all failures: the step was committed.
    pub(super) fn clear(&mut self) {
        self.reports.clear();
        self.failures.clear();
    }

    /// Records that `reporter` could not reach `suspect`.
    pub(super) fn record_report(&mut self, reporter: NodeId, suspect: NodeId) {
        *self.reports.entry((reporter, suspect)).or_default() += 1;
    }

    /// Records a failure of a node by itself. Returns whether there were too many.
    pub(super) fn record_failure(&mut self, node: &NodeId) -> bool {
        let failures = self.failures.entry(node.clone()).or_default();
        *failures += 1;
        *failures >= FAILURES_MAX
    }

    /// The nodes in reports, as reporters or suspects, once there are enough reports to act on.
    pub(super) fn reported(&self) -> BTreeSet<&NodeId> {
        if self.reports.values().sum::<u32>() < REPORTS_MAX {
            return BTreeSet::new();
        }
        self.reports.keys().flat_map(|(reporter, suspect)| [reporter, suspect]).collect()
    }

    /// The number of nodes that could not reach `node`.
    pub(super) fn reporters_of(&self, node: &NodeId) -> usize {
        self.reports.keys().filter(|(_, suspect)| suspect == node).count()
    }

    pub(super) fn is_suspended(&self, node: &NodeId) -> bool {
        self.suspended_ms.contains_key(node)
    }

    /// Does not use a node for a while.
    pub(super) fn suspend(&mut self, node: &NodeId) {
        let suspensions = self.suspensions.entry(node.clone()).or_default();
        let ms = (SUSPENSION_MS << (*suspensions).min(SUSPENSION_DOUBLINGS_MAX)).min(SUSPENSION_MAX_MS);
        *suspensions += 1;
        self.suspended_ms.insert(node.clone(), ms);
    }

    /// Changes no placement for a while.
    pub(super) fn pause(&mut self) {
        self.paused_ms = PAUSE_MS;
    }

    pub(super) fn is_paused(&self) -> bool {
        self.paused_ms > 0
    }

    /// Lets time pass. Returns whether a suspension or the pause ended.
    pub(super) fn pass(&mut self, ms: u64) -> bool {
        let (before, paused) = (self.suspended_ms.len(), self.is_paused());
        self.suspended_ms.retain(|_, left| {
            *left = left.saturating_sub(ms);
            *left > 0
        });
        self.paused_ms = self.paused_ms.saturating_sub(ms);
        self.suspended_ms.len() < before || (paused && !self.is_paused())
    }
}
