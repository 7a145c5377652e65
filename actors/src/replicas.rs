//! The shards in a node's memory: their actors, and the gradients that wait for shards on their way.

use crate::dense::DenseActor;
use crate::directory::{ShardActor, ShardActors};
use crate::expert::ExpertActor;
use crate::node_context::NodeContext;
use crate::reducer::ReducerMsg;
use crate::router::RouterActor;
use crate::shard::{ShardMsg, ShardReplica};
use crate::shards::FetchedShards;
use futures::future::try_join_all;
use ractor::{Actor, ActorCell};
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::marker::PhantomData;
use std::sync::{Arc, Mutex, PoisonError};
use volary_core::agent::STASH_MAX;
use volary_core::compute::{Compute, ComputeError, Computed};
use volary_core::schedule::Update;
use volary_core::{Epoch, ShardId, Step};

/// A summed gradient, `None` when no token met the expert, and what to do with it.
type Stashed<B> = (Step, Update, Option<<B as Compute>::Gradient>);

/// The shards in a node's memory.
pub(crate) struct LocalReplicas<B: Compute> {
    node: Arc<NodeContext<B>>,
    agent: ActorCell,
    pub(crate) fetched: FetchedShards<B>,
    /// A mutex only because a gradient may be sent to another thread and not shared with it.
    stash: Mutex<HashMap<ShardId, VecDeque<Stashed<B>>>>,
}

impl<B: Compute> LocalReplicas<B> {
    pub(crate) fn new(node: Arc<NodeContext<B>>, agent: ActorCell) -> Self {
        Self { node, agent, fetched: FetchedShards::default(), stash: Mutex::default() }
    }

    fn stash(&mut self) -> &mut HashMap<ShardId, VecDeque<Stashed<B>>> {
        self.stash.get_mut().unwrap_or_else(PoisonError::into_inner)
    }

    /// Drops what is on its way, with the gradients that wait for it.
    pub(crate) fn discard_fetched(&mut self) {
        self.fetched.take_all();
        self.stash().clear();
    }

    /// Uses every shard that has come.
    pub(crate) async fn install_fetched(&mut self) -> Computed<()> {
        let mut owners = self.node.shard_actors().all().clone();
        for (shard, (version, state)) in self.fetched.take_all() {
            let replica = ShardReplica::new(shard, Arc::clone(&self.node), state, version);
            insert(&mut owners, shard, spawn_shard_actor(replica, self.agent.clone()).await?);
        }
        self.node.set_shard_actors(ShardActors::new(owners));
        Ok(())
    }

    /// Uses one shard that was copied beside the training, and applies to it what it missed.
    pub(crate) async fn install(&mut self, shard: ShardId, replay: &[Step]) -> Computed<()> {
        let fetched = self.fetched.take(shard);
        let (version, state) = fetched.ok_or_else(|| ComputeError(format!("{shard} did not come")))?;
        let replica = ShardReplica::new(shard, Arc::clone(&self.node), state, version);
        let owner = spawn_shard_actor(replica, self.agent.clone()).await?;
        let stashed = self.stash().remove(&shard).unwrap_or_default();
        for (step, update, gradient) in stashed {
            if replay.contains(&step) {
                owner.ask(|reply| ShardMsg::Apply { gradient, step, update, reply }).await?;
            }
        }
        let mut owners = self.node.shard_actors().all().clone();
        insert(&mut owners, shard, owner);
        self.node.set_shard_actors(ShardActors::new(owners));
        Ok(())
    }

    pub(crate) fn release(&self, shards: &[ShardId]) {
        let mut owners = self.node.shard_actors().all().clone();
        for shard in shards {
            if let Some(owner) = owners.remove(shard) {
                owner.stop();
            }
        }
        self.node.set_shard_actors(ShardActors::new(owners));
    }

    /// Applies a prepared step to shards, and keeps the gradients of those that are on their way.
    pub(crate) async fn apply(
        &mut self,
        (epoch, step): (Epoch, Step),
        update: Update,
        shards: &[ShardId],
        stash: &[ShardId],
    ) -> Computed<()> {
        let taken = self.node.reducer().call(|reply| ReducerMsg::Take { epoch, step, reply }, None).await;
        let mut gradients: BTreeMap<_, _> = match taken {
            Ok(ractor::rpc::CallResult::Success(gradients)) => gradients,
            _ => return Err(ComputeError("the reducer is gone".into())),
        };
        let missing = |shard: &ShardId| ComputeError(format!("{shard} has no gradient"));
        let actors = self.node.shard_actors();
        let mut applied = Vec::new();
        for &shard in shards {
            let gradient = gradients.remove(&shard).ok_or_else(|| missing(&shard))?;
            let owner = actors.get(shard)?.clone();
            applied.push(async move {
                owner.ask(|reply| ShardMsg::Apply { gradient, step, update, reply }).await
            });
        }
        for &shard in stash {
            let gradient = gradients.remove(&shard).ok_or_else(|| missing(&shard))?;
            let kept = self.stash().entry(shard).or_default();
            kept.push_back((step, update, gradient));
            if kept.len() > STASH_MAX {
                kept.pop_front();
            }
        }
        try_join_all(applied).await?;
        Ok(())
    }

    /// The stored form of shards as they are now.
    pub(crate) async fn store(&self, step: Step, shards: Vec<ShardId>) -> Computed<Vec<(ShardId, Vec<u8>)>> {
        let actors = self.node.shard_actors();
        let store = |shard: ShardId| {
            let actors = Arc::clone(&actors);
            async move {
                let owner = actors.get(shard)?;
                let stored = owner.ask(|reply| ShardMsg::Store { version: Some(step), reply }).await?;
                Ok::<_, ComputeError>((shard, stored.1))
            }
        };
        try_join_all(shards.into_iter().map(store)).await
    }
}

fn insert<B: Compute>(owners: &mut BTreeMap<ShardId, ShardActor<B>>, shard: ShardId, owner: ShardActor<B>) {
    if let Some(before) = owners.insert(shard, owner) {
        before.stop();
    }
}

async fn spawn_shard_actor<B: Compute>(
    replica: ShardReplica<B>,
    agent: ActorCell,
) -> Computed<ShardActor<B>> {
    let shard = replica.id;
    let failed =
        |error: ractor::SpawnErr| ComputeError(format!("the actor of {shard} does not start: {error}"));
    Ok(match shard {
        ShardId::Embedding | ShardId::Dense { .. } => ShardActor::Dense(
            Actor::spawn_linked(None, DenseActor(PhantomData), replica, agent).await.map_err(failed)?.0,
        ),
        ShardId::Router { layer } => {
            let start = (layer, replica);
            ShardActor::Router(
                Actor::spawn_linked(None, RouterActor(PhantomData), start, agent).await.map_err(failed)?.0,
            )
        }
        ShardId::Expert { .. } => ShardActor::Expert(
            Actor::spawn_linked(None, ExpertActor(PhantomData), replica, agent).await.map_err(failed)?.0,
        ),
    })
}
