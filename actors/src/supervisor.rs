//! The supervisor actor: the shell around [`volary_core::machine::Machine`].
//!
//! It turns what happens (nodes that come, speak and go, people who ask, checkpoints that become durable) into events, and carries
//! out the machine's effects in their order: a commit is in sled, flushed and synced, before any node hears of it.
//! It supervises the checkpointer actor. When it fails, the process ends; nothing that was committed is lost.

use crate::checkpointer::{CheckpointerActor, CheckpointerArgs, CheckpointerMsg, blocking};
use crate::limits::{STATUS_EVENTS, WATCH_EVERY};
use crate::operator::{NodeStatus, OperatorReply, OperatorRequest, ShardStatus, Status, SupervisorStatus};
use crate::run_files::{EventLine, MetricsLine, RunFiles, ValidationLine, unix_ms};
use crate::wire::{Down, NodeInfo, RunInfo};
use bytes::Bytes;
use ractor::{Actor, ActorProcessingErr, ActorRef, RpcReplyPort};
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot};
use volary_core::machine::{Activity, Committed, Effect, Event, Machine, Notice, Settings};
use volary_core::messages::{Pass, ToNode};
use volary_core::{NodeId, ShardId, Step};
use volary_data::Dataset;
use volary_storage::{Checkpoints, Digest, RunDir, Store, Table};

/// Words of one node that may wait for its link.
pub(crate) const WORDS_AHEAD: usize = 256;

/// What the supervisor is told.
pub(crate) enum SupervisorMsg {
    /// Something happened.
    Event(Event),
    /// A node joined; `down` is its control stream.
    Joined { node: NodeId, info: NodeInfo, session: u64, down: mpsc::Sender<Down> },
    /// A node's link ended.
    Lost { node: NodeId, session: u64, reason: String },
    /// A shard for the checkpoint.
    Shard { step: Step, shard: ShardId, bytes: Bytes },
    /// It is time to look whether anything has come of what is under way.
    Watch,
    /// Somebody asks.
    Operator { request: OperatorRequest, reply: RpcReplyPort<OperatorReply> },
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq)]
pub enum RunEnd {
    /// At its last step, or stopped as asked, with everything durable.
    Done {
        /// The last committed step.
        step: Step,
    },
    /// It cannot go on.
    Fatal {
        /// Why.
        reason: String,
    },
}

/// What the supervisor starts from.
pub(crate) struct SupervisorArgs {
    pub(crate) run: RunInfo,
    pub(crate) settings: Settings,
    pub(crate) dir: RunDir,
    pub(crate) store: Store,
    pub(crate) checkpoints: Checkpoints,
    pub(crate) config_hash: Digest,
    pub(crate) dataset: Arc<Dataset>,
    pub(crate) address: String,
    pub(crate) log_every: u64,
    pub(crate) end: oneshot::Sender<RunEnd>,
}

struct Session {
    info: NodeInfo,
    session: u64,
    down: mpsc::Sender<Down>,
}

