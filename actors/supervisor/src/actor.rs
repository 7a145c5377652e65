//! The supervisor actor: the shell around [`volary_core::machine::Machine`].
//!
//! It turns what happens (nodes that connect, report and disconnect, operators' requests, checkpoints that
//! become durable) into events, and carries out the machine's effects in their order: a commit is in sled,
//! flushed and synced, before any node receives it. It supervises the checkpointer actor. When it fails,
//! the process ends; no committed step is lost.
//!
//! | module | contents |
//! | --- | --- |
//! | `recovery` | what a supervisor finds on disk when it starts |
//! | `sessions` | connected nodes |
//! | `effects` | carrying out what the machine decides |
//! | `operator` | requests of operators |
//! | `telemetry`, `traces` | metrics, events, TensorBoard files; traces |

mod effects;
mod operator;
mod recovery;
mod sessions;
mod telemetry;
mod traces;

pub(crate) use recovery::last_members;
pub use recovery::persist;

use crate::checkpointer::{CheckpointerActor, CheckpointerArgs};
use crate::credentials::Credentials;
use crate::error::{Error, Result};
use crate::events::EventStream;
use crate::limits::{TICK, TICKS_AT_ONCE_MAX};
use crate::messages::{CheckpointerMsg, CopierMsg, FromNode, SessionId, SupervisorMsg, notify};
use crate::run_files::{MetricsLine, ReportedCopy, RunFiles};
use crate::timings::Timings;
use bytes::Bytes;
use ractor::{Actor, ActorProcessingErr, ActorRef, RpcReplyPort};
use recovery::Recovery;
use sessions::Sessions;
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;
use telemetry::Telemetry;
use tokio::sync::oneshot;
use volary_core::machine::{Event, Machine, Settings};
use volary_core::{NodeId, ShardId, Step};
use volary_data::Dataset;
use volary_protocol::operator::{OperatorReply, OperatorRequest};
use volary_protocol::{RunInfo, ToNode};
use volary_storage::{Checkpoints, Digest, RunDir, Store};
use volary_telemetry::Pipeline;
use volary_telemetry::metrics::SupervisorMetrics;
use volary_transport::BytePermit;

/// How a run ended.
#[derive(Clone, Debug, PartialEq)]
pub enum RunEnd {
    /// At its last step, or stopped by an operator, with everything durable.
    Done {
        /// The last committed step.
        step: Step,
    },
    /// The supervisor itself cannot go on, as after an error of its disk. Its nodes keep their state, and
    /// wait for its restart.
    Halted {
        /// Why.
        reason: String,
        /// Whether a restart may help by itself.
        may_pass: bool,
    },
    /// It cannot continue.
    Fatal {
        /// Why.
        reason: String,
    },
}

/// What the supervisor actor starts from.
pub(crate) struct SupervisorArgs {
    pub(crate) run: RunInfo,
    pub(crate) settings: Settings,
    pub(crate) dir: RunDir,
    pub(crate) store: Store,
    pub(crate) credentials: Arc<Credentials>,
    pub(crate) checkpoints: Checkpoints,
    pub(crate) config_hash: Digest,
    pub(crate) address: String,
    pub(crate) pipeline: Pipeline,
    pub(crate) metrics: Arc<SupervisorMetrics>,
    pub(crate) events: EventStream,
    /// Whether no node holds state in memory any more.
    pub(crate) nodes_are_gone: bool,
    /// Whether an operator allows the run to go back past a damaged checkpoint.
    pub(crate) may_go_back: bool,
    /// The documents of the validation sequences, by round and lane.
    pub(crate) validation_documents: Vec<Vec<u64>>,
    /// The text, which nodes get from the supervisor.
    pub(crate) dataset: Arc<Dataset>,
    /// Set when the run is over, so that nodes may drop what they hold.
    pub(crate) over: Arc<AtomicBool>,
    /// Copies checkpoints to the run's object store, if it has one.
    pub(crate) copier: Option<ActorRef<CopierMsg>>,
    pub(crate) reported_copy: ReportedCopy,
    pub(crate) end: oneshot::Sender<RunEnd>,
}

