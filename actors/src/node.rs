//! The node's agent: the actor through which the supervisor directs a node. The shell around [`volary_core::agent`].
//!
//! Who supervises whom:
//!
//! ```text
//! NodeActor (agent)
//!   ├── ReducerActor
//!   ├── LaneActor    one per lane that this node has run
//!   ├── DenseActor   embedding, and one per layer
//!   ├── RouterActor  one per MoE layer
//!   └── ExpertActor  one per expert held here
//! ```
//!
//! It takes the supervisor's messages in the order of the control stream, so that a commit is applied before the
//! next step begins. It waits for computations here and never for the network: what comes from other nodes is fetched by
//! tasks. It outlives the supervisor's link, and with it the shards. A child that dies makes the epoch fail; the
//! supervisor decides what follows.

use crate::lane::{LaneActor, LaneMsg, LaneTrace};
use crate::node_context::{Begun, NodeContext};
use crate::reducer::{ReducerActor, ReducerMsg};
use crate::replicas::LocalReplicas;
use crate::shard::{LaneStep, ShardMsg};
use crate::shards::{self, Uplink};
use crate::trace::TraceRequest;
use crate::wire::ToSupervisor;
use ractor::{Actor, ActorProcessingErr, ActorRef, RpcReplyPort, SupervisionEvent};
use std::collections::{HashMap, HashSet};
use std::marker::PhantomData;
use std::sync::Arc;
use std::time::Instant;
use tokio::sync::{mpsc, oneshot};
use tokio::task::AbortHandle;
use volary_core::agent::{Agent, Effect, Event, Failure};
use volary_core::compute::{Compute, ComputeError, Computed};
use volary_core::messages::{
    Assignment, LaneReport, NodeCommand, NodeReport, Norm, Pass, ResidentState, Source,
};
use volary_core::{Epoch, Lane, NodeId, ShardId, Step};
use volary_telemetry::metrics::Phase;
use volary_telemetry::{Scope, Span};

/// Why a node ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NodeEnd {
    /// The supervisor let it go.
    Left(String),
    /// The supervisor cannot be reached any more.
    SupervisorGone(String),
}

/// The way to a supervisor, for as long as its link holds.
pub(crate) struct Connection {
    pub(crate) up: mpsc::Sender<ToSupervisor>,
    pub(crate) uplink: Uplink,
    /// Whether what is in memory may be kept.
    pub(crate) keep: bool,
}

/// What the agent is told.
pub(crate) enum NodeMsg {
    /// A supervisor is there.
    Connected(Connection),
    /// By the supervisor.
    Down(NodeCommand, Option<TraceRequest>),
    /// By itself, when a step has begun: without lanes there may be nothing to wait for.
    Begun,
    /// By a lane that is done.
    LaneDone { at: LaneStep, pass: Pass, outcome: Computed<LaneReport> },
    /// By the reducer: the gradient of every held shard is here.
    Reduced { epoch: Epoch, step: Step, norms: Vec<(ShardId, Norm)> },
    /// By whoever could not do its part.
    Failed { epoch: Epoch, reason: String },
    /// By a task that fetches or copies shards.
    Came(Event),
    /// By the control stream's end.
    SupervisorLost,
    /// By whoever is about to say what this node holds.
    ResidentState { reply: RpcReplyPort<ResidentState> },
    /// By the process: somebody wants it to leave.
    LeaveRequested,
}

/// What this node is doing of the current step.
struct Part {
    epoch: Epoch,
    step: Step,
    pass: Pass,
    waiting: HashSet<Lane>,
    lanes: Vec<(Lane, LaneReport)>,
    norms: Option<Vec<(ShardId, Norm)>>,
    /// From the last lane's end until all gradients are here.
    reducing: Option<(Span, Instant)>,
}

/// What the agent starts from.
pub(crate) struct NodeArgs<B: Compute> {
    pub(crate) node: Arc<NodeContext<B>>,
    pub(crate) end: oneshot::Sender<NodeEnd>,
}

/// The agent's state.
pub(crate) struct NodeState<B: Compute> {
    me: ActorRef<NodeMsg>,
    node: Arc<NodeContext<B>>,
    agent: Agent,
    replicas: LocalReplicas<B>,
    connection: Option<Connection>,
    end: Option<oneshot::Sender<NodeEnd>>,
    lanes: HashMap<Lane, ActorRef<LaneMsg>>,
    tasks: Vec<AbortHandle>,
    part: Option<Part>,
    /// The traces that the supervisor's last words belong to.
    traces: Traces,
    /// When this node said that it is prepared.
    prepared: Option<Instant>,
}

