//! The route of one shard's gradient: partial sums from the nodes that compute its leaves to the shard's
//! owner, and the final sum from the owner back to all holders.
//!
//! The order of additions is fixed by the tree over all leaves ([`crate::tree`]); this module decides only
//! *where* each addition happens. Every span of leaves has one reducer, which receives the sums of the span's
//! two halves:
//!
//! - A node that computes all leaves of a span reduces it alone. Nothing is sent for it.
//! - A span of several nodes is reduced by the shard's owner, as long as at most `fan_in` nodes compute the
//!   shard.
//! - With more nodes, each group of about `fan_in` of them has a reducer among themselves, and so has each
//!   group of such groups, so that no link carries the sums of all nodes.
//! - Owners and reducers rotate from shard to shard, so that no node adds everything.
//! - Only the location of an addition depends on the placement, never its operands: losses are bit-identical
//!   on any number of nodes.
//!
//! Six lanes on the nodes a, b and c, where b owns the shard. The tree halves a span at the largest power of
//! two:
//!
//! ```text
//!                  [0,6) b                  sums, leaves to root          broadcast of the root
//!                 /       \
//!         [0,4) b          [4,6) c          a -> b  [0,2)                 b -> c
//!         /     \          /     \          c -> b  [4,6)                 b -> a
//!     [0,2) a  [2,4) b  [4] c   [5] c
//!     /    \   /    \
//!   [0] a [1] a [2] b [3] b
//! ```
//!
//! Node a computes lanes 0 and 1 and sends one sum; so does c. The owner b adds `[0,2) + [2,4)` and then
//! `[0,4) + [4,6)`.

use crate::ids::NodeId;
use crate::tree::LeafSpan;

/// The route of one shard's gradient under one placement.
#[derive(Clone, Debug)]
pub struct Reduction<'a> {
    /// Leaves of the gradient: lanes, or for an expert groups of lanes.
    pub(crate) leaves: u32,
    /// For each lane, the place in `runners` of the node that takes it through the shard's stage.
    pub(crate) lanes: &'a [u32],
    /// The nodes of the shard's stage.
    pub(crate) runners: &'a [NodeId],
    /// The holders of the shard: of an expert its owner first, otherwise the nodes of the stage.
    pub(crate) holders: &'a [NodeId],
    /// For an expert: its lane groups and its number.
    pub(crate) expert: Option<ExpertLeaves>,
    /// Rotates owners and reducers from shard to shard.
    pub(crate) rotation: usize,
    /// Sums that one node adds, and nodes that it passes the final sum to.
    pub(crate) fan_in: u32,
}

/// The leaves of an expert's gradient.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ExpertLeaves {
    /// Lanes in a leaf.
    pub(crate) lane_group: u32,
    /// The expert's number, which rotates the replicas.
    pub(crate) rotation: usize,
}

/// One gradient on its way between two nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transfer<'a> {
    /// The sender.
    pub from: &'a NodeId,
    /// The receiver.
    pub to: &'a NodeId,
    /// The leaves in the sum; all leaves for the final sum.
    pub span: LeafSpan,
}

impl<'a> Reduction<'a> {
    /// The span of all leaves.
    #[must_use]
    pub fn root(&self) -> LeafSpan {
        LeafSpan::root(self.leaves)
    }

