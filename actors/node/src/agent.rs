//! The agent: the actor through which the supervisor directs a node. The shell around
//! [`volary_core::agent`].
//!
//! Who supervises whom:
//!
//! ```text
//! AgentActor
//!   ├── ReducerActor
//!   ├── LaneActor    one per lane that this node has run
//!   ├── DenseActor   embedding, and one per layer
//!   ├── RouterActor  one per MoE layer
//!   └── ExpertActor  one per expert held here
//! ```
//!
//! It takes the supervisor's commands in the order of the control stream, so that a commit is applied
//! before the next step begins. It waits for computations in its handlers and never for other nodes: shards
//! from other nodes are fetched by tasks. It outlives the supervisor's link, and with it the shards. A
//! child that dies fails the epoch; the supervisor decides what follows.

mod pass;

use crate::context::NodeContext;
use crate::error::{Error, Result};
use crate::ids::PassId;
use crate::messages::{Connection, LaneMsg, NodeMsg, ReducerMsg, notify, respond};
use crate::net::uplink::Uplink;
use crate::shards::replicas::LocalReplicas;
use crate::shards::stores::PendingStores;
use crate::shards::transfer;
use crate::step::reducer::ReducerActor;
use pass::RunningPass;
use ractor::rpc::CallResult;
use ractor::{Actor, ActorProcessingErr, ActorRef, SupervisionEvent};
use std::collections::HashMap;
use std::marker::PhantomData;
use std::sync::Arc;
use std::time::Instant;
use tokio::sync::oneshot;
use tokio::task::AbortHandle;
use volary_core::agent::{Agent, Effect, Event, Failure};
use volary_core::compute::Compute;
use volary_core::messages::{Assignment, NodeCommand, NodeReport, Source};
use volary_core::{Epoch, Lane, NodeId, ShardId, Step};
use volary_protocol::{ToSupervisor, TraceRequest};
use volary_telemetry::Scope;
use volary_telemetry::metrics::Phase;

/// How a node ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NodeEnd {
    /// The supervisor released it, or it was asked to leave at once; with the reason.
    Left(String),
    /// The supervisor cannot be reached any more; with the reason.
    SupervisorLost(String),
    /// Others cannot reach it at the address that it announces.
    Unreachable {
        /// The address.
        address: String,
        /// The reason.
        reason: String,
    },
}

/// What the agent starts from.
pub(crate) struct AgentArgs<B: Compute> {
    pub(crate) node: Arc<NodeContext<B>>,
    pub(crate) end: oneshot::Sender<NodeEnd>,
}

/// The agent's state.
pub(crate) struct AgentState<B: Compute> {
    me: ActorRef<NodeMsg>,
    node: Arc<NodeContext<B>>,
    agent: Agent,
    replicas: LocalReplicas<B>,
    /// Shards that a checkpoint wants and that are not sent yet.
    stores: PendingStores,
    connection: Option<Connection>,
    end: Option<oneshot::Sender<NodeEnd>>,
    lanes: HashMap<Lane, ActorRef<LaneMsg>>,
    /// Fetches and copies under way.
    transfers: Vec<AbortHandle>,
    pass: Option<RunningPass>,
    traces: CommandTraces,
    /// When this node reported that it is prepared.
    prepared: Option<Instant>,
}

/// The traces of the supervisor's last commands, for the spans that they lead to.
#[derive(Default)]
struct CommandTraces {
    /// The pass that began, with its lanes.
    begun: TraceRequest,
    step: Scope,
    /// The placement that was assigned, with the transfers of its shards.
    placement: Scope,
    checkpoint: Scope,
}

/// See the module.
pub(crate) struct AgentActor<B>(pub(crate) PhantomData<B>);

impl<B: Compute> Actor for AgentActor<B> {
    type Msg = NodeMsg;
    type State = AgentState<B>;
    type Arguments = AgentArgs<B>;

    async fn pre_start(
        &self,
        me: ActorRef<Self::Msg>,
        args: Self::Arguments,
    ) -> std::result::Result<Self::State, ActorProcessingErr> {
        let AgentArgs { node, end } = args;
        let start = (Arc::clone(&node), me.clone());
        let (reducer, _) = Actor::spawn_linked(None, ReducerActor(PhantomData), start, me.get_cell()).await?;
        node.set_reducer(reducer);
        Ok(AgentState {
            agent: Agent::new(node.id.clone(), Arc::new(node.architecture.clone())),
            replicas: LocalReplicas::new(Arc::clone(&node), me.get_cell()),
            stores: PendingStores::default(),
            me,
            node,
            connection: None,
            end: Some(end),
            lanes: HashMap::new(),
            transfers: Vec::new(),
            pass: None,
            traces: CommandTraces::default(),
            prepared: None,
        })
    }

