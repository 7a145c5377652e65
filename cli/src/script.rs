//! A script: faults and membership changes of a run at chosen steps. The file holds `[[event]]` tables; see
//! `examples/events.toml`.

use crate::document;
use crate::limits::SCRIPT_EVENTS_MAX;
use anyhow::{Context, bail};
use serde::Deserialize;
use std::collections::VecDeque;
use std::fmt;
use std::path::Path;
use std::time::Duration;
use volary_node::{FAULT_SECONDS_MAX, Fault, is_fraction};

/// A change to the processes of a run or to their network.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(tag = "do", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Action {
    /// Kills a node's process.
    Kill {
        /// The node.
        node: String,
    },
    /// Suspends a node's process for a time.
    Stop {
        /// The node.
        node: String,
        /// The duration.
        for_seconds: f64,
    },
    /// Drains a node: it hands its shards over and leaves.
    Drain {
        /// The node.
        node: String,
    },
    /// Starts one more node. (With braces, so that serde refuses the keys of other actions.)
    Join {},
    /// Kills the supervisor's process.
    KillSupervisor {},
    /// Drops all packets to and from a node for a time.
    Partition {
        /// The node.
        node: String,
        /// The duration.
        for_seconds: f64,
    },
    /// Drops all packets between two nodes for a time.
    Cut {
        /// The node that drops them.
        node: String,
        /// The other node.
        peer: String,
        /// The duration.
        for_seconds: f64,
    },
    /// Drops a fraction of a node's packets for a time.
    Lose {
        /// The node.
        node: String,
        /// The fraction: more than 0, at most 1.
        fraction: f64,
        /// The duration.
        for_seconds: f64,
    },
    /// Flips a bit in a node's replica of a shard.
    Corrupt {
        /// The node.
        node: String,
        /// The shard: `embedding`, `layer.0.dense`, `layer.1.router` or `layer.1.expert.3`.
        shard: String,
    },
}

impl Action {
    /// The names of its nodes.
    fn nodes(&self) -> Vec<&str> {
        match self {
            Self::Join {} | Self::KillSupervisor {} => vec![],
            Self::Cut { node, peer, .. } => vec![node, peer],
            Self::Kill { node }
            | Self::Stop { node, .. }
            | Self::Drain { node }
            | Self::Partition { node, .. }
            | Self::Corrupt { node, .. }
            | Self::Lose { node, .. } => vec![node],
        }
    }

    fn seconds(&self) -> Option<f64> {
        match self {
            Self::Stop { for_seconds, .. }
            | Self::Partition { for_seconds, .. }
            | Self::Cut { for_seconds, .. }
            | Self::Lose { for_seconds, .. } => Some(*for_seconds),
            Self::Kill { .. }
            | Self::Drain { .. }
            | Self::Join {}
            | Self::KillSupervisor {}
            | Self::Corrupt { .. } => None,
        }
    }

    /// Checks bounds that the types do not express.
    fn check(&self) -> anyhow::Result<()> {
        if let Some(seconds) = self.seconds().filter(|s| !(*s >= 0.001 && *s <= FAULT_SECONDS_MAX)) {
            bail!("for_seconds = {seconds}: expected 0.001 to {FAULT_SECONDS_MAX}");
        }
        match self {
            Self::Lose { fraction, .. } if !is_fraction(*fraction) => {
                bail!("fraction = {fraction}: expected more than 0 and at most 1")
            }
            Self::Corrupt { shard, .. } if shard.is_empty() || shard.contains(char::is_whitespace) => {
                bail!(
                    "shard = {shard:?}: expected the name of a shard, such as \"embedding\" or \"layer.1.expert.3\""
                )
            }
            Self::Cut { node, peer, .. } if node == peer => {
                bail!("peer = {peer:?}: expected another node than node")
            }
            _ => Ok(()),
        }
    }

    /// The fault that a node must inject into itself or its network, with its name.
    #[must_use]
    pub fn node_fault(&self) -> Option<(&str, Fault)> {
        if let Self::Corrupt { node, shard } = self {
            return Some((node, Fault::Corrupt { shard: shard.clone() }));
        }
        // In bounds: checked by check().
        let during = Duration::try_from_secs_f64(self.seconds()?).ok()?;
        match self {
            Self::Partition { node, .. } => Some((node, Fault::Partition { during })),
            Self::Cut { node, peer, .. } => Some((node, Fault::Cut { peer: peer.clone(), during })),
            Self::Lose { node, fraction, .. } => Some((node, Fault::Lose { fraction: *fraction, during })),
            _ => None,
        }
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kill { node } => write!(f, "kill {node}"),
            Self::Stop { node, for_seconds } => write!(f, "stop {node} for {for_seconds} s"),
            Self::Drain { node } => write!(f, "drain {node}"),
            Self::Join {} => write!(f, "join"),
            Self::KillSupervisor {} => write!(f, "kill the supervisor"),
            Self::Partition { node, for_seconds } => write!(f, "partition {node} for {for_seconds} s"),
            Self::Cut { node, peer, for_seconds } => {
                write!(f, "cut {node} from {peer} for {for_seconds} s")
            }
            Self::Corrupt { node, shard } => write!(f, "flip a bit of {shard} on {node}"),
            Self::Lose { node, fraction, for_seconds } => {
                write!(f, "lose {fraction} of the packets of {node} for {for_seconds} s")
            }
        }
    }
}