/// Where the spans of what the supervisor has asked go.
#[derive(Default)]
struct Traces {
    /// The step that was begun, with its lanes.
    begun: TraceRequest,
    step: Scope,
    /// The placement that was assigned, with its shards on their way.
    change: Scope,
    checkpoint: Scope,
}

/// See the module.
pub(crate) struct NodeActor<B>(pub(crate) PhantomData<B>);

impl<B: Compute> Actor for NodeActor<B> {
    type Msg = NodeMsg;
    type State = NodeState<B>;
    type Arguments = NodeArgs<B>;

    async fn pre_start(
        &self,
        me: ActorRef<Self::Msg>,
        args: Self::Arguments,
    ) -> Result<Self::State, ActorProcessingErr> {
        let NodeArgs { node, end } = args;
        let start = (Arc::clone(&node), me.clone());
        let (reducer, _) = Actor::spawn_linked(None, ReducerActor(PhantomData), start, me.get_cell()).await?;
        node.set_reducer(reducer);
        Ok(NodeState {
            agent: Agent::new(node.id.clone()),
            replicas: LocalReplicas::new(Arc::clone(&node), me.get_cell()),
            me,
            node,
            connection: None,
            end: Some(end),
            lanes: HashMap::new(),
            tasks: Vec::new(),
            part: None,
            traces: Traces::default(),
            prepared: None,
        })
    }

    async fn handle(
        &self,
        _: ActorRef<Self::Msg>,
        message: Self::Msg,
        state: &mut Self::State,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            NodeMsg::Connected(connection) => state.on_connected(connection),
            NodeMsg::Down(message, traced) => state.on_told(message, traced).await,
            NodeMsg::Begun => state.when_done().await,
            NodeMsg::LaneDone { at, pass, outcome } => state.on_lane_done(at, pass, outcome).await,
            NodeMsg::Reduced { epoch, step, norms } => state.on_reduced(epoch, step, norms).await,
            NodeMsg::Failed { epoch, reason } => state.on_failed(epoch, reason, false).await,
            NodeMsg::Came(event) => state.on_came(event).await,
            NodeMsg::SupervisorLost => {
                state.connection = None;
                state.on_event(Event::SupervisorLost).await;
            }
            NodeMsg::ResidentState { reply } => drop(reply.send(state.agent.resident_state())),
            NodeMsg::LeaveRequested => state.say(NodeReport::LeaveRequested).await,
        }
        Ok(())
    }

    async fn handle_supervisor_evt(
        &self,
        _: ActorRef<Self::Msg>,
        event: SupervisionEvent,
        state: &mut Self::State,
    ) -> Result<(), ActorProcessingErr> {
        if let SupervisionEvent::ActorFailed(actor, error) = event {
            let epoch = state.agent.epoch();
            state.on_failed(epoch, format!("actor {} died: {error}", actor.get_id()), true).await;
        }
        Ok(())
    }
}

impl<B: Compute> NodeState<B> {
    /// A supervisor that does not take this node back as it is makes it start with nothing.
    fn on_connected(&mut self, connection: Connection) {
        if !connection.keep {
            self.forget(Epoch::MAX, true);
            let all: Vec<ShardId> = self.node.shard_actors().all().keys().copied().collect();
            self.replicas.release(&all);
            self.agent = Agent::new(self.node.id.clone());
            self.node.set_begun(Begun::default());
        }
        self.connection = Some(connection);
    }

    async fn say(&self, message: NodeReport) {
        // While the supervisor is away nobody listens; it hears what this node holds when it is back.
        if let Some(connection) = &self.connection {
            drop(connection.up.send(ToSupervisor::Protocol(message)).await);
        }
    }

    async fn on_failed(&mut self, epoch: Epoch, reason: String, fatal: bool) {
        tracing::warn!(epoch, reason, "this node could not do its part");
        if epoch == self.agent.epoch() {
            self.part = None;
        }
        let failure = Failure { reason, fatal, suspect: self.node.peers.suspect() };
        self.on_event(Event::Failed { epoch, failure }).await;
    }

    /// Shards that came for a placement are used before the agent hears of them, unless it has gone on to another.
    async fn on_came(&mut self, event: Event) {
        if let Event::Fetched { epoch, outcome: Ok(()) } = &event
            && *epoch == self.agent.epoch()
            && let Err(error) = self.replicas.install_fetched().await
        {
            return self.on_failed(*epoch, error.to_string(), true).await;
        }
        self.on_event(event).await;
    }