    async fn handle(
        &self,
        _: ActorRef<Self::Msg>,
        message: Self::Msg,
        state: &mut Self::State,
    ) -> std::result::Result<(), ActorProcessingErr> {
        match message {
            NodeMsg::Connected(connection) => state.on_connected(connection),
            NodeMsg::Command(command, trace) => state.on_command(command, trace).await,
            NodeMsg::Begun => state.when_pass_done().await,
            NodeMsg::LaneDone { at, pass, outcome } => state.on_lane_done(at, pass, outcome).await,
            NodeMsg::Reduced { epoch, step, norms } => state.on_reduced(epoch, step, norms).await,
            NodeMsg::Compared { epoch, step, digests } => state.on_compared(epoch, step, digests).await,
            NodeMsg::Failed { epoch, error } => state.on_failed(epoch, &error).await,
            NodeMsg::Transferred(event) => state.on_transferred(event).await,
            NodeMsg::SupervisorLost => {
                state.connection = None;
                state.on_event(Event::SupervisorLost).await;
            }
            NodeMsg::ResidentState { reply } => respond(reply, state.agent.resident_state()),
            NodeMsg::NextStored { step, reply } => respond(reply, state.next_stored(step).await),
            NodeMsg::LearnerUnreached { epoch, learner, reason } => {
                state.report(NodeReport::LearnerUnreached { epoch, node: learner, reason }).await;
            }
            NodeMsg::LeaveRequested => state.report(NodeReport::LeaveRequested).await,
            NodeMsg::Unreachable { address, reason } => {
                state.leave(NodeEnd::Unreachable { address, reason });
            }
        }
        Ok(())
    }

    async fn handle_supervisor_evt(
        &self,
        _: ActorRef<Self::Msg>,
        event: SupervisionEvent,
        state: &mut Self::State,
    ) -> std::result::Result<(), ActorProcessingErr> {
        if let SupervisionEvent::ActorFailed(actor, error) = event {
            let (epoch, actor) = (state.agent.epoch(), actor.get_id().to_string());
            let error = Error::ActorDied { actor, reason: error.to_string() };
            state.on_failed(epoch, &error).await;
        }
        Ok(())
    }
}

/// Sends the shards of a checkpoint one after the other.
async fn send_stored(me: &ActorRef<NodeMsg>, uplink: &Uplink, epoch: Epoch, step: Step) -> Result<()> {
    loop {
        match me.call(|reply| NodeMsg::NextStored { step, reply }, None).await {
            Ok(CallResult::Success(next)) => match next? {
                Some((shard, bytes)) => uplink.send_checkpoint(epoch, step, shard, bytes).await?,
                None => return Ok(()),
            },
            _ => return Err(Error::ActorGone { actor: "agent" }),
        }
    }
}

/// The event that a failure of an effect becomes.
fn on_failure(effect: &Effect, epoch: Epoch) -> Box<dyn FnOnce(Failure) -> Event + Send> {
    match *effect {
        Effect::Apply { .. } => Box::new(|failure| Event::NotApplied { failure }),
        Effect::Install { shard, .. } => Box::new(move |failure| Event::NotInstalled { shard, failure }),
        _ => Box::new(move |failure| Event::Failed { epoch, failure }),
    }
}

/// The report of a checkpoint's shard that was not stored.
fn not_stored(step: Step, error: &Error) -> NodeReport {
    match error {
        Error::NotFinite { shard } => NodeReport::WeightsNotFinite { step, shard: *shard },
        other => NodeReport::CheckpointFailed { step, reason: other.to_string() },
    }
}

impl<B: Compute> AgentState<B> {
    /// A supervisor that does not accept this node's state makes it start with nothing.
    fn on_connected(&mut self, connection: Connection) {
        if !connection.keep {
            self.discard(Epoch(u64::MAX), true);
            let all: Vec<ShardId> = self.node.shard_actors().all().keys().copied().collect();
            self.replicas.release(&all);
            let architecture = Arc::new(self.node.architecture.clone());
            self.agent = Agent::new(self.node.id.clone(), architecture);
            self.node.set_begun(PassId::default());
        }
        self.connection = Some(connection);
    }

