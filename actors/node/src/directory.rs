//! The shard actors of this node: a snapshot, replaced as a whole when the placement changes.

use crate::error::{Error, Result};
use crate::handles::{Dense, Expert, Router, ShardActor};
use std::collections::BTreeMap;
use volary_core::compute::Compute;
use volary_core::{ExpertId, LayerId, ShardId};

/// The shard actors of this node.
pub(crate) struct ShardActors<B: Compute> {
    actors: BTreeMap<ShardId, ShardActor<B>>,
}

impl<B: Compute> Default for ShardActors<B> {
    fn default() -> Self {
        Self { actors: BTreeMap::new() }
    }
}

impl<B: Compute> ShardActors<B> {
    pub(crate) fn new(actors: BTreeMap<ShardId, ShardActor<B>>) -> Self {
        Self { actors }
    }

    pub(crate) fn get(&self, shard: ShardId) -> Result<&ShardActor<B>> {
        self.actors.get(&shard).ok_or(Error::MissingShard { shard })
    }

    pub(crate) fn all(&self) -> &BTreeMap<ShardId, ShardActor<B>> {
        &self.actors
    }

    pub(crate) fn embedding(&self) -> Result<Dense<B>> {
        self.dense_shard(ShardId::Embedding)
    }

    pub(crate) fn dense(&self, layer: LayerId) -> Result<Dense<B>> {
        self.dense_shard(ShardId::Dense { layer })
    }

    fn dense_shard(&self, shard: ShardId) -> Result<Dense<B>> {
        match self.actors.get(&shard) {
            Some(ShardActor::Dense(dense)) => Ok(dense.clone()),
            _ => Err(Error::MissingShard { shard }),
        }
    }

    pub(crate) fn router(&self, layer: LayerId) -> Result<Router<B>> {
        let shard = ShardId::Router { layer };
        match self.actors.get(&shard) {
            Some(ShardActor::Router(router)) => Ok(router.clone()),
            _ => Err(Error::MissingShard { shard }),
        }
    }

    pub(crate) fn expert(&self, layer: LayerId, expert: ExpertId) -> Result<Expert<B>> {
        let shard = ShardId::Expert { layer, expert };
        match self.actors.get(&shard) {
            Some(ShardActor::Expert(expert)) => Ok(expert.clone()),
            _ => Err(Error::MissingShard { shard }),
        }
    }
}
