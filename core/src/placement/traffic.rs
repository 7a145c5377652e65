//! Who may send what to whom under a placement. A frame that the placement does not foresee changes nothing.

use super::Placement;
use crate::ids::{ExpertId, Lane, LayerId, LayerRange, NodeId, ShardId};
use crate::tree::LeafSpan;

/// What one node sends to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Traffic<'a> {
    /// Rows of a lane for experts of a layer.
    Rows {
        /// The layer.
        layer: LayerId,
        /// The lane.
        lane: Lane,
        /// The experts.
        experts: &'a [(ExpertId, u32)],
    },
    /// The residual stream of a lane, or its gradient, for the layers of a stage.
    Stage {
        /// The layers.
        layers: LayerRange,
        /// The lane.
        lane: Lane,
    },
    /// A sum over some leaves of a shard's gradient, for the node that adds it or for the shard's owner.
    Partial {
        /// The shard.
        shard: ShardId,
        /// The leaves.
        span: LeafSpan,
    },
    /// The final sum of a shard's gradient.
    Root {
        /// The shard.
        shard: ShardId,
    },
    /// A request for a shard.
    Shard {
        /// The shard.
        shard: ShardId,
    },
}

impl Placement {
    /// Whether `from` may send this to `to`.
    #[must_use]
    pub fn may_send(&self, from: &NodeId, to: &NodeId, traffic: Traffic<'_>) -> bool {
        match traffic {
            Traffic::Rows { layer, lane, experts } => {
                self.stage_of(layer).and_then(|stage| stage.stage_node(lane)) == Some(from)
                    && experts.iter().all(|&(expert, _)| {
                        self.serving_replica(ShardId::Expert { layer, expert }, lane) == Some(to)
                    })
            }
            Traffic::Stage { layers, lane } => {
                let stage = self.stages.iter().find(|stage| stage.layers == layers);
                self.stages.first().and_then(|stage| stage.stage_node(lane)) == Some(from)
                    && stage.and_then(|stage| stage.stage_node(lane)) == Some(to)
            }
            Traffic::Partial { shard, span } => self.may_send_partial(from, to, shard, span),
            Traffic::Root { shard } => {
                let learns = self.learners.get(&shard).is_some_and(|nodes| nodes.contains(to));
                (learns && self.owner(shard) == Some(from))
                    || self.broadcast_children(shard, from).contains(to)
            }
            Traffic::Shard { shard } => self.holds_or_learns(from, shard),
        }
    }