    /// The holder that makes the final sum and sends it to the others.
    #[must_use]
    pub fn owner(&self) -> Option<&'a NodeId> {
        self.holders.get(self.owner_place())
    }

    fn owner_place(&self) -> usize {
        if self.expert.is_some() { 0 } else { self.rotation % self.holders.len().max(1) }
    }

    /// The holders, the owner first.
    pub fn holders(&self) -> impl Iterator<Item = &'a NodeId> + Clone + use<'a> {
        let (before, from_owner) = self.holders.split_at(self.owner_place().min(self.holders.len()));
        from_owner.iter().chain(before)
    }

    /// The node that takes a lane through the shard's stage.
    fn runner(&self, lane: u32) -> Option<&'a NodeId> {
        self.runners.get(*self.lanes.get(lane as usize)? as usize)
    }

    /// The node that computes a leaf: the lane's node or, for an expert, the replica that serves the lane
    /// group. A replica on the node of the group's first lane is preferred.
    #[must_use]
    pub fn computed_by(&self, leaf: u32) -> Option<&'a NodeId> {
        let Some(expert) = self.expert else { return self.runner(leaf) };
        let runner = self.runner(leaf * expert.lane_group)?;
        if let Some(local) = self.holders.iter().find(|holder| *holder == runner) {
            return Some(local);
        }
        self.holders.get((leaf as usize + expert.rotation) % self.holders.len().max(1))
    }

    /// The node that computes all leaves of a span, if one does.
    fn single_node(&self, span: LeafSpan) -> Option<&'a NodeId> {
        let first = self.computed_by(span.start)?;
        (span.start + 1..span.end).all(|leaf| self.computed_by(leaf) == Some(first)).then_some(first)
    }

    /// The node that makes the sum over a span.
    #[must_use]
    pub fn reducer(&self, span: LeafSpan) -> Option<&'a NodeId> {
        self.computed_by(span.start)?;
        if let Some(node) = self.single_node(span) {
            return Some(node);
        }
        let level = self.level(span);
        let mut block = self.root();
        if self.expert.is_some() || self.level(block) == level {
            return self.owner();
        }
        // The largest span around this one on the same level: all of it is reduced by one node.
        while self.level(block) != level {
            let (left, right) = block.children()?;
            block = if span.start < right.start { left } else { right };
        }
        self.runner(block.start + (self.rotation % (block.end - block.start).max(1) as usize) as u32)
    }

    /// The height of a tree with `fan_in` children per reducer over the runs of one node in a span of lanes:
    /// 0 for one run.
    fn level(&self, span: LeafSpan) -> u32 {
        let lanes = self.lanes.get(span.start as usize..span.end as usize).unwrap_or_default();
        let runs = 1 + lanes.windows(2).filter(|pair| pair[0] != pair[1]).count() as u64;
        let (mut level, mut reach) = (0, 1u64);
        while reach < runs {
            reach *= u64::from(self.fan_in.max(2));
            level += 1;
        }
        level
    }

    /// The nodes to which `node` passes the final sum: the owner is the root of a tree over all holders.
    pub fn broadcast_children(&self, node: &NodeId) -> impl Iterator<Item = &'a NodeId> + use<'a> {
        let fan_out = self.fan_in.max(1) as usize;
        let place = self.holders().position(|holder| holder == node);
        let (skip, take) = place.map_or((0, 0), |place| (fan_out * place + 1, fan_out));
        self.holders().skip(skip).take(take)
    }

    /// The sums that `node` makes alone, from left to right.
    #[must_use]
    pub fn fragments(&self, node: &NodeId) -> Vec<LeafSpan> {
        LeafSpan::fragments(self.leaves, |leaf| self.computed_by(leaf) == Some(node))
    }

    /// Every gradient that crosses a link in one step: the partial sums, then the final sum.
    pub fn transfers(&self) -> impl Iterator<Item = Transfer<'a>> + use<'a> {
        let mut transfers = Vec::new();
        let mut open = vec![self.root()];
        while let Some(span) = open.pop() {
            let (None, Some(to), Some((left, right))) =
                (self.single_node(span), self.reducer(span), span.children())
            else {
                continue;
            };
            for span in [left, right] {
                transfers.extend(self.reducer(span).map(|from| Transfer { from, to, span }));
                open.push(span);
            }
        }
        let span = self.root();
        let last = self.reducer(span).zip(self.owner()).map(|(from, to)| Transfer { from, to, span });
        transfers.extend(last);
        for from in self.holders() {
            transfers.extend(self.broadcast_children(from).map(|to| Transfer { from, to, span }));
        }
        transfers.into_iter().filter(|transfer| transfer.from != transfer.to)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The example of the module's documentation.
    #[test]
    fn six_lanes_on_three_nodes() {
        let nodes = ["a", "b", "c"].map(NodeId::new);
        let [a, b, c] = &nodes;
        let reduction = Reduction {
            leaves: 6,
            lanes: &[0, 0, 1, 1, 2, 2],
            runners: &nodes,
            holders: &nodes,
            expert: None,
            rotation: 1,
            fan_in: 8,
        };
        assert_eq!(reduction.owner(), Some(b));
        let transfers: Vec<(&NodeId, &NodeId, (u32, u32))> =
            reduction.transfers().map(|t| (t.from, t.to, (t.span.start, t.span.end))).collect();
        assert_eq!(transfers, [(c, b, (4, 6)), (a, b, (0, 2)), (b, c, (0, 6)), (b, a, (0, 6))]);
    }
}
