//! A scripted run: what happens to its processes, and at which step. The file holds `[[event]]` tables; see
//! `examples/events.toml`.

use crate::config::{explain, nearest};
use anyhow::{Context, bail};
use serde::Deserialize;
use std::collections::VecDeque;
use std::fmt;
use std::path::Path;
use std::time::Duration;
use volary_node::{FAULT_SECONDS_MAX, NetworkFault, is_fraction};

/// How many events a script may have. What they write to one node fits its pipe, whether or not it is read.
const EVENTS_MAX: usize = 1000;

/// What happens.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(tag = "do", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Action {
    /// The node's process is killed.
    Kill {
        /// Which one.
        node: String,
    },
    /// The node's process stands still for a while.
    Stop {
        /// Which one.
        node: String,
        /// For how long.
        for_seconds: f64,
    },
    /// The node gives away what it holds and leaves.
    Drain {
        /// Which one.
        node: String,
    },
    /// One more node starts. (With braces, so that serde refuses keys that belong to others.)
    Join {},
    /// The supervisor's process is killed.
    KillSupervisor {},
    /// Nothing passes between the node and anybody for a while.
    Partition {
        /// Which one.
        node: String,
        /// For how long.
        for_seconds: f64,
    },
    /// Nothing passes between two nodes for a while.
    Cut {
        /// The one that is told.
        node: String,
        /// The other.
        peer: String,
        /// For how long.
        for_seconds: f64,
    },
    /// The node loses a part of its packets for a while.
    Lose {
        /// Which one.
        node: String,
        /// Which part.
        fraction: f64,
        /// For how long.
        for_seconds: f64,
    },
}

impl Action {
    /// The nodes that it names.
    fn nodes(&self) -> Vec<&str> {
        match self {
            Self::Join {} | Self::KillSupervisor {} => vec![],
            Self::Cut { node, peer, .. } => vec![node, peer],
            Self::Kill { node }
            | Self::Stop { node, .. }
            | Self::Drain { node }
            | Self::Partition { node, .. }
            | Self::Lose { node, .. } => vec![node],
        }
    }

    fn seconds(&self) -> Option<f64> {
        match self {
            Self::Stop { for_seconds, .. }
            | Self::Partition { for_seconds, .. }
            | Self::Cut { for_seconds, .. }
            | Self::Lose { for_seconds, .. } => Some(*for_seconds),
            Self::Kill { .. } | Self::Drain { .. } | Self::Join {} | Self::KillSupervisor {} => None,
        }
    }

    /// What no single key's type shows.
    fn check(&self) -> anyhow::Result<()> {
        if let Some(seconds) = self.seconds().filter(|s| !(*s >= 0.001 && *s <= FAULT_SECONDS_MAX)) {
            bail!("for_seconds = {seconds}: expected 0.001 to {FAULT_SECONDS_MAX}");
        }
        match self {
            Self::Lose { fraction, .. } if !is_fraction(*fraction) => {
                bail!("fraction = {fraction}: expected more than 0 and at most 1")
            }
            Self::Cut { node, peer, .. } if node == peer => {
                bail!("peer = {peer:?}: expected another node than node")
            }
            _ => Ok(()),
        }
    }

    /// The node that a disturbance is told to, and the disturbance.
    #[must_use]
    pub fn disturbance(&self) -> Option<(&str, NetworkFault)> {
        // In bounds: check() has seen it.
        let during = Duration::try_from_secs_f64(self.seconds()?).ok()?;
        match self {
            Self::Partition { node, .. } => Some((node, NetworkFault::Partition { during })),
            Self::Cut { node, peer, .. } => Some((node, NetworkFault::Cut { peer: peer.clone(), during })),
            Self::Lose { node, fraction, .. } => {
                Some((node, NetworkFault::Lose { fraction: *fraction, during }))
            }
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
            Self::Lose { node, fraction, for_seconds } => {
                write!(f, "lose {fraction} of the packets of {node} for {for_seconds} s")
            }
        }
    }
}

