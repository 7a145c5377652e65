//! The events of a run that a person at the terminal must see at once. A supervisor that `volary train`
//! started writes them to its standard output, which works on a full disk too.

use crate::output;
use serde::Deserialize;
use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::RecvError;
use volary_core::ShardId;
use volary_supervisor::events::Event;

/// Writes the alerts among some events to standard output, until there are no more.
pub async fn write(mut events: Receiver<Event>) {
    loop {
        match events.recv().await {
            Ok(event) => {
                // Without a reader there is no one to tell.
                let _ = text(&event.json).map(output::line);
            }
            Err(RecvError::Lagged(_)) => {}
            Err(RecvError::Closed) => return,
        }
    }
}

/// The lines of `events.jsonl` that matter to a person; others are not parsed.
#[derive(Debug, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
enum Alert {
    CheckpointFailed { step: u64, reason: String },
    CheckpointPassed { step: u64, reason: String },
    CheckpointNotCopied { step: u64, reason: String },
    WentBack { from: u64, to: u64, shard: ShardId },
    WentBackFromNan { from: u64, to: u64, data: u64, reason: String },
    WentBackFromDifference { from: u64, to: u64, shard: ShardId },
    ReplicasDiffer { step: u64, shard: ShardId, what: String, nodes: Vec<String>, blamed: Vec<String> },
    ArithmeticMixed { kinds: Vec<Vec<String>> },
    NoRoom { reason: String },
    DrainDeferred { node: String, reason: String },
}

/// The text of an event that a person must see; `None` for any other line.
#[must_use]
pub fn text(line: &str) -> Option<String> {
    Some(match serde_json::from_str(line).ok()? {
        Alert::CheckpointFailed { step, reason } => format!("the checkpoint of step {step} failed: {reason}"),
        Alert::CheckpointPassed { step, reason } => format!("no checkpoint of step {step}: {reason}"),
        Alert::CheckpointNotCopied { step, reason } => {
            format!("the checkpoint of step {step} is not in the store: {reason}")
        }
        Alert::WentBack { from, to, shard } => {
            format!("went back from step {from} to {to}: the last copy of {} is lost", shard)
        }
        Alert::WentBackFromDifference { from, to, shard } => {
            format!("went back from step {from} to {to}: replicas of {} were not equal", shard)
        }
        Alert::ReplicasDiffer { step, shard, what, nodes, blamed } => {
            let whose = match blamed.as_slice() {
                [] => format!("no majority among {}", nodes.join(", ")),
                blamed => format!("that of {} differs from the others'", blamed.join(", ")),
            };
            format!(
                "step {step} is not committed: the {what} of {} is not the same on all nodes; {whose}",
                shard
            )
        }
        Alert::WentBackFromNan { from, to, data, reason } => {
            format!("went back from step {from} to {to}, and on with the data of step {data}: {reason}")
        }
        Alert::ArithmeticMixed { kinds } => {
            let kinds: Vec<String> = kinds.iter().map(|nodes| nodes.join(", ")).collect();
            format!(
                "nodes of several arithmetic kinds ({}): losses and weights depend on the placement",
                kinds.join("; ")
            )
        }
        Alert::NoRoom { reason } => reason,
        Alert::DrainDeferred { node, reason } => format!("{node} cannot leave yet: {reason}"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use volary_core::machine::{Compared, Notice};
    use volary_core::{NodeId, Step};

    #[test]
    fn what_needs_a_person_is_told_and_the_rest_is_not() {
        let text = |notice: &Notice| text(&serde_json::to_string(notice).unwrap());
        let (step, reason) = (Step(7), "disk full".to_owned());
        let failed = text(&Notice::CheckpointFailed { step, reason: reason.clone() }).unwrap();
        assert!(failed.contains("step 7") && failed.contains("disk full"), "{failed}");
        let nan = Notice::WentBackFromNan { from: Step(9), to: step, data: Step(10), reason: reason.clone() };
        assert!(text(&nan).unwrap().contains("from step 9 to 7, and on with the data of step 10"));
        for told in [
            Notice::CheckpointPassed { step, reason: reason.clone() },
            Notice::WentBack { from: Step(9), to: step, shard: ShardId::Embedding },
            Notice::WentBackFromDifference { from: Step(9), to: step, shard: ShardId::Embedding },
            Notice::ReplicasDiffer {
                step,
                shard: ShardId::Embedding,
                what: Compared::State,
                nodes: vec![NodeId::new("n1"), NodeId::new("n2")],
                blamed: vec![],
            },
            Notice::ArithmeticMixed { kinds: vec![vec![NodeId::new("n1")], vec![NodeId::new("n2")]] },
            Notice::NoRoom { reason: reason.clone() },
            Notice::DrainDeferred { node: NodeId::new("n1"), reason },
        ] {
            assert!(text(&told).is_some(), "{told:?}");
        }
        assert_eq!(text(&Notice::Checkpoint { step }), None);
        assert_eq!(super::text("no JSON"), None);
    }
}