/// The supervisor's state.
pub(crate) struct SupervisorState {
    me: ActorRef<SupervisorMsg>,
    run: RunInfo,
    settings: Settings,
    machine: Machine,
    sessions: Sessions,
    store: Store,
    credentials: Arc<Credentials>,
    checkpoints: Checkpoints,
    may_go_back: bool,
    validation_documents: Vec<Vec<u64>>,
    dataset: Arc<Dataset>,
    over: Arc<AtomicBool>,
    files: RunFiles,
    checkpointer: ActorRef<CheckpointerMsg>,
    /// The node that stores each shard of the checkpoint in progress.
    checkpoint_senders: BTreeMap<ShardId, NodeId>,
    address: String,
    telemetry: Telemetry,
    reported_copy: ReportedCopy,
    /// The expert load of the last committed step.
    load: Vec<Vec<u64>>,
    last_commit: Instant,
    last_tick: Instant,
    timings: Timings,
    last_metrics: Option<MetricsLine>,
    /// The last lines of `events.jsonl`, for `status`.
    recent_events: VecDeque<String>,
    /// Steps that were skipped, and checkpoints that failed, in this process.
    skipped_steps: u64,
    failed_checkpoints: u64,
    /// Operators' requests that are answered later.
    pending_requests: Vec<(OperatorRequest, RpcReplyPort<OperatorReply>)>,
    end: Option<oneshot::Sender<RunEnd>>,
}

/// See the module.
pub(crate) struct SupervisorActor;

impl Actor for SupervisorActor {
    type Msg = SupervisorMsg;
    type State = SupervisorState;
    type Arguments = SupervisorArgs;

    async fn pre_start(
        &self,
        me: ActorRef<Self::Msg>,
        args: Self::Arguments,
    ) -> std::result::Result<Self::State, ActorProcessingErr> {
        let recovery = Recovery::load(
            &args.store,
            &args.checkpoints,
            args.nodes_are_gone,
            args.settings.training.max_skipped_steps,
        )?;
        let files = RunFiles::open(&args.dir, &args.store)?;
        let start = CheckpointerArgs {
            checkpoints: args.checkpoints.clone(),
            store: args.store.clone(),
            config_hash: args.config_hash,
            keep: args.settings.checkpoint.keep.max(1),
            agreed: recovery.restored.agreed,
            supervisor: me.clone(),
            copier: args.copier.clone(),
        };
        let (checkpointer, _) = Actor::spawn_linked(None, CheckpointerActor, start, me.get_cell()).await?;
        me.send_interval(TICK, || SupervisorMsg::Tick);
        Ok(SupervisorState::new(me, args, recovery, files, checkpointer))
    }

    async fn handle(
        &self,
        me: ActorRef<Self::Msg>,
        message: Self::Msg,
        state: &mut Self::State,
    ) -> std::result::Result<(), ActorProcessingErr> {
        if let Err(error) = state.on_message(message).await {
            // What cannot be journaled did not happen: the run stops here and resumes from what is durable.
            state.fail(&error);
        }
        if state.end.is_none() {
            me.stop(None);
        }
        Ok(())
    }
}

impl SupervisorState {
    fn new(
        me: ActorRef<SupervisorMsg>,
        args: SupervisorArgs,
        recovery: Recovery,
        files: RunFiles,
        checkpointer: ActorRef<CheckpointerMsg>,
    ) -> Self {
        let telemetry = Telemetry::new(&args);
        let (may_go_back, over, reported_copy) = (args.may_go_back, args.over, args.reported_copy);
        let (validation_documents, dataset) = (args.validation_documents, args.dataset);
        let SupervisorArgs { run, settings, store, credentials, checkpoints, address, end, .. } = args;
        Self {
            me,
            machine: Machine::new(settings.clone(), recovery.restored),
            run,
            settings,
            sessions: Sessions::default(),
            store,
            credentials,
            checkpoints,
            may_go_back,
            validation_documents,
            dataset,
            over,
            files,
            checkpointer,
            checkpoint_senders: BTreeMap::new(),
            address,
            telemetry,
            reported_copy,
            load: recovery.load,
            last_commit: Instant::now(),
            last_tick: Instant::now(),
            timings: Timings::new(recovery.restarted),
            last_metrics: None,
            recent_events: VecDeque::new(),
            pending_requests: Vec::new(),
            skipped_steps: 0,
            failed_checkpoints: 0,
            end: Some(end),
        }
    }

