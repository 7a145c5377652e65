//! The stored and sent form of a placement: every name once and numbers from there on, in runs.
//!
//! At 1,000 nodes a placement in which 500 join has its names in one holder list per stage, and in one set of
//! learners per shard. As runs of numbers these take a few bytes each.

use super::{Placement, Stage};
use crate::ids::{Epoch, LayerRange, NodeId, ShardId};
use crate::limits::LANES_MAX;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use std::collections::{BTreeMap, BTreeSet};

/// Consecutive numbers: the first one, and their count.
type Run = (u32, u32);

/// The nodes of some lanes, as places among a stage's holders: the first place, whether each later lane has
/// the next place or the same one, and the number of lanes.
type LaneRun = (u32, bool, u32);

#[derive(Serialize, Deserialize)]
struct Encoded {
    epoch: Epoch,
    lane_group: u32,
    fan_in: u32,
    names: Names,
    members: Vec<Run>,
    stages: Vec<(LayerRange, Vec<Run>, Vec<LaneRun>)>,
    experts: Vec<(ShardId, Vec<Run>)>,
    learners: Vec<(ShardId, Vec<Run>)>,
}

/// Names in order: each by the number of bytes that it shares with the one before, and the rest. As columns,
/// which compress better than rows.
#[derive(Default, Serialize, Deserialize)]
pub(crate) struct Names {
    shared: Vec<u8>,
    /// Bytes of each rest.
    lengths: Vec<u32>,
    /// The rests, one after the other.
    rests: String,
}

impl Names {
    pub(crate) fn new<'a>(names: impl IntoIterator<Item = &'a NodeId>) -> Self {
        let (mut encoded, mut before) = (Self::default(), "");
        for NodeId(name) in names {
            let pairs = before.char_indices().zip(name.char_indices());
            let ends = pairs.take_while(|(left, right)| left == right).map(|(_, (at, c))| at + c.len_utf8());
            let shared = ends.take_while(|end| *end <= usize::from(u8::MAX)).last().unwrap_or(0);
            let rest = &name[shared..];
            encoded.shared.push(shared as u8);
            encoded.lengths.push(rest.len() as u32);
            encoded.rests.push_str(rest);
            before = name;
        }
        encoded
    }

    /// The names, or what is wrong with them.
    pub(crate) fn decode(&self) -> Result<Vec<NodeId>, &'static str> {
        let mut names: Vec<NodeId> = Vec::with_capacity(self.shared.len());
        let mut rests = self.rests.as_str();
        for (shared, length) in self.shared.iter().zip(&self.lengths) {
            let before = names.last().map_or("", |name| name.0.as_str());
            let shared = before.get(..usize::from(*shared)).ok_or("a name continues no other")?;
            let (rest, others) = rests.split_at_checked(*length as usize).ok_or("a name is cut off")?;
            names.push(NodeId::new(format!("{shared}{rest}")));
            rests = others;
        }
        match self.shared.len() == self.lengths.len() && rests.is_empty() {
            true => Ok(names),
            false => Err("names have other lengths"),
        }
    }
}

impl Serialize for Placement {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        encode(self).serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Placement {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        decode(Encoded::deserialize(deserializer)?).map_err(de::Error::custom)
    }
}

fn encode(placement: &Placement) -> Encoded {
    let holders = placement.stages.iter().flat_map(|stage| &stage.holders);
    let experts = placement.experts.values().flatten();
    let learners = placement.learners.values().flatten();
    let names: BTreeSet<&NodeId> =
        placement.members.iter().chain(holders).chain(experts).chain(learners).collect();
    let numbers: BTreeMap<&NodeId, u32> = names.iter().copied().zip(0..).collect();
    let stage = |stage: &Stage| (stage.layers, runs(&numbers, &stage.holders), lane_runs(&stage.lanes));
    Encoded {
        epoch: placement.epoch,
        lane_group: placement.lane_group,
        fan_in: placement.fan_in,
        members: runs(&numbers, &placement.members),
        stages: placement.stages.iter().map(stage).collect(),
        experts: placement.experts.iter().map(|(shard, nodes)| (*shard, runs(&numbers, nodes))).collect(),
        learners: placement.learners.iter().map(|(shard, nodes)| (*shard, runs(&numbers, nodes))).collect(),
        names: Names::new(names.iter().copied()),
    }
}

fn decode(encoded: Encoded) -> Result<Placement, &'static str> {
    let names = encoded.names.decode()?;
    let list = |runs: Vec<Run>| nodes(&names, &runs);
    let stages = encoded.stages.into_iter().map(|(layers, holders, lanes)| {
        let (holders, lanes) = (list(holders)?, places(&lanes)?);
        match lanes.iter().all(|place| (*place as usize) < holders.len()) {
            true => Ok(Stage { layers, holders, lanes }),
            false => Err("a lane has no node"),
        }
    });
    let of_shard = |(shard, runs)| list(runs).map(|nodes| (shard, nodes));
    let learners = |(shard, runs)| list(runs).map(|nodes| (shard, nodes.into_iter().collect()));
    Ok(Placement {
        epoch: encoded.epoch,
        members: list(encoded.members)?,
        stages: stages.collect::<Result<_, _>>()?,
        lane_group: encoded.lane_group,
        fan_in: encoded.fan_in,
        experts: encoded.experts.into_iter().map(of_shard).collect::<Result<_, _>>()?,
        learners: encoded.learners.into_iter().map(learners).collect::<Result<_, _>>()?,
    })
}

