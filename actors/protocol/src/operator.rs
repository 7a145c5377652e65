//! What people ask a running supervisor, and what it answers.

use serde::{Deserialize, Serialize};
use volary_core::machine::Activity;
use volary_core::{Epoch, Lane, Step};
use volary_transport::{AccessRole, AccessTokenTerms};

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
    /// Make a token.
    AccessTokenCreate {
        /// What it allows.
        role: AccessRole,
        /// For how long, how often, and what is written on it.
        terms: AccessTokenTerms,
    },
    /// List the tokens.
    AccessTokenList,
    /// Make a token good for nothing.
    AccessTokenRevoke {
        /// Its name.
        id: String,
    },
    /// Let a node hand over what it has and leave; answered when it has left.
    Drain {
        /// The node's name.
        node: String,
    },
}

/// One token at a glance; its secret is nowhere.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AccessTokenStatus {
    /// Its name.
    pub id: String,
    /// What it allows.
    pub role: AccessRole,
    /// When it was made, in seconds since 1970.
    pub created_unix_s: u64,
    /// When it ends, in seconds since 1970; `None` is never.
    pub expires_unix_s: Option<u64>,
    /// How often it may still be used; `None` is without end.
    pub uses_left: Option<u32>,
    /// What is written on it.
    pub labels: Vec<(String, String)>,
}

/// The answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum OperatorReply {
    /// To [`OperatorRequest::Status`].
    Status(Box<Status>),
    /// To [`OperatorRequest::AccessTokenCreate`]: the token, which is shown once.
    AccessToken {
        /// Its text.
        text: String,
    },
    /// To [`OperatorRequest::AccessTokenList`].
    AccessTokens(Vec<AccessTokenStatus>),
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
    /// How long a step should take, in milliseconds, by what was seen of the nodes; 0 where nothing is placed.
    pub predicted_step_ms: f64,
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
