//! The control stream between the supervisor and a node: small messages, in order.
//!
//! The step and recovery protocol itself is [`volary_core::messages`]; it travels in the `Protocol` variants.

use crate::layout::LayoutPatch;
use crate::limits::TOKENS_PER_MESSAGE;
use crate::trace::TraceRequest;
use serde::{Deserialize, Serialize};
use volary_core::Lane;
use volary_core::architecture::Architecture;
use volary_core::messages::{NodeCommand, NodeReport, ResidentState};
use volary_core::options::{TelemetryOptions, TrainingOptions};
use volary_core::profile::Profile;
use volary_transport::{CanaryKey, IssuedCertificate};

/// What a node tells the supervisor about itself when it joins.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NodeInfo {
    /// Its process id.
    pub pid: u32,
    /// Its device, as `cpu` or `cuda:0`.
    pub device: String,
    /// Threads of its device executor.
    pub threads: usize,
    /// What it can do; nothing before it has measured itself, which needs the run's description.
    pub profile: Option<Profile>,
    /// Where its peers reach it.
    pub address: String,
    /// Where its metrics are served, if they are.
    pub http: Option<String>,
    /// A random number of its process, which tells it from an earlier or later process of its name.
    pub instance: u64,
}

/// A node's link to another node.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LinkReport {
    /// The other node.
    pub peer: String,
    /// The round trip, in milliseconds.
    pub round_trip_ms: f64,
    /// Bytes sent over the link so far.
    pub sent_bytes: u64,
    /// Bytes received over the link so far.
    pub received_bytes: u64,
    /// Bytes per second in one direction, from one probe; nothing before it, 0 when it failed.
    pub bandwidth: Option<f64>,
}

/// The description of a run, which a node needs before it can do anything.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunInfo {
    /// The run's name.
    pub run: String,
    /// The run's seed.
    pub seed: u64,
    /// The model.
    pub architecture: Architecture,
    /// The training.
    pub training: TrainingOptions,
    /// Silence after which a peer is considered lost, in milliseconds.
    pub node_timeout_ms: u64,
    /// How long a node keeps its state and waits for a lost supervisor, in milliseconds.
    pub supervisor_timeout_ms: u64,
    /// Whether nodes benchmark themselves before they are placed.
    pub measure: bool,
    /// What is traced, and where traces go.
    pub telemetry: TelemetryOptions,
}

impl RunInfo {
    /// Whether the state of one run can be used in the other.
    #[must_use]
    pub fn same_model(&self, other: &Self) -> bool {
        (&self.run, self.seed, &self.architecture) == (&other.run, other.seed, &other.architecture)
    }
}

/// Supervisor to node.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum ToNode {
    /// The answer to [`ToSupervisor::Hello`].
    Welcome(Box<Welcome>),
    /// A live process has the node's name: retry later, or under another name.
    NameInUse,
    /// The answer to [`ToSupervisor::Renew`].
    Renewed(IssuedCertificate),
    /// Hashes of certificates that are revoked, also between nodes.
    Revoked(Vec<[u8; 32]>),
    /// A command of the step and recovery protocol, and the trace that it belongs to.
    Protocol(NodeCommand, Option<TraceRequest>),
    /// Tokens of lanes of the `Begin` that follows, when they do not fit into it.
    Tokens(Vec<(Lane, Vec<u32>)>),
    /// The layout of the `Assign` that follows.
    Layout(LayoutPatch),
    /// Asks whether the node's process lives.
    Ping,
    /// The answer to [`ToSupervisor::Ping`].
    Pong,
    /// The node's address cannot be dialed, so that it cannot take part: it ends.
    Unreachable {
        /// The address that the node announced.
        address: String,
        /// The reason.
        reason: String,
    },
}

impl ToNode {
    /// The messages in which this one is sent: tokens that do not fit into a `Begin` go ahead of it.
    #[must_use]
    pub fn split(mut self) -> Vec<Self> {
        let mut messages = Vec::new();
        if let Self::Protocol(NodeCommand::Begin { lanes, .. }, _) = &mut self {
            let mut tokens = 0;
            let mut full = Vec::new();
            for (at, (_, lane)) in lanes.iter().enumerate() {
                if tokens + lane.len() > TOKENS_PER_MESSAGE && tokens > 0 {
                    full.push(at);
                    tokens = 0;
                }
                tokens += lane.len();
            }
            let mut begin = 0;
            for end in full {
                messages.push(Self::Tokens(lanes.drain(..end - begin).collect()));
                begin = end;
            }
        }
        messages.push(self);
        messages
    }
}

/// Node to supervisor.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum ToSupervisor {
    /// The first message: what the node is, and what it has in memory.
    Hello(NodeInfo, ResidentState),
    /// A report of the step and recovery protocol.
    Protocol(NodeReport),
    /// The measured profile: the node can be placed.
    Profile(Box<Profile>),
    /// A request for a certificate of a new key, before the present one expires (DER).
    Renew(Vec<u8>),
    /// The links to other nodes, at intervals.
    Links(Vec<LinkReport>),
    /// Ended spans, as JSON, for the run to keep.
    Spans(Vec<String>),
    /// Asks whether the supervisor's process lives.
    Ping,
    /// The answer to [`ToNode::Ping`].
    Pong,
}

/// The answer to a node that is admitted.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Welcome {
    /// A [`RunInfo`] as JSON: its tagged options need a self-describing format.
    pub run: String,
    /// Whether the supervisor accepts the state in the node's memory.
    pub keep: bool,
    /// The port of the canary on the supervisor's host, and the key for it, if there is one.
    pub canary: Option<(u16, CanaryKey)>,
    /// Hashes of certificates that are not good any more.
    pub revoked: Vec<[u8; 32]>,
}
