//! The node's agent: the actor through which the supervisor directs a node.
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
//! next step begins. A child that dies makes the epoch fail; the supervisor decides what follows.

use crate::dense::DenseActor;
use crate::directory::{Directory, Owner};
use crate::expert::ExpertActor;
use crate::keeper::{At, Keeper, ShardMsg};
use crate::lane::{LaneActor, LaneMsg};
use crate::node_context::{Begun, NodeContext};
use crate::reducer::{ReducerActor, ReducerMsg};
use crate::router::RouterActor;
use crate::shards::{self, Uplink};
use crate::wire::Up;
use futures::future::try_join_all;
use ractor::{Actor, ActorCell, ActorProcessingErr, ActorRef, SupervisionEvent};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::marker::PhantomData;
use std::sync::Arc;
use tokio::sync::{mpsc, oneshot};
use volary_core::compute::{Compute, ComputeError, Computed};
use volary_core::messages::{Assignment, FromNode, LaneReport, Norm, Pass, ToNode};
use volary_core::schedule::Update;
use volary_core::{Epoch, Lane, ShardId, Step};

/// Why a node ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NodeEnd {
    /// The supervisor let it go.
    Left(String),
    /// The supervisor cannot be reached any more.
    SupervisorGone(String),
}

/// What the agent is told.
pub(crate) enum NodeMsg {
    /// By the supervisor.
    Down(ToNode),
    /// By a lane that is done.
    LaneDone { at: At, pass: Pass, outcome: Computed<LaneReport> },
    /// By the reducer: the gradient of every held shard is here.
    Reduced { epoch: Epoch, step: Step, norms: Vec<(ShardId, Norm)> },
    /// By whoever could not do its part.
    Failed { epoch: Epoch, reason: String },
    /// By the control stream's end.
    SupervisorGone { reason: String },
}

/// What this node is doing of the current step.
struct Part {
    epoch: Epoch,
    step: Step,
    pass: Pass,
    waiting: HashSet<Lane>,
    lanes: Vec<(Lane, LaneReport)>,
    norms: Option<Vec<(ShardId, Norm)>>,
}

/// What the agent starts from.
pub(crate) struct NodeArgs<B: Compute> {
    pub(crate) node: Arc<NodeContext<B>>,
    pub(crate) up: mpsc::Sender<Up>,
    pub(crate) uplink: Uplink,
    pub(crate) end: oneshot::Sender<NodeEnd>,
}

/// The agent's state.
pub(crate) struct NodeState<B: Compute> {
    me: ActorRef<NodeMsg>,
    node: Arc<NodeContext<B>>,
    up: mpsc::Sender<Up>,
    uplink: Uplink,
    end: Option<oneshot::Sender<NodeEnd>>,
    lanes: HashMap<Lane, ActorRef<LaneMsg>>,
    epoch: Epoch,
    part: Option<Part>,
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
        let NodeArgs { node, up, uplink, end } = args;
        let start = (Arc::clone(&node), me.clone());
        let (reducer, _) = Actor::spawn_linked(None, ReducerActor(PhantomData), start, me.get_cell()).await?;
        node.set_reducer(reducer);
        Ok(NodeState { me, node, up, uplink, end: Some(end), lanes: HashMap::new(), epoch: 0, part: None })
    }

    async fn handle(
        &self,
        _: ActorRef<Self::Msg>,
        message: Self::Msg,
        state: &mut Self::State,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            NodeMsg::Down(message) => state.on_down(message).await,
            NodeMsg::LaneDone { at, pass, outcome } => state.on_lane_done(at, pass, outcome).await,
            NodeMsg::Reduced { epoch, step, norms } => state.on_reduced(epoch, step, norms).await,
            NodeMsg::Failed { epoch, reason } => state.on_failed(epoch, reason, false).await,
            NodeMsg::SupervisorGone { reason } => state.on_end(NodeEnd::SupervisorGone(reason)),
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
            let epoch = state.epoch;
            state.on_failed(epoch, format!("actor {} died: {error}", actor.get_id()), true).await;
        }
        Ok(())
    }
}

impl<B: Compute> NodeState<B> {
    async fn say(&self, message: FromNode) {
        // The writer's end closes only with the control stream, whose end is told apart.
        drop(self.up.send(Up::Say(message)).await);
    }

