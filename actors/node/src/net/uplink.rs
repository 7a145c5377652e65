//! The link to the supervisor, for shards of checkpoints.

use crate::error::{Error, Result};
use bytes::Bytes;
use volary_core::{Epoch, ShardId, Step};
use volary_protocol::FrameRefusal;
use volary_protocol::frames::{self, ShardRequest, StoredShard};
use volary_transport::{FrameKind, Link};

/// The link to the supervisor.
#[derive(Clone)]
pub(crate) struct Uplink {
    pub(crate) link: Link,
}

impl Uplink {
    fn error(&self, reason: impl ToString) -> Error {
        Error::Supervisor { reason: reason.to_string(), link_open: self.link.is_open() }
    }

    /// A shard of a checkpoint.
    pub(crate) async fn fetch(&self, shard: ShardId, version: Step) -> Result<Bytes> {
        let request = ShardRequest { shard, version: Some(version) };
        let frame = frames::frame(FrameKind::ShardRequest, Epoch(0), version, &request, Vec::new())?;
        let reply = self.link.request(frame).await.map_err(|error| self.error(error))?;
        if reply.kind == FrameKind::Refusal {
            let refusal = frames::decode::<FrameRefusal>(&reply).map_err(|error| self.error(error))?;
            return Err(self.error(refusal));
        }
        frames::only_blob(reply).map_err(|error| self.error(error))
    }

    /// Sends a stored shard for a checkpoint; resolves when it is on its way.
    pub(crate) async fn send_checkpoint(
        &self,
        epoch: Epoch,
        step: Step,
        shard: ShardId,
        bytes: Vec<u8>,
    ) -> Result<()> {
        let header = StoredShard { shard, version: step };
        let frame = frames::blob(FrameKind::Blob, epoch, step, &header, bytes)?;
        let sent = self.link.send(frame).await;
        sent.map_err(|error| self.error(format!("{shard} was not delivered: {error}")))
    }
}
