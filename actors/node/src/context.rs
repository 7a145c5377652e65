//! What all actors of one node share.

use crate::device::credit::OpenLeaves;
use crate::device::executor::Executor;
use crate::directory::ShardActors;
use crate::error::{Error, Result};
use crate::ids::PassId;
use crate::limits::EARLY_MAX;
use crate::messages::ReducerMsg;
use crate::net::peers::Peers;
use parking_lot::RwLock;
use ractor::ActorRef;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio::sync::{Semaphore, watch};
use volary_core::architecture::Architecture;
use volary_core::compute::Compute;
use volary_core::costs::{Costs, lanes_in_flight};
use volary_core::options::TrainingOptions;
use volary_core::placement::Placement;
use volary_core::{Epoch, NodeId};
use volary_telemetry::Tracer;
use volary_telemetry::metrics::NodeMetrics;

/// What all actors of one node share.
pub(crate) struct NodeContext<B: Compute> {
    pub(crate) id: NodeId,
    pub(crate) architecture: Architecture,
    pub(crate) costs: Costs,
    pub(crate) tokens_per_lane: usize,
    pub(crate) executor: Executor<B>,
    pub(crate) peers: Peers,
    pub(crate) lanes_in_flight: Semaphore,
    /// Gradients that are made and not yet added up.
    pub(crate) open_leaves: OpenLeaves,
    pub(crate) tracer: Tracer,
    pub(crate) metrics: Arc<NodeMetrics>,
    reducer: OnceLock<ActorRef<ReducerMsg<B>>>,
    placement: RwLock<Arc<Placement>>,
    shard_actors: RwLock<Arc<ShardActors<B>>>,
    begun: watch::Sender<PassId>,
    /// Nanoseconds of device time spent on lanes here, experts not included.
    lane_time: AtomicU64,
}

impl<B: Compute> NodeContext<B> {
    pub(crate) fn new(
        id: NodeId,
        (architecture, training): (&Architecture, &TrainingOptions),
        executor: Executor<B>,
        peers: Peers,
        (tracer, metrics): (Tracer, Arc<NodeMetrics>),
    ) -> Self {
        let lanes = lanes_in_flight(executor.threads());
        Self {
            id,
            architecture: architecture.clone(),
            costs: Costs::new(architecture, training),
            tokens_per_lane: training.tokens_per_lane(),
            executor,
            peers,
            lanes_in_flight: Semaphore::new(lanes),
            open_leaves: OpenLeaves::default(),
            tracer,
            metrics,
            reducer: OnceLock::new(),
            placement: RwLock::default(),
            shard_actors: RwLock::default(),
            begun: watch::Sender::new(PassId::default()),
            lane_time: AtomicU64::new(0),
        }
    }

    /// Waits until a lane may begin: until the leaves of all but one lane are added up.
    pub(crate) async fn until_lane_may_begin(&self) {
        let placement = self.placement();
        let shards = self.architecture.shards();
        let own = shards.into_iter().filter(|shard| !shard.is_expert() && placement.holds(&self.id, *shard));
        self.open_leaves.at_most(own.count()).await;
    }

    pub(crate) fn add_lane_time(&self, time: Duration) {
        self.lane_time.fetch_add(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// The lanes that this node computes under the present placement, in whole lanes: half of the layers of
    /// two lanes count as one.
    pub(crate) fn lane_work(&self) -> f64 {
        let whole = self.costs.lane_flops(self.costs.all_layers());
        self.placement().lane_work(&self.id, |layers| self.costs.lane_flops(layers) / whole)
    }

    /// Lanes per second of device time over all threads, from the device time since the last call.
    pub(crate) fn take_speed(&self, lanes: f64) -> Option<f64> {
        let seconds = self.lane_time.swap(0, Ordering::Relaxed) as f64 / 1e9;
        (lanes > 0.0 && seconds > 0.0).then(|| lanes * self.executor.threads() as f64 / seconds)
    }

    pub(crate) fn set_reducer(&self, reducer: ActorRef<ReducerMsg<B>>) {
        // Set once, by the agent as it starts.
        drop(self.reducer.set(reducer));
    }

    /// The reducer of this node.
    ///
    /// # Panics
    /// Before the agent has started, when there is no actor yet that could call this.
    #[expect(clippy::expect_used, reason = "the agent sets it before it spawns any actor")]
    pub(crate) fn reducer(&self) -> &ActorRef<ReducerMsg<B>> {
        self.reducer.get().expect("the reducer starts first")
    }

    pub(crate) fn placement(&self) -> Arc<Placement> {
        Arc::clone(&self.placement.read())
    }

    pub(crate) fn set_placement(&self, placement: Arc<Placement>) {
        *self.placement.write() = placement;
    }

    pub(crate) fn shard_actors(&self) -> Arc<ShardActors<B>> {
        Arc::clone(&self.shard_actors.read())
    }

    pub(crate) fn set_shard_actors(&self, actors: ShardActors<B>) {
        *self.shard_actors.write() = Arc::new(actors);
    }

    pub(crate) fn set_begun(&self, pass: PassId) {
        self.begun.send_replace(pass);
    }

    /// All passes of epochs before `epoch` are over.
    pub(crate) fn set_over(&self, epoch: Epoch) {
        let next = PassId { epoch, ..PassId::default() };
        self.begun.send_if_modified(|now| {
            let is_later = *now < next;
            if is_later {
                *now = next;
            }
            is_later
        });
    }

    /// Resolves when a pass is over here: a later one, or a later epoch, has begun.
    pub(crate) async fn until_over(&self, pass: PassId) {
        // The sender lives as long as this context.
        drop(self.begun.subscribe().wait_for(|now| *now > pass).await);
    }

    /// Waits until this node has begun the pass of a frame: a peer may be a little ahead.
    ///
    /// # Errors
    /// When the pass is over here, or does not begin in time.
    pub(crate) async fn until_begun(&self, wanted: PassId) -> Result<()> {
        let mut begun = self.begun.subscribe();
        let reached = tokio::time::timeout(EARLY_MAX, begun.wait_for(|now| *now >= wanted)).await;
        match reached {
            Ok(Ok(now)) if *now == wanted => Ok(()),
            Ok(Ok(now)) => Err(Error::Stale { wanted, current: *now }),
            _ => Err(Error::NotBegun { wanted, limit: EARLY_MAX }),
        }
    }
}
