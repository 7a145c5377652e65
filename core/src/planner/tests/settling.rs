//! Repeated planning settles, and never makes a step longer or a placement less safe.

use super::*;
use crate::random::{Purpose, Stream};

/// Random nodes: speeds, links, zones and memory of every combination.
fn cluster(stream: &mut Stream, costs: &Costs) -> (Vec<Member>, usize, usize, usize) {
    let mut pick = |options: &[f64]| options[(stream.next_f64() * options.len() as f64) as usize];
    let nodes = pick(&[2.0, 3.0, 4.0, 5.0, 7.0, 9.0]) as usize;
    let whole = costs.stage_bytes(costs.all_layers(), 2) as f64 + 8.0 * costs.expert_bytes as f64;
    let links = [(f64::INFINITY, 0.0), (1e9, 1e-4), (1e8, 1e-3), (1e7, 1e-2)];
    let zones = pick(&[1.0, 2.0, 3.0]) as usize;
    let memory = pick(&[f64::INFINITY, 2.0, 1.2, 0.7]);
    let member = |number: usize| {
        let mut profile = Profile::relative(pick(&[0.25, 0.5, 1.0, 1.0, 2.0, 4.0]));
        (profile.bandwidth, profile.round_trip_s) = links[pick(&[0.0, 1.0, 2.0, 3.0]) as usize];
        profile.zone = format!("zone-{}", number % zones);
        if memory.is_finite() {
            profile.memory_bytes = (memory * pick(&[0.8, 1.0, 1.3]) * whole) as u64;
        }
        Member { node: NodeId::new(format!("node-{number}")), profile }
    };
    let members = (0..nodes).map(member).collect();
    let (experts, replication) = (pick(&[2.0, 4.0, 8.0]) as usize, pick(&[1.0, 2.0, 3.0]) as usize);
    (members, experts, replication, pick(&[1.0, 4.0, 1e9]) as usize)
}

fn after(request: &Request<'_>, previous: &Placement) -> Result<Plan, Shortage> {
    super::super::plan(&Request { previous: Some(previous), ..request.clone() })
}

/// Counts over random clusters.
#[derive(Debug, Default, PartialEq)]
struct Counts {
    settled: usize,
    unsettled: usize,
    /// Placements that are slower or less safe than the one before them.
    worse: usize,
    /// Plans with a budget for all moves that the next plan replaces.
    replaced: usize,
}

fn count(from: u64, cases: u64) -> Counts {
    let mut counts = Counts::default();
    for seed in from..from + cases {
        let mut stream = Stream::new(seed, Purpose::Faults, &[]);
        let costs = Costs::new(&small(8), &training());
        let (members, experts, replication, moves_max) = cluster(&mut stream, &costs);
        let architecture = small(experts);
        let (training, extra_replicas) = (training(), BTreeMap::new());
        let request = Request {
            epoch: Epoch(1),
            members: &members,
            architecture: &architecture,
            training: &training,
            replication,
            fan_in: 8,
            extra_replicas: &extra_replicas,
            moves_max,
            previous: None,
        };
        let is_worse = |next: &Plan, now: &Plan| {
            let rank = |plan: &Plan| (plan.safety(&request), -plan.prediction.step_s);
            rank(next) < rank(now)
        };
        let without_first = Request { members: &members[1..], ..request.clone() };
        let Ok(before) = super::super::plan(&without_first) else { continue };
        let again = after(&without_first, &before.placement).expect("room for the same placement");
        counts.replaced += usize::from(!again.placement.has_same_layout(&before.placement));
        // One node joins.
        let Ok(mut now) = after(&request, &before.placement) else { continue };
        counts.worse += usize::from(is_worse(&now, &before));
        let mut rounds = 0;
        loop {
            let next = after(&request, &now.placement).expect("room for the same placement");
            if next.placement.has_same_layout(&now.placement) {
                counts.settled += 1;
                break;
            }
            counts.worse += usize::from(is_worse(&next, &now));
            if moves_max > 1_000 {
                eprintln!("seed {seed}: a plan is replaced by the next one");
                counts.replaced += 1;
            }
            now = next;
            rounds += 1;
            if rounds == 40 {
                eprintln!("seed {seed} does not settle");
                counts.unsettled += 1;
                break;
            }
        }
    }
    counts
}

/// With a budget for all moves, the plan of a plan is the same plan.
#[test]
fn plans_settle_after_a_join_and_none_on_the_way_is_worse() {
    let counts = count(0, 3_000);
    assert!(counts.settled > 1_500, "{counts:?}");
    assert_eq!(counts, Counts { settled: counts.settled, ..Counts::default() });
}