    /// The maker of a span's sum sends it to the maker of the sum above it, and the root to the owner.
    fn may_send_partial(&self, from: &NodeId, to: &NodeId, shard: ShardId, span: LeafSpan) -> bool {
        let leaves = self.leaves(shard);
        let Some(reduction) = self.reduction(shard).filter(|_| span.is_node(leaves)) else { return false };
        let next = match span.parent(leaves) {
            Some((parent, _)) => reduction.reducer(parent),
            None => reduction.owner(),
        };
        reduction.reducer(span) == Some(from) && next == Some(to)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::placement::Stage;
    use proptest::prelude::*;

    const EXPERTS: u32 = 4;

    fn id(number: u32) -> NodeId {
        NodeId::new(format!("n{number:02}"))
    }

    /// Two stages of one layer, the second one with experts, over `nodes` nodes; the last node learns.
    fn placement(nodes: u32, lanes: u32, fan_in: u32, replicas: u32) -> Placement {
        let members: Vec<NodeId> = (0..nodes).map(id).collect();
        let half = (nodes / 2).max(1) as usize;
        let runs = |holders: &[NodeId]| {
            let count = holders.len() as u32;
            (0..lanes).map(|lane| lane * count / lanes).collect()
        };
        let stage = |layer: u16, holders: &[NodeId]| Stage {
            layers: LayerId::range(layer..layer + 1),
            holders: holders.to_vec(),
            lanes: runs(holders),
        };
        let expert = |number: u32| ShardId::Expert { layer: LayerId(1), expert: ExpertId(number as u16) };
        let holders =
            |number: u32| (0..replicas.min(nodes)).map(|replica| id((number + replica) % nodes)).collect();
        let learner = id(nodes);
        Placement {
            stages: vec![stage(0, &members[..half]), stage(1, &members[members.len() - half..])],
            members,
            lane_group: 2,
            fan_in,
            experts: (0..EXPERTS).map(|number| (expert(number), holders(number))).collect(),
            learners: [(expert(0), [learner].into())].into(),
            ..Placement::default()
        }
    }

    fn shards() -> Vec<ShardId> {
        let experts = (0..EXPERTS as u16).map(|e| ShardId::Expert { layer: LayerId(1), expert: ExpertId(e) });
        let dense = [LayerId(0), LayerId(1)].map(|layer| ShardId::Dense { layer });
        dense.into_iter().chain([ShardId::Embedding]).chain(experts).collect()
    }

    proptest! {
        /// Of all pairs of nodes and all spans, exactly what the route of a gradient has is allowed.
        #[test]
        fn the_sums_of_a_route_are_allowed_and_no_others(
            nodes in 1u32..9, lanes in 1u32..14, fan_in in 2u32..5, replicas in 1u32..4,
        ) {
            let placement = placement(nodes, lanes, fan_in, replicas);
            for shard in shards() {
                let reduction = placement.reduction(shard).expect("a route");
                let sent: Vec<_> = reduction.transfers().collect();
                let leaves = placement.leaves(shard);
                for (from, to) in (0..=nodes).flat_map(|a| (0..=nodes).map(move |b| (id(a), id(b)))) {
                    if from == to {
                        continue;
                    }
                    for start in 0..leaves {
                        for end in start + 1..=leaves {
                            let span = LeafSpan { start, end };
                            let is_sent = sent.iter().any(|t| (t.from, t.to, t.span) == (&from, &to, span));
                            let root = span == reduction.root();
                            let partial = placement.may_send(&from, &to, Traffic::Partial { shard, span });
                            let whole = root && placement.may_send(&from, &to, Traffic::Root { shard });
                            let learns = root && to == id(nodes) && whole;
                            prop_assert!(
                                learns || is_sent == (partial || whole),
                                "{} {:?} from {} to {}: sent {}, allowed {} {}", shard, span, from, to, is_sent, partial, whole
                            );
                        }
                    }
                }
            }
        }

        #[test]
        fn a_learner_gets_the_final_sum_from_the_owner_alone(
            nodes in 1u32..9, lanes in 1u32..14, fan_in in 2u32..5, replicas in 1u32..4,
        ) {
            let placement = placement(nodes, lanes, fan_in, replicas);
            let learner = id(nodes);
            for shard in shards() {
                for from in (0..nodes).map(id) {
                    let learns = placement.learners.contains_key(&shard);
                    let allowed = placement.may_send(&from, &learner, Traffic::Root { shard });
                    prop_assert_eq!(allowed, learns && placement.owner(shard) == Some(&from));
                }
            }
        }

        #[test]
        fn rows_and_streams_come_from_the_node_of_their_lane(
            nodes in 1u32..9, lanes in 1u32..14, replicas in 1u32..4, lane in 0u32..14, expert in 0u32..EXPERTS,
        ) {
            prop_assume!(lane < lanes);
            let placement = placement(nodes, lanes, 8, replicas);
            let (lane, layer, expert) = (Lane(lane), LayerId(1), ExpertId(expert as u16));
            let serving = placement.serving_replica(ShardId::Expert { layer, expert }, lane).expect("a replica");
            let runner = placement.stages[1].stage_node(lane).expect("a node");
            let driver = placement.stages[0].stage_node(lane).expect("a node");
            for (from, to) in (0..=nodes).flat_map(|a| (0..=nodes).map(move |b| (id(a), id(b)))) {
                let rows = Traffic::Rows { layer, lane, experts: &[(expert, 3)] };
                prop_assert_eq!(placement.may_send(&from, &to, rows), &from == runner && &to == serving);
                let stream = Traffic::Stage { layers: LayerId::range(1..2), lane };
                prop_assert_eq!(placement.may_send(&from, &to, stream), &from == driver && &to == runner);
                let wrong = Traffic::Stage { layers: LayerId::range(0..2), lane };
                prop_assert!(!placement.may_send(&from, &to, wrong), "no stage has these layers");
            }
        }
    }
}
