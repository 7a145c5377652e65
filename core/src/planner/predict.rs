//! The time of a step under a placement, part by part.
//!
//! A step has two parts that do not overlap: lanes on their way forward and back, and then the sums of the gradients with the
//! update. While lanes run, a node's device, its network and the chain of one lane's layers hide behind each other, and the
//! longest of them counts; the step is as long as its slowest node makes it. Routing is taken as even.

use super::Member;
use crate::costs::{Costs, LANES_AHEAD, lanes_in_flight};
use crate::ids::{ExpertId, Lane, NodeId, ShardId};
use crate::placement::{Placement, Stage};
use crate::tree::LeafSpan;
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};

/// How well a node's device, its network and the chain of a lane's layers hide behind each other: perfectly at infinity, not at
/// all at 1.
const HIDING: f64 = 3.0;

/// What one node does in a step. Times are in seconds, sizes in bytes.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct NodePart {
    /// Attention, dense feed-forward, gates and the loss of its lanes.
    pub dense_s: f64,
    /// The rows that its experts get.
    pub expert_s: f64,
    /// Sums of gradients and the optimizer.
    pub update_s: f64,
    /// Rows and residual streams on the wire, in the slower direction.
    pub network_s: f64,
    /// Its lanes' layers one after the other, with the round trips between them.
    pub chain_s: f64,
    /// Gradients on the wire after the lanes, in the slower direction.
    pub exchange_s: f64,
    /// Rows, residual streams and gradients received.
    pub received_bytes: u64,
    /// The same, sent.
    pub sent_bytes: u64,
    /// Parameters, optimizer state, gradients and activations.
    pub memory_bytes: u64,
    /// Replicas of experts.
    pub experts: usize,
    /// Lanes that it takes through its stage.
    pub lanes: usize,
}

impl NodePart {
    /// From the first lane's start to the last one's end. What is longest counts, and more the more the others are as long: they hide
    /// behind each other imperfectly. The norm is fitted to what `cargo bench --bench placement` measured.
    #[must_use]
    pub fn lanes_s(&self) -> f64 {
        let parts = [self.dense_s + self.expert_s, self.network_s, self.chain_s];
        parts.map(|part| part.powf(HIDING)).iter().sum::<f64>().powf(1.0 / HIDING)
    }
}

/// What a placement promises.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Prediction {
    /// Seconds from one commit to the next.
    pub step_s: f64,
    /// Of these, until the last lane is done.
    pub lanes_s: f64,
    /// Of these, gradients on the wire, the optimizer and the words of the commit.
    pub commit_s: f64,
    /// Tokens per second.
    pub tokens_per_s: f64,
    /// The node that the others wait for.
    pub slowest: Option<NodeId>,
    /// Each member's part, in the order of the placement's members.
    #[serde(skip)]
    pub nodes: Vec<NodePart>,
}

/// Bytes in and out of one node.
#[derive(Clone, Copy, Default)]
struct Traffic {
    received: f64,
    sent: f64,
}

impl Traffic {
    fn seconds(self, bandwidth: f64) -> f64 {
        self.received.max(self.sent) / bandwidth
    }
}

/// What a placement promises of these nodes.
#[must_use]
pub fn predict(placement: &Placement, members: &[Member], costs: &Costs) -> Prediction {
    let known: BTreeMap<&NodeId, &Member> = members.iter().map(|member| (&member.node, member)).collect();
    let ordered: Option<Vec<&Member>> =
        placement.members.iter().map(|node| known.get(node).copied()).collect();
    // A placement of other nodes promises nothing.
    let Some(members) = ordered else { return Prediction { step_s: f64::INFINITY, ..Prediction::default() } };
    let mut count = Count::new(placement, members, costs);
    count.lanes();
    count.experts();
    count.gradients();
    count.total()
}

/// A prediction under way. Nodes are their places among the members.
struct Count<'a> {
    placement: &'a Placement,
    members: Vec<&'a Member>,
    costs: &'a Costs,
    places: BTreeMap<&'a NodeId, usize>,
    parts: Vec<NodePart>,
    rows: Vec<Traffic>,
    gradients: Vec<Traffic>,
    /// Bytes that the optimizer and the sums go over.
    updated: Vec<f64>,
    /// Share of its lanes' rows that leave the node.
    away: Vec<f64>,
    /// Share of its lanes of which any row leaves it.
    travels: Vec<f64>,
    /// How long its rows wait at the slowest of the nodes to which they go, each time.
    waits: Vec<f64>,
}

