//! What all connections of the supervisor share.

use crate::credentials::Credentials;
use crate::limits::{CHECKPOINT_BYTES_AHEAD, DIAL_BACK_MAX};
use crate::messages::SupervisorMsg;
use parking_lot::Mutex;
use ractor::rpc::CallResult;
use ractor::{ActorRef, ActorStatus};
use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use volary_core::NodeId;
use volary_data::Dataset;
use volary_protocol::layout::Patches;
use volary_protocol::operator::{OperatorReply, OperatorRequest};
use volary_storage::Checkpoints;
use volary_telemetry::{Pipeline, SpanRecord};
use volary_transport::{ByteBudget, Canary, CanaryKey, CanaryWatch, Endpoint};

/// What all connections share.
pub(super) struct Shared {
    pub(super) credentials: Arc<Credentials>,
    pub(super) checkpoints: Checkpoints,
    pub(super) dataset: Arc<Dataset>,
    pub(super) actor: ActorRef<SupervisorMsg>,
    endpoint: Endpoint,
    sessions: AtomicU64,
    canary: Option<Canary>,
    pipeline: Pipeline,
    /// How many links each name has: no other node gets a certificate for it meanwhile.
    names: Mutex<HashMap<NodeId, usize>>,
    /// Names of members from before the supervisor's restart. Joins under these names are refused until
    /// `reserved_until`.
    reserved: HashSet<NodeId>,
    reserved_until: Instant,
    over: Arc<AtomicBool>,
    /// Layouts as they are sent to many nodes.
    pub(super) patches: Arc<Patches>,
    /// Bytes of checkpoint shards that may be in memory.
    pub(super) checkpoint_budget: ByteBudget,
}

/// What [`Shared`] is made of.
pub(super) struct SharedParts {
    pub(super) credentials: Arc<Credentials>,
    pub(super) checkpoints: Checkpoints,
    pub(super) dataset: Arc<Dataset>,
    pub(super) actor: ActorRef<SupervisorMsg>,
    pub(super) endpoint: Endpoint,
    pub(super) pipeline: Pipeline,
    /// The names that are kept for nodes which may return, and for how long.
    pub(super) reserved: Vec<NodeId>,
    pub(super) patience: Duration,
    /// Set when the run is over.
    pub(super) over: Arc<AtomicBool>,
}

/// A name that is in use until this is dropped.
pub(super) struct NameInUse {
    shared: Arc<Shared>,
    name: NodeId,
}

impl Drop for NameInUse {
    fn drop(&mut self) {
        let mut names = self.shared.names.lock();
        if let Some(links) = names.get_mut(&self.name) {
            *links -= 1;
            if *links == 0 {
                names.remove(&self.name);
            }
        }
    }
}

impl Shared {
    pub(super) fn new(parts: SharedParts) -> Self {
        let SharedParts { credentials, checkpoints, dataset, actor, endpoint, pipeline, .. } = parts;
        // Without a canary deaths are detected later, by silence.
        let canary = Canary::listen(endpoint.local_addr());
        let canary = canary.inspect_err(|error| tracing::warn!(%error, "no canary")).ok();
        Self {
            credentials,
            over: parts.over,
            checkpoints,
            dataset,
            actor,
            endpoint,
            sessions: AtomicU64::new(0),
            canary,
            pipeline,
            names: Mutex::default(),
            reserved: parts.reserved.into_iter().collect(),
            reserved_until: Instant::now() + parts.patience,
            patches: Arc::default(),
            checkpoint_budget: ByteBudget::new(CHECKPOINT_BYTES_AHEAD),
        }
    }

    /// Whether the run is over, so that nodes may drop what they hold.
    pub(super) fn is_over(&self) -> bool {
        self.over.load(Ordering::Acquire)
    }

    /// Whether the supervisor does not go on, for whatever reason.
    pub(super) fn has_stopped(&self) -> bool {
        self.actor.get_status() == ActorStatus::Stopped
    }

    /// The number of a new session.
    pub(super) fn next_session(&self) -> u64 {
        self.sessions.fetch_add(1, Ordering::Relaxed)
    }

    pub(super) fn is_in_use(&self, name: &str) -> bool {
        self.names.lock().contains_key(&NodeId::new(name))
    }

    /// Whether the node of this name may still return after the supervisor's restart.
    pub(super) fn is_reserved(&self, name: &str) -> bool {
        Instant::now() < self.reserved_until && self.reserved.contains(&NodeId::new(name))
    }

    /// Marks a name as in use.
    pub(super) fn use_name(self: &Arc<Self>, name: &NodeId) -> NameInUse {
        *self.names.lock().entry(name.clone()).or_default() += 1;
        NameInUse { shared: Arc::clone(self), name: name.clone() }
    }

    /// The port and key for a node's canary, and the watch of its end.
    pub(super) fn expect_canary(&self) -> Option<((u16, CanaryKey), CanaryWatch)> {
        let canary = self.canary.as_ref()?;
        let (key, watch) = canary.expect().ok()?;
        Some(((canary.address().port(), key), watch))
    }

    /// Whether others reach a node at the address that it announces.
    ///
    /// # Errors
    /// The reason why not.
    pub(super) async fn dial_back(&self, node: &NodeId, address: &str) -> Result<(), String> {
        let address: SocketAddr =
            address.parse().map_err(|_| "it is not an address and a port".to_owned())?;
        match tokio::time::timeout(DIAL_BACK_MAX, self.endpoint.connect(address, &node.0)).await {
            Ok(Ok(link)) => {
                link.close("the node can be reached");
                Ok(())
            }
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err(format!("no answer within {DIAL_BACK_MAX:?}")),
        }
    }

    /// Keeps a node's spans. Whatever they say, they are the node's own.
    pub(super) fn keep_spans(&self, node: &NodeId, spans: &[String]) {
        let attribute = |mut record: SpanRecord| {
            record.process.clone_from(&node.0);
            record
        };
        let parsed = spans.iter().filter_map(|span| serde_json::from_str(span).ok());
        self.pipeline.store(parsed.map(attribute).collect());
    }

    /// Passes an operator's request to the actor and awaits the reply, which may take as long as a
    /// checkpoint.
    pub(super) async fn ask(&self, request: OperatorRequest) -> OperatorReply {
        match self.actor.call(|reply| SupervisorMsg::Operator { request, reply }, None).await {
            Ok(CallResult::Success(answer)) => answer,
            _ => OperatorReply::Failed { reason: "the run has ended".into() },
        }
    }
}
