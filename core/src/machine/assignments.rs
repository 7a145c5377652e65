//! The assignment of each node: its shards, and the source of each.

use super::Machine;
use crate::ids::{NodeId, ShardId, Step};
use crate::layout::{Addresses, Layout};
use crate::limits::COPY_SOURCES_MAX;
use crate::messages::{Assignment, Source};
use crate::shared::Shared;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

impl Machine {
    /// The assignments of `voters`. Common parts are shared, and shards are walked once instead of once per
    /// node.
    pub(super) fn assignments(&self, voters: &BTreeSet<NodeId>) -> Vec<(NodeId, Assignment)> {
        let addresses = self.nodes.iter().map(|(node, n)| (node.clone(), n.address.clone())).collect();
        let placement = Arc::new(self.placement.clone());
        let layout = Shared::new(Layout { placement, addresses: Addresses(addresses) });
        let blank = |node: &NodeId| {
            let assignment = Assignment {
                layout: layout.clone(),
                timeline: self.timeline,
                version: self.committed,
                last: self.last,
                shards: Vec::new(),
                learn: Vec::new(),
            };
            (node.clone(), assignment)
        };
        let mut assignments: BTreeMap<NodeId, Assignment> = voters.iter().map(blank).collect();
        for shard in self.settings.architecture.shards() {
            for node in self.placement.holders_unordered(shard) {
                if let Some(assignment) = assignments.get_mut(node) {
                    assignment.shards.push((shard, self.source(node, shard)));
                }
            }
        }
        for (shard, nodes) in &self.placement.learners {
            let copy_sources = self.copy_sources(*shard);
            for node in nodes {
                if let Some(assignment) = assignments.get_mut(node) {
                    assignment.learn.push((*shard, copy_sources.clone()));
                }
            }
        }
        assignments.into_iter().collect()
    }

    /// Holders of a shard to copy from, at most [`COPY_SOURCES_MAX`], rotated by shard to spread the load.
    fn copy_sources(&self, shard: ShardId) -> Vec<NodeId> {
        let Some(holders) = self.holders.get(&shard).filter(|holders| !holders.is_empty()) else {
            return Vec::new();
        };
        let rotation = match shard {
            ShardId::Expert { expert, .. } => expert.index(),
            _ => shard.layer().index(),
        };
        let first = rotation % holders.len();
        holders.iter().cycle().skip(first).take(holders.len().min(COPY_SOURCES_MAX)).cloned().collect()
    }

    fn source(&self, node: &NodeId, shard: ShardId) -> Source {
        match self.holders.get(&shard) {
            Some(holders) if holders.contains(node) => Source::Held,
            Some(holders) if !holders.is_empty() => {
                self.copy_sources(shard).into_iter().next().map_or(Source::Initial, Source::Peer)
            }
            // A run may begin with weights from elsewhere: a checkpoint at step 0.
            _ if self.committed == Step(0) && self.durable.is_none() => Source::Initial,
            _ => Source::Checkpoint(self.committed),
        }
    }
}
