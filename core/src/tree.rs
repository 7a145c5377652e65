//! The fixed binary tree over which gradients are summed.
//!
//! Floating-point addition is not associative, so the order of a sum is part of the mathematics of a run.
//! Here the order is a binary tree over *leaves*, numbered from 0, that depends only on their number: a span
//! is divided at the largest power of two below its length. A process with all leaves below a node of the
//! tree may send that node's sum; the distribution of leaves never changes the result.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// A node of the tree: the half-open range of leaves below it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct LeafSpan {
    /// The first leaf.
    pub start: u32,
    /// One past the last leaf.
    pub end: u32,
}

impl LeafSpan {
    /// The root of the tree over `leaves` leaves.
    #[must_use]
    pub fn root(leaves: u32) -> Self {
        Self { start: 0, end: leaves }
    }

    /// The two children, or `None` for a leaf.
    #[must_use]
    pub fn children(self) -> Option<(Self, Self)> {
        let length = self.end - self.start;
        if length < 2 {
            return None;
        }
        // The largest power of two strictly below the length.
        let left = 1u32 << (31 - (length - 1).leading_zeros());
        let middle = self.start + left;
        Some((Self { start: self.start, end: middle }, Self { start: middle, end: self.end }))
    }

    /// The parent and the sibling of this node in the tree over `leaves` leaves, or `None` for the root
    /// and for a span that is no node of the tree.
    #[must_use]
    pub fn parent(self, leaves: u32) -> Option<(Self, Self)> {
        let mut node = Self::root(leaves);
        while let Some((left, right)) = node.children() {
            if self == left {
                return Some((node, right));
            }
            if self == right {
                return Some((node, left));
            }
            node = if self.start < right.start { left } else { right };
        }
        None
    }

    /// Whether this is a node of the tree over `leaves` leaves.
    #[must_use]
    pub fn is_node(self, leaves: u32) -> bool {
        self == Self::root(leaves) || self.parent(leaves).is_some()
    }

    /// The number of nodes that [`LeafSpan::fragments`] finds for consecutive leaves `held`.
    #[must_use]
    pub fn parts_of_run(leaves: u32, held: std::ops::Range<u32>) -> u32 {
        fn parts(node: LeafSpan, held: &std::ops::Range<u32>) -> u32 {
            if node.end <= held.start || held.end <= node.start || node.start >= node.end {
                return 0;
            }
            if held.start <= node.start && node.end <= held.end {
                return 1;
            }
            node.children().map_or(0, |(left, right)| parts(left, held) + parts(right, held))
        }
        parts(Self::root(leaves), &held)
    }

    /// The largest nodes of the tree over `leaves` leaves all of whose leaves satisfy `held`, from left to
    /// right.
    pub fn fragments(leaves: u32, held: impl Fn(u32) -> bool) -> Vec<Self> {
        let mut found = Vec::new();
        let mut open = vec![Self::root(leaves)];
        while let Some(node) = open.pop() {
            if node.start < node.end && (node.start..node.end).all(&held) {
                found.push(node);
            } else if let Some((left, right)) = node.children() {
                open.push(right);
                open.push(left);
            }
        }
        found
    }
}

/// The next operation after a value was put into a [`Fold`].
#[derive(Debug, PartialEq, Eq)]
pub enum Next<T> {
    /// Nothing until more values come.
    Wait,
    /// Add `right` to `left` and put the sum back as `span`.
    Add {
        /// The node whose sum this will be.
        span: LeafSpan,
        /// The sum over the left child.
        left: T,
        /// The sum over the right child.
        right: T,
    },
    /// The sum is complete here: `span` is the root, or its parent is added elsewhere.
    Done {
        /// The node of the tree.
        span: LeafSpan,
        /// Its sum.
        value: T,
    },
}

/// The bookkeeping of one sum over the tree: values arrive in any order, additions come out in the fixed one.
///
/// The values are opaque: tensors in a node, numbers in tests.
#[derive(Debug)]
pub struct Fold<T> {
    leaves: u32,
    waiting: BTreeMap<LeafSpan, T>,
}

impl<T> Fold<T> {
    /// A sum over `leaves` leaves.
    #[must_use]
    pub fn new(leaves: u32) -> Self {
        Self { leaves, waiting: BTreeMap::new() }
    }