/// An action and its time.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// It happens as soon as this step is committed.
    pub at_step: u64,
    /// What happens.
    pub action: Action,
}

/// The events that are still to come, in order.
#[derive(Debug, Default)]
pub struct Script {
    events: VecDeque<Event>,
}

impl Script {
    /// Whether an event disturbs the network.
    #[must_use]
    pub fn disturbs(&self) -> bool {
        self.events.iter().any(|event| event.action.disturbance().is_some())
    }

    /// Reads the script of a run that starts with so many nodes.
    ///
    /// # Errors
    /// One line that names the file, the event and what was expected.
    pub fn load(path: &Path, nodes: usize) -> anyhow::Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| format!("events {}", path.display()))?;
        Self::parse(&text, &path.display().to_string(), nodes)
    }

    /// As [`Script::load`], from text; `name` is what errors call it.
    ///
    /// # Errors
    /// As [`Script::load`].
    pub fn parse(text: &str, name: &str, nodes: usize) -> anyhow::Result<Self> {
        let mut table: toml::Table =
            toml::from_str(text).map_err(|error| anyhow::anyhow!("{}", explain(name, text, &error)))?;
        let Some(toml::Value::Array(tables)) = table.remove("event") else {
            bail!("{name}: expected [[event]] tables");
        };
        if let Some(key) = table.keys().next() {
            bail!("{name}: unknown key `{key}`: expected only [[event]] tables");
        }
        if tables.len() > EVENTS_MAX {
            bail!("{name}: {} events: expected at most {EVENTS_MAX}", tables.len());
        }
        let mut events = Vec::with_capacity(tables.len());
        for (number, table) in (1..).zip(tables) {
            let event = event(table).with_context(|| format!("{name}, event {number}"))?;
            events.push((number, event));
        }
        // A stable sort: events of one step happen as they are written.
        events.sort_by_key(|(_, event)| event.at_step);
        check_names(&events, nodes)
            .map_err(|(number, reason)| anyhow::anyhow!("{name}, event {number}: {reason}"))?;
        Ok(Self { events: events.into_iter().map(|(_, event)| event).collect() })
    }

    /// The next event that is due when `step` is the last committed one. Call it until there is none.
    pub fn due(&mut self, step: u64) -> Option<Event> {
        let due = self.events.front().is_some_and(|event| event.at_step <= step);
        if due { self.events.pop_front() } else { None }
    }

    /// What is still to come.
    pub fn pending(&self) -> impl ExactSizeIterator<Item = &Event> {
        self.events.iter()
    }
}

fn event(table: toml::Value) -> anyhow::Result<Event> {
    let toml::Value::Table(mut table) = table else { bail!("expected a table: [[event]]") };
    let at_step =
        table.remove("at_step").context("missing field `at_step`: expected a step, 0 for the start")?;
    let at_step = at_step
        .as_integer()
        .and_then(|step| u64::try_from(step).ok())
        .with_context(|| format!("at_step = {at_step}: expected a step, 0 for the start"))?;
    let what = table.get("do").and_then(toml::Value::as_str).map(|what| format!("do = {what:?}: "));
    let action: Action = toml::Value::Table(table).try_into().map_err(|error: toml::de::Error| {
        anyhow::anyhow!("{}{}", what.unwrap_or_default(), nearest(error.message()))
    })?;
    action.check()?;
    Ok(Event { at_step, action })
}

/// Every node that is named must be there by then: one of the first, or a joiner, which are counted on in their order.
fn check_names(events: &[(usize, Event)], nodes: usize) -> Result<(), (usize, String)> {
    let mut there = nodes;
    for (number, Event { at_step, action }) in events {
        there += usize::from(*action == Action::Join {});
        for name in action.nodes() {
            if !(1..=there).any(|number| name == node_name(number)) {
                return Err((
                    *number,
                    format!(
                        "{name:?}: expected node-1 to node-{there}, the nodes there are at step {at_step}"
                    ),
                ));
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