/// An action and its step.
#[derive(Clone, Debug, PartialEq)]
pub struct ScriptEvent {
    /// The action happens as soon as this step is committed.
    pub at_step: u64,
    /// The action.
    pub action: Action,
}

/// The pending events, in order.
#[derive(Debug, Default)]
pub struct Script {
    events: VecDeque<ScriptEvent>,
}

impl Script {
    /// Whether an event injects a fault into a node, or into its network.
    #[must_use]
    pub fn has_faults_inside(&self) -> bool {
        self.events.iter().any(|event| event.action.node_fault().is_some())
    }

    /// Reads the script of a run that starts with `nodes` nodes.
    ///
    /// # Errors
    /// One line that names the file, the event and the expected value.
    pub fn load(path: &Path, nodes: usize) -> anyhow::Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| format!("events {}", path.display()))?;
        Self::parse(&text, &path.display().to_string(), nodes)
    }

    /// As [`Script::load`], from text; errors call it `name`.
    ///
    /// # Errors
    /// As [`Script::load`].
    pub fn parse(text: &str, name: &str, nodes: usize) -> anyhow::Result<Self> {
        let mut table: toml::Table = document::parse(text, name)?;
        let Some(toml::Value::Array(tables)) = table.remove("event") else {
            bail!("{name}: expected [[event]] tables");
        };
        if let Some(key) = table.keys().next() {
            bail!("{name}: unknown key `{key}`: expected only [[event]] tables");
        }
        if tables.len() > SCRIPT_EVENTS_MAX {
            bail!("{name}: {} events: expected at most {SCRIPT_EVENTS_MAX}", tables.len());
        }
        let mut events = Vec::with_capacity(tables.len());
        for (number, table) in (1..).zip(tables) {
            let event = event(table).with_context(|| format!("{name}, event {number}"))?;
            events.push((number, event));
        }
        // A stable sort: events of one step happen in the order of the file.
        events.sort_by_key(|(_, event)| event.at_step);
        check_names(&events, nodes, name)?;
        Ok(Self { events: events.into_iter().map(|(_, event)| event).collect() })
    }

    /// The next event that is due after `step`, the last committed one. Call it until it returns `None`.
    pub fn due(&mut self, step: u64) -> Option<ScriptEvent> {
        let due = self.events.front().is_some_and(|event| event.at_step <= step);
        if due { self.events.pop_front() } else { None }
    }

    /// The pending events.
    pub fn pending(&self) -> impl ExactSizeIterator<Item = &ScriptEvent> {
        self.events.iter()
    }
}

fn event(table: toml::Value) -> anyhow::Result<ScriptEvent> {
    let toml::Value::Table(mut table) = table else { bail!("expected a table: [[event]]") };
    let at_step =
        table.remove("at_step").context("missing field `at_step`: expected a step, 0 for the start")?;
    let at_step = at_step
        .as_integer()
        .and_then(|step| u64::try_from(step).ok())
        .with_context(|| format!("at_step = {at_step}: expected a step, 0 for the start"))?;
    let action = table.get("do").and_then(toml::Value::as_str).map(|name| format!("do = {name:?}: "));
    let action: Action = document::convert(table.into())
        .map_err(|error| anyhow::anyhow!("{}{error}", action.unwrap_or_default()))?;
    action.check()?;
    Ok(ScriptEvent { at_step, action })
}

/// Checks that every named node exists at its event: one of the first nodes, or one that joined before. Nodes
/// that join continue the numbering.
fn check_names(events: &[(usize, ScriptEvent)], nodes: usize, file: &str) -> anyhow::Result<()> {
    let mut existing = nodes;
    for (number, ScriptEvent { at_step, action }) in events {
        existing += usize::from(*action == Action::Join {});
        for name in action.nodes() {
            if !(1..=existing).any(|number| name == node_name(number)) {
                bail!(
                    "{file}, event {number}: {name:?}: expected node-1 to node-{existing}, the nodes at step {at_step}"
                );
            }
        }
    }
    Ok(())
}

/// The name of the node with this number, from 1.
#[must_use]
pub fn node_name(number: usize) -> String {
    format!("node-{number}")
}

#[cfg(test)]
#[path = "script_tests.rs"]
mod tests;
