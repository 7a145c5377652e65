//! The checkpointer actor: makes a durable checkpoint of the shards that nodes send.
//!
//! Supervised by the supervisor actor, which opens one checkpoint at a time and is told when it is durable
//! or failed. Disk work runs on blocking threads, one shard after the other, and a shard returns its share
//! of the memory budget when it is on disk.

use crate::blocking::blocking;
use crate::error::Error;
use crate::messages::{CheckpointerMsg, CopierMsg, CopyJob, CopyOutcome, SupervisorMsg, notify, respond};
use bytes::Bytes;
use ractor::{Actor, ActorProcessingErr, ActorRef};
use std::sync::Arc;
use volary_core::machine::Event;
use volary_core::{Epoch, ShardId, Step, Timeline};
use volary_storage::limits::JOURNAL_STEPS_KEPT;
use volary_storage::{Checkpoints, Digest, Pending, Store};
use volary_telemetry::Scope;

/// What the checkpointer starts from.
pub(crate) struct CheckpointerArgs {
    pub(crate) checkpoints: Checkpoints,
    pub(crate) store: Store,
    pub(crate) config_hash: Digest,
    /// Checkpoints to keep.
    pub(crate) keep: usize,
    /// The checkpoint that all replicas agreed on.
    pub(crate) agreed: Option<Step>,
    pub(crate) supervisor: ActorRef<SupervisorMsg>,
    /// Copies checkpoints to the run's object store, if it has one.
    pub(crate) copier: Option<ActorRef<CopierMsg>>,
}

/// The checkpointer's state.
pub(crate) struct CheckpointerState {
    me: ActorRef<CheckpointerMsg>,
    args: CheckpointerArgs,
    /// The checkpoint in progress, with the number of its attempt.
    pending: Option<(u64, Arc<Pending>)>,
    /// The newest checkpoint that is durable: the run may need it until the next one is.
    durable: Option<Step>,
    /// The checkpoint that the run goes back to when replicas differ.
    agreed: Option<Step>,
    /// Checkpoints that are being copied: their blobs stay.
    copying: Vec<Step>,
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
        me: ActorRef<Self::Msg>,
        args: Self::Arguments,
    ) -> Result<Self::State, ActorProcessingErr> {
        let durable = args.checkpoints.steps()?.last().copied();
        let (agreed, scope, copying) = (args.agreed, Scope::default(), Vec::new());
        let mut state = CheckpointerState { me, args, pending: None, durable, agreed, copying, scope };
        // Its copy may be missing: the process may have ended before.
        if let Some(step) = durable {
            state.copy(step).await;
        }
        Ok(state)
    }

    async fn handle(
        &self,
        _: ActorRef<Self::Msg>,
        message: Self::Msg,
        state: &mut Self::State,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            CheckpointerMsg::Open { attempt, at, shards, scope } => state.on_open(attempt, at, shards, scope),
            CheckpointerMsg::Shard { step, shard, bytes, permit } => {
                state.on_shard(step, shard, bytes).await;
                // Only now the next shard is taken off the wire.
                drop(permit);
            }
            CheckpointerMsg::Drop { attempt } => _ = state.pending.take_if(|(number, _)| *number == attempt),
            CheckpointerMsg::Agreed { step } => state.agreed = Some(step),
            CheckpointerMsg::Copied(outcome) => state.on_copied(outcome).await,
            CheckpointerMsg::Idle { reply } => respond(reply, ()),
        }
        Ok(())
    }
}

impl CheckpointerState {
    fn on_open(&mut self, attempt: u64, at: (Step, Timeline, Epoch), shards: Vec<ShardId>, scope: Scope) {
        self.scope = scope;
        let pending = self.args.checkpoints.begin(at, self.args.config_hash, shards);
        self.pending = Some((attempt, Arc::new(pending)));
    }

    async fn on_shard(&mut self, step: Step, shard: ShardId, bytes: Bytes) {
        // Whatever attempt a shard was sent for: its bytes at a step are the same in all of them.
        let current = self.pending.as_ref().filter(|(_, pending)| pending.step() == step);
        let Some((attempt, pending)) = current else { return };
        let (attempt, pending, scope) = (*attempt, Arc::clone(pending), self.scope.clone());
        let added = blocking(move || {
            scope.enter(|| pending.add(shard, &bytes))?;
            Ok::<_, volary_storage::Error>(pending.missing().is_empty())
        });
        match added.await {
            Ok(false) => {}
            Ok(true) => self.complete(attempt).await,
            Err(error) => self.failed(attempt, &error).await,
        }
    }

    async fn complete(&mut self, attempt: u64) {
        // The only other handle was in the blocking call that has returned.
        let Some(pending) = self.pending.take().and_then(|(_, pending)| Arc::into_inner(pending)) else {
            return;
        };
        let (step, scope) = (pending.step(), self.scope.clone());
        match blocking(move || scope.enter(|| pending.complete())).await {
            Ok(_) => {
                self.durable = self.durable.max(Some(step));
                self.tell_supervisor(Event::CheckpointStored { attempt });
                self.copy(step).await;
                self.tidy_up().await;
            }
            Err(error) => self.failed(attempt, &error).await,
        }
    }

    async fn failed(&mut self, attempt: u64, error: &Error) {
        self.pending = None;
        // What it has written already must not take the space of the next one.
        self.tidy_up().await;
        self.tell_supervisor(Event::CheckpointFailed { attempt, reason: error.to_string() });
    }

    /// Hands a checkpoint to the copier.
    async fn copy(&mut self, step: Step) {
        let Some(copier) = &self.args.copier else { return };
        let (checkpoints, keep) = (self.args.checkpoints.clone(), self.args.keep);
        let must_stay = vec![self.agreed];
        match blocking(move || checkpoints.at(step)).await {
            Ok(record) => {
                self.copying.push(step);
                let job = CopyJob { record, keep, must_stay, from: self.me.clone() };
                notify(copier, CopierMsg::Copy(Box::new(job)));
            }
            Err(error) => tracing::warn!(%step, %error, "the checkpoint cannot be copied"),
        }
    }

    async fn on_copied(&mut self, outcome: CopyOutcome) {
        self.copying.retain(|step| *step != outcome.step);
        notify(&self.args.supervisor, SupervisorMsg::Copied(outcome));
        self.tidy_up().await;
    }

    /// Removes old checkpoints, blobs that no checkpoint has, and steps of the journal that are not needed.
    async fn tidy_up(&self) {
        let (checkpoints, store) = (self.args.checkpoints.clone(), self.args.store.clone());
        let keep = self.args.keep;
        let copying = self.copying.iter().map(|step| Some(*step));
        let must_stay: Vec<Option<Step>> = copying.chain([self.durable, self.agreed]).collect();
        let tidied = blocking(move || {
            checkpoints.retain(keep, &must_stay)?;
            let oldest = checkpoints.steps()?.first().copied().unwrap_or_default();
            let recent = store.last_committed()?.unwrap_or_default().0.saturating_sub(JOURNAL_STEPS_KEPT);
            store.prune_before(oldest.min(Step(recent))).map(drop)
        });
        if let Err(error) = tidied.await {
            tracing::warn!(%error, "old checkpoints and steps cannot be removed");
        }
    }

    fn tell_supervisor(&self, event: Event) {
        notify(&self.args.supervisor, SupervisorMsg::Event(event));
    }
}