/// Lanes in groups, as one of their runners sees them.
#[derive(Clone, Copy, Default)]
struct Grouped {
    /// Its own, whose group it serves.
    own: f64,
    /// Others' in groups that it serves.
    foreign: f64,
    /// Its own, in groups that another runner serves.
    lost: f64,
}

impl<'a> Count<'a> {
    fn new(placement: &'a Placement, members: Vec<&'a Member>, costs: &'a Costs) -> Self {
        let places = placement.members.iter().enumerate().map(|(place, node)| (node, place)).collect();
        let nodes = members.len();
        Self {
            placement,
            members,
            costs,
            places,
            parts: vec![NodePart::default(); nodes],
            rows: vec![Traffic::default(); nodes],
            gradients: vec![Traffic::default(); nodes],
            updated: vec![0.0; nodes],
            away: vec![0.0; nodes],
            travels: vec![0.0; nodes],
            waits: vec![0.0; nodes],
        }
    }

    /// How long rows that come to a node wait there for a thread: what is left, on average, of the call under way when they come, and a
    /// call of each lane that is in flight beyond the threads. Calls are whole layers of its own lanes, and the loss; they are not
    /// interrupted.
    fn wait_at(&self, stage: &Stage, place: usize) -> f64 {
        let profile = &self.members[place].profile;
        let tokens = self.costs.tokens_per_lane as f64;
        let calls = self.costs.dense_flops[stage.layers.indices()].iter().flat_map(|flops| {
            let work = flops * tokens * profile.threads as f64;
            [work / profile.dense.forward, 2.0 * work / profile.dense.backward]
        });
        let (count, sum, squares) =
            calls.fold((0.0, 0.0, 0.0), |(count, sum, squares), t| (count + 1.0, sum + t, squares + t * t));
        if sum == 0.0 {
            return 0.0;
        }
        (squares / (2.0 * sum) + LANES_AHEAD as f64 * sum / count) / profile.threads as f64
    }

    /// Sets how long the rows of a stage's runners wait elsewhere.
    fn wait_elsewhere(&mut self, stage: &Stage, servers: &BTreeSet<usize>) {
        let runs: BTreeSet<usize> = self
            .runners(stage)
            .into_iter()
            .filter(|(_, lanes)| *lanes > 0.0)
            .map(|(place, _)| place)
            .collect();
        let busy = servers.intersection(&runs).map(|&place| (self.wait_at(stage, place), place));
        let mut slowest: Vec<(f64, usize)> = busy.collect();
        slowest.sort_by(|a, b| b.0.total_cmp(&a.0));
        for &place in &runs {
            let other = slowest.iter().find(|(_, server)| *server != place);
            self.waits[place] = self.waits[place].max(other.map_or(0.0, |(wait, _)| *wait));
        }
    }

    /// How the lanes of a stage's runners are grouped: the runner of a group's first lane serves it, if it holds the expert.
    fn grouped(&self, stage: &Stage) -> BTreeMap<usize, Grouped> {
        let mut grouped: BTreeMap<usize, Grouped> = BTreeMap::new();
        let place = |holder: u32| self.places[&stage.holders[holder as usize]];
        for group in stage.lanes.chunks(self.costs.lane_group.max(1) as usize) {
            let server = place(group[0]);
            for &holder in group {
                if place(holder) == server {
                    grouped.entry(server).or_default().own += 1.0;
                } else {
                    grouped.entry(server).or_default().foreign += 1.0;
                    grouped.entry(place(holder)).or_default().lost += 1.0;
                }
            }
        }
        grouped
    }

    /// The places of a stage's holders, each with its number of lanes.
    fn runners(&self, stage: &Stage) -> Vec<(usize, f64)> {
        let mut counts = vec![0u32; stage.holders.len()];
        stage.lanes.iter().for_each(|&holder| counts[holder as usize] += 1);
        stage.holders.iter().map(|node| self.places[node]).zip(counts.into_iter().map(f64::from)).collect()
    }

