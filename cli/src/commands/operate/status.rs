//! The status of a run as text and as JSON.

use std::fmt;
use volary_protocol::operator::{NodeStatus, Status};

/// The status as a JSON object, with events as objects.
pub(crate) fn to_json(status: &Status) -> serde_json::Result<serde_json::Value> {
    let mut value = serde_json::to_value(status)?;
    let events: Vec<serde_json::Value> =
        status.events.iter().filter_map(|e| serde_json::from_str(e).ok()).collect();
    value["events"] = events.into();
    Ok(value)
}

/// The name of the run's activity: `training`.
pub(crate) fn activity(status: &Status) -> String {
    let value = serde_json::to_value(status.activity).ok();
    value.and_then(|value| value.as_str().map(str::to_owned)).unwrap_or_default()
}

/// A node's lanes as text, separated by spaces.
pub(crate) fn lanes(node: &NodeStatus) -> String {
    node.lanes.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
}

/// A status as text.
pub(super) struct StatusText<'a>(pub(super) &'a Status);

impl fmt::Display for StatusText<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Status { run, step, steps, epoch, supervisor, .. } = self.0;
        writeln!(f, "{run}: {}, step {step} of {steps}, epoch {epoch}", activity(self.0))?;
        if let (Some(loss), Some(speed)) = (self.0.loss, self.0.tokens_per_second) {
            writeln!(f, "  loss {loss:.4}, {speed:.0} tokens/s")?;
        }
        writeln!(f, "  supervisor: process {} at {}", supervisor.pid, supervisor.address)?;
        match self.0.checkpoint {
            Some(step) => writeln!(f, "  checkpoint: step {step}")?,
            None => writeln!(f, "  checkpoint: none yet")?,
        }
        self.0.nodes.iter().try_for_each(|node| writeln!(f, "  {}", NodeText(node)))
    }
}

/// A node as text.
struct NodeText<'a>(&'a NodeStatus);

impl fmt::Display for NodeText<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let NodeStatus { name, state, device, pid, capacity, shards, .. } = self.0;
        write!(
            f,
            "{name}: {state} on {device}, process {pid}, capacity {capacity:.2}, {shards} shards, lanes "
        )?;
        if self.0.lanes.is_empty() { f.write_str("none") } else { f.write_str(&lanes(self.0)) }
    }
}
