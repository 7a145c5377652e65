//! The cut of the layers into stages, and the stage of each node.

use super::candidates::Candidates;
use super::input::Request;
use crate::costs::Costs;
use crate::ids::{LayerId, LayerRange};
use std::collections::BTreeSet;

/// The ratio of the slowest stage's speed to the fastest one's below which all nodes are redistributed.
const BALANCED: f64 = 0.8 * 0.8;

/// The nodes of one stage, in the order of their names.
#[derive(Clone, Debug)]
pub(super) struct StageNodes {
    pub(super) layers: LayerRange,
    pub(super) nodes: Vec<usize>,
}

/// The numbers of stages to try: the present one first, then every power of two, then one layer each.
pub(super) fn counts(costs: &Costs, present: usize) -> Vec<usize> {
    let layers = usize::from(costs.layers()).max(1);
    let powers = std::iter::successors(Some(1usize), |n| n.checked_mul(2)).take_while(|&n| n < layers);
    let mut counts = vec![present.min(layers)];
    for count in powers.chain([layers]) {
        if !counts.contains(&count) {
            counts.push(count);
        }
    }
    counts
}

/// Layers in `count` runs with about the same operations in each.
pub(super) fn cut(costs: &Costs, count: usize) -> Vec<LayerRange> {
    let total: f64 = costs.dense_flops.iter().sum();
    let layers = costs.layers();
    let mut cuts = vec![0u16];
    let mut sum = 0.0;
    for layer in 0..layers {
        sum += costs.dense_flops[usize::from(layer)];
        let (made, left) = (cuts.len(), layers - layer - 1);
        // At least one layer must remain for each of the other stages.
        let must = usize::from(left) == count.saturating_sub(made);
        let may = made < count && sum >= total * made as f64 / count as f64;
        if made < count && (must || may) {
            cuts.push(layer + 1);
        }
    }
    cuts.push(layers);
    cuts.windows(2).map(|pair| LayerId::range(pair[0]..pair[1])).filter(|layers| !layers.is_empty()).collect()
}

/// The stages with their nodes; `None` when a stage fits no node.
pub(super) fn assign(
    candidates: &Candidates<'_>,
    costs: &Costs,
    request: &Request<'_>,
    count: usize,
) -> Option<Vec<StageNodes>> {
    let same_cut = request.previous.filter(|placement| placement.stages.len() == count);
    let cuts = match same_cut {
        Some(placement) => placement.stages.iter().map(|stage| stage.layers).collect(),
        None => cut(costs, count),
    };
    if let &[layers] = cuts.as_slice() {
        let nodes: Vec<usize> =
            (0..candidates.len()).filter(|&n| candidates.has_room(costs, n, layers)).collect();
        return (!nodes.is_empty()).then(|| vec![StageNodes { layers, nodes }]);
    }
    let mut groups = Groups::new(candidates, costs, &cuts);
    if let Some(placement) = same_cut {
        groups.keep(placement);
    }
    groups.fill();
    if groups.is_unbalanced() {
        groups = Groups::new(candidates, costs, &cuts);
        groups.fill();
    }
    groups.finish()
}

/// Stages while nodes are assigned to them.
struct Groups<'a> {
    candidates: &'a Candidates<'a>,
    costs: &'a Costs,
    cuts: &'a [LayerRange],
    /// Lanes per second of all nodes of each stage.
    load: Vec<f64>,
    nodes: Vec<Vec<usize>>,
    zones: Vec<BTreeSet<usize>>,
    stage: Vec<Option<usize>>,
}

impl<'a> Groups<'a> {
    fn new(candidates: &'a Candidates<'a>, costs: &'a Costs, cuts: &'a [LayerRange]) -> Self {
        let (nodes, zones) = (vec![Vec::new(); cuts.len()], vec![BTreeSet::new(); cuts.len()]);
        Self {
            candidates,
            costs,
            cuts,
            load: vec![0.0; cuts.len()],
            nodes,
            zones,
            stage: vec![None; candidates.len()],
        }
    }

    /// Lanes per second that a node adds to a stage.
    fn share(&self, node: usize, stage: usize) -> f64 {
        1.0 / self.candidates.lane_seconds(self.costs, node, self.cuts[stage])
    }

    fn put(&mut self, node: usize, stage: usize) {
        self.load[stage] += self.share(node, stage);
        self.nodes[stage].push(node);
        self.zones[stage].insert(self.candidates.zones[node]);
        self.stage[node] = Some(stage);
    }

    /// Nodes keep the stages that they have.
    fn keep(&mut self, placement: &crate::placement::Placement) {
        for (number, stage) in placement.stages.iter().enumerate() {
            for node in stage.holders.iter().filter_map(|node| self.candidates.place(node)) {
                if self.stage[node].is_none() && self.candidates.has_room(self.costs, node, self.cuts[number])
                {
                    self.put(node, number);
                }
            }
        }
    }

    /// Every other node, the fastest first, gets the slowest stage for which it has room. Of stages that
    /// differ by no more than the node itself, one without the node's zone comes first.
    fn fill(&mut self) {
        let rate = |n: usize| self.candidates.members[n].profile.dense.both();
        let mut order: Vec<usize> = (0..self.candidates.len()).filter(|&n| self.stage[n].is_none()).collect();
        order.sort_by(|&a, &b| rate(b).total_cmp(&rate(a)).then(a.cmp(&b)));
        for node in order {
            let room: Vec<usize> = (0..self.cuts.len())
                .filter(|&stage| self.candidates.has_room(self.costs, node, self.cuts[stage]))
                .collect();
            let least = room.iter().map(|&stage| self.load[stage]).fold(f64::INFINITY, f64::min);
            let near = room.into_iter().filter(|&s| self.load[s] <= least + self.share(node, s));
            let known = |stage: usize| self.zones[stage].contains(&self.candidates.zones[node]);
            let best =
                near.min_by(|&a, &b| known(a).cmp(&known(b)).then(self.load[a].total_cmp(&self.load[b])));
            if let Some(stage) = best {
                self.put(node, stage);
            }
        }
    }

    fn is_unbalanced(&self) -> bool {
        let most = self.load.iter().copied().fold(0.0, f64::max);
        let least = self.load.iter().copied().fold(f64::INFINITY, f64::min);
        least < BALANCED * most
    }

    fn finish(self) -> Option<Vec<StageNodes>> {
        let sorted = |(&layers, mut nodes): (&LayerRange, Vec<usize>)| {
            nodes.sort_unstable();
            (!nodes.is_empty()).then_some(StageNodes { layers, nodes })
        };
        self.cuts.iter().zip(self.nodes).map(sorted).collect()
    }
}
