//! Nodes that fail, cannot be reached, or have fallen behind: the step is tried again, and whoever stands in its way
//! is shut out. Shut out, a node may join anew; it is not used again before some time has passed.

use super::{ATTEMPTS_MAX, Effect, Machine, Notice, Phase};
use crate::ids::NodeId;
use std::collections::{BTreeMap, BTreeSet};

/// Complaints about unreachable nodes within one step after which somebody is shut out: one may be a death that
/// everybody is about to hear of.
const REPORTS_MAX: u32 = 2;
/// Failures of one node within one step, of whatever kind, after which it is shut out if it can be spared.
const FAILURES_MAX: u32 = 3;
/// Attempts at a step that follow one another at once where a node cannot be reached that cannot be spared; after these, each
/// waits for the network.
const IMMEDIATE_ATTEMPTS_MAX: u32 = 4;
/// For how long a node that was shut out is not used, in milliseconds; twice as long each time.
const SUSPENSION_MS: u64 = 5_000;
/// The longest suspension, in milliseconds.
const SUSPENSION_MAX_MS: u64 = 300_000;
/// How long nothing is moved after a background copy failed, in milliseconds.
const PAUSE_MS: u64 = 5_000;

/// Who is not trusted, and for how long.
#[derive(Debug, Default)]
pub(super) struct Suspicion {
    /// Who could not reach whom, since the last commit.
    reports: BTreeMap<(NodeId, NodeId), u32>,
    /// How often a node failed by itself, since the last commit.
    failures: BTreeMap<NodeId, u32>,
    /// Milliseconds left.
    suspended: BTreeMap<NodeId, u64>,
    /// How often each was shut out.
    times: BTreeMap<NodeId, u32>,
    paused_ms: u64,
}

impl Suspicion {
    /// A step was committed: whatever was in its way is not any more.
    pub(super) fn clear(&mut self) {
        self.reports.clear();
        self.failures.clear();
    }

    pub(super) fn is_suspended(&self, node: &NodeId) -> bool {
        self.suspended.contains_key(node)
    }

    pub(super) fn is_paused(&self) -> bool {
        self.paused_ms > 0
    }

    /// Lets time pass. Whether somebody may be used again, or something moved.
    pub(super) fn pass(&mut self, ms: u64) -> bool {
        let (before, paused) = (self.suspended.len(), self.paused_ms > 0);
        self.suspended.retain(|_, left| {
            *left = left.saturating_sub(ms);
            *left > 0
        });
        self.paused_ms = self.paused_ms.saturating_sub(ms);
        self.suspended.len() < before || (paused && self.paused_ms == 0)
    }

    fn suspend(&mut self, node: &NodeId) {
        let times = self.times.entry(node.clone()).or_default();
        let ms = (SUSPENSION_MS << (*times).min(6)).min(SUSPENSION_MAX_MS);
        *times += 1;
        self.suspended.insert(node.clone(), ms);
    }
}

impl Machine {
    pub(super) fn on_failed(&mut self, node: &NodeId, reason: &str, fatal: bool, suspect: Option<NodeId>) {
        let learner = !self.placement.is_member(node);
        if learner {
            // It has no part in the step yet; the run must not hang on it.
            return self.on_cannot_learn(node, reason.to_owned());
        }
        let reason = format!("{node}: {reason}");
        if let Some(suspect) = suspect
            && self.nodes.contains_key(&suspect)
        {
            *self.suspicion.reports.entry((node.clone(), suspect.clone())).or_default() += 1;
            if let Some(culprit) = self.culprit() {
                return self.fence(&culprit, &format!("a link to it is broken ({reason})"));
            }
            if !fatal && self.attempts >= IMMEDIATE_ATTEMPTS_MAX {
                return self.wait_for_network(suspect, &reason);
            }
        } else {
            // It fails by itself: its device, its memory, an actor. Others may have what it has.
            let failures = self.suspicion.failures.entry(node.clone()).or_default();
            *failures += 1;
            if (fatal || *failures >= FAILURES_MAX) && self.is_dispensable(node) {
                return self.fence(node, &reason);
            }
        }
        self.try_again(&reason, fatal);
    }

