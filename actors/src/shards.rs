//! How a node gets the shards that a placement gives it, and how it hands its own to a checkpoint.

use crate::node_context::NodeContext;
use crate::peers::refused;
use crate::wire::{self, ShardAt, ShardWish};
use futures::{StreamExt, TryStreamExt, stream};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use volary_core::agent::Failure;
use volary_core::compute::{Compute, ComputeError, Computed};
use volary_core::messages::Source;
use volary_core::{Epoch, NodeId, ShardId, Step};
use volary_telemetry::Meter;
use volary_transport::{Kind, Link};

/// Shards that are fetched at a time: enough to hide round trips, few enough to bound memory.
const FETCHES_AHEAD: usize = 4;

/// Shards with their versions.
pub(crate) type Copies<B> = HashMap<ShardId, (Step, <B as Compute>::Shard)>;

/// Shards that have come and wait for the agent to say what becomes of them.
pub(crate) struct FetchedShards<B: Compute> {
    here: Arc<Mutex<Copies<B>>>,
}

impl<B: Compute> Clone for FetchedShards<B> {
    fn clone(&self) -> Self {
        Self { here: Arc::clone(&self.here) }
    }
}

impl<B: Compute> Default for FetchedShards<B> {
    fn default() -> Self {
        Self { here: Arc::default() }
    }
}

impl<B: Compute> FetchedShards<B> {
    pub(crate) fn put(&self, shard: ShardId, version: Step, state: B::Shard) {
        self.here.lock().unwrap_or_else(PoisonError::into_inner).insert(shard, (version, state));
    }

    pub(crate) fn take(&self, shard: ShardId) -> Option<(Step, B::Shard)> {
        self.here.lock().unwrap_or_else(PoisonError::into_inner).remove(&shard)
    }

    pub(crate) fn take_all(&self) -> Copies<B> {
        std::mem::take(&mut *self.here.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// The link to the supervisor, for shards.
#[derive(Clone)]
pub(crate) struct Uplink {
    pub(crate) link: Link,
}

impl Uplink {
    async fn fetch(&self, shard: ShardId, version: Step) -> Computed<bytes::Bytes> {
        let supervisor = NodeId::new("the supervisor");
        let wish = ShardWish { shard, version: Some(version) };
        let frame = wire::frame(Kind::ShardRequest, 0, version, &wish, Vec::new())?;
        let reply =
            self.link.request(frame).await.map_err(|e| ComputeError(format!("the supervisor: {e}")))?;
        wire::only_blob(refused(&supervisor, reply)?)
    }

    /// Sends stored shards one after the other.
    pub(crate) async fn send_checkpoint(
        &self,
        epoch: Epoch,
        step: Step,
        stored: Vec<(ShardId, Vec<u8>)>,
    ) -> Computed<()> {
        for (shard, bytes) in stored {
            let meta = ShardAt { shard, version: step };
            let frame = wire::blob(Kind::Blob, epoch, step, &meta, bytes)?;
            let sent = self.link.send(frame).await;
            sent.map_err(|error| ComputeError(format!("{shard} did not reach the supervisor: {error}")))?;
        }
        Ok(())
    }
}

/// Fetches shards at a version from wherever an assignment says.
pub(crate) async fn fetch_all<B: Compute>(
    node: &Arc<NodeContext<B>>,
    uplink: &Uplink,
    fetched: &FetchedShards<B>,
    shards: Vec<(ShardId, Source)>,
    version: Step,
    epoch: Epoch,
) -> Result<(), Failure> {
    let fetch = |(shard, source)| async move {
        let state = fetch(node, uplink, shard, source, version, epoch).await?;
        fetched.put(shard, version, state);
        Ok(())
    };
    stream::iter(shards).map(fetch).buffer_unordered(FETCHES_AHEAD).try_collect().await
}

async fn fetch<B: Compute>(
    node: &Arc<NodeContext<B>>,
    uplink: &Uplink,
    shard: ShardId,
    source: Source,
    version: Step,
    epoch: Epoch,
) -> Result<B::Shard, Failure> {
    let fatal = |error: ComputeError| Failure { reason: error.to_string(), fatal: true, suspect: None };
    let bytes = match source {
        Source::Peer(peer) => copy(node, shard, &peer, Some(version), epoch).await?.1,
        // A supervisor that is gone is not fatal: it comes back, and another placement with it.
        Source::Checkpoint(_) => uplink.fetch(shard, version).await.map_err(|error| {
            let fatal = uplink.link.is_open();
            Failure { reason: error.to_string(), fatal, suspect: None }
        })?,
        Source::Initial | Source::Held => {
            let initial = move |backend: &B| backend.initial(shard);
            return node.executor.run(&Meter::default(), initial).await.map_err(fatal);
        }
    };
    let load = move |backend: &B| backend.load(shard, &bytes);
    node.executor.run(&Meter::default(), load).await.map_err(fatal)
}

/// Copies a shard from the first of `from` at whatever version it has, beside the training.
pub(crate) async fn learn<B: Compute>(
    node: &Arc<NodeContext<B>>,
    fetched: &FetchedShards<B>,
    shard: ShardId,
    from: &[NodeId],
    epoch: Epoch,
) -> Result<Step, Failure> {
    let nobody = || Failure { reason: format!("nobody has {shard}"), fatal: false, suspect: None };
    let (version, bytes) = copy(node, shard, from.first().ok_or_else(nobody)?, None, epoch).await?;
    let load = move |backend: &B| backend.load(shard, &bytes);
    let state = node.executor.run(&Meter::default(), load).await;
    let state = state.map_err(|error| Failure { reason: error.to_string(), fatal: false, suspect: None })?;
    fetched.put(shard, version, state);
    Ok(version)
}

async fn copy<B: Compute>(
    node: &Arc<NodeContext<B>>,
    shard: ShardId,
    peer: &NodeId,
    version: Option<Step>,
    epoch: Epoch,
) -> Result<(Step, bytes::Bytes), Failure> {
    let ask = async {
        let wish = ShardWish { shard, version };
        let frame = wire::frame(Kind::ShardRequest, epoch, version.unwrap_or(0), &wish, Vec::new())?;
        let reply = node.peers.request(peer, frame).await?;
        let at: ShardAt = wire::decode(&reply)?;
        Ok::<_, ComputeError>((at.version, wire::only_blob(reply)?))
    };
    // A peer that died meanwhile is another placement's business.
    ask.await.map_err(|error| Failure {
        reason: error.to_string(),
        fatal: false,
        suspect: node.peers.suspect(),
    })
}