/// The supervisor's state.
pub(crate) struct SupervisorState {
    run: RunInfo,
    settings: Settings,
    machine: Machine,
    sessions: BTreeMap<NodeId, Session>,
    store: Store,
    checkpoints: Checkpoints,
    dataset: Arc<Dataset>,
    files: RunFiles,
    checkpointer: ActorRef<CheckpointerMsg>,
    address: String,
    log_every: u64,
    last_commit: Instant,
    last_progress: Instant,
    last_metrics: Option<MetricsLine>,
    events: VecDeque<String>,
    waiting: Vec<(OperatorRequest, RpcReplyPort<OperatorReply>)>,
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
    ) -> Result<Self::State, ActorProcessingErr> {
        let SupervisorArgs {
            run,
            settings,
            dir,
            store,
            checkpoints,
            config_hash,
            dataset,
            address,
            log_every,
            end,
        } = args;
        let durable = checkpoints.latest_intact()?.map(|record| record.step);
        let back = durable.unwrap_or(0);
        // Nothing after the last durable checkpoint has its weights any more: these steps are done again.
        checkpoints.truncate_after(back)?;
        store.truncate_after(back)?;
        let files = RunFiles::open(&dir, back)?;
        let epoch = store.get(Table::Facts, "epoch")?.unwrap_or(0);
        let start = CheckpointerArgs {
            checkpoints: checkpoints.clone(),
            config_hash,
            keep: settings.checkpoint.keep.max(1),
            supervisor: me.clone(),
        };
        let (checkpointer, _) = Actor::spawn_linked(None, CheckpointerActor, start, me.get_cell()).await?;
        let timeout = std::time::Duration::from_millis(settings.cluster.gather_timeout_ms);
        me.send_after(timeout, || SupervisorMsg::Event(Event::GatherTimeout));
        me.send_interval(WATCH_EVERY, || SupervisorMsg::Watch);
        Ok(SupervisorState {
            machine: Machine::new(settings.clone(), durable, epoch),
            run,
            settings,
            sessions: BTreeMap::new(),
            store,
            checkpoints,
            dataset,
            files,
            checkpointer,
            address,
            log_every,
            last_commit: Instant::now(),
            last_progress: Instant::now(),
            last_metrics: None,
            events: VecDeque::new(),
            waiting: Vec::new(),
            end: Some(end),
        })
    }

    async fn handle(
        &self,
        me: ActorRef<Self::Msg>,
        message: Self::Msg,
        state: &mut Self::State,
    ) -> Result<(), ActorProcessingErr> {
        let done = match message {
            SupervisorMsg::Event(event) => state.on_event(event).await,
            SupervisorMsg::Joined { node, info, session, down } => {
                state.on_joined(node, info, session, down).await
            }
            SupervisorMsg::Lost { node, session, reason } => state.on_lost(node, session, reason).await,
            SupervisorMsg::Shard { step, shard, bytes } => {
                drop(state.checkpointer.cast(CheckpointerMsg::Shard { step, shard, bytes }));
                Ok(())
            }
            SupervisorMsg::Watch => state.on_watch().await,
            SupervisorMsg::Operator { request, reply } => state.on_operator(request, reply).await,
        };
        if let Err(reason) = done {
            // What cannot be journalled did not happen: the run stops here and resumes from what is durable.
            state.on_end(RunEnd::Fatal { reason });
        }
        if state.end.is_none() {
            me.stop(None);
        }
        Ok(())
    }
}

type Outcome = Result<(), String>;

impl SupervisorState {
    async fn on_event(&mut self, event: Event) -> Outcome {
        for effect in self.machine.handle(event) {
            self.carry_out(effect).await?;
        }
        Ok(())
    }

    /// A step that hangs, for whatever reason, is dropped and tried again.
    async fn on_watch(&mut self) -> Outcome {
        let limit = Duration::from_millis(self.settings.cluster.step_timeout_ms);
        if self.last_progress.elapsed() < limit {
            return Ok(());
        }
        self.last_progress = Instant::now();
        self.on_event(Event::Stalled).await
    }

    async fn on_joined(
        &mut self,
        node: NodeId,
        info: NodeInfo,
        session: u64,
        down: mpsc::Sender<Down>,
    ) -> Outcome {
        if let Some(before) = self.sessions.remove(&node) {
            drop(before);
            self.on_event(Event::Lost { node: node.clone(), reason: "it joined anew".into() }).await?;
        }
        if let Err(reason) = self.check_memory(&node, &info) {
            if self.machine.activity() == Activity::Gathering {
                return Err(reason);
            }
            // A run that is going on does not end for a newcomer that is too small for it.
            tracing::warn!(reason, "a node was sent away");
            drop(down.send(Down::Say(ToNode::Leave { reason })).await);
            return Ok(());
        }
        let (capacity, address) = (info.capacity, info.address.clone());
        let run = serde_json::to_string(&self.run).map_err(|error| error.to_string())?;
        drop(down.send(Down::Welcome(run)).await);
        self.sessions.insert(node.clone(), Session { info, session, down });
        self.on_event(Event::Joined { node, capacity, address }).await
    }

