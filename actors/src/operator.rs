//! What people ask a running supervisor, and what it answers.

use serde::{Deserialize, Serialize};
use volary_core::machine::Activity;
use volary_core::{Epoch, Lane, Step};

use crate::wire::LinkReport;

/// A question or order.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum OperatorRequest {
    /// How is it going?
    Status,
    /// Write a checkpoint at the next boundary between steps; answered when it is durable.
    Checkpoint,
    /// Write a checkpoint and end; answered when it is done.
    Stop,
    /// Let a node hand over what it has and leave; answered when it has left.
    Drain {
        /// The node's name.
        node: String,
    },
}

/// The answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum OperatorReply {
    /// To [`OperatorRequest::Status`].
    Status(Box<Status>),
    /// Done, and after which step.
    Done {
        /// The step.
        step: Step,
    },
    /// Not done, and why.
    Failed {
        /// Why.
        reason: String,
    },
}

/// A run at a glance.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// The run's name.
    pub run: String,
    /// The current placement's number.
    pub epoch: Epoch,
    /// The last committed step.
    pub step: Step,
    /// The last step of the run.
    pub steps: Step,
    /// What the supervisor is doing.
    pub activity: Activity,
    /// The last durable checkpoint.
    pub checkpoint: Option<Step>,
    /// Assignments of the last committed step: by MoE layer, by expert.
    pub load: Vec<Vec<u64>>,
    /// The loss of the last committed step, nats per token.
    pub loss: Option<f64>,
    /// Tokens per second of the last committed step.
    pub tokens_per_second: Option<f64>,
    /// The supervisor's process.
    pub supervisor: SupervisorStatus,
    /// The nodes.
    pub nodes: Vec<NodeStatus>,
    /// The shards.
    pub shards: Vec<ShardStatus>,
    /// The last events, as in `events.jsonl`.
    pub events: Vec<String>,
}

/// Where the supervisor is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SupervisorStatus {
    /// Its process.
    pub pid: u32,
    /// Its QUIC address.
    pub address: String,
}

/// One node at a glance.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NodeStatus {
    /// Its name.
    pub name: String,
    /// Its process.
    pub pid: u32,
    /// `member`; `learning` while it copies shards, `draining` while it hands them over, `joined` before, and `suspended` when it
    /// was shut out not long ago.
    pub state: String,
    /// Its device.
    pub device: String,
    /// How much it does in a second, relative to the others.
    pub capacity: f64,
    /// What fails together with it; empty when that is not known.
    pub zone: String,
    /// Shards that it holds.
    pub shards: usize,
    /// Lanes that it runs.
    pub lanes: Vec<Lane>,
    /// Its links to other nodes, as it reported them last.
    pub links: Vec<LinkReport>,
    /// Where its figures are served, if they are.
    pub http: Option<String>,
}

/// One shard at a glance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardStatus {
    /// Its name.
    pub name: String,
    /// The last committed step.
    pub version: Step,
    /// The nodes that hold it, its owner first.
    pub replicas: Vec<String>,
}
