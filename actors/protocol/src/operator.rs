//! Requests of operators to a running supervisor, and its replies.

use serde::{Deserialize, Serialize};
use volary_core::machine::Activity;
use volary_core::{Epoch, Lane, Step};
use volary_transport::{AccessRole, AccessTokenTerms};

use crate::control::LinkReport;

/// A request.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum OperatorRequest {
    /// The run's status.
    Status,
    /// Write a checkpoint after the current step; answered when it is durable.
    Checkpoint,
    /// Write a checkpoint and end the run; answered when both are done.
    Stop,
    /// Create an access token.
    AccessTokenCreate {
        /// What it allows.
        role: AccessRole,
        /// Its lifetime, uses and labels.
        terms: AccessTokenTerms,
    },
    /// List the access tokens.
    AccessTokenList,
    /// Revoke an access token.
    AccessTokenRevoke {
        /// Its name.
        id: String,
    },
    /// Drain a node: it hands its shards over and leaves. Answered when it has left.
    Drain {
        /// The node's name.
        node: String,
    },
}

/// The status of an access token. Its secret is not stored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AccessTokenStatus {
    /// Its name.
    pub id: String,
    /// What it allows.
    pub role: AccessRole,
    /// Its creation, in seconds since 1970.
    pub created_unix_s: u64,
    /// Its expiry, in seconds since 1970; `None` is never.
    pub expires_unix_s: Option<u64>,
    /// Uses left; `None` is without limit.
    pub uses_left: Option<u32>,
    /// Its labels, `(key, value)`.
    pub labels: Vec<(String, String)>,
}

/// A reply.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum OperatorReply {
    /// To [`OperatorRequest::Status`].
    Status(Box<Status>),
    /// To [`OperatorRequest::AccessTokenCreate`]: the access token, which is shown once.
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

/// The status of a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// The run's name.
    pub run: String,
    /// The current placement's number.
    pub epoch: Epoch,
    /// The last committed step.
    pub step: Step,
    /// The number of steps of the run.
    pub steps: u64,
    /// What the supervisor is doing.
    pub activity: Activity,
    /// The last durable checkpoint.
    pub checkpoint: Option<Step>,
    /// Checkpoints that could not be written since the supervisor started.
    pub failed_checkpoints: u64,
    /// Steps that were skipped since the supervisor started, because their gradients were not finite.
    pub skipped_steps: u64,
    /// Why the step after the last commit was dropped, if it was: it names the nodes that cannot reach each
    /// other.
    pub trouble: Option<String>,
    /// Assignments of the last committed step: by MoE layer, by expert.
    pub load: Vec<Vec<u64>>,
    /// The loss of the last committed step, nats per token.
    pub loss: Option<f64>,
    /// Tokens per second of the last committed step.
    pub tokens_per_second: Option<f64>,
    /// How often each source of text has been read.
    pub sources: Vec<SourceStatus>,
    /// The predicted time of a step in milliseconds, from the observed profiles of the nodes; 0 before the
    /// first placement.
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

/// A source of text.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SourceStatus {
    /// Its name.
    pub name: String,
    /// Passes over its training text up to the last committed step.
    pub epochs: f64,
}

/// The supervisor's process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SupervisorStatus {
    /// Its process.
    pub pid: u32,
    /// Its QUIC address.
    pub address: String,
}

/// The status of a node.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NodeStatus {
    /// Its name.
    pub name: String,
    /// Its process.
    pub pid: u32,
    /// `joined` before it has a part in the run, `learning` while it copies shards, `member`, `draining`
    /// while it hands its shards over, and `suspended` for a while after it was fenced.
    pub state: String,
    /// Its device.
    pub device: String,
    /// The arithmetic kind of its device: nodes with equal ones compute the same bits. Empty when unknown.
    #[serde(default)]
    pub arithmetic: String,
    /// Its capacity relative to the others.
    pub capacity: f64,
    /// Its failure domain; empty when unknown.
    pub zone: String,
    /// The number of shards that it holds.
    pub shards: usize,
    /// The lanes that it drives.
    pub lanes: Vec<Lane>,
    /// Its links to other nodes, from its last report.
    pub links: Vec<LinkReport>,
    /// Where its metrics are served, if they are.
    pub http: Option<String>,
}

/// The status of a shard.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardStatus {
    /// Its name.
    pub name: String,
    /// The last committed step.
    pub version: Step,
    /// The nodes that hold it, the owner first.
    pub replicas: Vec<String>,
}
