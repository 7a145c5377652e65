//! The shards in a node's memory: their actors, and the gradients that wait for shards on their way.

use crate::dense::DenseActor;
use crate::directory::{Directory, Owner};
use crate::expert::ExpertActor;
use crate::keeper::{Keeper, ShardMsg};
use crate::node_context::NodeContext;
use crate::reducer::ReducerMsg;
use crate::router::RouterActor;
use crate::shards::Arrivals;
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
pub(crate) struct Holdings<B: Compute> {
    node: Arc<NodeContext<B>>,
    agent: ActorCell,
    pub(crate) arrivals: Arrivals<B>,
    /// A mutex only because a gradient may be sent to another thread and not shared with it.
    stash: Mutex<HashMap<ShardId, VecDeque<Stashed<B>>>>,
}

impl<B: Compute> Holdings<B> {
    pub(crate) fn new(node: Arc<NodeContext<B>>, agent: ActorCell) -> Self {
        Self { node, agent, arrivals: Arrivals::default(), stash: Mutex::default() }
    }

    fn stash(&mut self) -> &mut HashMap<ShardId, VecDeque<Stashed<B>>> {
        self.stash.get_mut().unwrap_or_else(PoisonError::into_inner)
    }

    /// Drops what is on its way, with the gradients that wait for it.
    pub(crate) fn forget_arrivals(&mut self) {
        self.arrivals.take_all();
        self.stash().clear();
    }

    /// Uses every shard that has come.
    pub(crate) async fn take_in(&mut self) -> Computed<()> {
        let mut owners = self.node.directory().owners().clone();
        for (shard, (version, state)) in self.arrivals.take_all() {
            let keeper = Keeper::new(shard, Arc::clone(&self.node), state, version);
            insert(&mut owners, shard, spawn_owner(keeper, self.agent.clone()).await?);
        }
        self.node.set_directory(Directory::new(owners));
        Ok(())
    }

    /// Uses one shard that was copied beside the training, and applies to it what it missed.
    pub(crate) async fn install(&mut self, shard: ShardId, replay: &[Step]) -> Computed<()> {
        let arrived = self.arrivals.take(shard);
        let (version, state) = arrived.ok_or_else(|| ComputeError(format!("{shard} did not come")))?;
        let keeper = Keeper::new(shard, Arc::clone(&self.node), state, version);
        let owner = spawn_owner(keeper, self.agent.clone()).await?;
        let stashed = self.stash().remove(&shard).unwrap_or_default();
        for (step, update, gradient) in stashed {
            if replay.contains(&step) {
                owner.ask(|reply| ShardMsg::Apply { gradient, step, update, reply }).await?;
            }
        }
        let mut owners = self.node.directory().owners().clone();
        insert(&mut owners, shard, owner);
        self.node.set_directory(Directory::new(owners));
        Ok(())
    }

    pub(crate) fn let_go(&self, shards: &[ShardId]) {
        let mut owners = self.node.directory().owners().clone();
        for shard in shards {
            if let Some(owner) = owners.remove(shard) {
                owner.stop();
            }
        }
        self.node.set_directory(Directory::new(owners));
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
        let directory = self.node.directory();
        let mut applied = Vec::new();
        for &shard in shards {
            let gradient = gradients.remove(&shard).ok_or_else(|| missing(&shard))?;
            let owner = directory.get(shard)?.clone();
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
        let directory = self.node.directory();
        let store = |shard: ShardId| {
            let directory = Arc::clone(&directory);
            async move {
                let owner = directory.get(shard)?;
                let stored = owner.ask(|reply| ShardMsg::Store { version: Some(step), reply }).await?;
                Ok::<_, ComputeError>((shard, stored.1))
            }
        };
        try_join_all(shards.into_iter().map(store)).await
    }
}

fn insert<B: Compute>(owners: &mut BTreeMap<ShardId, Owner<B>>, shard: ShardId, owner: Owner<B>) {
    if let Some(before) = owners.insert(shard, owner) {
        before.stop();
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
