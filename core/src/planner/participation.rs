//! Leaving nodes out: over slow links a few of them may do a step sooner than all together.

use super::Request;
use super::candidates::Candidates;
use crate::costs::Costs;
use std::collections::BTreeSet;

/// Links on which a lane spends less than this are as good as one another, in seconds.
const NEAR_S: f64 = 1e-3;

/// Who may run lanes, and who may hold anything at all, by place in the candidates.
#[derive(Clone, Debug)]
pub(super) struct Participation {
    pub(super) runs: Vec<bool>,
    pub(super) holds: Vec<bool>,
}

impl Participation {
    /// Everybody.
    pub(super) fn all(nodes: usize) -> Self {
        Self { runs: vec![true; nodes], holds: vec![true; nodes] }
    }

    /// The first `runners` of an order run lanes; they hold everything, together with as many others as the copies and the zones
    /// that these need ask for.
    fn first(runners: usize, order: &[usize], candidates: &Candidates<'_>, copies: usize) -> Self {
        let mut participation = Self { runs: vec![false; order.len()], holds: vec![false; order.len()] };
        for &node in &order[..runners] {
            (participation.runs[node], participation.holds[node]) = (true, true);
        }
        let copies = copies.min(order.len());
        let zones_wanted = copies.min(candidates.zone_count);
        let mut zones: BTreeSet<usize> =
            order[..runners].iter().map(|&node| candidates.zones[node]).collect();
        let mut holders = runners;
        for &node in &order[runners..] {
            if zones.len() < zones_wanted && zones.insert(candidates.zones[node]) {
                participation.holds[node] = true;
                holders += 1;
            }
        }
        for &node in &order[runners..] {
            if holders < copies && !participation.holds[node] {
                participation.holds[node] = true;
                holders += 1;
            }
        }
        participation
    }
}

/// What is worth trying beside everybody: the nearest and fastest 1, 2, 4 and so on; with how many run lanes.
pub(super) fn alternatives(
    candidates: &Candidates<'_>,
    costs: &Costs,
    request: &Request<'_>,
) -> Vec<(usize, Participation)> {
    let mut order: Vec<usize> = (0..candidates.len()).collect();
    let rate = |node: usize| candidates.members[node].profile.dense.both();
    order.sort_by(|&a, &b| {
        let distance = |node| distance(candidates, costs, node);
        distance(a).cmp(&distance(b)).then(rate(b).total_cmp(&rate(a))).then(a.cmp(&b))
    });
    let sizes =
        std::iter::successors(Some(1usize), |n| n.checked_mul(2)).take_while(|&n| n < candidates.len());
    let copies = request.replication.max(1);
    sizes.map(|runners| (runners, Participation::first(runners, &order, candidates, copies))).collect()
}

/// How far away a node is: what a lane would spend on its link if all rows went over it, in powers of two.
fn distance(candidates: &Candidates<'_>, costs: &Costs, node: usize) -> i32 {
    let profile = &candidates.members[node].profile;
    let layers = costs.moe_layers.len() as f64;
    let wire = 4.0 * layers * costs.rows_per_lane() * costs.row_wire as f64 / profile.bandwidth;
    (2.0 * layers * profile.round_trip_s + wire).max(NEAR_S).log2().floor() as i32
}