    async fn on_told(&mut self, message: NodeCommand, traced: Option<TraceRequest>) {
        let traced = traced.unwrap_or_default();
        let scope = self.node.tracer.remote(traced.identity());
        match &message {
            NodeCommand::Begin { .. } => {
                self.traces = Traces { begun: traced, step: scope, ..Traces::default() }
            }
            NodeCommand::Commit { .. } => {
                self.traces.step = scope;
                let waited = self.prepared.take().map(|prepared| prepared.elapsed());
                waited.into_iter().for_each(|waited| self.node.metrics.phase(Phase::Commit, waited));
            }
            NodeCommand::Assign(_) => self.traces.change = scope,
            NodeCommand::Checkpoint { .. } => self.traces.checkpoint = scope,
            NodeCommand::Abort { .. } | NodeCommand::Leave { .. } => {}
        }
        self.on_event(Event::Command(message)).await;
    }

    async fn on_event(&mut self, event: Event) {
        // What an effect leads to is looked at when all are carried out.
        let mut next = vec![event];
        while let Some(event) = next.pop() {
            for effect in self.agent.handle(event) {
                let epoch = self.agent.epoch();
                if let Err(error) = self.carry_out(effect).await {
                    tracing::error!(epoch, %error, "the device failed");
                    let failure = Failure { reason: error.to_string(), fatal: true, suspect: None };
                    next.push(Event::Failed { epoch, failure });
                }
            }
        }
    }

    async fn carry_out(&mut self, effect: Effect) -> Computed<()> {
        match effect {
            Effect::Report(message) => self.say(message).await,
            Effect::Apply { epoch, step, update, shards, stash } => {
                let began = Instant::now();
                let mut span = self.traces.step.span("apply").with("volary.step", step as i64);
                span.set("volary.shards", shards.len() as i64);
                self.replicas.apply((epoch, step), update, &shards, &stash).await?;
                self.node.metrics.phase(Phase::Apply, began.elapsed());
            }
            Effect::Discard { epoch, all } => self.forget(epoch + 1, all),
            Effect::Enter(assignment) => self.enter(*assignment),
            Effect::Fetch { epoch, version, shards } => self.fetch(epoch, version, shards),
            Effect::Copy { epoch, shard, from } => self.copy(epoch, shard, from),
            Effect::Install { shard, replay, .. } => self.replicas.install(shard, &replay).await?,
            Effect::Release(shards) => self.replicas.release(&shards),
            Effect::Run { epoch, step, pass, lanes } => self.run(epoch, step, pass, lanes).await?,
            Effect::Store { epoch, step, shards } => self.store(epoch, step, shards).await,
            Effect::Leave { reason } => self.leave(reason),
        }
        Ok(())
    }

    /// Drops the work of epochs before `epoch`; the sums of a prepared step only when `all`.
    fn forget(&mut self, epoch: Epoch, all: bool) {
        self.part = None;
        self.lanes.values().for_each(|lane| drop(lane.cast(LaneMsg::Drop)));
        self.tasks.drain(..).for_each(|task| task.abort());
        self.replicas.discard_fetched();
        if all {
            drop(self.node.reducer().cast(ReducerMsg::Forget { epoch }));
        }
        self.node.shard_actors().all().values().for_each(|owner| owner.tell(ShardMsg::Forget { epoch }));
    }

    fn enter(&mut self, assignment: Assignment) {
        self.node.peers.set_members(&assignment.addresses);
        self.node.set_placement(Arc::clone(&assignment.placement));
    }

    fn fetch(&mut self, epoch: Epoch, version: Step, shards: Vec<(ShardId, Source)>) {
        let Some(connection) = &self.connection else { return };
        let (node, fetched, me) = (Arc::clone(&self.node), self.replicas.fetched.clone(), self.me.clone());
        let uplink = connection.uplink.clone();
        let span = self.traces.change.span("shards.fetch").with("volary.shards", shards.len() as i64);
        let task = tokio::spawn(async move {
            let _span = span;
            let outcome = shards::fetch_all(&node, &uplink, &fetched, shards, version, epoch).await;
            drop(me.cast(NodeMsg::Came(Event::Fetched { epoch, outcome })));
        });
        self.tasks.push(task.abort_handle());
    }

    fn copy(&mut self, epoch: Epoch, shard: ShardId, from: Vec<NodeId>) {
        let (node, fetched, me) = (Arc::clone(&self.node), self.replicas.fetched.clone(), self.me.clone());
        let mut span = self.traces.change.span("shard.copy").with("volary.shard", shard.to_string());
        span.set("volary.from", from.first().map(|node| node.0.clone()).unwrap_or_default());
        let task = tokio::spawn(async move {
            let _span = span;
            let outcome = shards::learn(&node, &fetched, shard, &from, epoch).await;
            drop(me.cast(NodeMsg::Came(Event::Copied { epoch, shard, outcome })));
        });
        self.tasks.retain(|task| !task.is_finished());
        self.tasks.push(task.abort_handle());
    }

