//! What a scripted run does to a node's links: one line on the node's standard input, `partition 3000`, `cut node-1 3000`
//! or `lose 0.3 3000`, times in milliseconds. The parent writes the lines, the node reads them.

use crate::node_context::NodeContext;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use volary_core::compute::Compute;
use volary_transport::{Interference, check_name};

/// The longest that a disturbance may last.
pub const DISTURB_SECONDS_MAX: f64 = 3600.0;

/// What happens to the links of the node that reads it.
#[derive(Clone, Debug, PartialEq)]
pub enum Disturbance {
    /// Nothing passes between this node and anybody.
    Partition {
        /// For how long.
        during: Duration,
    },
    /// Nothing passes between this node and another.
    Cut {
        /// The other node.
        peer: String,
        /// For how long.
        during: Duration,
    },
    /// A part of the packets is lost.
    Lose {
        /// Which part: more than 0, at most 1.
        fraction: f64,
        /// For how long.
        during: Duration,
    },
}

impl fmt::Display for Disturbance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Partition { during } => write!(f, "partition {}", during.as_millis()),
            Self::Cut { peer, during } => write!(f, "cut {peer} {}", during.as_millis()),
            Self::Lose { fraction, during } => write!(f, "lose {fraction} {}", during.as_millis()),
        }
    }
}

impl FromStr for Disturbance {
    type Err = String;

    fn from_str(line: &str) -> Result<Self, String> {
        let words: Vec<&str> = line.split_whitespace().collect();
        let parsed = match words.as_slice() {
            ["partition", millis] => Self::Partition { during: duration(millis)? },
            ["cut", peer, millis] => {
                check_name(peer).map_err(|error| error.to_string())?;
                Self::Cut { peer: (*peer).to_owned(), during: duration(millis)? }
            }
            ["lose", fraction, millis] => Self::Lose { fraction: part(fraction)?, during: duration(millis)? },
            _ => {
                return Err(format!(
                    "{line:?}: expected `partition MILLIS`, `cut PEER MILLIS` or `lose FRACTION MILLIS`"
                ));
            }
        };
        Ok(parsed)
    }
}

fn duration(word: &str) -> Result<Duration, String> {
    let most = Duration::from_secs_f64(DISTURB_SECONDS_MAX).as_millis();
    let millis = word.parse::<u64>().ok().filter(|&millis| millis > 0 && u128::from(millis) <= most);
    millis.map(Duration::from_millis).ok_or_else(|| format!("{word:?}: expected 1 to {most} milliseconds"))
}

fn part(word: &str) -> Result<f64, String> {
    let fraction = word.parse::<f64>().ok().filter(|&fraction| is_part(fraction));
    fraction.ok_or_else(|| format!("{word:?}: expected a fraction, more than 0 and at most 1"))
}

/// Whether a number is a part of something: more than 0, at most 1.
#[must_use]
pub fn is_part(fraction: f64) -> bool {
    fraction > 0.0 && fraction <= 1.0
}

/// Does to this node's links what it is told, for as long as somebody may tell.
pub(crate) async fn disturb<B: Compute>(
    node: Arc<NodeContext<B>>,
    interference: Interference,
    mut disturbances: mpsc::Receiver<Disturbance>,
) {
    while let Some(disturbance) = disturbances.recv().await {
        tracing::warn!(%disturbance, "the network is disturbed, as asked");
        match disturbance {
            Disturbance::Partition { during } => interference.partition(during),
            Disturbance::Lose { fraction, during } => interference.lose(fraction, during),
            Disturbance::Cut { peer, during } => match node.peers.address(&peer) {
                Some(address) => interference.cut(address, during),
                None => tracing::warn!(peer, "is not known here"),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_parent_writes_is_what_the_node_reads() {
        let during = Duration::from_millis(3000);
        let all = [
            (Disturbance::Partition { during }, "partition 3000"),
            (Disturbance::Cut { peer: "node-1".into(), during }, "cut node-1 3000"),
            (Disturbance::Lose { fraction: 0.3, during }, "lose 0.3 3000"),
        ];
        for (disturbance, line) in all {
            assert_eq!(disturbance.to_string(), line);
            assert_eq!(line.parse(), Ok(disturbance));
        }
    }

    #[test]
    fn a_bad_line_says_what_was_expected() {
        let bad = [
            ("", "expected `partition MILLIS`"),
            ("partition", "expected `partition MILLIS`"),
            ("partition 3 4", "expected `partition MILLIS`"),
            ("partition 0", "\"0\": expected 1 to 3600000 milliseconds"),
            ("partition 3600001", "expected 1 to 3600000"),
            ("partition -5", "expected 1 to 3600000"),
            ("cut ../up 5", "../up"),
            ("lose 0 5", "\"0\": expected a fraction"),
            ("lose 1.01 5", "expected a fraction"),
            ("lose NaN 5", "expected a fraction"),
        ];
        for (line, expected) in bad {
            let error = line.parse::<Disturbance>().expect_err(line);
            assert!(error.contains(expected), "{line}: {error}");
        }
    }
}