    async fn on_failed(&mut self, epoch: Epoch, reason: String, fatal: bool) {
        if epoch == self.epoch {
            tracing::warn!(epoch, reason, "this node could not do its part");
            self.part = None;
            self.say(FromNode::Failed { epoch, reason, fatal }).await;
        }
    }

    fn on_end(&mut self, end: NodeEnd) {
        if let Some(sender) = self.end.take() {
            drop(sender.send(end));
        }
        self.me.stop(None);
    }

    async fn on_down(&mut self, message: ToNode) {
        match message {
            ToNode::Assign(assignment) => self.on_assign(*assignment).await,
            ToNode::Begin { epoch, step, pass, lanes } => self.on_begin(epoch, step, pass, lanes).await,
            ToNode::Commit { epoch, step, update } => self.on_commit(epoch, step, update).await,
            ToNode::Abort { epoch } => self.forget(epoch + 1),
            ToNode::Checkpoint { epoch, step, shards } => self.on_checkpoint(epoch, step, shards).await,
            ToNode::Leave { reason } => self.on_end(NodeEnd::Left(reason)),
        }
    }

    /// Drops everything that belongs to epochs before `epoch`, but no shard.
    fn forget(&mut self, epoch: Epoch) {
        self.part = None;
        self.lanes.values().for_each(|lane| drop(lane.cast(LaneMsg::Drop)));
        drop(self.node.reducer().cast(ReducerMsg::Forget { epoch }));
        self.node.directory().owners().values().for_each(|owner| owner.tell(ShardMsg::Forget { epoch }));
    }

    async fn on_assign(&mut self, assignment: Assignment) {
        let epoch = assignment.placement.epoch;
        self.epoch = epoch;
        self.forget(epoch);
        self.node.peers.set_members(&assignment.addresses).await;
        match self.take_shards(&assignment).await {
            Ok(()) => {
                self.node.set_placement(Arc::new(assignment.placement));
                self.say(FromNode::Ready { epoch }).await;
            }
            Err((error, fatal)) => self.on_failed(epoch, error.to_string(), fatal).await,
        }
    }

    /// Fetches what this node is to hold and does not. What it holds beyond that stays until the epoch begins, since
    /// a peer may still ask for it.
    async fn take_shards(&self, assignment: &Assignment) -> Result<(), (ComputeError, bool)> {
        let directory = self.node.directory();
        let version = assignment.version;
        let fetched = shards::fetch_all(&self.node, &self.uplink, assignment).await?;
        let mut owners: BTreeMap<ShardId, Owner<B>> = directory.owners().clone();
        for (shard, state) in fetched {
            let keeper = Keeper::new(shard, Arc::clone(&self.node), state, version);
            let owner = spawn_owner(keeper, self.me.get_cell()).await.map_err(|error| (error, true))?;
            if let Some(before) = owners.insert(shard, owner) {
                before.stop();
            }
        }
        self.node.set_directory(Directory::new(owners));
        Ok(())
    }

    /// Ends the actors of shards that the placement gives to others.
    fn let_go(&self) {
        let (placement, directory) = (self.node.placement(), self.node.directory());
        if directory.owners().keys().all(|&shard| placement.holds(&self.node.id, shard)) {
            return;
        }
        let mut owners = directory.owners().clone();
        owners.retain(|&shard, owner| {
            let holds = placement.holds(&self.node.id, shard);
            if !holds {
                owner.stop();
            }
            holds
        });
        self.node.set_directory(Directory::new(owners));
    }

    async fn on_begin(&mut self, epoch: Epoch, step: Step, pass: Pass, lanes: Vec<(Lane, Vec<u32>)>) {
        if epoch != self.epoch {
            return;
        }
        self.let_go();
        let waiting = lanes.iter().map(|(lane, _)| *lane).collect();
        self.part = Some(Part { epoch, step, pass, waiting, lanes: Vec::new(), norms: None });
        if pass == Pass::Train {
            let placement = self.node.placement();
            drop(self.node.reducer().cast(ReducerMsg::Begin { epoch, step, placement }));
        }
        // Only now, when the reducer has begun, may frames of this step come in.
        self.node.set_begun(Begun { epoch, step, train: pass == Pass::Train });
        for (lane, tokens) in lanes {
            match self.lane(lane).await {
                Ok(actor) => drop(actor.cast(LaneMsg::Run { at: At { epoch, step, lane }, pass, tokens })),
                Err(error) => return self.on_failed(epoch, error.to_string(), true).await,
            }
        }
        self.when_done().await;
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

    async fn on_lane_done(&mut self, at: At, pass: Pass, outcome: Computed<LaneReport>) {
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
            self.when_done().await;
        }
    }

