//! What was measured, and when it asks for another placement: nodes' speeds and experts' loads.
//!
//! Nothing flaps: averages move slowly, a change must promise a shorter step by a margin, and some steps pass between
//! two looks. None of this shows in the mathematics, since no placement does.

use super::{Machine, Node, Notice};
use crate::ids::{NodeId, ShardId};
use crate::placement::{Member, share_lanes};
use std::collections::BTreeMap;

/// Weight of the newest measurement in a moving average.
const NEWEST: f64 = 0.2;
/// Commits between two looks, and from a new placement to the first.
const LOOK_EVERY: u64 = 16;
/// A new share of lanes must promise a step shorter by this factor.
const WORTH_IT: f64 = 0.85;
/// How far an expert's load must be above the next number of copies before it gets them, in copies.
const MORE_ABOVE: f64 = 0.25;
/// How far below the present number before it loses one.
const LESS_BELOW: f64 = 1.25;

/// What was measured.
#[derive(Debug, Default)]
pub(super) struct Balance {
    /// Share of each expert in its layer's tokens times the experts of the layer: 1 when even.
    load: BTreeMap<ShardId, f64>,
    /// Experts that get more copies than the run's replication.
    pub(super) hot: BTreeMap<ShardId, usize>,
    commits: u64,
}

impl Balance {
    /// Planner's capacity per declared one, so that newcomers are compared with what was measured.
    pub(super) fn scale<'a>(&self, nodes: impl Iterator<Item = &'a Node>) -> f64 {
        let (capacity, declared) =
            nodes.fold((0.0, 0.0), |sum, node| (sum.0 + node.capacity, sum.1 + node.declared));
        if declared > 0.0 { capacity / declared } else { 1.0 }
    }
}

impl Machine {
    pub(super) fn measured(&mut self, node: &NodeId, speed: Option<f64>) {
        let Some((known, speed)) = self.nodes.get_mut(node).zip(speed) else { return };
        if speed.is_finite() && speed > 0.0 {
            known.speed = Some(known.speed.map_or(speed, |before| before + NEWEST * (speed - before)));
        }
    }

    pub(super) fn loaded(&mut self, load: &[Vec<u64>]) {
        let layers: Vec<usize> = self.settings.architecture.moe_layers().collect();
        for (layer, counts) in layers.into_iter().zip(load) {
            let total: u64 = counts.iter().sum();
            for (expert, &count) in counts.iter().enumerate() {
                let share = count as f64 * counts.len() as f64 / total.max(1) as f64;
                let shard = ShardId::Expert { layer: layer as u16, expert: expert as u16 };
                let average = self.balance.load.entry(shard).or_insert(share);
                *average += NEWEST * (share - *average);
            }
        }
    }

    /// Every so many commits: whether other lanes or copies would make a step shorter.
    pub(super) fn rebalance_if_worth_it(&mut self) {
        self.balance.commits += 1;
        if !self.settings.cluster.rebalance || !self.balance.commits.is_multiple_of(LOOK_EVERY) {
            return;
        }
        let reasons = [self.look_at_speeds(), self.look_at_loads()];
        for reason in reasons.into_iter().flatten() {
            self.unsettled = true;
            self.notice(Notice::Rebalancing { step: self.committed, reason });
        }
    }

    fn look_at_speeds(&mut self) -> Option<String> {
        let measured = self
            .placement
            .members
            .iter()
            .filter_map(|name| self.nodes.get(name)?.speed.zip(self.nodes.get(name)));
        let (speeds, capacities) =
            measured.fold((0.0, 0.0), |sum, (speed, node)| (sum.0 + speed, sum.1 + node.capacity));
        if capacities <= 0.0 {
            return None;
        }
        let scale = speeds / capacities;
        let now = |node: &Node| node.speed.unwrap_or(node.capacity * scale);
        let members: Vec<Member> = self
            .placement
            .members
            .iter()
            .filter_map(|name| Some(Member { node: name.clone(), capacity: now(self.nodes.get(name)?) }))
            .collect();
        let seconds = |lanes: &[NodeId]| {
            let of = |m: &Member| lanes.iter().filter(|&n| n == &m.node).count() as f64 / m.capacity;
            members.iter().map(of).fold(0.0, f64::max)
        };
        let (before, after) =
            (seconds(&self.placement.lanes), seconds(&share_lanes(&members, self.settings.training.lanes)));
        if after >= WORTH_IT * before {
            return None;
        }
        for node in self.nodes.values_mut() {
            node.capacity = now(node);
        }
        Some(format!("measured speeds promise a step of {:.0} % of the present one", 100.0 * after / before))
    }

    /// An expert with twice its share of tokens deserves its copies, one with more of them more.
    fn look_at_loads(&mut self) -> Option<String> {
        let (least, most) = (self.settings.cluster.replication, self.placement.members.len());
        let mut changed = Vec::new();
        for (&shard, &load) in &self.balance.load {
            let now = self.balance.hot.get(&shard).copied().unwrap_or(least).max(1);
            let wanted = load / 2.0 * least as f64;
            let next = match () {
                () if wanted > now as f64 + MORE_ABOVE => now + 1,
                () if wanted < now as f64 - LESS_BELOW => now - 1,
                () => now,
            };
            let next = next.clamp(least, most.max(least));
            if next != now {
                changed.push((shard, next, load));
            }
        }
        for &(shard, copies, _) in &changed {
            if copies > least {
                self.balance.hot.insert(shard, copies);
            } else {
                self.balance.hot.remove(&shard);
            }
        }
        let &(shard, copies, load) = changed.iter().max_by(|a, b| a.2.total_cmp(&b.2))?;
        let others = changed.len() - 1;
        Some(format!(
            "{shard} has {load:.1} times its even load and gets {copies} copies ({others} others change)"
        ))
    }

    /// Experts that one placement may move beyond those that must, for the run's budget of bytes.
    pub(super) fn moves_max(&self) -> usize {
        let a = &self.settings.architecture;
        let expert = a.shards().into_iter().find(|shard| shard.is_expert());
        let bytes = expert.map_or(1, |shard| a.shard_parameters(shard) * 4).max(1);
        usize::try_from((self.settings.cluster.rebalance_bytes / bytes).max(1)).unwrap_or(usize::MAX)
    }
}
