//! Shards that a checkpoint wants, until they are sent.
//!
//! A shard is stored when the uplink has room for it, so that one stored shard is in memory at a time. A step
//! that is applied meanwhile would overwrite what is to be stored: then the rest is stored just before, in
//! the memory that the step's other gradients have left free ([`volary_core::costs::Costs`]).

use crate::error::Result;
use crate::shards::replicas::LocalReplicas;
use std::collections::VecDeque;
use volary_core::compute::Compute;
use volary_core::{ShardId, Step};

/// Shards of one checkpoint that this node is to send.
#[derive(Debug, Default)]
pub(crate) struct PendingStores {
    step: Step,
    /// Shards that are not stored yet.
    waiting: VecDeque<ShardId>,
    /// Shards that had to be stored before their turn.
    stored: VecDeque<(ShardId, Vec<u8>)>,
}

impl PendingStores {
    /// The shards of a checkpoint of `step`.
    pub(crate) fn new(step: Step, shards: Vec<ShardId>) -> Self {
        Self { step, waiting: shards.into(), stored: VecDeque::new() }
    }

    /// The checkpoint's step.
    pub(crate) fn step(&self) -> Step {
        self.step
    }

    /// The next shard to send, stored; nothing when all are sent.
    pub(crate) async fn next<B: Compute>(
        &mut self,
        replicas: &LocalReplicas<B>,
    ) -> Result<Option<(ShardId, Vec<u8>)>> {
        if let Some(stored) = self.stored.pop_front() {
            return Ok(Some(stored));
        }
        let Some(shard) = self.waiting.pop_front() else { return Ok(None) };
        Ok(Some((shard, replicas.store(self.step, shard).await?)))
    }

    /// Stores what is about to change or to be released.
    pub(crate) async fn store_before_change<B: Compute>(
        &mut self,
        replicas: &LocalReplicas<B>,
        changing: &[ShardId],
    ) -> Result<()> {
        let (now, later): (Vec<_>, Vec<_>) =
            self.waiting.drain(..).partition(|shard| changing.contains(shard));
        self.waiting = later.into();
        for shard in now {
            self.stored.push_back((shard, replicas.store(self.step, shard).await?));
        }
        Ok(())
    }
}
