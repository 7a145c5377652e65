//! Plans without some nodes: behind slow links, few nodes may be faster than all.

use super::candidates::{Candidates, Participation};
use super::input::Request;
use crate::costs::Costs;

/// Links on which a lane spends less than this, in seconds, count as equal.
const NEAR_S: f64 = 1e-3;

/// Alternatives to all nodes: the nearest and fastest 1, 2, 4 and so on, each with the number of nodes that
/// run lanes.
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

/// The distance of a node: the time of a lane on its link, if all rows crossed it, in powers of two of a
/// second.
fn distance(candidates: &Candidates<'_>, costs: &Costs, node: usize) -> i32 {
    let profile = &candidates.members[node].profile;
    let layers = costs.moe_layers.len() as f64;
    let wire = 4.0 * layers * costs.rows_per_lane() * costs.row_wire_bytes as f64 / profile.bandwidth;
    (2.0 * layers * profile.round_trip_s + wire).max(NEAR_S).log2().floor() as i32
}