    /// Takes the value of one node of the tree. `is_here` tells the nodes whose sums are made here.
    pub fn put(&mut self, span: LeafSpan, value: T, is_here: impl FnOnce(LeafSpan) -> bool) -> Next<T> {
        let above = span.parent(self.leaves).filter(|(parent, _)| is_here(*parent));
        let Some((parent, sibling)) = above else { return Next::Done { span, value } };
        let Some(other) = self.waiting.remove(&sibling) else {
            self.waiting.insert(span, value);
            return Next::Wait;
        };
        let (left, right) = if span.start < sibling.start { (value, other) } else { (other, value) };
        Next::Add { span: parent, left, right }
    }
}

/// The sum of `values` in the tree's order, for values that are small enough to be gathered first (losses,
/// norms).
#[must_use]
pub fn fold_numbers(values: &[f64]) -> f64 {
    fn fold(values: &[f64], span: LeafSpan) -> f64 {
        match span.children() {
            Some((left, right)) => fold(values, left) + fold(values, right),
            None => values.get(span.start as usize).copied().unwrap_or(0.0),
        }
    }
    fold(values, LeafSpan::root(values.len() as u32))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::{Purpose, Stream};
    use proptest::prelude::*;

    proptest! {
    /// The expression is the same for every distribution of leaves and sums, and every order of arrival.
            #[test]
            fn the_sum_is_the_same_expression_for_every_split_and_order(leaves in 1u32..40, nodes in 1u64..6, seed: u64) {
                let mut stream = Stream::new(seed, Purpose::Faults, &[]);
    // The place of each sum: arbitrary, but fixed.
                let place = |span: LeafSpan| Stream::new(seed, Purpose::Faults, &[span.start.into(), span.end.into()]).below(nodes);
                let mut folds: Vec<Fold<String>> = (0..nodes).map(|_| Fold::new(leaves)).collect();
                let mut in_transit: Vec<(LeafSpan, String)> =
                    (0..leaves).map(|l| (LeafSpan { start: l, end: l + 1 }, l.to_string())).collect();
                let mut roots = Vec::new();
                while !in_transit.is_empty() {
                    let (span, value) = in_transit.swap_remove(stream.below(in_transit.len() as u64) as usize);
                    let Some((parent, _)) = span.parent(leaves) else {
                        roots.push(value);
                        continue;
                    };
                    let node = place(parent);
                    match folds[node as usize].put(span, value, |span| place(span) == node) {
                        Next::Wait => {}
                        Next::Add { span, left, right } => in_transit.push((span, format!("({left}+{right})"))),
                        Next::Done { .. } => prop_assert!(false, "each value is sent to the place of its parent"),
                    }
                }
                fn expression(span: LeafSpan) -> String {
                    match span.children() {
                        Some((left, right)) => format!("({}+{})", expression(left), expression(right)),
                        None => span.start.to_string(),
                    }
                }
                prop_assert_eq!(roots, [expression(LeafSpan::root(leaves))]);
            }
        }

    #[test]
    fn the_parts_of_a_run_are_counted_without_listing_its_leaves() {
        for leaves in 1..24 {
            for (start, end) in (0..=leaves).flat_map(|a| (a..=leaves).map(move |b| (a, b))) {
                let listed = LeafSpan::fragments(leaves, |leaf| (start..end).contains(&leaf)).len();
                assert_eq!(
                    LeafSpan::parts_of_run(leaves, start..end) as usize,
                    listed,
                    "{start}..{end} of {leaves}"
                );
            }
        }
    }

    #[test]
    fn twelve_lanes_over_three_nodes_are_three_whole_subtrees() {
        let fragments = |node: u32| LeafSpan::fragments(12, |leaf| leaf / 4 == node);
        assert_eq!(fragments(0), [LeafSpan { start: 0, end: 4 }]);
        assert_eq!(fragments(1), [LeafSpan { start: 4, end: 8 }]);
        assert_eq!(fragments(2), [LeafSpan { start: 8, end: 12 }]);
    }

    #[test]
    fn numbers_fold_in_the_tree_order() {
        let values = [1e16, 1.0, -1e16, 1.0, 3.0];
        assert_eq!(fold_numbers(&values), ((1e16 + 1.0) + (-1e16 + 1.0)) + 3.0);
        assert_eq!(fold_numbers(&[]), 0.0);
    }
}
