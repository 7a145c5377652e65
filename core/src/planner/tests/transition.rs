//! The way from one placement to another.

use super::*;

const EXPERTS: usize = 6;
/// More rounds than any transition takes: each copies at least one shard.
const ROUNDS_MAX: usize = 64;

fn request<'a>(
    members: &'a [Member],
    architecture: &'a Architecture,
    training: &'a TrainingOptions,
    extra_replicas: &'a BTreeMap<ShardId, usize>,
) -> Request<'a> {
    Request {
        epoch: Epoch(2),
        members,
        architecture,
        training,
        replication: 2,
        fan_in: 8,
        extra_replicas,
        moves_max: usize::MAX,
        previous: None,
    }
}

fn holders_of(placement: &Placement, members: &[Member]) -> BTreeMap<ShardId, BTreeSet<NodeId>> {
    let present = |node: &NodeId| members.iter().any(|member| member.node == *node);
    let held = |shard| placement.holders(shard).into_iter().filter(present).collect();
    small(EXPERTS).shards().into_iter().map(|shard| (shard, held(shard))).collect()
}

proptest! {
    /// Nodes of any memory leave and join: on the way to the target no node exceeds its memory, no shard
    /// loses its last copy, and copying ends at the target.
    #[test]
    fn a_transition_fits_loses_nothing_and_ends(
        sizes in proptest::collection::vec(0.3f64..1.5, 3..8), gone in 0usize..2, new in 0usize..3,
    ) {
        let (architecture, training, none) = (small(EXPERTS), training(), BTreeMap::new());
        let costs = Costs::new(&architecture, &training);
        let whole = costs.stage_bytes(costs.all_layers(), 3) + costs.expert_bytes * 2 * EXPERTS as u64;
        let mut all = candidates(sizes.len(), 2, 0);
        for (member, size) in all.iter_mut().zip(&sizes) {
            member.profile.memory_bytes = (whole as f64 * size) as u64;
        }
        let Ok(first) = whole_plan(&all[..all.len() - new], EXPERTS, 2, None) else { return Ok(()) };
        let mut before = first.placement;
        let members = &all[gone..];
        let Ok(target) = whole_plan(members, EXPERTS, 2, Some(&before)) else { return Ok(()) };
        let request = request(members, &architecture, &training, &none);
        let mut holders = holders_of(&before, members);
        let lost: BTreeSet<ShardId> =
            holders.iter().filter(|(_, nodes)| nodes.is_empty()).map(|(shard, _)| *shard).collect();
        for round in 0.. {
            prop_assert!(round < ROUNDS_MAX, "the transition does not end");
            let has = |shard: ShardId| target.placement.holders(shard).iter().all(|n| holders[&shard].contains(n));
            if architecture.shards().into_iter().all(has) {
                break;
            }
            let Some(next) = plan_transition(&request, &holders, &before, &target.placement) else { break };
            let memory = memory::Memory::new(&request);
            let mut bytes = memory.held(&next);
            for (shard, nodes) in &next.learners {
                for node in nodes {
                    prop_assert!(!next.holds(node, *shard), "{} learns {} that it holds", node, shard);
                    *bytes.entry(node.clone()).or_default() += memory.bytes(node, &[*shard]);
                }
            }
            for (node, bytes) in &bytes {
                prop_assert!(*bytes <= memory.of(node), "{} has {} for {}", node, memory.of(node), bytes);
            }
            let mut learned = holders_of(&next, members);
            for (shard, nodes) in &mut learned {
                let kept = nodes.iter().any(|node| holders[shard].contains(node));
                prop_assert!(kept || lost.contains(shard), "{} was given up", shard);
                nodes.extend(next.learners.get(shard).into_iter().flatten().cloned());
            }
            (before, holders) = (next, learned);
        }
        // Shards that are still missing are fetched before the next step.
        prop_assert!(fits(&request, &target.placement));
    }
}