    async fn run(
        &mut self,
        epoch: Epoch,
        step: Step,
        pass: Pass,
        lanes: Vec<(Lane, Vec<u32>)>,
    ) -> Computed<()> {
        let waiting = lanes.iter().map(|(lane, _)| *lane).collect();
        self.part = Some(Part { epoch, step, pass, waiting, lanes: Vec::new(), norms: None, reducing: None });
        self.node.metrics.begun(epoch, step);
        if pass == Pass::Train {
            let placement = self.node.placement();
            drop(self.node.reducer().cast(ReducerMsg::Begin { epoch, step, placement }));
        }
        self.node.take_speed(0.0);
        // Only now, when the reducer has begun, may frames of this step come in.
        self.node.set_begun(Begun { epoch, step, train: pass == Pass::Train });
        for (lane, tokens) in lanes {
            let actor = self.lane(lane).await?;
            let (whole, sampled_tokens) = self.traces.begun.of_lane(lane);
            let trace = LaneTrace { step: self.traces.step.clone(), whole, sampled_tokens };
            drop(actor.cast(LaneMsg::Run { at: LaneStep { epoch, step, lane }, pass, tokens, trace }));
        }
        drop(self.me.cast(NodeMsg::Begun));
        Ok(())
    }

    async fn lane(&mut self, lane: Lane) -> Computed<ActorRef<LaneMsg>> {
        if let Some(actor) = self.lanes.get(&lane) {
            return Ok(actor.clone());
        }
        let start = (Arc::clone(&self.node), self.me.clone());
        let (actor, _) = Actor::spawn_linked(None, LaneActor(PhantomData), start, self.me.get_cell())
            .await
            .map_err(|error| ComputeError(format!("lane {lane} does not start: {error}")))?;
        self.lanes.insert(lane, actor.clone());
        Ok(actor)
    }

    async fn on_lane_done(&mut self, at: LaneStep, pass: Pass, outcome: Computed<LaneReport>) {
        let report = match outcome {
            Ok(report) => report,
            Err(error) => return self.on_failed(at.epoch, format!("lane {}: {error}", at.lane), false).await,
        };
        let Some(part) = &mut self.part else { return };
        if (part.epoch, part.step, part.pass) == (at.epoch, at.step, pass) && part.waiting.remove(&at.lane) {
            part.lanes.push((at.lane, report));
            self.when_done().await;
        }
    }

    async fn on_reduced(&mut self, epoch: Epoch, step: Step, norms: Vec<(ShardId, Norm)>) {
        let Some(part) = &mut self.part else { return };
        if (part.epoch, part.step) == (epoch, step) {
            part.norms = Some(norms);
            if let Some((_span, began)) = part.reducing.take() {
                self.node.metrics.phase(Phase::Reduce, began.elapsed());
            }
            self.when_done().await;
        }
    }

    /// Tells the supervisor when all lanes are done and, in training, all gradients are here.
    async fn when_done(&mut self) {
        let Some(part) = &mut self.part else { return };
        if !part.waiting.is_empty() {
            return;
        }
        if part.pass == Pass::Train && part.norms.is_none() {
            let span = || self.traces.step.span("reduce").with("volary.step", part.step as i64);
            part.reducing.get_or_insert_with(|| (span(), Instant::now()));
            return;
        }
        let Some(Part { epoch, step, pass, lanes, norms, .. }) = self.part.take() else { return };
        let message = match pass {
            Pass::Train => {
                let speed = self.node.take_speed(self.node.lane_work());
                self.prepared = Some(Instant::now());
                NodeReport::Prepared { epoch, step, norms: norms.unwrap_or_default(), lanes, speed }
            }
            Pass::Validate { round } => NodeReport::Validated { epoch, round, lanes },
        };
        self.on_event(Event::Done(message)).await;
    }

    /// Stores the shards as they are now and sends them while training goes on.
    async fn store(&mut self, epoch: Epoch, step: Step, shards: Vec<ShardId>) {
        let Some(connection) = &self.connection else { return };
        let (uplink, up) = (connection.uplink.clone(), connection.up.clone());
        let span = self.traces.checkpoint.span("shards.store").with("volary.shards", shards.len() as i64);
        let stored = self.replicas.store(step, shards).await;
        tokio::spawn(async move {
            let _span = span;
            let sent = match stored {
                Ok(stored) => uplink.send_checkpoint(epoch, step, stored).await,
                Err(error) => Err(error),
            };
            if let Err(error) = sent {
                let reason = error.to_string();
                drop(up.send(ToSupervisor::Protocol(NodeReport::CheckpointFailed { step, reason })).await);
            }
        });
    }

    fn leave(&mut self, reason: String) {
        if let Some(sender) = self.end.take() {
            drop(sender.send(NodeEnd::Left(reason)));
        }
        self.me.stop(None);
    }
}
