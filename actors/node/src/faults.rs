//! Faults that a scripted run injects into a node: one line each on the node's standard input, `partition
//! 3000`, `cut node-1 3000` or `lose 0.3 3000`, with the duration in milliseconds, or `corrupt embedding`.
//! The parent writes the lines, the node reads them.

use crate::context::NodeContext;
use crate::limits::FAULT_SECONDS_MAX;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use volary_core::compute::Compute;
use volary_transport::{Interference, check_name};

/// A fault of the node that reads it, or of its network.
#[derive(Clone, Debug, PartialEq)]
pub enum Fault {
    /// Drops all packets to and from this node.
    Partition {
        /// The duration.
        during: Duration,
    },
    /// Drops all packets between this node and another.
    Cut {
        /// The other node.
        peer: String,
        /// The duration.
        during: Duration,
    },
    /// Drops a fraction of the packets.
    Lose {
        /// The fraction: more than 0, at most 1.
        fraction: f64,
        /// The duration.
        during: Duration,
    },
    /// Flips a bit in this node's replica of a shard.
    Corrupt {
        /// The shard's name, as in `layer.1.expert.3`.
        shard: String,
    },
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Partition { during } => write!(f, "partition {}", during.as_millis()),
            Self::Cut { peer, during } => write!(f, "cut {peer} {}", during.as_millis()),
            Self::Lose { fraction, during } => write!(f, "lose {fraction} {}", during.as_millis()),
            Self::Corrupt { shard } => write!(f, "corrupt {shard}"),
        }
    }
}

/// A line that is no fault.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidFault {
    /// Unknown words, or too few or too many.
    #[error(
        "{0:?}: expected `partition MILLIS`, `cut PEER MILLIS`, `lose FRACTION MILLIS` or `corrupt SHARD`"
    )]
    Form(String),
    /// The peer's name is not a node's name.
    #[error("{0}")]
    Peer(String),
    /// The duration is out of range.
    #[error("{0:?}: expected 1 to {DURATION_MS_MAX} milliseconds")]
    Duration(String),
    /// The fraction is out of range.
    #[error("{0:?}: expected a fraction, more than 0 and at most 1")]
    Fraction(String),
}

const DURATION_MS_MAX: u64 = FAULT_SECONDS_MAX as u64 * 1000;

impl FromStr for Fault {
    type Err = InvalidFault;

    fn from_str(line: &str) -> Result<Self, InvalidFault> {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            ["partition", millis] => Ok(Self::Partition { during: duration(millis)? }),
            ["cut", peer, millis] => {
                check_name(peer).map_err(|error| InvalidFault::Peer(error.to_string()))?;
                Ok(Self::Cut { peer: (*peer).to_owned(), during: duration(millis)? })
            }
            ["lose", part, millis] => Ok(Self::Lose { fraction: fraction(part)?, during: duration(millis)? }),
            ["corrupt", shard] => Ok(Self::Corrupt { shard: (*shard).to_owned() }),
            _ => Err(InvalidFault::Form(line.to_owned())),
        }
    }
}

fn duration(word: &str) -> Result<Duration, InvalidFault> {
    let millis = word.parse::<u64>().ok().filter(|millis| (1..=DURATION_MS_MAX).contains(millis));
    millis.map(Duration::from_millis).ok_or_else(|| InvalidFault::Duration(word.to_owned()))
}

fn fraction(word: &str) -> Result<f64, InvalidFault> {
    let fraction = word.parse::<f64>().ok().filter(|&fraction| is_fraction(fraction));
    fraction.ok_or_else(|| InvalidFault::Fraction(word.to_owned()))
}

/// Whether a number is a fraction: more than 0, at most 1.
#[must_use]
pub fn is_fraction(fraction: f64) -> bool {
    fraction > 0.0 && fraction <= 1.0
}

/// Injects faults into this node until their sender is gone.
pub(crate) async fn inject<B: Compute>(
    node: Arc<NodeContext<B>>,
    interference: Interference,
    mut faults: mpsc::Receiver<Fault>,
) {
    while let Some(fault) = faults.recv().await {
        tracing::warn!(%fault, "injecting a fault");
        match fault {
            Fault::Partition { during } => interference.partition(during),
            Fault::Lose { fraction, during } => interference.drop_fraction(fraction, during),
            Fault::Cut { peer, during } => match node.peers.address(&peer) {
                Some(address) => interference.block_peer(address, during),
                None => tracing::warn!(peer, "no member has this name"),
            },
            Fault::Corrupt { shard } => corrupt(&node, &shard).await,
        }
    }
}

async fn corrupt<B: Compute>(node: &NodeContext<B>, name: &str) {
    let actors = node.shard_actors();
    match actors.all().iter().find(|(shard, _)| shard.to_string() == name) {
        Some((_, actor)) => match actor.flip_bit().await {
            Ok(()) => tracing::warn!(shard = name, "a bit of this node's replica is flipped"),
            Err(error) => tracing::warn!(shard = name, %error, "no bit could be flipped"),
        },
        None => tracing::warn!(shard = name, "this node does not hold the shard"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_survives_its_text() {
        let during = Duration::from_millis(3000);
        let all = [
            (Fault::Partition { during }, "partition 3000"),
            (Fault::Cut { peer: "node-1".into(), during }, "cut node-1 3000"),
            (Fault::Lose { fraction: 0.3, during }, "lose 0.3 3000"),
            (Fault::Corrupt { shard: "layer.1.expert.3".into() }, "corrupt layer.1.expert.3"),
        ];
        for (fault, line) in all {
            assert_eq!(fault.to_string(), line);
            assert_eq!(line.parse(), Ok(fault));
        }
    }

    #[test]
    fn an_invalid_line_is_refused_with_what_was_expected() {
        let bad = [
            ("", "expected `partition MILLIS`"),
            ("partition", "expected `partition MILLIS`"),
            ("partition 3 4", "expected `partition MILLIS`"),
            ("partition 0", "\"0\": expected 1 to 3600000 milliseconds"),
            ("partition 3600001", "expected 1 to 3600000"),
            ("partition -5", "expected 1 to 3600000"),
            ("corrupt", "`corrupt SHARD`"),
            ("cut ../up 5", "../up"),
            ("lose 0 5", "\"0\": expected a fraction"),
            ("lose 1.01 5", "expected a fraction"),
            ("lose NaN 5", "expected a fraction"),
        ];
        for (line, expected) in bad {
            let error = line.parse::<Fault>().expect_err(line).to_string();
            assert!(error.contains(expected), "{line}: {error}");
        }
    }
}
