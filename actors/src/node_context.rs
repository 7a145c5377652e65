//! What all actors of one node share.

use crate::directory::ShardActors;
use crate::executor::Executor;
use crate::limits::EARLY_MAX;
use crate::peers::Peers;
use crate::reducer::ReducerMsg;
use ractor::ActorRef;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, PoisonError, RwLock};
use std::time::Duration;
use tokio::sync::{Semaphore, watch};
use volary_core::architecture::Architecture;
use volary_core::compute::{Compute, ComputeError, Computed};
use volary_core::costs::{Costs, lanes_in_flight};
use volary_core::options::TrainingOptions;
use volary_core::placement::Placement;
use volary_core::{Epoch, NodeId, Step};
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
    pub(crate) tracer: Tracer,
    pub(crate) metrics: Arc<NodeMetrics>,
    reducer: OnceLock<ActorRef<ReducerMsg<B>>>,
    placement: RwLock<Arc<Placement>>,
    actors: RwLock<Arc<ShardActors<B>>>,
    begun: watch::Sender<Begun>,
    /// Nanoseconds that lanes have computed here, experts not counted.
    lane_time: AtomicU64,
}

/// What this node has begun. Within a step validation comes before training, whose frames need a reducer that has begun.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Begun {
    pub(crate) epoch: Epoch,
    pub(crate) step: Step,
    pub(crate) train: bool,
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
            tracer,
            metrics,
            reducer: OnceLock::new(),
            placement: RwLock::default(),
            actors: RwLock::default(),
            begun: watch::Sender::new(Begun::default()),
            lane_time: AtomicU64::new(0),
        }
    }

    pub(crate) fn add_lane_time(&self, time: Duration) {
        self.lane_time.fetch_add(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// Lanes that this node computes under the present placement, whole ones: half of the layers of two lanes are one.
    pub(crate) fn lane_work(&self) -> f64 {
        let whole: f64 = self.costs.dense_flops.iter().sum();
        self.placement().lane_work(&self.id, |layers| {
            self.costs.dense_flops[usize::from(layers.start)..usize::from(layers.end)].iter().sum::<f64>()
                / whole
        })
    }

    /// Lanes that the device would do in a second of computing, from those that it has done since the last call.
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
    /// Before the agent has started, when there is no actor that could ask.
    #[expect(clippy::expect_used, reason = "the agent sets it before it spawns any actor that asks")]
    pub(crate) fn reducer(&self) -> ActorRef<ReducerMsg<B>> {
        self.reducer.get().expect("the reducer starts first").clone()
    }

    pub(crate) fn placement(&self) -> Arc<Placement> {
        Arc::clone(&self.placement.read().unwrap_or_else(PoisonError::into_inner))
    }

    pub(crate) fn set_placement(&self, placement: Arc<Placement>) {
        *self.placement.write().unwrap_or_else(PoisonError::into_inner) = placement;
    }

    pub(crate) fn shard_actors(&self) -> Arc<ShardActors<B>> {
        Arc::clone(&self.actors.read().unwrap_or_else(PoisonError::into_inner))
    }

    pub(crate) fn set_shard_actors(&self, actors: ShardActors<B>) {
        *self.actors.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(actors);
    }

    pub(crate) fn set_begun(&self, begun: Begun) {
        self.begun.send_replace(begun);
    }

    /// Waits until this node has begun what a frame belongs to: a peer may be a little ahead of it. What is stale is
    /// refused.
    pub(crate) async fn until_begun(&self, wanted: Begun) -> Computed<()> {
        let mut begun = self.begun.subscribe();
        let reached = tokio::time::timeout(EARLY_MAX, begun.wait_for(|now| *now >= wanted)).await;
        match reached {
            Ok(Ok(now)) if *now == wanted => Ok(()),
            Ok(Ok(now)) => Err(ComputeError(format!("stale: {wanted:?} came after {:?}", *now))),
            _ => Err(ComputeError(format!("{wanted:?} was not begun here within {EARLY_MAX:?}"))),
        }
    }
}
