//! The supervisor actor: the shell around [`volary_core::machine::Machine`].
//!
//! It turns what happens (nodes that come, speak and go, people who ask, checkpoints that become durable) into events, and carries
//! out the machine's effects in their order: a commit is in sled, flushed and synced, before any node hears of it.
//! `effects` carries them out, `people` answers who asks. It supervises the checkpointer actor. When it fails, the process ends; nothing that was committed is lost.

mod effects;
mod observed;
mod people;
mod traces;

use observed::Observed;
use traces::Traces;

use crate::checkpointer::{CheckpointerActor, CheckpointerArgs, CheckpointerMsg};
use crate::credentials::Credentials;
use crate::durations::Durations;
use crate::event_stream::EventStream;
use crate::limits::TICK;
use crate::operator::{OperatorReply, OperatorRequest};
use crate::run_files::{MetricsLine, RunFiles};
use crate::wire::{LinkReport, NodeInfo, RunInfo, ToNode, Welcome};
use bytes::Bytes;
use ractor::{Actor, ActorProcessingErr, ActorRef, RpcReplyPort};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Instant;
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};
use volary_core::machine::{Committed, Event, Machine, PersistentState, Restored, Settings};
use volary_core::messages::{LastCommit, NodeCommand, NodeReport, ResidentState};
use volary_core::profile::Profile;
use volary_core::{NodeId, ShardId, Step};
use volary_data::Dataset;
use volary_storage::{Checkpoints, Digest, RunDir, Store, Table};
use volary_telemetry::Pipeline;
use volary_telemetry::metrics::SupervisorMetrics;
use volary_telemetry::tensorboard::EventFile;
use volary_transport::{CanaryKey, Link};

/// Under which name the store keeps what the machine must not forget.
const CLUSTER: &str = "cluster";
/// Words of one node that may wait for its link.
pub(crate) const WORDS_AHEAD: usize = 256;

/// What the supervisor is told.
pub(crate) enum SupervisorMsg {
    /// Something happened.
    Event(Event),
    /// A node is there, new or back.
    Joined(Box<Arrival>),
    /// A node said something.
    Said { node: NodeId, session: u64, message: NodeReport },
    /// What a node can do.
    Measured { node: NodeId, session: u64, profile: Box<Profile> },
    /// What a node knows of its links.
    Links { node: NodeId, session: u64, links: Vec<LinkReport> },
    /// A node's link ended.
    Lost { node: NodeId, session: u64, reason: String },
    /// A shard for the checkpoint.
    Shard { node: NodeId, session: u64, step: Step, shard: ShardId, bytes: Bytes, room: OwnedSemaphorePermit },
    /// Time has passed.
    Tick,
    /// Somebody asks.
    Operator { request: OperatorRequest, reply: RpcReplyPort<OperatorReply> },
}

/// A node that is there, new or back.
pub(crate) struct Arrival {
    pub(crate) node: NodeId,
    pub(crate) info: NodeInfo,
    /// What it has in memory.
    pub(crate) held: ResidentState,
    pub(crate) session: u64,
    /// Its control stream.
    pub(crate) down: mpsc::Sender<ToNode>,
    pub(crate) link: Link,
    /// Where it shows that its process lives.
    pub(crate) canary: Option<(u16, CanaryKey)>,
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
    pub(crate) credentials: Arc<Credentials>,
    pub(crate) checkpoints: Checkpoints,
    pub(crate) config_hash: Digest,
    pub(crate) dataset: Arc<Dataset>,
    pub(crate) address: String,
    pub(crate) pipeline: Pipeline,
    pub(crate) metrics: Arc<SupervisorMetrics>,
    pub(crate) events: EventStream,
    /// Whether nobody has anything in memory any more.
    pub(crate) nodes_are_gone: bool,
    pub(crate) end: oneshot::Sender<RunEnd>,
}

struct Session {
    info: NodeInfo,
    session: u64,
    down: mpsc::Sender<ToNode>,
    link: Link,
    links: Vec<LinkReport>,
    last_word: Instant,
    /// What it came with, until it has measured itself and is one of the cluster.
    newcomer: Option<ResidentState>,
}

impl Session {
    /// Puts a word on its way. Who does not read for so long that no more fit is given up; a node whose link is gone is told apart.
    fn say(&self, word: ToNode) {
        if let Err(mpsc::error::TrySendError::Full(_)) = self.down.try_send(word) {
            self.link.close("it does not read its control stream");
        }
    }
}

