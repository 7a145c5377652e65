//! How shards get to a node: from peers, from a checkpoint through the supervisor, or from the run's seed.

use crate::context::NodeContext;
use crate::error::{Error, Result};
use crate::limits::FETCHES_AHEAD;
use crate::net::uplink::Uplink;
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::sync::Arc;
use volary_core::compute::Compute;
use volary_core::messages::Source;
use volary_core::{Epoch, NodeId, ShardId, Step};
use volary_protocol::frames::{self, ShardRequest, StoredShard};
use volary_telemetry::Meter;
use volary_transport::FrameKind;

/// Shards with their versions.
type VersionedShards<B> = HashMap<ShardId, (Step, <B as Compute>::Shard)>;

/// Shards that have arrived and wait for the agent to install them.
pub(crate) struct FetchedShards<B: Compute> {
    shards: Arc<Mutex<VersionedShards<B>>>,
}

impl<B: Compute> Clone for FetchedShards<B> {
    fn clone(&self) -> Self {
        Self { shards: Arc::clone(&self.shards) }
    }
}

impl<B: Compute> Default for FetchedShards<B> {
    fn default() -> Self {
        Self { shards: Arc::default() }
    }
}

impl<B: Compute> FetchedShards<B> {
    fn put(&self, shard: ShardId, version: Step, state: B::Shard) {
        self.shards.lock().insert(shard, (version, state));
    }

    pub(crate) fn take(&self, shard: ShardId) -> Option<(Step, B::Shard)> {
        self.shards.lock().remove(&shard)
    }

    pub(crate) fn take_all(&self) -> VersionedShards<B> {
        std::mem::take(&mut *self.shards.lock())
    }
}

/// Fetches what a placement needs before its first step.
pub(crate) struct Fetch<'a, B: Compute> {
    pub(crate) node: &'a Arc<NodeContext<B>>,
    pub(crate) uplink: &'a Uplink,
    pub(crate) version: Step,
    pub(crate) epoch: Epoch,
}

impl<B: Compute> Fetch<'_, B> {
    /// Fetches shards, a few at a time, each from the source that the assignment gives.
    pub(crate) async fn all(&self, fetched: &FetchedShards<B>, shards: Vec<(ShardId, Source)>) -> Result<()> {
        let fetch = |(shard, source)| async move {
            fetched.put(shard, self.version, self.one(shard, source).await?);
            Ok(())
        };
        stream::iter(shards).map(fetch).buffer_unordered(FETCHES_AHEAD).try_collect().await
    }

    async fn one(&self, shard: ShardId, source: Source) -> Result<B::Shard> {
        let Self { node, uplink, version, epoch } = *self;
        let bytes = match source {
            Source::Peer(peer) => copy(node, shard, &peer, Some(version), epoch).await?.1,
            Source::Checkpoint(_) => uplink.fetch(shard, version).await?,
            Source::Initial | Source::Held => {
                let initial = move |backend: &B| backend.initial(shard).map_err(Error::replica(shard));
                return node.executor.run(&Meter::default(), initial).await;
            }
        };
        load(node, shard, bytes).await
    }
}

/// Copies a shard, at its holder's present version, from the first of `from` that could be dialed lately,
/// while training continues.
pub(crate) async fn copy_to_learn<B: Compute>(
    node: &Arc<NodeContext<B>>,
    fetched: &FetchedShards<B>,
    shard: ShardId,
    from: &[NodeId],
    epoch: Epoch,
) -> Result<Step> {
    let dialed = from.iter().find(|peer| node.peers.check_dialed(peer).is_ok());
    let peer = dialed.or_else(|| from.first()).ok_or(Error::NoHolder { shard })?;
    node.peers.check_dialed(peer)?;
    let (version, bytes) = copy(node, shard, peer, None, epoch).await?;
    fetched.put(shard, version, load(node, shard, bytes).await?);
    Ok(version)
}

async fn load<B: Compute>(node: &NodeContext<B>, shard: ShardId, bytes: Bytes) -> Result<B::Shard> {
    let load = move |backend: &B| backend.load(shard, &bytes).map_err(Error::replica(shard));
    node.executor.run(&Meter::default(), load).await
}

async fn copy<B: Compute>(
    node: &NodeContext<B>,
    shard: ShardId,
    peer: &NodeId,
    version: Option<Step>,
    epoch: Epoch,
) -> Result<(Step, Bytes)> {
    let request = ShardRequest { shard, version };
    let step = version.unwrap_or_default();
    let frame = frames::frame(FrameKind::ShardRequest, epoch, step, &request, Vec::new())?;
    let reply = node.peers.request(peer, frame).await?;
    let header: StoredShard = frames::decode(&reply)?;
    Ok((header.version, frames::only_blob(reply)?))
}
