//! The replicas in this node's memory: their actors, and the gradients that wait for shards under way.

use crate::context::NodeContext;
use crate::directory::ShardActors;
use crate::error::{Error, Result};
use crate::handles::{Dense, Expert, Router, ShardActor};
use crate::messages::{ReducerMsg, Sum};
use crate::shards::transfer::FetchedShards;
use crate::step::dense::DenseActor;
use crate::step::expert::ExpertActor;
use crate::step::router::RouterActor;
use crate::step::shard::ShardReplica;
use futures::future::try_join_all;
use parking_lot::Mutex;
use ractor::rpc::CallResult;
use ractor::{Actor, ActorCell};
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::marker::PhantomData;
use std::sync::Arc;
use volary_core::compute::Compute;
use volary_core::update::Update;
use volary_core::{Epoch, ShardId, Step};

/// The reduced gradient of a step, and what to do with it.
type StashedUpdate<B> = (Step, Update, Sum<B>);

/// The replicas in this node's memory.
pub(crate) struct LocalReplicas<B: Compute> {
    node: Arc<NodeContext<B>>,
    /// Supervises the shard actors.
    agent: ActorCell,
    pub(crate) fetched: FetchedShards<B>,
    /// A mutex only because a gradient may be sent to another thread and not shared with it.
    stash: Mutex<HashMap<ShardId, VecDeque<StashedUpdate<B>>>>,
}

impl<B: Compute> LocalReplicas<B> {
    pub(crate) fn new(node: Arc<NodeContext<B>>, agent: ActorCell) -> Self {
        Self { node, agent, fetched: FetchedShards::default(), stash: Mutex::default() }
    }

    /// Drops shards under way, with the gradients that wait for them.
    pub(crate) fn discard_fetched(&mut self) {
        self.fetched.take_all();
        self.stash.get_mut().clear();
    }

    /// Installs every fetched shard.
    pub(crate) async fn install_fetched(&mut self) -> Result<()> {
        let mut actors = self.node.shard_actors().all().clone();
        for (shard, (version, state)) in self.fetched.take_all() {
            insert(&mut actors, shard, self.spawn(shard, version, state).await?);
        }
        self.node.set_shard_actors(ShardActors::new(actors));
        Ok(())
    }

    /// Installs one shard that was copied during training, after applying the steps that it missed.
    pub(crate) async fn install_copied(&mut self, shard: ShardId, replay: &[Step]) -> Result<()> {
        let (version, state) = self.fetched.take(shard).ok_or(Error::MissingShard { shard })?;
        let actor = self.spawn(shard, version, state).await?;
        let stashed = self.stash.get_mut().remove(&shard).unwrap_or_default();
        for (step, update, gradient) in stashed {
            if replay.contains(&step) {
                actor.apply(gradient, step, update).await?;
            }
        }
        let mut actors = self.node.shard_actors().all().clone();
        insert(&mut actors, shard, actor);
        self.node.set_shard_actors(ShardActors::new(actors));
        Ok(())
    }

    /// Frees shards.
    pub(crate) fn release(&self, shards: &[ShardId]) {
        let mut actors = self.node.shard_actors().all().clone();
        for shard in shards {
            if let Some(actor) = actors.remove(shard) {
                actor.stop();
            }
        }
        self.node.set_shard_actors(ShardActors::new(actors));
    }

    /// Applies a prepared step to `shards`, and stashes the gradients of shards under way.
    pub(crate) async fn apply(
        &mut self,
        (epoch, step): (Epoch, Step),
        update: Update,
        shards: &[ShardId],
        stash: &[(ShardId, usize)],
    ) -> Result<()> {
        let reply = self.node.reducer().call(|reply| ReducerMsg::Take { epoch, step, reply }, None).await;
        let Ok(CallResult::Success(mut gradients)) = reply else {
            return Err(Error::ActorGone { actor: "reducer" });
        };
        let mut take = |shard| gradients.remove(&shard).ok_or(Error::MissingGradient { shard, step });
        let actors = self.node.shard_actors();
        let mut applied = Vec::new();
        for &shard in shards {
            let (gradient, actor) = (take(shard)?, actors.get(shard)?);
            applied.push(actor.apply(gradient, step, update));
        }
        for &(shard, most) in stash {
            let gradient = take(shard)?;
            let kept = self.stash.get_mut().entry(shard).or_default();
            kept.push_back((step, update, gradient));
            if kept.len() > most {
                kept.pop_front();
            }
        }
        try_join_all(applied).await?;
        Ok(())
    }

    /// The stored form of a shard for a checkpoint: it must be at `step`, and finite.
    pub(crate) async fn store(&self, step: Step, shard: ShardId) -> Result<Vec<u8>> {
        Ok(self.node.shard_actors().get(shard)?.store(Some(step), true).await?.1)
    }

    async fn spawn(&self, shard: ShardId, version: Step, state: B::Shard) -> Result<ShardActor<B>> {
        let replica = ShardReplica::new(shard, Arc::clone(&self.node), state, version);
        let agent = self.agent.clone();
        let died = |error: ractor::SpawnErr| Error::ActorDied {
            actor: format!("of {shard}"),
            reason: error.to_string(),
        };
        Ok(match shard {
            ShardId::Embedding | ShardId::Dense { .. } => {
                let dense = Actor::spawn_linked(None, DenseActor(PhantomData), replica, agent).await;
                ShardActor::Dense(Dense(dense.map_err(died)?.0))
            }
            ShardId::Router { .. } => {
                let router = Actor::spawn_linked(None, RouterActor(PhantomData), replica, agent).await;
                ShardActor::Router(Router(router.map_err(died)?.0))
            }
            ShardId::Expert { .. } => {
                let expert = Actor::spawn_linked(None, ExpertActor(PhantomData), replica, agent).await;
                ShardActor::Expert(Expert(expert.map_err(died)?.0))
            }
        })
    }
}

/// Inserts an actor, and ends the one before it.
fn insert<B: Compute>(actors: &mut BTreeMap<ShardId, ShardActor<B>>, shard: ShardId, actor: ShardActor<B>) {
    if let Some(before) = actors.insert(shard, actor) {
        before.stop();
    }
}
