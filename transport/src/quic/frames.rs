//! Reads frames from QUIC streams: every length is checked before memory is reserved for it.

use super::buffer::{AlignedBuffer, is_aligned};
use crate::budget::{ByteBudget, BytePermit};
use crate::error::{Error, Result};
use crate::frame::{FIXED, Fixed, Frame, Part, PartHead, check_total};
use crate::limits::RESERVE_BYTES_MAX;
use bytes::Bytes;
use quinn::RecvStream;
use std::time::Duration;

/// Reads one frame. With a `stall_max`, the stream must deliver some bytes within each such interval.
pub(super) async fn read_frame(stream: &mut RecvStream, stall_max: Option<Duration>) -> Result<Frame> {
    Ok(read_frame_within(stream, stall_max, None).await?.0)
}

/// [`read_frame`], with its tensors' bytes taken from a budget before they are read.
pub(super) async fn read_frame_within(
    stream: &mut RecvStream,
    stall_max: Option<Duration>,
    budget: Option<&ByteBudget>,
) -> Result<(Frame, Option<BytePermit>)> {
    let mut fixed = [0; FIXED];
    exact(stream, &mut fixed, stall_max).await?;
    let fixed = Fixed::decode(&fixed)?;
    let mut meta = vec![0; fixed.meta];
    exact(stream, &mut meta, stall_max).await?;
    let mut heads = Vec::new();
    for _ in 0..fixed.parts {
        let mut start = [0; 2];
        exact(stream, &mut start, stall_max).await?;
        let mut rest = vec![0; PartHead::rest(start[1])?];
        exact(stream, &mut rest, stall_max).await?;
        heads.push(PartHead::decode(start[0], start[1], &rest)?);
    }
    check_total(&heads)?;
    let permit = match budget {
        Some(budget) => budget.take(heads.iter().map(|head| head.bytes).sum()).await,
        None => None,
    };
    let mut parts = Vec::with_capacity(heads.len());
    for head in heads {
        let data = read_part(stream, head.bytes as usize, stall_max).await?;
        parts.push(Part { dtype: head.dtype, shape: head.shape, data });
    }
    Ok((fixed.frame(meta.into(), parts), permit))
}

/// Reads a tensor into one buffer of its size. At most [`RESERVE_BYTES_MAX`] is reserved in advance; the rest
/// is reserved after that much has arrived.
async fn read_part(stream: &mut RecvStream, bytes: usize, stall_max: Option<Duration>) -> Result<Bytes> {
    let mut data = AlignedBuffer::with_capacity(bytes.min(RESERVE_BYTES_MAX))?;
    while data.len() < bytes {
        if data.len() == RESERVE_BYTES_MAX {
            data = data.grow_to(bytes)?;
        }
        let capacity = if data.len() < RESERVE_BYTES_MAX { bytes.min(RESERVE_BYTES_MAX) } else { bytes };
        match within(stall_max, stream.read_chunk(capacity - data.len(), true)).await? {
            Ok(Some(chunk)) if chunk.bytes.len() == bytes && is_aligned(&chunk.bytes) => {
                return Ok(chunk.bytes);
            }
            Ok(Some(chunk)) => data.extend(&chunk.bytes),
            Ok(None) => return Err(Error::malformed("frame", "it is cut short")),
            Err(error) => return Err(Error::connection("a stream", error)),
        }
    }
    Ok(data.finish())
}

async fn exact(stream: &mut RecvStream, buffer: &mut [u8], stall_max: Option<Duration>) -> Result<()> {
    within(stall_max, stream.read_exact(buffer)).await?.map_err(|error| match error {
        quinn::ReadExactError::FinishedEarly(_) => Error::malformed("frame", "it is cut short"),
        quinn::ReadExactError::ReadError(error) => Error::connection("a stream", error),
    })
}

async fn within<T>(stall_max: Option<Duration>, work: impl Future<Output = T>) -> Result<T> {
    let Some(stall_max) = stall_max else { return Ok(work.await) };
    let stalled = |_| Error::malformed("frame", format!("no data for {stall_max:?}"));
    tokio::time::timeout(stall_max, work).await.map_err(stalled)
}
