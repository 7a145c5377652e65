//! What was measured, and when it asks for another placement: nodes' speeds and experts' loads.
//!
//! Nothing flaps: averages move slowly, a change must promise a shorter step by a margin, and some steps pass between
//! two looks. None of this shows in the mathematics, since no placement does.

use super::{Machine, Node, Notice};
use crate::costs::Costs;
use crate::ids::{Epoch, ExpertId, LayerId, NodeId, ShardId};
use crate::planner::{self, Member, Request, predict};
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
    pub(super) extra_replicas: BTreeMap<ShardId, usize>,
    commits: u64,
}

impl Balance {
    /// What nodes turned out to do by what they had measured of themselves, so that newcomers are compared fairly.
    pub(super) fn scale<'a>(&self, nodes: impl Iterator<Item = &'a Node>) -> f64 {
        let (now, declared) =
            nodes.fold((0.0, 0.0), |sum, node| (sum.0 + node.profile.capacity(), sum.1 + node.declared));
        if declared > 0.0 { now / declared } else { 1.0 }
    }
}

impl Machine {
    pub(super) fn record_speed(&mut self, node: &NodeId, speed: Option<f64>) {
        let Some((known, speed)) = self.nodes.get_mut(node).zip(speed) else { return };
        if speed.is_finite() && speed > 0.0 {
            known.speed = Some(known.speed.map_or(speed, |before| before + NEWEST * (speed - before)));
        }
    }

    /// Links are looked at together with speeds, and move nothing by themselves.
    pub(super) fn record_link(&mut self, node: &NodeId, bandwidth: f64, round_trip_s: f64) {
        let sound = bandwidth > 0.0 && round_trip_s.is_finite() && round_trip_s >= 0.0;
        if let Some(known) = self.nodes.get_mut(node).filter(|_| sound) {
            (known.profile.bandwidth, known.profile.round_trip_s) = (bandwidth, round_trip_s);
        }
    }

    pub(super) fn record_load(&mut self, load: &[Vec<u64>]) {
        let layers: Vec<LayerId> = self.settings.architecture.moe_layers().collect();
        for (layer, counts) in layers.into_iter().zip(load) {
            let total: u64 = counts.iter().sum();
            for (expert, &count) in (0..).map(ExpertId).zip(counts) {
                let share = count as f64 * counts.len() as f64 / total.max(1) as f64;
                let shard = ShardId::Expert { layer, expert };
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
        let reasons = [self.check_speeds(), self.check_loads()];
        for reason in reasons.into_iter().flatten() {
            self.mark_placement_dirty();
            self.notice(Notice::Rebalancing { step: self.committed, reason });
        }
    }

    /// The members with what was seen of them.
    pub(super) fn observed_profiles(&self, costs: &Costs) -> Vec<Member> {
        let whole = costs.lane_flops(costs.all_layers());
        let there = self.placement.members.iter().filter_map(|name| self.nodes.get_key_value(name));
        let nodes: Vec<(&NodeId, &Node)> = there.collect();
        let factor = |node: &Node| node.speed.map(|speed| speed * node.profile.dense.seconds(whole));
        let measured: Vec<f64> = nodes.iter().filter_map(|(_, node)| factor(node)).collect();
        // Who ran no lane is taken to differ from its figures as the others do.
        let usual =
            if measured.is_empty() { 1.0 } else { measured.iter().sum::<f64>() / measured.len() as f64 };
        let member = |(name, node): (&NodeId, &Node)| {
            let mut profile = node.profile.clone();
            profile.scale(factor(node).unwrap_or(usual));
            Member { node: name.clone(), profile }
        };
        nodes.into_iter().map(member).collect()
    }

    fn check_speeds(&mut self) -> Option<String> {
        let costs = Costs::new(&self.settings.architecture, &self.settings.training);
        if self.placement.members.iter().all(|name| self.nodes.get(name).is_none_or(|n| n.speed.is_none())) {
            return None;
        }
        let members = self.observed_profiles(&costs);
        let request = Request {
            epoch: Epoch::default(),
            members: &members,
            architecture: &self.settings.architecture,
            training: &self.settings.training,
            replication: self.settings.cluster.replication,
            fan_in: self.settings.cluster.fan_in,
            extra_replicas: &self.balance.extra_replicas,
            moves_max: self.moves_max(),
            previous: Some(&self.placement),
        };
        let before = predict(&self.placement, &members, &costs).step_s;
        let after = planner::plan(&request).prediction.step_s;
        if after >= WORTH_IT * before {
            return None;
        }
        for member in members {
            if let Some(node) = self.nodes.get_mut(&member.node) {
                node.profile = member.profile;
            }
        }
        Some(format!("measured speeds promise a step of {:.0} % of the present one", 100.0 * after / before))
    }

    /// An expert with twice its share of tokens deserves its copies, one with more of them more.
    fn check_loads(&mut self) -> Option<String> {
        let (least, most) = (self.settings.cluster.replication, self.placement.members.len());
        let mut changed = Vec::new();
        for (&shard, &load) in &self.balance.load {
            let now = self.balance.extra_replicas.get(&shard).copied().unwrap_or(least).max(1);
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
                self.balance.extra_replicas.insert(shard, copies);
            } else {
                self.balance.extra_replicas.remove(&shard);
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