    /// The dense work, what is held for it, and residual streams from stage to stage.
    fn lanes(&mut self) {
        for (number, stage) in self.placement.stages.iter().enumerate() {
            let flops = self.costs.lane_flops(stage.layers);
            for (place, lanes) in self.runners(stage) {
                let profile = &self.members[place].profile;
                let part = &mut self.parts[place];
                part.dense_s += profile.dense.seconds(flops * lanes);
                part.lanes += lanes as usize;
                part.memory_bytes += self.costs.stage_bytes(stage.layers, lanes_in_flight(profile.threads));
            }
            if number == 0 {
                continue;
            }
            // To the stage and back to who drives the lane, in both passes.
            let wire = 2.0 * self.costs.lane_wire as f64;
            for (lane, &runner) in (0..).map(Lane).zip(&stage.lanes) {
                let Some(driver) = self.placement.stages[0].stage_node(lane) else { continue };
                let (there, here) = (self.places[&stage.holders[runner as usize]], self.places[driver]);
                if there != here {
                    for place in [there, here] {
                        self.rows[place].received += wire;
                        self.rows[place].sent += wire;
                    }
                }
            }
        }
    }

    /// The experts' work and the rows on the wire, both passes.
    fn experts(&mut self) {
        let group = f64::from(self.costs.lane_group.max(1));
        for stage in &self.placement.stages {
            let grouped = self.grouped(stage);
            let mut own_rows = 0.0;
            let mut servers = BTreeSet::new();
            let mut kept: BTreeMap<usize, f64> = BTreeMap::new();
            let first = ShardId::Expert { layer: stage.layers.start, expert: ExpertId(0) };
            let last = ShardId::Expert { layer: stage.layers.end, expert: ExpertId(0) };
            for (_, holders) in self.placement.experts.range(first..last) {
                let rows_per_lane = self.costs.rows_per_lane() / self.costs.experts.max(1) as f64;
                own_rows += rows_per_lane;
                // Groups of lanes are served where they run if they can be; the others are shared evenly.
                let places: Vec<usize> = holders.iter().map(|node| self.places[node]).collect();
                servers.extend(places.iter().copied());
                let local: Vec<Grouped> =
                    places.iter().map(|p| grouped.get(p).copied().unwrap_or_default()).collect();
                let served: f64 = local.iter().map(|lanes| lanes.own + lanes.foreign).sum();
                let others = (f64::from(self.costs.lanes) - served).max(0.0);
                for (&place, local) in places.iter().zip(local) {
                    let remote = local.foreign + others / places.len() as f64;
                    let rows = (local.own + remote) * rows_per_lane;
                    let profile = &self.members[place].profile;
                    let wire = 2.0 * remote * rows_per_lane * self.costs.row_wire as f64;
                    self.rows[place].received += wire;
                    self.rows[place].sent += wire;
                    *kept.entry(place).or_default() += local.own * rows_per_lane;
                    let part = &mut self.parts[place];
                    part.expert_s += profile.expert.seconds(rows * self.costs.expert_flops);
                    part.experts += 1;
                    part.memory_bytes += self.costs.expert_bytes;
                    let leaves = (local.own + remote) / group;
                    self.updated[place] += (1.0 + leaves) * self.costs.expert_wire as f64;
                }
            }
            self.wait_elsewhere(stage, &servers);
            for (&place, lanes) in &grouped {
                let all = lanes.own + lanes.lost;
                let gone = (all * own_rows - kept.get(&place).copied().unwrap_or(0.0)).max(0.0);
                let wire = 2.0 * gone * self.costs.row_wire as f64;
                self.rows[place].sent += wire;
                self.rows[place].received += wire;
                if gone > 0.0 {
                    self.away[place] += gone / (all * own_rows);
                    // Where it holds every expert, only lanes whose group another serves.
                    let only_lost = gone <= lanes.lost * own_rows * (1.0 + 1e-9);
                    self.travels[place] = if only_lost { lanes.lost / all } else { 1.0 };
                }
            }
        }
    }

