//! The shards on this node and their actors: a snapshot, replaced as a whole when the placement changes.

use crate::dense::DenseMsg;
use crate::expert::ExpertMsg;
use crate::router::RouterMsg;
use crate::shard::ShardMsg;
use ractor::ActorRef;
use std::collections::BTreeMap;
use volary_core::ShardId;
use volary_core::compute::{Compute, ComputeError, Computed};

/// The actor that owns a shard.
pub(crate) enum ShardActor<B: Compute> {
    /// The embedding or a dense layer.
    Dense(ActorRef<DenseMsg<B>>),
    /// A gate.
    Router(ActorRef<RouterMsg<B>>),
    /// An expert.
    Expert(ActorRef<ExpertMsg<B>>),
}

impl<B: Compute> Clone for ShardActor<B> {
    fn clone(&self) -> Self {
        match self {
            Self::Dense(actor) => Self::Dense(actor.clone()),
            Self::Router(actor) => Self::Router(actor.clone()),
            Self::Expert(actor) => Self::Expert(actor.clone()),
        }
    }
}

impl<B: Compute> ShardActor<B> {
    /// Tells the actor something about its shard.
    pub(crate) fn tell(&self, message: ShardMsg<B>) {
        let told = match self {
            Self::Dense(actor) => actor.cast(DenseMsg::Shard(message)).is_ok(),
            Self::Router(actor) => actor.cast(RouterMsg::Shard(message)).is_ok(),
            Self::Expert(actor) => actor.cast(ExpertMsg::Shard(message)).is_ok(),
        };
        // A dropped reply port is what the asker sees.
        if !told {
            tracing::debug!("a shard's actor is gone");
        }
    }

    /// Asks the actor something about its shard.
    pub(crate) async fn ask<T: Send + 'static>(
        &self,
        make: impl FnOnce(ractor::RpcReplyPort<Computed<T>>) -> ShardMsg<B>,
    ) -> Computed<T> {
        match self {
            Self::Dense(actor) => crate::ask::ask(actor, |reply| DenseMsg::Shard(make(reply))).await,
            Self::Router(actor) => crate::ask::ask(actor, |reply| RouterMsg::Shard(make(reply))).await,
            Self::Expert(actor) => crate::ask::ask(actor, |reply| ExpertMsg::Shard(make(reply))).await,
        }
    }

    /// Ends the actor, and with it the shard's memory.
    pub(crate) fn stop(&self) {
        match self {
            Self::Dense(actor) => actor.stop(None),
            Self::Router(actor) => actor.stop(None),
            Self::Expert(actor) => actor.stop(None),
        }
    }
}

/// The shards on this node.
pub(crate) struct ShardActors<B: Compute> {
    owners: BTreeMap<ShardId, ShardActor<B>>,
}

impl<B: Compute> Default for ShardActors<B> {
    fn default() -> Self {
        Self { owners: BTreeMap::new() }
    }
}

impl<B: Compute> ShardActors<B> {
    pub(crate) fn new(owners: BTreeMap<ShardId, ShardActor<B>>) -> Self {
        Self { owners }
    }

    pub(crate) fn get(&self, shard: ShardId) -> Computed<&ShardActor<B>> {
        self.owners.get(&shard).ok_or_else(|| ComputeError(format!("{shard} is not on this node")))
    }

    pub(crate) fn all(&self) -> &BTreeMap<ShardId, ShardActor<B>> {
        &self.owners
    }

    pub(crate) fn embedding(&self) -> Computed<ActorRef<DenseMsg<B>>> {
        self.dense_shard(ShardId::Embedding)
    }

    pub(crate) fn dense(&self, layer: u16) -> Computed<ActorRef<DenseMsg<B>>> {
        self.dense_shard(ShardId::Dense { layer })
    }

    fn dense_shard(&self, shard: ShardId) -> Computed<ActorRef<DenseMsg<B>>> {
        match self.get(shard)? {
            ShardActor::Dense(actor) => Ok(actor.clone()),
            _ => Err(ComputeError(format!("{shard} has no dense actor"))),
        }
    }

    pub(crate) fn router(&self, layer: u16) -> Computed<ActorRef<RouterMsg<B>>> {
        match self.get(ShardId::Router { layer })? {
            ShardActor::Router(actor) => Ok(actor.clone()),
            _ => Err(ComputeError(format!("layer {layer} has no router actor"))),
        }
    }

    pub(crate) fn expert(&self, layer: u16, expert: u16) -> Computed<ActorRef<ExpertMsg<B>>> {
        match self.get(ShardId::Expert { layer, expert })? {
            ShardActor::Expert(actor) => Ok(actor.clone()),
            _ => Err(ComputeError(format!("expert {expert} of layer {layer} has no expert actor"))),
        }
    }
}
