//! How a node gets the shards that a placement gives it, and how it hands its own to a checkpoint.

use crate::executor::Priority;
use crate::node_context::NodeContext;
use crate::peers::refused;
use crate::wire::{self, ShardAt};
use futures::{StreamExt, TryStreamExt, stream};
use std::sync::Arc;
use volary_core::compute::{Compute, ComputeError, Computed};
use volary_core::messages::{Assignment, Source};
use volary_core::{Epoch, NodeId, ShardId, Step};
use volary_transport::{Kind, Link};

/// Shards that are fetched at a time: enough to hide round trips, few enough to bound memory.
const FETCHES_AHEAD: usize = 4;

/// The link to the supervisor, for shards.
#[derive(Clone)]
pub(crate) struct Uplink {
    pub(crate) link: Link,
}

impl Uplink {
    async fn fetch(&self, shard: ShardId, version: Step) -> Computed<bytes::Bytes> {
        let supervisor = NodeId::new("the supervisor");
        let meta = ShardAt { shard, version };
        let frame = wire::frame(Kind::ShardRequest, 0, version, &meta, Vec::new())?;
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

/// Fetches every shard of an assignment that this node does not hold at the right version already. The error says
/// whether trying again cannot help.
pub(crate) async fn fetch_all<B: Compute>(
    node: &Arc<NodeContext<B>>,
    uplink: &Uplink,
    assignment: &Assignment,
) -> Result<Vec<(ShardId, B::Shard)>, (ComputeError, bool)> {
    let wanted: Vec<_> =
        assignment.shards.iter().filter(|(_, source)| *source != Source::Held).cloned().collect();
    for (shard, _) in assignment.shards.iter().filter(|(_, source)| *source == Source::Held) {
        node.directory().get(*shard).map_err(|error| (error, true))?;
    }
    let version = assignment.version;
    let fetch = |(shard, source)| fetch(node, uplink, shard, source, version, assignment.placement.epoch);
    stream::iter(wanted).map(fetch).buffer_unordered(FETCHES_AHEAD).try_collect().await
}

async fn fetch<B: Compute>(
    node: &Arc<NodeContext<B>>,
    uplink: &Uplink,
    shard: ShardId,
    source: Source,
    version: Step,
    epoch: Epoch,
) -> Result<(ShardId, B::Shard), (ComputeError, bool)> {
    let bytes = match source {
        Source::Peer(peer) => {
            let meta = ShardAt { shard, version };
            let frame =
                wire::frame(Kind::ShardRequest, epoch, version, &meta, Vec::new()).map_err(|e| (e, true))?;
            // A peer that died meanwhile is another placement's business.
            let reply = node.peers.request(&peer, frame).await.map_err(|error| (error, false))?;
            wire::only_blob(reply).map_err(|error| (error, false))?
        }
        Source::Checkpoint(_) => uplink.fetch(shard, version).await.map_err(|error| (error, true))?,
        Source::Initial | Source::Held => {
            let initial = move |backend: &B| backend.initial(shard);
            let state = node.executor.run(Priority::Urgent, initial).await.map_err(|error| (error, true))?;
            return Ok((shard, state));
        }
    };
    let load = move |backend: &B| backend.load(shard, &bytes);
    let state = node.executor.run(Priority::Urgent, load).await.map_err(|error| (error, true))?;
    Ok((shard, state))
}
