//! The copier actor: copies checkpoints to the run's object store, one at a time.
//!
//! Started beside the supervisor actor, which it outlives, so that the last checkpoint arrives. The
//! checkpointer hands it each checkpoint that is durable, and keeps its blobs until it hears of the end.
//! While one is copied, only the newest of those that follow waits. A failure costs a copy, and never the
//! run.

use crate::messages::{CheckpointerMsg, CopierMsg, CopyJob, CopyOutcome, notify, respond};
use parking_lot::Mutex;
use ractor::{Actor, ActorProcessingErr, ActorRef, RpcReplyPort};
use std::sync::Arc;
use std::time::Instant;
use volary_storage::Mirror;

/// The copier's state.
pub(crate) struct CopierState {
    me: ActorRef<CopierMsg>,
    /// Taken by the copy in progress.
    mirror: Arc<Mutex<Option<Mirror>>>,
    is_copying: bool,
    next: Option<CopyJob>,
    /// Those who wait until nothing is left to copy.
    waiting: Vec<RpcReplyPort<Option<CopyOutcome>>>,
    last: Option<CopyOutcome>,
}

/// See the module.
pub(crate) struct CopierActor;

impl Actor for CopierActor {
    type Msg = CopierMsg;
    type State = CopierState;
    type Arguments = Mirror;

    async fn pre_start(
        &self,
        me: ActorRef<Self::Msg>,
        mirror: Self::Arguments,
    ) -> Result<Self::State, ActorProcessingErr> {
        let mirror = Arc::new(Mutex::new(Some(mirror)));
        Ok(CopierState { me, mirror, is_copying: false, next: None, waiting: Vec::new(), last: None })
    }

    async fn handle(
        &self,
        _: ActorRef<Self::Msg>,
        message: Self::Msg,
        state: &mut Self::State,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            CopierMsg::Copy(job) => state.on_copy(*job),
            CopierMsg::Ended(outcome) => state.on_ended(outcome),
            CopierMsg::Idle { reply } => state.on_idle(reply),
        }
        Ok(())
    }
}

impl CopierState {
    fn on_copy(&mut self, job: CopyJob) {
        if let Some(replaced) = self.next.replace(job) {
            let outcome = CopyOutcome { step: replaced.record.step, result: None };
            notify(&replaced.from, CheckpointerMsg::Copied(outcome));
        }
        self.go_on();
    }

    fn on_ended(&mut self, outcome: CopyOutcome) {
        self.last = Some(outcome);
        self.is_copying = false;
        self.go_on();
    }

    fn on_idle(&mut self, reply: RpcReplyPort<Option<CopyOutcome>>) {
        self.waiting.push(reply);
        self.go_on();
    }

    fn go_on(&mut self) {
        if self.is_copying {
            return;
        }
        let Some(job) = self.next.take() else {
            return self.waiting.drain(..).for_each(|reply| respond(reply, self.last.clone()));
        };
        // It is there while nothing is copied.
        let Some(mut mirror) = self.mirror.lock().take() else { return };
        self.is_copying = true;
        let (me, place) = (self.me.clone(), Arc::clone(&self.mirror));
        // A task and not the handler: the mailbox stays open for newer checkpoints.
        tokio::spawn(async move {
            let CopyJob { record, keep, must_stay, from } = job;
            let began = Instant::now();
            let copied = mirror.copy(&record, keep, &must_stay).await;
            let seconds = began.elapsed().as_secs_f64();
            let result = copied.map(|copied| (copied, seconds)).map_err(|error| error.to_string());
            *place.lock() = Some(mirror);
            let outcome = CopyOutcome { step: record.step, result: Some(result) };
            notify(&from, CheckpointerMsg::Copied(outcome.clone()));
            notify(&me, CopierMsg::Ended(outcome));
        });
    }
}
