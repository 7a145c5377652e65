//! Waiting for nodes: at the start of a run, after a loss, and while the network is broken.

use super::state::{CapacityShortage, Gathering, Phase, Readiness};
use super::{Effect, Machine, Notice};
use crate::ids::{Epoch, NodeId, ShardId, Step};
use std::collections::BTreeSet;

impl Machine {
    /// Starts when the wanted and awaited nodes are here, and gives up after `cluster.gather_timeout_ms`.
    pub(super) fn gather(&mut self) {
        if !matches!(self.phase, Phase::Gathering(_)) {
            return;
        }
        if self.committed >= self.settings.training.last_step() && self.is_durable() {
            // The supervisor died after its last effect.
            return self.end(Effect::Done);
        }
        match self.readiness() {
            Readiness::Wait => {}
            Readiness::Start => {
                if let Phase::Gathering(gathering) = &mut self.phase {
                    gathering.awaited.clear();
                }
                if self.idle_ms >= self.settings.cluster.return_timeout_ms {
                    // They had their time.
                    self.away.clear();
                }
                self.place("enough nodes have joined");
            }
            Readiness::GiveUp(reason) => self.give_up(reason),
        }
    }

    fn readiness(&self) -> Readiness {
        let Phase::Gathering(gathering) = &self.phase else { return Readiness::Wait };
        let unchanged = |shortage: &CapacityShortage| shortage.nodes.iter().eq(self.nodes.keys());
        let is_short = gathering.shortage.as_ref().is_some_and(unchanged);
        if gathering.verifying || self.idle_ms < gathering.pause_ms {
            return Readiness::Wait;
        }
        if !is_short && self.has_enough_nodes(gathering) {
            return Readiness::Start;
        }
        let limit = self.settings.cluster.gather_timeout_ms;
        if self.idle_ms < limit || self.settings.stay {
            return Readiness::Wait;
        }
        Readiness::GiveUp(match &gathering.shortage {
            Some(shortage) => shortage.reason.clone(),
            None => format!(
                "waited {limit} ms (cluster.gather_timeout_ms) for {} nodes, but only {} joined",
                gathering.wanted_nodes,
                self.nodes.len()
            ),
        })
    }

    /// A run waits for all nodes that it wants. One that has begun goes on with fewer: once no shard is lost
    /// and silent nodes would have timed out, or once returning nodes had their time.
    fn has_enough_nodes(&self, gathering: &Gathering) -> bool {
        if self.nodes.len() >= gathering.wanted_nodes && gathering.awaited.is_empty() {
            return true;
        }
        let cluster = &self.settings.cluster;
        let is_complete = || gathering.wanted_nodes == 1 && self.lost_shard().is_none();
        let had_their_time = self.idle_ms >= cluster.return_timeout_ms
            || (self.idle_ms >= cluster.node_timeout_ms && is_complete());
        let has_begun = self.placement.epoch > Epoch(0);
        has_begun && !self.nodes.is_empty() && had_their_time
    }

    /// Waits for at least one node and for those in `awaited`. A capacity shortage stays known until the
    /// nodes change.
    fn start_gathering(&mut self, awaited: BTreeSet<NodeId>) {
        let shortage = match &mut self.phase {
            Phase::Gathering(gathering) => gathering.shortage.take(),
            _ => None,
        };
        let (pause_ms, verifying) = (0, false);
        self.phase = Phase::Gathering(Gathering { wanted_nodes: 1, awaited, shortage, pause_ms, verifying });
        self.idle_ms = 0;
    }

    /// Drops the step in flight, and makes a new placement after `ms` milliseconds.
    pub(super) fn abort_and_wait(&mut self, reason: &str, ms: u64) {
        self.drop_step(reason);
        self.start_gathering(BTreeSet::new());
        if let Phase::Gathering(gathering) = &mut self.phase {
            gathering.pause_ms = ms;
        }
    }

    /// Going back is the last resort: where every shard without a holder is held by a node whose link broke,
    /// the run waits for those nodes, for at most `cluster.return_timeout_ms`. Returns whether it does.
    pub(super) fn wait_for_return(&mut self) -> bool {
        let lost = self.lost_shards();
        let holds = |shard: &ShardId| self.away.values().any(|held| held.contains(shard));
        if lost.is_empty() || !lost.iter().all(holds) {
            return false;
        }
        let of_lost = |held: &BTreeSet<ShardId>| lost.iter().any(|shard| held.contains(shard));
        let awaited = self.away.iter().filter(|(_, held)| of_lost(held)).map(|(node, _)| node.clone());
        self.start_gathering(awaited.collect());
        true
    }

    /// A checkpoint is about to be loaded: its bytes are read first, while nodes join.
    pub(super) fn verify_checkpoint(&mut self, step: Step) {
        if !matches!(self.phase, Phase::Gathering(_)) {
            self.start_gathering(BTreeSet::new());
        }
        if let Phase::Gathering(gathering) = &mut self.phase {
            gathering.verifying = true;
            self.effects.push(Effect::VerifyCheckpoint { step });
        }
    }

    pub(super) fn on_checkpoint_verified(&mut self, intact: Option<Step>) {
        if let Phase::Gathering(gathering) = &mut self.phase
            && std::mem::take(&mut gathering.verifying)
        {
            (self.durable, self.verified) = (intact, intact);
            self.forget_comparisons();
            self.gather();
        }
    }

    /// Waits for more memory to load lost shards into. A run that has not begun ends instead.
    pub(super) fn wait_for_capacity(&mut self, reason: String) {
        if self.placement.epoch == Epoch(0) {
            return self.end(Effect::Fatal { reason });
        }
        if !matches!(self.phase, Phase::Gathering(_)) {
            self.start_gathering(BTreeSet::new());
        }
        self.notice(Notice::NoRoom { reason: reason.clone() });
        let nodes = self.nodes.keys().cloned().collect();
        if let Phase::Gathering(gathering) = &mut self.phase {
            gathering.shortage = Some(CapacityShortage { nodes, reason });
        }
    }

    /// No node is connected. Nodes whose links broke may return with their state.
    pub(super) fn wait_for_nodes(&mut self) {
        let members = std::mem::take(&mut self.placement.members);
        let may_return = members.into_iter().chain(self.away.keys().cloned());
        self.start_gathering(may_return.filter(|node| !self.gone.contains(node)).collect());
        self.placement.learners.clear();
        self.holders.clear();
    }

    /// Two nodes cannot reach each other and neither is dispensable: the same step reruns after
    /// `cluster.node_timeout_ms`, for at most as long as a run waits for nodes.
    pub(super) fn wait_for_network(&mut self, suspect: NodeId, reason: &str) {
        if self.retry.blocked_ms >= self.settings.cluster.gather_timeout_ms {
            return self.give_up(reason.into());
        }
        self.drop_step(reason);
        self.start_gathering(BTreeSet::from([suspect]));
    }
}