    /// Sums for the owners and roots from them; every holder applies.
    fn gradients(&mut self) {
        for stage in &self.placement.stages {
            let runners = self.runners(stage);
            let (mut sums, mut first) = (Vec::new(), 0);
            for &(_, lanes) in &runners {
                sums.push(f64::from(LeafSpan::parts_of_run(self.costs.lanes, first..first + lanes as u32)));
                first += lanes as u32;
            }
            let all: f64 = sums.iter().sum();
            if self.is_over_several(stage) {
                self.gradients_over_several(stage, &runners, &sums);
                continue;
            }
            for layer in stage.layers.iter() {
                let owner = self.placement.owner(ShardId::Dense { layer }).map(|node| self.places[node]);
                let wire = self.costs.dense_wire[layer.index()] as f64;
                for (&(place, lanes), sums) in runners.iter().zip(&sums) {
                    // The owner gets the others' sums and sends them the root.
                    let (sent, received) = match owner == Some(place) {
                        true => (runners.len() as f64 - 1.0, all - sums),
                        false => (*sums, 1.0),
                    };
                    self.gradients[place].sent += wire * sent;
                    self.gradients[place].received += wire * received;
                    self.updated[place] += wire * (1.0 + lanes);
                }
            }
        }
        let leaves = self.costs.lanes.div_ceil(self.costs.lane_group.max(1));
        for (shard, holders) in self.placement.experts.iter().filter(|(_, holders)| holders.len() > 1) {
            let wire = self.costs.expert_wire as f64;
            let mut parts: BTreeMap<&NodeId, u32> = BTreeMap::new();
            // Leaves that run together are one sum; what is shared by turns goes leaf by leaf.
            let mut last = None;
            for leaf in 0..leaves {
                let home = self.placement.computed_by(*shard, leaf);
                if home != last {
                    home.into_iter().for_each(|home| *parts.entry(home).or_default() += 1);
                }
                last = home;
            }
            let sums: u32 = parts.values().sum();
            for (i, node) in holders.iter().enumerate() {
                let place = self.places[node];
                let own = parts.get(node).copied().unwrap_or(0);
                let others = holders.len() as f64 - 1.0;
                let (sent, received) =
                    if i == 0 { (others, f64::from(sums - own)) } else { (f64::from(own), 1.0) };
                self.gradients[place].sent += wire * sent;
                self.gradients[place].received += wire * received;
            }
        }
    }

    /// Whether a stage's sums are made and passed on by more nodes than their owners.
    fn is_over_several(&self, stage: &Stage) -> bool {
        stage.holders.len() > self.placement.fan_in as usize
    }

    /// The same where there are too many nodes for one: who adds up and passes on takes turns from layer to layer, so that it evens out
    /// where there are many, and somebody does it for one where there are few.
    fn gradients_over_several(&mut self, stage: &Stage, runners: &[(usize, f64)], sums: &[f64]) {
        let fan = f64::from(self.placement.fan_in);
        let wires = &self.costs.dense_wire[stage.layers.indices()];
        let (all, most) = (wires.iter().sum::<u64>() as f64, wires.iter().max().map_or(0.0, |w| *w as f64));
        let running = runners.iter().filter(|(_, lanes)| *lanes > 0.0).count().max(1) as f64;
        // Each sum goes to somebody once, and so does what some of them are added up to.
        let added = sums.iter().sum::<f64>() / running * (1.0 + 1.0 / fan);
        for (&(place, lanes), sums) in runners.iter().zip(sums) {
            self.gradients[place].sent += all * (sums + 1.0 / fan) + all.max(fan * most);
            self.gradients[place].received += (all * added).max(fan * most) + all;
            self.updated[place] += all * (1.0 + lanes + added);
        }
    }

    /// Ways from node to node of a gradient, up to its owner and back to everybody; 2 where the owner gets all and tells all.
    fn hops(&self) -> f64 {
        let several = self.placement.stages.iter().filter(|stage| self.is_over_several(stage));
        let levels =
            |stage: &Stage| (stage.holders.len() as f64).log(f64::from(self.placement.fan_in.max(2)));
        several.map(|stage| 2.0 * levels(stage).ceil()).fold(2.0, f64::max)
    }

