//! The identifiers of a run: steps, epochs, lanes, layers, experts, nodes and shards.
//!
//! Numbers that identify something are newtypes, so that an epoch cannot be passed for a step or an expert
//! for a layer. They serialize as the plain number. Counts (of steps, lanes, layers ...) stay plain integers.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::ops::{Add, Range, Sub};

/// A newtype over an integer that is an identifier and not a quantity.
macro_rules! id {
    ($(#[$doc:meta])* $name:ident($number:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub $number);

        impl $name {
            /// The identifier after this one.
            #[must_use]
            pub const fn next(self) -> Self {
                Self(self.0 + 1)
            }

            /// The identifier before this one; that of 0 is 0.
            #[must_use]
            pub const fn previous(self) -> Self {
                Self(self.0.saturating_sub(1))
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }
    };
}

id! {
    /// The number of a training step, from 1; 0 is the state before the first step. A shard's version is the
    /// last step applied to it.
    Step(u64)
}

id! {
    /// The number of a placement, from 1; 0 precedes the first. Every message carries it, and receivers drop
    /// stale ones.
    Epoch(u64)
}

id! {
    /// The number of rollbacks of a run to a checkpoint. State of another timeline does not belong to the
    /// run.
    Timeline(u64)
}

id! {
    /// A fixed slice (micro-batch) of the global batch, from 0. The number of lanes is fixed for the life of
    /// a run.
    Lane(u32)
}

id! {
    /// A transformer layer, from 0.
    LayerId(u16)
}

id! {
    /// An expert within its MoE layer, from 0.
    ExpertId(u16)
}

impl Step {
    /// Whether the number is a multiple of `interval`; of an interval of 0 only step 0 is.
    #[must_use]
    pub const fn is_multiple_of(self, interval: u64) -> bool {
        self.0.is_multiple_of(interval)
    }

    /// The steps from this one to `last`, both included; none when `last` comes before.
    pub fn through(self, last: Self) -> impl DoubleEndedIterator<Item = Self> + Clone {
        (self.0..=last.0).map(Self)
    }
}

impl Add<u64> for Step {
    type Output = Self;

    fn add(self, steps: u64) -> Self {
        Self(self.0 + steps)
    }
}

impl Sub for Step {
    type Output = u64;

    /// The number of steps from `earlier` to this one.
    fn sub(self, earlier: Self) -> u64 {
        self.0 - earlier.0
    }
}

impl Lane {
    /// The place of this lane in a list of all lanes.
    #[must_use]
    pub const fn index(self) -> usize {
        self.0 as usize
    }

    /// The first `count` lanes.
    pub fn first(count: u32) -> impl DoubleEndedIterator<Item = Self> + ExactSizeIterator + Clone {
        (0..count).map(Self)
    }
}

impl LayerId {
    /// The place of this layer in a list of all layers.
    #[must_use]
    pub const fn index(self) -> usize {
        self.0 as usize
    }

    /// The layers of a range of numbers.
    #[must_use]
    pub const fn range(numbers: Range<u16>) -> LayerRange {
        LayerRange { start: Self(numbers.start), end: Self(numbers.end) }
    }

    /// The range of this layer alone.
    #[must_use]
    pub const fn alone(self) -> LayerRange {
        LayerRange { start: self, end: self.next() }
    }
}

impl ExpertId {
    /// The place of this expert in a list of all experts of its layer.
    #[must_use]
    pub const fn index(self) -> usize {
        self.0 as usize
    }

    /// The first `count` experts of a layer.
    pub fn first(count: u16) -> impl DoubleEndedIterator<Item = Self> + ExactSizeIterator + Clone {
        (0..count).map(Self)
    }
}

/// Consecutive layers, `start` included and `end` excluded. It serializes as `Range<u16>` does.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct LayerRange {
    /// The first layer.
    pub start: LayerId,
    /// One past the last layer.
    pub end: LayerId,
}

impl LayerRange {
    /// The layers, first to last.
    pub fn iter(self) -> impl DoubleEndedIterator<Item = LayerId> + ExactSizeIterator + Clone {
        (self.start.0..self.end.0).map(LayerId)
    }

    /// The places of these layers in a list of all layers.
    #[must_use]
    pub const fn indices(self) -> Range<usize> {
        self.start.index()..self.end.index()
    }

    /// The number of layers.
    #[must_use]
    pub fn len(self) -> usize {
        self.indices().len()
    }

    /// Whether there is no layer in it.
    #[must_use]
    pub fn is_empty(self) -> bool {
        self.indices().is_empty()
    }

    /// Whether `layer` is in it.
    #[must_use]
    pub fn contains(self, layer: LayerId) -> bool {
        self.start <= layer && layer < self.end
    }
}

impl fmt::Debug for LayerRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}..{}", self.start, self.end)
    }
}

