//! The status of a run as text and as JSON.

use std::collections::BTreeSet;
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
        let sources = self.0.sources.iter().map(|source| format!("{} {:.2}", source.name, source.epochs));
        writeln!(f, "  epochs: {}", sources.collect::<Vec<_>>().join(", "))?;
        writeln!(f, "  supervisor: process {} at {}", supervisor.pid, supervisor.address)?;
        match self.0.checkpoint {
            Some(step) => writeln!(f, "  checkpoint: step {step}")?,
            None => writeln!(f, "  checkpoint: none yet")?,
        }
        if let Some(trouble) = &self.0.trouble {
            writeln!(f, "  step {} was dropped and runs again: {trouble}", step.next())?;
        }
        for (count, what) in
            [(self.0.failed_checkpoints, "failed checkpoints"), (self.0.skipped_steps, "skipped steps")]
        {
            if count > 0 {
                writeln!(f, "  {what}: {count} since the supervisor started")?;
            }
        }
        let kinds: BTreeSet<&str> = self.0.nodes.iter().map(|node| node.arithmetic.as_str()).collect();
        if kinds.iter().filter(|kind| !kind.is_empty()).count() > 1 {
            writeln!(f, "  nodes of several arithmetic kinds: losses and weights depend on the placement")?;
        }
        self.0.nodes.iter().try_for_each(|node| writeln!(f, "  {}", NodeText(node)))
    }
}

/// A node as text.
struct NodeText<'a>(&'a NodeStatus);

impl fmt::Display for NodeText<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let NodeStatus { name, state, device, arithmetic, pid, capacity, shards, .. } = self.0;
        write!(
            f,
            "{name}: {state} on {device} ({arithmetic}), process {pid}, capacity {capacity:.2}, {shards} shards, lanes "
        )?;
        if self.0.lanes.is_empty() { f.write_str("none") } else { f.write_str(&lanes(self.0)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use volary_core::machine::Activity;
    use volary_core::{Epoch, Lane, Step};
    use volary_protocol::operator::{SourceStatus, SupervisorStatus};

    #[test]
    fn a_status_is_a_line_for_the_run_and_one_for_each_node() {
        let node = |name: &str, lanes: Vec<Lane>| NodeStatus {
            name: name.into(),
            pid: 7,
            state: "member".into(),
            device: "cpu".into(),
            arithmetic: if name == "node-1" { "aa" } else { "bb" }.into(),
            capacity: 1.25,
            zone: String::new(),
            shards: 17,
            lanes,
            links: Vec::new(),
            http: None,
        };
        let status = Status {
            run: "quickstart".into(),
            epoch: Epoch(4),
            step: Step(50),
            steps: 200,
            activity: Activity::Training,
            checkpoint: Some(Step(40)),
            failed_checkpoints: 0,
            trouble: None,
            skipped_steps: 3,
            load: Vec::new(),
            loss: Some(3.25),
            tokens_per_second: Some(5000.0),
            sources: vec![SourceStatus { name: "code".into(), epochs: 0.5 }],
            predicted_step_ms: 0.0,
            supervisor: SupervisorStatus { pid: 2, address: "127.0.0.1:1".into() },
            nodes: vec![node("node-1", vec![Lane(0), Lane(2)]), node("node-2", Vec::new())],
            shards: Vec::new(),
            events: vec!["{\"event\":\"joined\"}".into()],
        };
        assert_eq!(
            StatusText(&status).to_string(),
            "quickstart: training, step 50 of 200, epoch 4\n  loss 3.2500, 5000 tokens/s\n  epochs: code 0.50\n  \
             supervisor: process 2 at 127.0.0.1:1\n  checkpoint: step 40\n  \
             skipped steps: 3 since the supervisor started\n  \
             nodes of several arithmetic kinds: losses and weights depend on the placement\n  \
             node-1: member on cpu (aa), process 7, capacity 1.25, 17 shards, lanes 0 2\n  \
             node-2: member on cpu (bb), process 7, capacity 1.25, 17 shards, lanes none\n"
        );
        let json = to_json(&status).expect("JSON");
        assert_eq!(json["events"][0]["event"], "joined");
    }
}