    /// Tells the supervisor when all lanes are done and, in training, all gradients are here.
    async fn when_done(&mut self) {
        let Some(part) = &self.part else { return };
        if !part.waiting.is_empty() || (part.pass == Pass::Train && part.norms.is_none()) {
            return;
        }
        let Some(Part { epoch, step, pass, lanes, norms, .. }) = self.part.take() else { return };
        let message = match pass {
            Pass::Train => FromNode::Prepared { epoch, step, norms: norms.unwrap_or_default(), lanes },
            Pass::Validate { round } => FromNode::Validated { epoch, round, lanes },
        };
        self.say(message).await;
    }

    async fn on_commit(&mut self, epoch: Epoch, step: Step, update: Update) {
        if epoch != self.epoch {
            return;
        }
        match self.apply(epoch, step, update).await {
            Ok(()) => self.say(FromNode::Applied { epoch, step }).await,
            Err(error) => self.on_failed(epoch, format!("step {step} was not applied: {error}"), true).await,
        }
    }

    async fn apply(&self, epoch: Epoch, step: Step, update: Update) -> Computed<()> {
        let taken = self.node.reducer().call(|reply| ReducerMsg::Take { epoch, step, reply }, None).await;
        let mut gradients = match taken {
            Ok(ractor::rpc::CallResult::Success(gradients)) => gradients,
            _ => return Err(ComputeError("the reducer is gone".into())),
        };
        let directory = self.node.directory();
        let apply = |(shard, owner): (&ShardId, &Owner<B>)| {
            let (shard, owner, gradient) = (*shard, owner.clone(), gradients.remove(shard));
            async move {
                let gradient = gradient.ok_or_else(|| ComputeError(format!("{shard} has no gradient")))?;
                owner.ask(|reply| ShardMsg::Apply { gradient, step, update, reply }).await
            }
        };
        let all: Vec<_> = directory.owners().iter().map(apply).collect();
        try_join_all(all).await?;
        Ok(())
    }

    /// Stores the shards as they are now and sends them while training goes on.
    async fn on_checkpoint(&mut self, epoch: Epoch, step: Step, shards: Vec<ShardId>) {
        let directory = self.node.directory();
        let store = |shard: ShardId| {
            let directory = Arc::clone(&directory);
            async move {
                let owner = directory.get(shard)?;
                let stored = owner.ask(|reply| ShardMsg::Store { version: step, reply }).await?;
                Ok::<_, ComputeError>((shard, stored))
            }
        };
        let (uplink, up) = (self.uplink.clone(), self.up.clone());
        let stored = try_join_all(shards.into_iter().map(store)).await;
        tokio::spawn(async move {
            let sent = match stored {
                Ok(stored) => uplink.send_checkpoint(epoch, step, stored).await,
                Err(error) => Err(error),
            };
            if let Err(error) = sent {
                let reason = error.to_string();
                drop(up.send(Up::Say(FromNode::CheckpointFailed { step, reason })).await);
            }
        });
    }
}

async fn spawn_owner<B: Compute>(keeper: Keeper<B>, agent: ActorCell) -> Computed<Owner<B>> {
    let shard = keeper.id;
    let failed =
        |error: ractor::SpawnErr| ComputeError(format!("the actor of {shard} does not start: {error}"));
    Ok(match shard {
        ShardId::Embedding | ShardId::Dense { .. } => Owner::Dense(
            Actor::spawn_linked(None, DenseActor(PhantomData), keeper, agent).await.map_err(failed)?.0,
        ),
        ShardId::Router { layer } => {
            let start = (layer, keeper);
            Owner::Router(
                Actor::spawn_linked(None, RouterActor(PhantomData), start, agent).await.map_err(failed)?.0,
            )
        }
        ShardId::Expert { .. } => Owner::Expert(
            Actor::spawn_linked(None, ExpertActor(PhantomData), keeper, agent).await.map_err(failed)?.0,
        ),
    })
}