fn runs<'a>(numbers: &BTreeMap<&NodeId, u32>, nodes: impl IntoIterator<Item = &'a NodeId>) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for number in nodes.into_iter().filter_map(|node| numbers.get(node)) {
        match runs.last_mut() {
            Some((first, count)) if *first + *count == *number => *count += 1,
            _ => runs.push((*number, 1)),
        }
    }
    runs
}

fn nodes(names: &[NodeId], runs: &[Run]) -> Result<Vec<NodeId>, &'static str> {
    let mut nodes = Vec::new();
    for &(first, count) in runs {
        let (first, count) = (first as usize, count as usize);
        let run = names.get(first..first.saturating_add(count)).ok_or("a node has no name")?;
        if nodes.len() + count > names.len() {
            return Err("a node is named twice");
        }
        nodes.extend_from_slice(run);
    }
    Ok(nodes)
}

fn lane_runs(places: &[u32]) -> Vec<LaneRun> {
    let mut runs: Vec<LaneRun> = Vec::new();
    for &place in places {
        match runs.last_mut() {
            Some((first, rises, count @ 1)) if place == *first || place == *first + 1 => {
                (*rises, *count) = (place != *first, 2);
            }
            Some((first, false, count)) if *count > 1 && place == *first => *count += 1,
            Some((first, true, count)) if place == *first + *count => *count += 1,
            _ => runs.push((place, false, 1)),
        }
    }
    runs
}

fn places(runs: &[LaneRun]) -> Result<Vec<u32>, &'static str> {
    let mut places = Vec::new();
    for &(first, rises, count) in runs {
        if places.len() as u64 + u64::from(count) > LANES_MAX {
            return Err("there are too many lanes");
        }
        let step = u32::from(rises);
        places.extend((0..count).map(|at| first.saturating_add(step * at)));
    }
    Ok(places)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{ExpertId, LayerId};
    use proptest::prelude::*;

    fn expert(number: u16) -> ShardId {
        ShardId::Expert { layer: LayerId(1), expert: ExpertId(number) }
    }

    /// A placement of `count` nodes, of which some learn; each holds a stage and drives one lane.
    fn placement(count: usize, learning: usize) -> Placement {
        let all: Vec<NodeId> = (0..count).map(|number| NodeId::new(format!("node-{number:05}"))).collect();
        let members = all[learning..].to_vec();
        let layers = LayerId::range(0..4);
        let lanes = (0..members.len() as u32).collect();
        let experts = (0..64).map(|number| {
            let at = usize::from(number) * 7 % (members.len() - 1);
            (expert(number), vec![members[at + 1].clone(), members[at].clone()])
        });
        let learners = all[..learning].iter().cloned().collect::<BTreeSet<_>>();
        let learners = (0..9).map(|number| (expert(number), learners.clone()));
        Placement {
            epoch: Epoch(7),
            stages: vec![Stage { layers, holders: members.clone(), lanes }],
            lane_group: 4,
            fan_in: 8,
            experts: experts.collect(),
            learners: learners.filter(|(_, nodes)| !nodes.is_empty()).collect(),
            members,
        }
    }

    #[test]
    fn a_placement_of_a_thousand_nodes_takes_a_few_bytes_for_each() {
        for learning in [0, 500] {
            let placement = placement(1_000, learning);
            let bytes = postcard::to_stdvec(&placement).unwrap();
            assert_eq!(postcard::from_bytes::<Placement>(&bytes).unwrap(), placement);
            assert!(bytes.len() < 8_000, "{} bytes, {learning} learn", bytes.len());
        }
    }

    #[test]
    fn numbers_that_cannot_be_are_refused() {
        let good = || encode(&placement(10, 3));
        type Change = fn(&mut Encoded);
        let bad: [(&str, Change); 7] = [
            ("a node has no name", |e| e.members = vec![(8, 3)]),
            ("a node is named twice", |e| e.members = vec![(0, 10), (0, 1)]),
            ("a lane has no node", |e| e.stages[0].2 = vec![(7, false, 1)]),
            ("too many lanes", |e| e.stages[0].2 = vec![(0, false, u32::MAX)]),
            ("a name continues no other", |e| e.names.shared[0] = 1),
            ("a name is cut off", |e| e.names.lengths[9] = 2),
            ("names have other lengths", |e| e.names.rests.push('x')),
        ];
        for (expected, change) in bad {
            let mut encoded = good();
            change(&mut encoded);
            let bytes = postcard::to_stdvec(&encoded).unwrap();
            assert!(postcard::from_bytes::<Placement>(&bytes).is_err(), "{expected}");
            assert!(decode(encoded).unwrap_err().contains(expected));
        }
    }

    proptest! {
        #[test]
        fn any_lists_survive_their_runs(
            places in prop::collection::vec(0u32..6, 0..60),
            names in prop::collection::btree_set("[a-cä-ö]{0,4}", 1..20),
            picks in prop::collection::vec(0usize..20, 0..20),
        ) {
            prop_assert_eq!(super::places(&lane_runs(&places)).unwrap(), places);
            let names: Vec<NodeId> = names.into_iter().map(NodeId::new).collect();
            prop_assert_eq!(Names::new(&names).decode().unwrap(), &names[..]);
            let numbers: BTreeMap<&NodeId, u32> = names.iter().zip(0..).collect();
            let distinct: BTreeSet<usize> = picks.iter().map(|pick| pick % names.len()).collect();
            let mut picked: Vec<NodeId> = distinct.iter().map(|at| names[*at].clone()).collect();
            prop_assert_eq!(nodes(&names, &runs(&numbers, &picked)).unwrap(), picked.clone());
            picked.reverse();
            prop_assert_eq!(nodes(&names, &runs(&numbers, &picked)).unwrap(), picked);
        }
    }
}