    /// Refuses a model that cannot fit: what every node holds, and the experts divided by all nodes that are wanted.
    fn check_memory(&self, node: &NodeId, info: &NodeInfo) -> Outcome {
        let a = &self.settings.architecture;
        // Weights, gradient and, for AdamW, two moments; Adafactor's factors are negligible.
        let words = match self.settings.training.optimizer {
            volary_core::options::Optimizer::Adafactor { .. } => 2,
            volary_core::options::Optimizer::Adamw { .. } => 4,
        };
        let bytes = |expert: bool| -> u64 {
            let shards = a.shards().into_iter().filter(|shard| shard.is_expert() == expert);
            shards.map(|shard| a.shard_parameters(shard) * 4 * words).sum()
        };
        let cluster = &self.settings.cluster;
        let nodes = cluster.nodes.max(1) as u64;
        let copies = (cluster.replication.max(1) as u64).min(nodes);
        let needed = bytes(false) + bytes(true) * copies / nodes;
        if needed <= info.memory_bytes {
            return Ok(());
        }
        let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
        Err(format!(
            "the model does not fit: {node} has {:.1} GiB of memory, and its share of {} parameters (weights, gradients and optimizer, \
             {copies} copies of each expert over {nodes} nodes) takes {:.1} GiB; add nodes, or choose a smaller model",
            gib(info.memory_bytes),
            a.parameters(),
            gib(needed),
        ))
    }

    async fn on_lost(&mut self, node: NodeId, session: u64, reason: String) -> Outcome {
        if self.sessions.get(&node).is_none_or(|known| known.session != session) {
            return Ok(());
        }
        self.sessions.remove(&node);
        self.on_event(Event::Lost { node, reason }).await
    }

    async fn on_operator(&mut self, request: OperatorRequest, reply: RpcReplyPort<OperatorReply>) -> Outcome {
        let event = match request {
            OperatorRequest::Status => {
                drop(reply.send(OperatorReply::Status(Box::new(self.status()))));
                return Ok(());
            }
            OperatorRequest::Checkpoint if self.machine.durable() == Some(self.machine.committed()) => {
                drop(reply.send(OperatorReply::Done { step: self.machine.committed() }));
                return Ok(());
            }
            OperatorRequest::Checkpoint => Event::CheckpointRequested,
            OperatorRequest::Stop => Event::StopRequested,
        };
        self.waiting.push((request, reply));
        self.on_event(event).await
    }

    async fn carry_out(&mut self, effect: Effect) -> Outcome {
        match effect {
            Effect::Send { node, message } => self.send(&node, message).await,
            Effect::Journal(committed) => self.journal(*committed).await,
            Effect::OpenCheckpoint { step, epoch, shards } => {
                drop(self.checkpointer.cast(CheckpointerMsg::Open { step, epoch, shards }));
                Ok(())
            }
            Effect::DropCheckpoint { step } => {
                drop(self.checkpointer.cast(CheckpointerMsg::Drop { step }));
                Ok(())
            }
            Effect::GoBack { step } => self.go_back(step).await,
            Effect::Validated { step, loss, tokens } => {
                self.last_commit = Instant::now();
                self.files.validation(&ValidationLine { step, loss, tokens }).map_err(|e| e.to_string())
            }
            Effect::Notice(notice) => self.on_notice(notice).await,
            Effect::Done => {
                self.on_end(RunEnd::Done { step: self.machine.committed() });
                Ok(())
            }
            Effect::Fatal { reason } => {
                self.on_end(RunEnd::Fatal { reason });
                Ok(())
            }
        }
    }

    async fn send(&mut self, node: &NodeId, mut message: ToNode) -> Outcome {
        self.last_progress = Instant::now();
        if let ToNode::Begin { step, pass, lanes, .. } = &mut message {
            for (lane, tokens) in lanes {
                let read = match pass {
                    Pass::Train => self.dataset.lane(*step, *lane),
                    Pass::Validate { round } => self.dataset.validation(*round, *lane),
                };
                *tokens = read.map_err(|error| format!("tokens of step {step}, lane {lane}: {error}"))?;
            }
        }
        if let Some(session) = self.sessions.get(node) {
            // A node whose link is gone is told apart; its words may be dropped.
            drop(session.down.send(Down::Say(message)).await);
        }
        Ok(())
    }

    async fn journal(&mut self, committed: Committed) -> Outcome {
        let (store, record) = (self.store.clone(), committed.clone());
        blocking(move || store.commit(record.step, &record)).await?;
        let seconds = self.last_commit.elapsed().as_secs_f64();
        self.last_commit = Instant::now();
        let line = MetricsLine::new(&committed, seconds);
        self.files.metrics(&line).map_err(|error| error.to_string())?;
        if self.log_every > 0 && line.step.is_multiple_of(self.log_every) {
            let (loss, busiest_expert) = (line.loss, line.busiest_expert);
            tracing::info!(step = line.step, loss, seconds, busiest_expert, load = ?committed.load, "committed");
        }
        self.last_metrics = Some(line);
        Ok(())
    }