    async fn on_message(&mut self, message: SupervisorMsg) -> Result<()> {
        match message {
            SupervisorMsg::Event(event) => self.on_event(event).await,
            SupervisorMsg::Connected(arrival) => self.on_connected(*arrival).await,
            SupervisorMsg::FromNode { session, message, place } => {
                let done = match message {
                    FromNode::Report(report) => self.on_report(session, report).await,
                    FromNode::Measured(profile) => self.on_measured(session, profile).await,
                    FromNode::Links(links) => self.on_links(session, links).await,
                };
                drop(place);
                done
            }
            SupervisorMsg::Failed(error) => Err(error),
            SupervisorMsg::Disconnected { session, cause, reason } => {
                self.on_disconnected(session, cause, reason).await
            }
            SupervisorMsg::Shard { session, step, shard, bytes, permit } => {
                self.on_shard(&session, step, shard, bytes, permit);
                Ok(())
            }
            SupervisorMsg::Revoked(hashes) => {
                self.sessions.send_to_all(&ToNode::Revoked(hashes));
                Ok(())
            }
            SupervisorMsg::Copied(outcome) => {
                self.on_copied(outcome);
                Ok(())
            }
            SupervisorMsg::Verified(verified) => {
                self.on_event(Event::CheckpointVerified { intact: verified? }).await
            }
            SupervisorMsg::Tick => self.on_tick().await,
            SupervisorMsg::Operator { request, reply } => self.on_operator(request, reply).await,
        }
    }

    /// Passes an event to the machine, and carries out what it decides.
    async fn on_event(&mut self, event: Event) -> Result<()> {
        for effect in self.machine.handle(event) {
            self.carry_out(effect).await?;
        }
        Ok(())
    }

    /// Time in which this process did not run counts against no node.
    async fn on_tick(&mut self) -> Result<()> {
        let elapsed = self.last_tick.elapsed().min(TICK * TICKS_AT_ONCE_MAX);
        self.last_tick = Instant::now();
        self.on_event(Event::Tick { ms: u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX) }).await
    }

    /// Takes a shard for the checkpoint from the node that is to send it, or from any node that holds the
    /// shard now: the placement may have changed since the checkpoint was opened.
    fn on_shard(
        &mut self,
        session: &SessionId,
        step: Step,
        shard: ShardId,
        bytes: Bytes,
        permit: Option<BytePermit>,
    ) {
        let node = &session.node;
        let is_sender = self.checkpoint_senders.get(&shard) == Some(node);
        let holds = is_sender || self.machine.placement().holds(node, shard);
        if self.sessions.current(session).is_some() && holds {
            notify(&self.checkpointer, CheckpointerMsg::Shard { step, shard, bytes, permit });
        } else {
            tracing::debug!(%node, %shard, %step, "checkpoint shard dropped: the node does not hold it");
        }
    }

    /// Ends the process after an error of the supervisor itself. Nodes are not released: they keep what was
    /// committed, as after a death of the supervisor.
    fn fail(&mut self, error: &Error) {
        tracing::error!(%error, "the supervisor cannot go on");
        let may_pass = !matches!(error, Error::DamagedCheckpoint { .. });
        self.on_end(RunEnd::Halted { reason: error.to_string(), may_pass });
    }

    fn on_end(&mut self, end: RunEnd) {
        let answer = match &end {
            RunEnd::Done { step } => OperatorReply::Done { step: *step },
            RunEnd::Halted { reason, .. } | RunEnd::Fatal { reason } => {
                OperatorReply::Failed { reason: reason.clone() }
            }
        };
        for (_, reply) in self.pending_requests.drain(..) {
            crate::messages::respond(reply, answer.clone());
        }
        // The first end counts.
        if let Some(sender) = self.end.take() {
            self.over.store(!matches!(end, RunEnd::Halted { .. }), Ordering::Release);
            // The process may be ending by itself.
            drop(sender.send(end));
        }
        // The writers send what is queued, then close; the links stay until the process ends.
        self.sessions.clear();
    }
}