    /// Of two nodes that cannot reach each other: the one that more complain of; if that does not tell, the one that
    /// does less. Never one without which a shard would be lost.
    fn culprit(&self) -> Option<NodeId> {
        let reports = &self.suspicion.reports;
        if reports.values().sum::<u32>() < REPORTS_MAX {
            return None;
        }
        let about = |node: &NodeId| reports.keys().filter(|(_, accused)| accused == node).count();
        let named: BTreeSet<&NodeId> = reports.keys().flat_map(|(by, about)| [by, about]).collect();
        let mut named: Vec<&NodeId> =
            named.into_iter().filter(|node| self.nodes.contains_key(node) && !self.is_needed(node)).collect();
        named.sort_by_key(|node| {
            let capacity = self.nodes.get(*node).map_or(0.0, |n| n.profile.capacity());
            (about(node), std::cmp::Reverse(capacity.to_bits()), *node)
        });
        named.last().map(|node| (*node).clone())
    }

    /// Whether a node has the last copy of something.
    fn is_needed(&self, node: &NodeId) -> bool {
        self.holders.values().any(|nodes| nodes.len() == 1 && nodes.contains(node))
    }

    /// Whether the run can go on without a node.
    fn is_dispensable(&self, node: &NodeId) -> bool {
        self.nodes.len() > 1 && !self.is_needed(node) && !self.holders.is_empty()
    }

    /// A step, or the move to a placement, took too long: whoever is waited for is shut out if it can be spared, and the step
    /// runs again.
    pub(super) fn on_too_slow(&mut self, reason: &str) {
        let waiting: BTreeSet<NodeId> = match &self.phase {
            Phase::Placing { waiting } => waiting.clone(),
            Phase::Training { prepared, .. } => {
                self.voters().into_iter().filter(|node| !prepared.contains_key(node)).collect()
            }
            _ => BTreeSet::new(),
        };
        let (members, learners): (Vec<NodeId>, Vec<NodeId>) =
            waiting.into_iter().partition(|node| self.placement.is_member(node));
        // Where everybody is waited for, nobody stands out.
        let others = members.len() < self.placement.members.len();
        if let Some(node) = members.iter().find(|node| others && self.is_dispensable(node)) {
            return self.fence(node, reason);
        }
        let only_learners = members.is_empty() && !learners.is_empty();
        learners.iter().for_each(|node| self.fence(node, reason));
        if !only_learners {
            self.try_again(reason, false);
        }
    }

    /// Shuts a node out. It may join anew, with nothing.
    pub(super) fn fence(&mut self, node: &NodeId, reason: &str) {
        if self.nodes.remove(node).is_none() {
            return;
        }
        self.suspicion.suspend(node);
        self.notice(Notice::Fenced { node: node.clone(), reason: reason.into() });
        self.effects.push(Effect::Fence { node: node.clone(), reason: reason.into() });
        self.on_node_removed(node, reason);
    }

    /// A copy beside the training failed: the newcomer waits a while, and so does whatever was to move.
    pub(super) fn on_cannot_learn(&mut self, node: &NodeId, reason: String) {
        if !self.placement.is_learning(node) {
            return;
        }
        self.notice(Notice::MigrationFailed { node: node.clone(), reason: reason.clone() });
        self.mark_placement_dirty();
        if self.placement.is_member(node) {
            self.suspicion.paused_ms = PAUSE_MS;
        } else {
            self.fence(node, &reason);
        }
    }

    /// Two nodes cannot reach each other and neither can be spared: the same step again when `cluster.node_timeout_ms` has passed, for as
    /// long as a run waits for nodes.
    fn wait_for_network(&mut self, suspect: NodeId, reason: &str) {
        if self.blocked_ms >= self.settings.cluster.gather_timeout_ms {
            return self.end(Effect::Fatal { reason: reason.into() });
        }
        self.drop_step(reason);
        (self.phase, self.idle_ms) = (Phase::Gathering, 0);
        self.wanted_nodes = 1;
        self.awaited = BTreeSet::from([suspect]);
    }

    /// The same step again, unless that cannot help or has been tried too often.
    pub(super) fn try_again(&mut self, reason: &str, fatal: bool) {
        self.attempts += 1;
        if fatal || self.attempts > ATTEMPTS_MAX {
            return self.end(Effect::Fatal { reason: reason.into() });
        }
        self.abort(reason);
    }
}
