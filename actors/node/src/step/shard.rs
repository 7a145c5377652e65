//! What dense, router and expert actors have in common: each owns one shard and treats it alike.

use crate::context::NodeContext;
use crate::device::executor::Priority;
use crate::error::{Error, Result};
use crate::ids::LaneStep;
use crate::messages::{Reply, ShardMsg, respond};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;
use volary_core::compute::Compute;
use volary_core::update::Update;
use volary_core::{Digest, Epoch, ShardId, Step};
use volary_telemetry::Meter;

/// What a lane's forward call leaves for its backward call, by attempt.
pub(crate) struct SavedActivations<T> {
    saved: Arc<Mutex<HashMap<LaneStep, T>>>,
}

impl<T> Clone for SavedActivations<T> {
    fn clone(&self) -> Self {
        Self { saved: Arc::clone(&self.saved) }
    }
}

impl<T> Default for SavedActivations<T> {
    fn default() -> Self {
        Self { saved: Arc::default() }
    }
}

impl<T> SavedActivations<T> {
    pub(crate) fn save(&self, at: LaneStep, value: T) {
        self.saved.lock().insert(at, value);
    }

    pub(crate) fn take(&self, at: LaneStep) -> Result<T> {
        self.saved.lock().remove(&at).ok_or(Error::MissingActivations { at })
    }

    /// Drops what belongs to epochs before `epoch`.
    pub(crate) fn discard_before(&self, epoch: Epoch) {
        self.saved.lock().retain(|at, _| at.epoch >= epoch);
    }
}

/// One replica of a shard, on this node.
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

    /// Queues an urgent computation with a view of the shard's parameters; its result goes to `then`.
    pub(crate) fn compute<T>(
        &self,
        meter: &Meter,
        work: impl FnOnce(&B, B::Params) -> T + Send + 'static,
        then: impl FnOnce(T) + Send + 'static,
    ) {
        let (state, node, expert) = (Arc::clone(&self.state), Arc::clone(&self.node), self.id.is_expert());
        let measured = move |backend: &B| {
            let start = Instant::now();
            let params = backend.params(&state.lock().shard);
            let result = work(backend, params);
            // Lanes per second are measured without experts, which serve other nodes' lanes too.
            if !expert {
                node.add_lane_time(start.elapsed());
            }
            result
        };
        self.node.executor.measured(meter, measured, then);
    }

    /// Handles what all three kinds of actor handle alike.
    pub(crate) fn on_shard(&self, message: ShardMsg<B>) {
        match message {
            ShardMsg::Apply { gradient, step, update, reply } => self.on_apply(gradient, step, update, reply),
            ShardMsg::Store { version, finite, reply } => self.on_store(version, finite, reply),
            ShardMsg::Digest { version, reply } => self.on_digest(version, reply),
            ShardMsg::FlipBit { reply } => self.on_flip_bit(reply),
            ShardMsg::Discard { .. } => {}
        }
    }

    fn on_apply(&self, gradient: Option<B::Gradient>, step: Step, update: Update, reply: Reply<()>) {
        let (shard, state) = (self.id, Arc::clone(&self.state));
        self.node.executor.submit(Priority::Urgent, move |backend| {
            let mut replica = state.lock();
            let done = if replica.version.next() == step {
                let applied = backend.apply(shard, &mut replica.shard, gradient, update);
                applied.map_err(Error::replica(shard))
            } else {
                Err(Error::WrongVersion { shard, version: replica.version, wanted: step.previous() })
            };
            if done.is_ok() {
                replica.version = step;
            }
            drop(replica);
            respond(reply, done);
        });
    }

    fn on_digest(&self, version: Step, reply: Reply<Digest>) {
        let (shard, state) = (self.id, Arc::clone(&self.state));
        self.node.executor.submit(Priority::Urgent, move |backend| {
            let replica = state.lock();
            let digest = match replica.version == version {
                true => backend.digest(&replica.shard).map_err(Error::replica(shard)),
                false => Err(Error::WrongVersion { shard, version: replica.version, wanted: version }),
            };
            drop(replica);
            respond(reply, digest);
        });
    }

    /// Flips a bit of the mantissa of the last number.
    fn on_flip_bit(&self, reply: Reply<()>) {
        let (shard, state) = (self.id, Arc::clone(&self.state));
        self.node.executor.submit(Priority::Urgent, move |backend| {
            let mut replica = state.lock();
            let flipped = backend.store(shard, replica.version, &replica.shard).and_then(|mut bytes| {
                if let Some(byte) = bytes.iter_mut().rev().nth(1) {
                    *byte ^= 1;
                }
                backend.load(shard, &bytes)
            });
            let done = flipped.map(|flipped| replica.shard = flipped).map_err(Error::replica(shard));
            drop(replica);
            respond(reply, done);
        });
    }

    fn on_store(&self, version: Option<Step>, finite: bool, reply: Reply<(Step, Vec<u8>)>) {
        let (shard, state) = (self.id, Arc::clone(&self.state));
        self.node.executor.submit(Priority::Urgent, move |backend| {
            let replica = state.lock();
            let at = replica.version;
            let store = || {
                if finite && !backend.is_finite(&replica.shard).map_err(Error::replica(shard))? {
                    return Err(Error::NotFinite { shard });
                }
                let bytes = backend.store(shard, at, &replica.shard).map_err(Error::replica(shard))?;
                Ok((at, bytes))
            };
            let stored = match version {
                Some(wanted) if wanted != at => Err(Error::WrongVersion { shard, version: at, wanted }),
                _ => store(),
            };
            drop(replica);
            respond(reply, stored);
        });
    }
}
