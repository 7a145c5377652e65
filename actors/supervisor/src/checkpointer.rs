//! The checkpointer actor: makes a durable checkpoint of the shards that nodes send.
//!
//! Supervised by the supervisor actor, which opens one checkpoint at a time and is told when it is durable
//! or failed. Disk work runs on blocking threads, one shard after the other, and a shard returns its share
//! of the memory budget when it is on disk.

use crate::blocking::blocking;
use crate::error::Error;
use crate::messages::{CheckpointerMsg, SupervisorMsg, notify};
use bytes::Bytes;
use ractor::{Actor, ActorProcessingErr, ActorRef};
use std::sync::Arc;
use volary_core::machine::Event;
use volary_core::{Epoch, ShardId, Step};
use volary_storage::{Checkpoints, Digest, Pending};
use volary_telemetry::Scope;

/// What the checkpointer starts from.
pub(crate) struct CheckpointerArgs {
    pub(crate) checkpoints: Checkpoints,
    pub(crate) config_hash: Digest,
    /// Checkpoints to keep.
    pub(crate) keep: usize,
    pub(crate) supervisor: ActorRef<SupervisorMsg>,
}

/// The checkpointer's state.
pub(crate) struct CheckpointerState {
    args: CheckpointerArgs,
    pending: Option<Arc<Pending>>,
    /// Where the spans of the checkpoint go.
    scope: Scope,
}

/// See the module.
pub(crate) struct CheckpointerActor;

impl Actor for CheckpointerActor {
    type Msg = CheckpointerMsg;
    type State = CheckpointerState;
    type Arguments = CheckpointerArgs;

    async fn pre_start(
        &self,
        _: ActorRef<Self::Msg>,
        args: Self::Arguments,
    ) -> Result<Self::State, ActorProcessingErr> {
        Ok(CheckpointerState { args, pending: None, scope: Scope::default() })
    }

    async fn handle(
        &self,
        _: ActorRef<Self::Msg>,
        message: Self::Msg,
        state: &mut Self::State,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            CheckpointerMsg::Open { step, epoch, shards, scope } => state.on_open(step, epoch, shards, scope),
            CheckpointerMsg::Shard { step, shard, bytes, permit } => {
                state.on_shard(step, shard, bytes).await;
                // Only now the next shard is taken off the wire.
                drop(permit);
            }
            CheckpointerMsg::Drop { step } => state.on_drop(step),
        }
        Ok(())
    }
}

impl CheckpointerState {
    fn on_open(&mut self, step: Step, epoch: Epoch, shards: Vec<ShardId>, scope: Scope) {
        self.scope = scope;
        let pending = self.args.checkpoints.begin(step, epoch, self.args.config_hash, shards);
        self.pending = Some(Arc::new(pending));
    }

    fn on_drop(&mut self, step: Step) {
        self.pending.take_if(|pending| pending.step() == step);
    }

    async fn on_shard(&mut self, step: Step, shard: ShardId, bytes: Bytes) {
        let Some(pending) = self.pending.as_ref().filter(|pending| pending.step() == step) else { return };
        let (pending, scope) = (Arc::clone(pending), self.scope.clone());
        let added = blocking(move || {
            scope.enter(|| pending.add(shard, &bytes))?;
            Ok::<_, volary_storage::Error>(pending.missing().is_empty())
        });
        match added.await {
            Ok(false) => {}
            Ok(true) => self.complete(step).await,
            Err(error) => self.failed(step, &error).await,
        }
    }

    async fn complete(&mut self, step: Step) {
        // The only other handle was in the blocking call that has returned.
        let Some(pending) = self.pending.take().and_then(Arc::into_inner) else { return };
        let (checkpoints, keep) = (self.args.checkpoints.clone(), self.args.keep);
        let scope = self.scope.clone();
        let completed = blocking(move || {
            scope.enter(|| pending.complete())?;
            if let Err(error) = checkpoints.retain(keep) {
                tracing::warn!(%error, "old checkpoints cannot be removed");
            }
            Ok::<_, volary_storage::Error>(())
        });
        match completed.await {
            Ok(()) => self.tell_supervisor(Event::CheckpointStored { step }),
            Err(error) => self.failed(step, &error).await,
        }
    }

    async fn failed(&mut self, step: Step, error: &Error) {
        self.pending = None;
        // What it has written already must not take the space of the next one.
        let (checkpoints, keep) = (self.args.checkpoints.clone(), self.args.keep);
        if let Err(error) = blocking(move || checkpoints.retain(keep)).await {
            tracing::warn!(%error, "the remains of a failed checkpoint cannot be removed");
        }
        self.tell_supervisor(Event::CheckpointFailed { step, reason: error.to_string() });
    }

    fn tell_supervisor(&self, event: Event) {
        notify(&self.args.supervisor, SupervisorMsg::Event(event));
    }
}