    /// Reports to the supervisor. While it is away the report is dropped: when it returns, it asks what
    /// this node holds.
    async fn report(&self, report: NodeReport) {
        if let Some(connection) = &self.connection {
            drop(connection.messages.send(ToSupervisor::Protocol(report)).await);
        }
    }

    async fn on_failed(&mut self, epoch: Epoch, error: &Error) {
        tracing::warn!(%epoch, %error, "this node could not do its part");
        if epoch == self.agent.epoch() {
            self.pass = None;
        }
        self.on_event(Event::Failed { epoch, failure: error.failure() }).await;
    }

    /// Fetched shards are installed before the agent learns of them, unless it is in another placement by
    /// now.
    async fn on_transferred(&mut self, event: Event) {
        if let Event::Fetched { epoch, outcome: Ok(()) } = &event
            && *epoch == self.agent.epoch()
            && let Err(error) = self.replicas.install_fetched().await
        {
            return self.on_failed(*epoch, &error).await;
        }
        self.on_event(event).await;
    }

    async fn on_command(&mut self, command: NodeCommand, trace: Option<TraceRequest>) {
        let trace = trace.unwrap_or_default();
        let scope = self.node.tracer.remote(trace.identity());
        match &command {
            NodeCommand::Begin { .. } => {
                self.traces = CommandTraces { begun: trace, step: scope, ..CommandTraces::default() };
            }
            NodeCommand::Commit { .. } => {
                self.traces.step = scope;
                if let Some(prepared) = self.prepared.take() {
                    self.node.metrics.phase(Phase::Commit, prepared.elapsed());
                }
            }
            NodeCommand::Assign(_) => self.traces.placement = scope,
            NodeCommand::Checkpoint { .. } => self.traces.checkpoint = scope,
            NodeCommand::LeaveDeferred { reason } => tracing::warn!("this node cannot leave yet: {reason}"),
            NodeCommand::Abort { .. } | NodeCommand::Leave { .. } => {}
        }
        self.on_event(Event::Command(command)).await;
    }

    /// Carries out what the agent decides. The effects after one that fails are not carried out: they may say
    /// that it succeeded. The failure is the agent's next event.
    async fn on_event(&mut self, event: Event) {
        let mut next = Some(event);
        while let Some(event) = next.take() {
            for effect in self.agent.handle(event) {
                let epoch = self.agent.epoch();
                let failed = on_failure(&effect, epoch);
                if let Err(error) = self.carry_out(effect).await {
                    tracing::error!(%epoch, %error, "an effect failed");
                    next = Some(failed(error.failure()));
                    break;
                }
            }
        }
    }

    async fn carry_out(&mut self, effect: Effect) -> Result<()> {
        match effect {
            Effect::Report(report) => self.report(report).await,
            Effect::Apply { epoch, step, update, shards, stash } => {
                self.store_before_change(&shards).await;
                let began = Instant::now();
                let mut span = self.traces.step.span("apply").with("volary.step", step.0 as i64);
                span.set("volary.shards", shards.len() as i64);
                let applied = self.replicas.apply((epoch, step), update, &shards, &stash).await;
                applied.map_err(|error| Error::NotUpdated { step, source: Box::new(error) })?;
                self.node.metrics.phase(Phase::Apply, began.elapsed());
            }
            Effect::Discard { epoch, all } => self.discard(epoch.next(), all),
            Effect::Enter(assignment) => self.enter(*assignment),
            Effect::Fetch { epoch, version, shards } => self.fetch(epoch, version, shards),
            Effect::Copy { epoch, shard, from } => self.copy(epoch, shard, from),
            Effect::Install { shard, version, replay } => {
                let step = replay.last().copied().unwrap_or(version);
                let installed = self.replicas.install_copied(shard, &replay).await;
                installed.map_err(|error| Error::NotUpdated { step, source: Box::new(error) })?;
            }
            Effect::Release(shards) => {
                self.store_before_change(&shards).await;
                self.replicas.release(&shards);
            }
            Effect::Run { epoch, step, pass, lanes, compare } => {
                self.run((epoch, step), pass, lanes, compare).await?;
            }
            Effect::Store { epoch, step, shards } => self.store(epoch, step, shards),
            Effect::Leave { reason } => self.leave(NodeEnd::Left(reason)),
        }
        Ok(())
    }

