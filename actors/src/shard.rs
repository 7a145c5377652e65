//! What dense, router and expert actors have in common: each owns one shard, and does the same things with it.

use crate::executor::Priority;
use crate::node_context::NodeContext;
use ractor::RpcReplyPort;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;
use volary_core::compute::{Compute, ComputeError, Computed};
use volary_core::schedule::Update;
use volary_core::{Epoch, Lane, ShardId, Step};
use volary_telemetry::Meter;

/// Which attempt at which step, and which lane of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct LaneStep {
    pub(crate) epoch: Epoch,
    pub(crate) step: Step,
    pub(crate) lane: Lane,
}

/// What an actor is asked to do with its shard between steps.
pub(crate) enum ShardMsg<B: Compute> {
    /// One step of the optimizer.
    Apply { gradient: Option<B::Gradient>, step: Step, update: Update, reply: RpcReplyPort<Computed<()>> },
    /// The stored form and its version; refused when another version is wanted.
    Store { version: Option<Step>, reply: RpcReplyPort<Computed<(Step, Vec<u8>)>> },
    /// Everything that belongs to epochs before this one is dropped.
    Forget { epoch: Epoch },
}

/// What a lane leaves with an actor between its forward and backward calls, by attempt.
pub(crate) struct SavedActivations<T> {
    kept: Arc<Mutex<HashMap<LaneStep, T>>>,
}

impl<T> Clone for SavedActivations<T> {
    fn clone(&self) -> Self {
        Self { kept: Arc::clone(&self.kept) }
    }
}

impl<T> Default for SavedActivations<T> {
    fn default() -> Self {
        Self { kept: Arc::default() }
    }
}

impl<T> SavedActivations<T> {
    fn lock(&self) -> MutexGuard<'_, HashMap<LaneStep, T>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn save(&self, at: LaneStep, value: T) {
        self.lock().insert(at, value);
    }

    pub(crate) fn take(&self, at: LaneStep) -> Computed<T> {
        self.lock().remove(&at).ok_or_else(|| ComputeError(format!("nothing is kept for {at:?}")))
    }

    pub(crate) fn forget_before(&self, epoch: Epoch) {
        self.lock().retain(|at, _| at.epoch >= epoch);
    }
}

/// One shard on this node.
pub(crate) struct ShardReplica<B: Compute> {
    pub(crate) id: ShardId,
    pub(crate) node: Arc<NodeContext<B>>,
    state: Arc<Mutex<ReplicaState<B>>>,
}

struct ReplicaState<B: Compute> {
    shard: B::Shard,
    version: Step,
}

impl<B: Compute> ShardReplica<B> {
    pub(crate) fn new(id: ShardId, node: Arc<NodeContext<B>>, shard: B::Shard, version: Step) -> Self {
        Self { id, node, state: Arc::new(Mutex::new(ReplicaState { shard, version })) }
    }

    /// Queues an urgent computation with a view of the shard's parameters; what it makes goes to `then`.
    pub(crate) fn compute<T>(
        &self,
        meter: &Meter,
        work: impl FnOnce(&B, B::Params) -> T + Send + 'static,
        then: impl FnOnce(T) + Send + 'static,
    ) {
        let (state, node, expert) = (Arc::clone(&self.state), Arc::clone(&self.node), self.id.is_expert());
        let measured = move |backend: &B| {
            let start = Instant::now();
            let params = backend.params(&lock(&state).shard);
            let made = work(backend, params);
            if !expert {
                node.add_lane_time(start.elapsed());
            }
            made
        };
        self.node.executor.measured(meter, measured, then);
    }

    /// What all three kinds of actor do alike.
    pub(crate) fn on_shard(&self, message: ShardMsg<B>) {
        match message {
            ShardMsg::Apply { gradient, step, update, reply } => self.on_apply(gradient, step, update, reply),
            ShardMsg::Store { version, reply } => self.on_store(version, reply),
            ShardMsg::Forget { .. } => {}
        }
    }

    fn on_apply(
        &self,
        gradient: Option<B::Gradient>,
        step: Step,
        update: Update,
        reply: RpcReplyPort<Computed<()>>,
    ) {
        let (id, state) = (self.id, Arc::clone(&self.state));
        self.node.executor.submit(Priority::Urgent, move |backend| {
            let mut held = lock(&state);
            let done = if held.version + 1 == step {
                backend.apply(id, &mut held.shard, gradient, step, update)
            } else {
                Err(ComputeError(format!("{id} is at step {}, and step {step} came", held.version)))
            };
            if done.is_ok() {
                held.version = step;
            }
            drop(held);
            drop(reply.send(done));
        });
    }

    fn on_store(&self, version: Option<Step>, reply: RpcReplyPort<Computed<(Step, Vec<u8>)>>) {
        let (id, state) = (self.id, Arc::clone(&self.state));
        self.node.executor.submit(Priority::Urgent, move |backend| {
            let held = lock(&state);
            let stored = match version {
                Some(wanted) if wanted != held.version => {
                    Err(ComputeError(format!("{id} is at step {}, not {wanted}", held.version)))
                }
                _ => backend.store(id, held.version, &held.shard).map(|bytes| (held.version, bytes)),
            };
            drop(held);
            drop(reply.send(stored));
        });
    }
}

fn lock<T>(state: &Mutex<T>) -> MutexGuard<'_, T> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}
