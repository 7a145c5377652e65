//! The control stream between the supervisor and a node: small messages, in order.
//!
//! The step and recovery protocol itself is [`volary_core::messages`]; it travels in the `Protocol` variants.

use crate::trace::TraceRequest;
use serde::{Deserialize, Serialize};
use volary_core::architecture::Architecture;
use volary_core::messages::{NodeCommand, NodeReport, ResidentState};
use volary_core::options::{TelemetryOptions, TrainingOptions};
use volary_core::profile::Profile;
use volary_transport::{CanaryKey, Issued};

/// What a node tells the supervisor about itself when it joins.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NodeInfo {
    /// Its process.
    pub pid: u32,
    /// Its device, as `cpu` or `cuda:0`.
    pub device: String,
    /// Threads of its device executor.
    pub threads: usize,
    /// What it can do; nothing before it has measured itself, for which it must know the run.
    pub profile: Option<Profile>,
    /// Where its peers reach it.
    pub address: String,
    /// Where its figures are served, if they are.
    pub http: Option<String>,
    /// A number that its process drew when it started: a process that comes back is told from another of its name.
    pub instance: u64,
}

/// What a node knows of its link to another one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LinkReport {
    /// The other node.
    pub peer: String,
    /// The round trip, in milliseconds.
    pub round_trip_ms: f64,
    /// Bytes sent since the link was made.
    pub sent_bytes: u64,
    /// Bytes received since the link was made.
    pub received_bytes: u64,
    /// Bytes per second in one direction, as measured once; nothing before.
    pub bandwidth: Option<f64>,
}

/// What a node must know of the run before it can do anything.
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
    /// How long a silent peer is believed alive, in milliseconds.
    pub node_timeout_ms: u64,
    /// How long a node keeps its state and waits for a supervisor that is gone, in milliseconds.
    pub supervisor_timeout_ms: u64,
    /// Whether nodes measure themselves before they are placed.
    pub measure: bool,
    /// What is traced, and where to.
    pub telemetry: TelemetryOptions,
}

impl RunInfo {
    /// Whether state of one is state of the other.
    pub fn same_model(&self, other: &Self) -> bool {
        (&self.run, self.seed, &self.architecture) == (&other.run, other.seed, &other.architecture)
    }
}

/// Supervisor to node, on the control stream.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum ToNode {
    /// The answer to [`ToSupervisor::Hello`].
    Welcome(Box<Welcome>),
    /// The name is taken by a living process: try again later, or under another name.
    NameInUse,
    /// The answer to [`ToSupervisor::Renew`].
    Renewed(Issued),
    /// Hashes of certificates that are not good any more, between nodes either.
    Revoked(Vec<[u8; 32]>),
    /// The protocol, and the trace that it belongs to.
    Protocol(NodeCommand, Option<TraceRequest>),
}

/// Node to supervisor, on the control stream.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum ToSupervisor {
    /// The first words: what it is, and what it has in memory.
    Hello(NodeInfo, ResidentState),
    /// The protocol.
    Protocol(NodeReport),
    /// What it measured of itself: now it can be placed.
    Profile(Box<Profile>),
    /// A request for another certificate, for a new key, before the present one ends.
    Renew(Vec<u8>),
    /// Now and then: the links to other nodes.
    Links(Vec<LinkReport>),
    /// Spans that have ended, as JSON: the run keeps them.
    Spans(Vec<String>),
}

/// What a node is told when it is let in.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Welcome {
    /// A [`RunInfo`] as JSON, since its tagged options need a format that describes itself.
    pub run: String,
    /// Whether it may keep what it has in memory.
    pub keep: bool,
    /// The port of the canary on the supervisor's host and the key to show there, if there is one.
    pub canary: Option<(u16, CanaryKey)>,
    /// Hashes of certificates that are not good any more.
    pub revoked: Vec<[u8; 32]>,
}

