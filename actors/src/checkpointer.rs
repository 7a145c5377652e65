//! The checkpointer actor: takes the shards that nodes send and makes a durable checkpoint of them.
//!
//! Supervised by the supervisor actor, which opens one checkpoint at a time and hears when it is durable or
//! failed. Disk work runs on blocking threads, one shard after the other, and a shard gives its room in memory back
//! when it is on the disk.

use crate::supervisor::SupervisorMsg;
use bytes::Bytes;
use ractor::{Actor, ActorProcessingErr, ActorRef};
use std::sync::Arc;
use tokio::sync::OwnedSemaphorePermit;
use volary_core::machine::Event;
use volary_core::{Epoch, ShardId, Step};
use volary_storage::{Checkpoints, Digest, Pending};
use volary_telemetry::Scope;

/// What the checkpointer is told.
pub(crate) enum CheckpointerMsg {
    /// A checkpoint of `step` begins.
    Open { step: Step, epoch: Epoch, shards: Vec<ShardId>, scope: Scope },
    /// A shard came.
    Shard { step: Step, shard: ShardId, bytes: Bytes, room: OwnedSemaphorePermit },
    /// The checkpoint is given up.
    Drop { step: Step },
}

/// What the checkpointer starts from.
pub(crate) struct CheckpointerArgs {
    pub(crate) checkpoints: Checkpoints,
    pub(crate) config_hash: Digest,
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
            CheckpointerMsg::Shard { step, shard, bytes, room } => {
                state.on_shard(step, shard, bytes).await;
                // Only now the next one is taken off the wire.
                drop(room);
            }
            CheckpointerMsg::Drop { step } => state.on_drop(step),
        }
        Ok(())
    }
}

impl CheckpointerState {
    fn on_open(&mut self, step: Step, epoch: Epoch, shards: Vec<ShardId>, scope: Scope) {
        self.scope = scope;
        self.pending =
            Some(Arc::new(self.args.checkpoints.begin(step, epoch, self.args.config_hash, shards)));
    }

    fn on_drop(&mut self, step: Step) {
        self.pending.take_if(|pending| pending.step() == step);
    }

    async fn on_shard(&mut self, step: Step, shard: ShardId, bytes: Bytes) {
        let Some(pending) = self.pending.as_ref().filter(|pending| pending.step() == step) else { return };
        let pending = Arc::clone(pending);
        let scope = self.scope.clone();
        let added = blocking(move || {
            scope.enter(|| pending.add(shard, &bytes))?;
            Ok(pending.missing().is_empty())
        });
        match added.await {
            Ok(false) => {}
            Ok(true) => self.complete(step).await,
            Err(reason) => self.failed(step, reason).await,
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
            Ok(())
        });
        match completed.await {
            Ok(()) => self.tell(Event::CheckpointStored { step }),
            Err(reason) => self.failed(step, reason).await,
        }
    }

    async fn failed(&mut self, step: Step, reason: String) {
        self.pending = None;
        // What it had written already must not keep the next one from finding room.
        let (checkpoints, keep) = (self.args.checkpoints.clone(), self.args.keep);
        if let Err(error) = blocking(move || checkpoints.retain(keep)).await {
            tracing::warn!(error, "what a failed checkpoint left behind cannot be removed");
        }
        self.tell(Event::CheckpointFailed { step, reason });
    }

    fn tell(&self, event: Event) {
        drop(self.args.supervisor.cast(SupervisorMsg::Event(event)));
    }
}

/// Runs disk work on a blocking thread.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> volary_storage::Result<T> + Send + 'static,
) -> Result<T, String> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done.map_err(|error| error.to_string()),
        Err(error) => Err(format!("disk work did not end: {error}")),
    }
}