    fn total(mut self) -> Prediction {
        let slowest_trip = self.members.iter().map(|m| m.profile.round_trip_s).fold(0.0, f64::max);
        let elsewhere = self.lane_elsewhere();
        let chains: Vec<f64> =
            (0..self.members.len())
                .map(|place| {
                    if self.placement.stages.is_empty() { 0.0 } else { self.lane_alone(0, place) + elsewhere }
                })
                .collect();
        let mut driven = vec![0usize; self.members.len()];
        if let Some(stage) = self.placement.stages.first() {
            self.runners(stage).into_iter().for_each(|(place, lanes)| driven[place] = lanes as usize);
        }
        let (mut lanes_s, mut commit_s, mut longest, mut slowest) = (0.0f64, 0.0f64, 0.0, None);
        for (place, member) in self.members.iter().enumerate() {
            let (profile, part) = (&member.profile, &mut self.parts[place]);
            let (rows, gradients) = (self.rows[place], self.gradients[place]);
            let handling = profile.network_s_per_byte / profile.threads as f64;
            part.network_s = rows.seconds(profile.bandwidth);
            part.exchange_s =
                gradients.seconds(profile.bandwidth) + (gradients.sent + gradients.received) * handling;
            part.update_s = self.updated[place] / profile.update_bytes_per_s;
            // What the network takes of the processors, the lanes do not get.
            part.dense_s += (rows.sent + rows.received) * handling;
            part.chain_s = chains[place] * driven[place].div_ceil(lanes_in_flight(profile.threads)) as f64;
            part.received_bytes = (rows.received + gradients.received) as u64;
            part.sent_bytes = (rows.sent + gradients.sent) as u64;
            let commit = part.exchange_s + part.update_s;
            (lanes_s, commit_s) = (lanes_s.max(part.lanes_s()), commit_s.max(commit));
            if part.lanes_s() + commit > longest || slowest.is_none() {
                (longest, slowest) = (part.lanes_s() + commit, Some(member.node.clone()));
            }
        }
        // Sums to the owners and roots back, and what is prepared and committed.
        let commit_s = commit_s + (1.0 + self.hops()) * slowest_trip;
        let step_s = lanes_s + commit_s;
        let tokens = f64::from(self.costs.lanes) * self.costs.tokens_per_lane as f64;
        Prediction { step_s, lanes_s, commit_s, tokens_per_s: tokens / step_s, slowest, nodes: self.parts }
    }

    /// Seconds of one lane that a node has to itself in a stage: its layers one after the other, with the round trips between.
    fn lane_alone(&self, number: usize, place: usize) -> f64 {
        let layers = self.placement.stages[number].layers;
        let profile = &self.members[place].profile;
        let moe = self.costs.moe_layers.iter().filter(|layer| layers.contains(**layer)).count() as f64;
        let rows = self.costs.rows_per_lane();
        // A lane's dense calls run on one thread, its experts on all.
        let dense = profile.dense.seconds(self.costs.lane_flops(layers)) * profile.threads as f64;
        let experts = profile.expert.seconds(rows * moe * self.costs.expert_flops);
        let away = self.away[place];
        let trips = self.travels[place] * 2.0 * moe * (profile.round_trip_s + self.waits[place]);
        let wire = 4.0 * moe * rows * away * self.costs.row_wire as f64 / profile.bandwidth;
        let hop = profile.round_trip_s + 2.0 * self.costs.lane_wire as f64 / profile.bandwidth;
        dense + experts + trips + wire + if number > 0 { 2.0 * hop } else { 0.0 }
    }

    /// Seconds of one lane in all stages but the first, as their runners take it on average.
    fn lane_elsewhere(&self) -> f64 {
        let mut seconds = 0.0;
        for (number, stage) in self.placement.stages.iter().enumerate().skip(1) {
            let runners = self.runners(stage);
            let all: f64 = runners.iter().map(|(_, lanes)| lanes).sum();
            let sum: f64 = runners.iter().map(|&(place, lanes)| lanes * self.lane_alone(number, place)).sum();
            seconds += sum / all.max(1.0);
        }
        seconds
    }
}