/// The supervisor's state.
pub(crate) struct SupervisorState {
    run: RunInfo,
    settings: Settings,
    machine: Machine,
    sessions: BTreeMap<NodeId, Session>,
    store: Store,
    credentials: Arc<Credentials>,
    checkpoints: Checkpoints,
    dataset: Arc<Dataset>,
    files: RunFiles,
    checkpointer: ActorRef<CheckpointerMsg>,
    /// Who stores which shard of the checkpoint that is being written.
    stores: BTreeMap<ShardId, NodeId>,
    address: String,
    observed: Observed,
    /// The expert load of the last committed step.
    load: Vec<Vec<u64>>,
    last_commit: Instant,
    last_tick: Instant,
    durations: Durations,
    /// Nodes that were let go, until their links end.
    left: BTreeSet<NodeId>,
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
            credentials,
            checkpoints,
            config_hash,
            dataset,
            address,
            pipeline,
            metrics,
            events,
            nodes_are_gone,
            end,
        } = args;
        let telemetry = run.telemetry.clone();
        let model = (&run.architecture, &run.training, run.seed);
        let board = EventFile::create(&dir.tensorboard());
        let board = board.inspect_err(|error| tracing::warn!(%error, "no TensorBoard file")).ok();
        let observed = Observed {
            sample_every: telemetry.sample_every,
            traces: Traces::new(pipeline.tracer(), telemetry, model),
            metrics,
            events,
            board,
        };
        let durable = checkpoints.latest_intact()?.map(|record| record.step);
        checkpoints.truncate_after(durable.unwrap_or(0))?;
        let mut persistent: PersistentState = store.get(Table::Facts, CLUSTER)?.unwrap_or_default();
        if nodes_are_gone {
            // Nothing after the last durable checkpoint has its weights any more: these steps are done again.
            store.truncate_after(durable.unwrap_or(0))?;
            persistent.members.clear();
        }
        let last: Option<Committed> = match store.last_committed()? {
            Some(step) => store.committed(step)?,
            None => None,
        };
        let last_load = last.as_ref().map(|committed| committed.load.clone()).unwrap_or_default();
        let files = RunFiles::open(&dir, &store)?;
        let restarted = !persistent.members.is_empty();
        let last = last.map(|c| LastCommit { epoch: c.epoch, step: c.step, update: c.update });
        let restored = Restored { durable, last, persistent };
        let start = CheckpointerArgs {
            checkpoints: checkpoints.clone(),
            config_hash,
            keep: settings.checkpoint.keep.max(1),
            supervisor: me.clone(),
        };
        let (checkpointer, _) = Actor::spawn_linked(None, CheckpointerActor, start, me.get_cell()).await?;
        me.send_interval(TICK, || SupervisorMsg::Tick);
        Ok(SupervisorState {
            machine: Machine::new(settings.clone(), restored),
            run,
            settings,
            sessions: BTreeMap::new(),
            store,
            credentials,
            checkpoints,
            dataset,
            files,
            checkpointer,
            stores: BTreeMap::new(),
            address,
            observed,
            load: last_load,
            last_commit: Instant::now(),
            last_tick: Instant::now(),
            durations: Durations::new(restarted),
            left: BTreeSet::new(),
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
            SupervisorMsg::Joined(arrival) => state.on_joined(*arrival).await,
            SupervisorMsg::Said { node, session, message } => state.on_said(node, session, message).await,
            SupervisorMsg::Measured { node, session, profile } => {
                state.on_measured(node, session, profile).await
            }
            SupervisorMsg::Links { node, session, links } => state.on_links(node, session, links).await,
            SupervisorMsg::Lost { node, session, reason } => state.on_lost(node, session, reason).await,
            SupervisorMsg::Shard { node, session, step, shard, bytes, room } => {
                state.on_shard((node, session), step, shard, bytes, room)
            }
            SupervisorMsg::Tick => state.on_tick().await,
            SupervisorMsg::Operator { request, reply } => state.on_operator(request, reply).await,
        };
        if let Err(reason) = done {
            // What cannot be journalled did not happen: the run stops here and resumes from what is durable.
            state.dismiss(&format!("the run cannot go on: {reason}")).await;
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

    async fn on_tick(&mut self) -> Outcome {
        let ms = self.last_tick.elapsed().as_millis();
        self.last_tick = Instant::now();
        self.on_event(Event::Tick { ms: u64::try_from(ms).unwrap_or(u64::MAX) }).await
    }

    async fn on_joined(&mut self, arrival: Arrival) -> Outcome {
        let Arrival { node, info, held, session, down, link, canary } = arrival;
        if let Some(before) = self.sessions.get(&node) {
            if before.info.instance != info.instance {
                // Another process of this name: the first one stays for as long as it lives.
                drop(down.try_send(ToNode::NameInUse));
                return Ok(());
            }
            self.lose(&node, "its process came back on another link").await?;
        }
        let run = serde_json::to_string(&self.run).map_err(|error| error.to_string())?;
        let keep = self.machine.accepts_state(&held);
        let revoked = self.credentials.revoked()?;
        drop(down.try_send(ToNode::Welcome(Box::new(Welcome { run, keep, canary, revoked }))));
        let held = if keep { held } else { ResidentState::default() };
        let profile = info.profile.clone();
        let (links, last_word) = (Vec::new(), Instant::now());
        let known = Session { info, session, down, link, links, last_word, newcomer: Some(held) };
        self.sessions.insert(node.clone(), known);
        match profile {
            Some(profile) => self.on_measured(node, session, Box::new(profile)).await,
            None => Ok(()),
        }
    }

    /// A node knows what it can do: now it is one of the cluster.
    async fn on_measured(&mut self, node: NodeId, session: u64, profile: Box<Profile>) -> Outcome {
        let Some(known) = self.session(&node, session) else { return Ok(()) };
        known.last_word = Instant::now();
        known.info.profile = Some((*profile).clone());
        let Some(held) = known.newcomer.take() else { return Ok(()) };
        let address = known.info.address.clone();
        self.on_event(Event::Joined { node, profile, address, held }).await
    }

    /// A checkpoint's shards come from their owners: those of the placement under which it was opened, or of one that came since, as nodes
    /// see it, so that whoever holds a shard now is heard too.
    fn on_shard(
        &mut self,
        (node, session): (NodeId, u64),
        step: Step,
        shard: ShardId,
        bytes: Bytes,
        room: OwnedSemaphorePermit,
    ) -> Outcome {
        let holds = self.stores.get(&shard) == Some(&node) || self.machine.placement().holds(&node, shard);
        if self.session(&node, session).is_some() && holds {
            drop(self.checkpointer.cast(CheckpointerMsg::Shard { step, shard, bytes, room }));
        } else {
            tracing::debug!(%node, %shard, step, "a shard for a checkpoint of somebody who does not own it");
        }
        Ok(())
    }

    /// The current session of a node, if these are its words.
    fn session(&mut self, node: &NodeId, session: u64) -> Option<&mut Session> {
        self.sessions.get_mut(node).filter(|known| known.session == session)
    }

    async fn on_said(&mut self, node: NodeId, session: u64, message: NodeReport) -> Outcome {
        let Some(known) = self.session(&node, session) else { return Ok(()) };
        known.last_word = Instant::now();
        if matches!(message, NodeReport::Prepared { .. }) {
            self.observed.traces.prepared(&node.0);
        }
        self.on_event(Event::Reported { node, message }).await
    }

    async fn on_links(&mut self, node: NodeId, session: u64, links: Vec<LinkReport>) -> Outcome {
        let Some(known) = self.sessions.get_mut(&node).filter(|known| known.session == session) else {
            return Ok(());
        };
        known.last_word = Instant::now();
        for LinkReport { peer, sent_bytes, received_bytes, .. } in &links {
            self.observed.metrics.link(&node.0, peer, *sent_bytes, *received_bytes);
        }
        let mut carried: Vec<(f64, f64)> = links
            .iter()
            .filter_map(|link| Some((link.bandwidth.filter(|b| *b > 0.0)?, link.round_trip_ms / 1e3)))
            .collect();
        known.links = links;
        carried.sort_by(|a, b| a.0.total_cmp(&b.0));
        let Some(&(bandwidth, round_trip_s)) = carried.get(carried.len() / 2) else { return Ok(()) };
        self.on_event(Event::LinkMeasured { node, bandwidth, round_trip_s }).await
    }

    async fn on_lost(&mut self, node: NodeId, session: u64, reason: String) -> Outcome {
        if self.session(&node, session).is_none() {
            return Ok(());
        }
        if self.left.remove(&node) {
            self.sessions.remove(&node);
            let step = self.machine.committed();
            self.answer(&OperatorRequest::Drain { node: node.0 }, &OperatorReply::Done { step });
            return Ok(());
        }
        self.lose(&node, &reason).await
    }

    /// A node is gone, and whatever its link still brings is not heard.
    async fn lose(&mut self, node: &NodeId, reason: &str) -> Outcome {
        if let Some(session) = self.sessions.remove(node) {
            session.link.close(reason);
            self.durations.lost(node, reason, session.last_word.elapsed());
        }
        let gone = OperatorReply::Failed { reason: format!("{node} is gone: {reason}") };
        self.answer(&OperatorRequest::Drain { node: node.0.clone() }, &gone);
        self.on_event(Event::Lost { node: node.clone(), reason: reason.to_owned() }).await
    }

    fn fence(&mut self, node: &NodeId, reason: &str) {
        if let Some(session) = self.sessions.remove(node) {
            session.link.close(reason);
            self.durations.lost(node, reason, session.last_word.elapsed());
        }
    }

    /// The last word to everybody.
    async fn dismiss(&mut self, reason: &str) {
        for session in self.sessions.values() {
            session.say(ToNode::Protocol(NodeCommand::Leave { reason: reason.to_owned() }, None));
        }
    }
}