    /// Drops the work of epochs before `epoch`; the gradients of a prepared step only when `all`.
    fn discard(&mut self, epoch: Epoch, all: bool) {
        self.pass = None;
        // Ends all waits for the work of these epochs.
        self.node.set_over(epoch);
        self.lanes.values().for_each(|lane| notify(lane, LaneMsg::Cancel));
        self.transfers.drain(..).for_each(|transfer| transfer.abort());
        self.replicas.discard_fetched();
        if all {
            notify(self.node.reducer(), ReducerMsg::Discard { epoch });
        }
        self.node.shard_actors().all().values().for_each(|actor| actor.discard(epoch));
    }

    fn enter(&mut self, assignment: Assignment) {
        self.node.peers.set_members(&assignment.layout.addresses.0);
        self.node.set_placement(Arc::clone(&assignment.layout.placement));
    }

    /// Fetches shards that the placement needs before its first step.
    fn fetch(&mut self, epoch: Epoch, version: Step, shards: Vec<(ShardId, Source)>) {
        let Some(connection) = &self.connection else { return };
        let (node, fetched, me) = (Arc::clone(&self.node), self.replicas.fetched.clone(), self.me.clone());
        let uplink = connection.uplink.clone();
        let span = self.traces.placement.span("shards.fetch").with("volary.shards", shards.len() as i64);
        self.transfer(async move {
            let _span = span;
            let fetch = transfer::Fetch { node: &node, uplink: &uplink, version, epoch };
            let outcome = fetch.all(&fetched, shards).await.map_err(|error| error.failure());
            notify(&me, NodeMsg::Transferred(Event::Fetched { epoch, outcome }));
        });
    }

    /// Copies a shard while training continues.
    fn copy(&mut self, epoch: Epoch, shard: ShardId, from: Vec<NodeId>) {
        let (node, fetched, me) = (Arc::clone(&self.node), self.replicas.fetched.clone(), self.me.clone());
        let mut span = self.traces.placement.span("shard.copy").with("volary.shard", shard.to_string());
        span.set("volary.source_node", from.first().map(|node| node.0.clone()).unwrap_or_default());
        self.transfer(async move {
            let _span = span;
            let outcome = transfer::copy_to_learn(&node, &fetched, shard, &from, epoch).await;
            let outcome = outcome.map_err(|error| error.failure());
            notify(&me, NodeMsg::Transferred(Event::Copied { epoch, shard, outcome }));
        });
    }

    fn transfer(&mut self, work: impl Future<Output = ()> + Send + 'static) {
        self.transfers.retain(|transfer| !transfer.is_finished());
        self.transfers.push(tokio::spawn(work).abort_handle());
    }

    /// Sends the shards as they are now while training continues, each stored when its turn has come.
    fn store(&mut self, epoch: Epoch, step: Step, shards: Vec<ShardId>) {
        let Some(connection) = &self.connection else { return };
        let (uplink, messages) = (connection.uplink.clone(), connection.messages.clone());
        let span = self.traces.checkpoint.span("shards.store").with("volary.shards", shards.len() as i64);
        self.stores = PendingStores::new(step, shards);
        let me = self.me.clone();
        tokio::spawn(async move {
            let _span = span;
            if let Err(error) = send_stored(&me, &uplink, epoch, step).await {
                let report = not_stored(step, &error);
                drop(messages.send(ToSupervisor::Protocol(report)).await);
            }
        });
    }

    /// Stores what a checkpoint wants before it changes. Where that fails the checkpoint fails, and not the
    /// step.
    async fn store_before_change(&mut self, shards: &[ShardId]) {
        if let Err(error) = self.stores.store_before_change(&self.replicas, shards).await {
            let step = self.stores.step();
            self.stores = PendingStores::default();
            self.report(not_stored(step, &error)).await;
        }
    }

    /// The next shard of the checkpoint of `step`; nothing when all are sent, or another one has begun.
    async fn next_stored(&mut self, step: Step) -> Result<Option<(ShardId, Vec<u8>)>> {
        match self.stores.step() == step {
            true => self.stores.next(&self.replicas).await,
            false => Ok(None),
        }
    }

    fn leave(&mut self, how: NodeEnd) {
        if let Some(end) = self.end.take() {
            // The process may be ending by itself.
            drop(end.send(how));
        }
        self.me.stop(None);
    }
}