/// A node's name, unique in its run: `node-1`, or the argument of `--name`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct NodeId(pub String);

impl NodeId {
    /// A node's id from its name.
    #[must_use]
    pub fn new(name: impl Into<String>) -> Self {
        Self(name.into())
    }
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The unit of state for placement, replication, transfer and checkpoints.
///
/// The order is the fixed order in which norms are summed and digests are listed.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum ShardId {
    /// The tied token embedding and the final norm.
    Embedding,
    /// Attention of one layer and, where the layer has no experts, its gated feed-forward.
    Dense {
        /// The layer.
        layer: LayerId,
    },
    /// The gate of one MoE layer, with the norm before it.
    Router {
        /// The layer.
        layer: LayerId,
    },
    /// One expert of one MoE layer.
    Expert {
        /// The layer.
        layer: LayerId,
        /// The expert.
        expert: ExpertId,
    },
}

impl ShardId {
    /// Whether this is an expert. Experts are placed one by one; all other shards of a layer are held by
    /// every node of the layer's pipeline stage.
    #[must_use]
    pub fn is_expert(self) -> bool {
        matches!(self, Self::Expert { .. })
    }

    /// The layer that the shard belongs to; the embedding belongs to the first layer.
    #[must_use]
    pub fn layer(self) -> LayerId {
        match self {
            Self::Embedding => LayerId(0),
            Self::Dense { layer } | Self::Router { layer } | Self::Expert { layer, .. } => layer,
        }
    }
}

impl fmt::Display for ShardId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Embedding => f.write_str("embedding"),
            Self::Dense { layer } => write!(f, "layer.{layer}.dense"),
            Self::Router { layer } => write!(f, "layer.{layer}.router"),
            Self::Expert { layer, expert } => write!(f, "layer.{layer}.expert.{expert}"),
        }
    }
}

impl fmt::Debug for ShardId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Stored records and messages hold plain numbers.
    #[test]
    fn identifiers_serialize_as_their_numbers() {
        let bytes = |value: &dyn Fn() -> postcard::Result<Vec<u8>>| value().expect("it serializes");
        assert_eq!(bytes(&|| postcard::to_stdvec(&Step(300))), bytes(&|| postcard::to_stdvec(&300u64)));
        assert_eq!(bytes(&|| postcard::to_stdvec(&Epoch(7))), bytes(&|| postcard::to_stdvec(&7u64)));
        assert_eq!(bytes(&|| postcard::to_stdvec(&Lane(300))), bytes(&|| postcard::to_stdvec(&300u32)));
        assert_eq!(
            bytes(&|| postcard::to_stdvec(&LayerId::range(2..300))),
            bytes(&|| postcard::to_stdvec(&(2u16..300)))
        );
        let shard = ShardId::Expert { layer: LayerId(2), expert: ExpertId(300) };
        assert_eq!(
            bytes(&|| postcard::to_stdvec(&shard)),
            bytes(&|| postcard::to_stdvec(&(3u8, 2u16, 300u16)))
        );
    }

    #[test]
    fn a_range_of_layers_is_walked_in_both_directions() {
        let range = LayerId::range(2..5);
        assert_eq!(range.iter().collect::<Vec<_>>(), [LayerId(2), LayerId(3), LayerId(4)]);
        assert_eq!(range.iter().next_back(), Some(LayerId(4)));
        assert!(range.contains(LayerId(4)) && !range.contains(LayerId(5)) && !range.contains(LayerId(1)));
        assert_eq!((range.len(), range.indices(), LayerId(4).alone().len()), (3, 2..5, 1));
        assert!(LayerId::range(5..5).is_empty());
    }
}