    async fn go_back(&mut self, step: Step) -> Outcome {
        let (store, checkpoints) = (self.store.clone(), self.checkpoints.clone());
        blocking(move || {
            checkpoints.truncate_after(step)?;
            store.truncate_after(step)
        })
        .await?;
        self.files.go_back(step).map_err(|error| error.to_string())
    }

    async fn on_notice(&mut self, notice: Notice) -> Outcome {
        match &notice {
            Notice::Placed { epoch, .. } => {
                let (store, epoch) = (self.store.clone(), *epoch);
                // Before anybody hears of it: an epoch's number is never used twice.
                blocking(move || store.put(Table::Facts, "epoch", &epoch)).await?;
            }
            Notice::Checkpoint { step } => {
                self.answer(OperatorRequest::Checkpoint, &OperatorReply::Done { step: *step })
            }
            Notice::CheckpointFailed { reason, .. } => {
                self.answer(OperatorRequest::Checkpoint, &OperatorReply::Failed { reason: reason.clone() });
            }
            _ => {}
        }
        match &notice {
            Notice::WentBack { .. } | Notice::ReplicasDiffer { .. } | Notice::CheckpointFailed { .. } => {
                tracing::error!(?notice, "event");
            }
            Notice::Lost { .. } | Notice::Aborted { .. } => tracing::warn!(?notice, "event"),
            _ => tracing::info!(?notice, "event"),
        }
        let line = EventLine { unix_ms: unix_ms(), notice };
        self.files.event(&line).map_err(|error| error.to_string())?;
        if let Ok(text) = serde_json::to_string(&line) {
            self.events.push_back(text);
        }
        while self.events.len() > STATUS_EVENTS {
            self.events.pop_front();
        }
        Ok(())
    }

    fn answer(&mut self, request: OperatorRequest, answer: &OperatorReply) {
        for (_, reply) in self.waiting.extract_if(.., |(asked, _)| *asked == request) {
            drop(reply.send(answer.clone()));
        }
    }

    fn on_end(&mut self, end: RunEnd) {
        let answer = match &end {
            RunEnd::Done { step } => OperatorReply::Done { step: *step },
            RunEnd::Fatal { reason } => OperatorReply::Failed { reason: reason.clone() },
        };
        self.waiting.drain(..).for_each(|(_, reply)| drop(reply.send(answer.clone())));
        if let Some(sender) = self.end.take() {
            drop(sender.send(end));
        }
        // The writers send what is queued, then close; the links stay until the process ends.
        self.sessions.clear();
    }

    fn status(&self) -> Status {
        let placement = self.machine.placement();
        let node = |(node, session): (&NodeId, &Session)| NodeStatus {
            name: node.0.clone(),
            pid: session.info.pid,
            state: if placement.members.contains(node) { "member".into() } else { "joined".into() },
            device: session.info.device.clone(),
            capacity: session.info.capacity,
            shards: self
                .settings
                .architecture
                .shards()
                .into_iter()
                .filter(|&s| placement.holds(node, s))
                .count(),
            lanes: placement.lanes_of(node),
        };
        let shard = |shard: ShardId| ShardStatus {
            name: shard.to_string(),
            version: self.machine.committed(),
            replicas: placement.holders(shard).into_iter().map(|node| node.0).collect(),
        };
        Status {
            run: self.run.run.clone(),
            epoch: placement.epoch,
            step: self.machine.committed(),
            steps: self.settings.training.steps,
            activity: if self.end.is_some() { self.machine.activity() } else { Activity::Done },
            checkpoint: self.machine.durable(),
            loss: self.last_metrics.as_ref().map(|line| line.loss),
            tokens_per_second: self.last_metrics.as_ref().map(|line| line.tokens_per_second),
            supervisor: SupervisorStatus { pid: std::process::id(), address: self.address.clone() },
            nodes: self.sessions.iter().map(node).collect(),
            shards: self.settings.architecture.shards().into_iter().map(shard).collect(),
            events: self.events.iter().cloned().collect(),
        }
    }
}
