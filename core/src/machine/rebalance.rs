//! Measured speeds and expert loads, and the placements that they call for.
//!
//! Placements do not oscillate: averages move slowly, a change must promise a shorter step by a margin, and a
//! number of steps pass between two checks. No placement changes the mathematics.

use super::balance::average;
use super::nodes::PARAMETER_BYTES;
use super::state::Node;
use super::{Machine, Notice};
use crate::costs::Costs;
use crate::ids::NodeId;
use crate::planner::{self, Member, predict};

/// Commits between two checks.
const CHECK_EVERY: u64 = 16;
/// Another distribution of lanes must promise a step shorter by this factor.
const WORTHWHILE: f64 = 0.85;

impl Machine {
    pub(super) fn record_speed(&mut self, node: &NodeId, speed: Option<f64>) {
        let Some((known, speed)) = self.nodes.get_mut(node).zip(speed) else { return };
        if speed.is_normal() && speed > 0.0 {
            // Times are averaged, not speeds: a node that stands still at times is as slow as its steps are
            // long.
            let time = average(known.speed.map(f64::recip), speed.recip());
            known.speed = Some(time.recip());
        }
    }

    /// Records a link. Links are checked together with speeds, and change no placement by themselves.
    pub(super) fn record_link(&mut self, node: &NodeId, bandwidth: f64, round_trip_s: f64) {
        let sound = bandwidth > 0.0 && round_trip_s.is_finite() && round_trip_s >= 0.0;
        if let Some(known) = self.nodes.get_mut(node).filter(|_| sound) {
            (known.profile.bandwidth, known.profile.round_trip_s) = (bandwidth, round_trip_s);
        }
    }

    /// Records the kept assignments of a step, `[MoE layers][experts]`.
    pub(super) fn record_load(&mut self, load: &[Vec<u64>]) {
        for (layer, counts) in self.settings.architecture.moe_layers().zip(load) {
            self.balance.record_load(layer, counts);
        }
    }

    /// Checks every [`CHECK_EVERY`] commits whether other lanes or replicas would shorten a step.
    pub(super) fn rebalance_if_worthwhile(&mut self) {
        self.balance.commits += 1;
        if !self.settings.cluster.rebalance || !self.balance.commits.is_multiple_of(CHECK_EVERY) {
            return;
        }
        let replication = self.settings.cluster.replication;
        let speeds = self.check_speeds();
        let loads = self.balance.update_replicas(replication, self.placement.members.len());
        for reason in [speeds, loads].into_iter().flatten() {
            self.schedule_replan();
            self.notice(Notice::Rebalancing { step: self.committed, reason });
        }
    }

    /// The members with their measured speeds. A member without a lane is scaled as the others are on
    /// average.
    pub(super) fn measured_members(&self, costs: &Costs) -> Vec<Member> {
        let all_layers = costs.all_layers();
        let members = self.placement.members.iter().filter_map(|name| self.nodes.get_key_value(name));
        let members: Vec<(&NodeId, &Node)> = members.collect();
        let speedup = |node: &Node| {
            node.speed.map(|speed| speed * node.profile.dense.seconds(costs.lane_flops(all_layers)))
        };
        let measured: Vec<f64> = members.iter().filter_map(|(_, node)| speedup(node)).collect();
        let usual =
            if measured.is_empty() { 1.0 } else { measured.iter().sum::<f64>() / measured.len() as f64 };
        let member = |(name, node): (&NodeId, &Node)| {
            let mut profile = node.profile.clone();
            profile.scale(speedup(node).unwrap_or(usual));
            Member { node: name.clone(), profile }
        };
        members.into_iter().map(member).collect()
    }

    fn check_speeds(&mut self) -> Option<String> {
        let has_speed = |name: &NodeId| self.nodes.get(name).is_some_and(|node| node.speed.is_some());
        if !self.placement.members.iter().any(has_speed) {
            return None;
        }
        let costs = Costs::new(&self.settings.architecture, &self.settings.training);
        let members = self.measured_members(&costs);
        let before = predict(&self.placement, &members, &costs).step_s;
        let plan = self.request(&members, Some(&self.placement), planner::plan).ok()?;
        let after = plan.prediction.step_s;
        if after >= WORTHWHILE * before {
            return None;
        }
        for member in members {
            if let Some(node) = self.nodes.get_mut(&member.node) {
                node.profile = member.profile;
            }
        }
        Some(format!(
            "by measured speeds, another placement reduces the step to {:.0} %",
            100.0 * after / before
        ))
    }

    /// The duration of a step under the present placement by the measured speeds, in seconds; 0 without a
    /// placement.
    #[must_use]
    pub fn predicted_step_s(&self) -> f64 {
        let costs = Costs::new(&self.settings.architecture, &self.settings.training);
        let step_s = predict(&self.placement, &self.measured_members(&costs), &costs).step_s;
        if step_s.is_finite() { step_s } else { 0.0 }
    }

    /// Experts that one placement may move beyond the necessary ones, by the run's budget in bytes.
    pub(super) fn moves_max(&self) -> usize {
        let architecture = &self.settings.architecture;
        let expert = architecture.shards().into_iter().find(|shard| shard.is_expert());
        let bytes = expert.map_or(1, |shard| architecture.shard_parameters(shard) * PARAMETER_BYTES).max(1);
        usize::try_from((self.settings.cluster.rebalance_bytes / bytes).max(1)).unwrap_or(usize::MAX)
    }
}
