//! Frames on QUIC streams, one on each: pieces out as they lie, tensors in at 64-byte boundaries.

use crate::accept::Refused;
use crate::error::{Error, Result};
use crate::frame::{FIXED, Fixed, Frame, Part, PartHead, check_total};
use crate::limits::{ALIGNMENT_BYTES, RESERVE_BYTES_MAX, STALL_MAX};
use crate::link::{InboundFrame, Replier};
use bytes::Bytes;
use quinn::{Connection, RecvStream, SendStream, VarInt};
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::sync::mpsc;

/// A connection that carries frames; clones are the same connection.
#[derive(Clone, Debug)]
pub(crate) struct Wire {
    pub(crate) connection: Connection,
    pub(crate) peer: String,
    /// The endpoint's: whole frames are written and read there, beside the connection's driver, so that a frame costs
    /// one change of threads and not one for every window of data.
    pub(crate) runtime: Handle,
    pub(crate) refused: Refused,
}

struct AbortOnDrop<T>(tokio::task::JoinHandle<T>);

impl<T> Drop for AbortOnDrop<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Wire {
    pub(crate) async fn request(&self, pieces: Vec<Bytes>) -> Result<Frame> {
        let wire = self.clone();
        self.beside_the_driver(async move {
            let (mut send, mut receive) = wire.connection.open_bi().await.map_err(|e| wire.broken(e))?;
            wire.write(&mut send, pieces).await?;
            // The answer may take its time.
            read_frame(&mut receive, None).await
        })
        .await
    }

    pub(crate) async fn send(&self, pieces: Vec<Bytes>) -> Result<()> {
        let wire = self.clone();
        self.beside_the_driver(async move {
            let mut send = wire.connection.open_uni().await.map_err(|e| wire.broken(e))?;
            wire.write(&mut send, pieces).await
        })
        .await
    }

    pub(crate) async fn answer(self, mut stream: SendStream, pieces: Vec<Bytes>) -> Result<()> {
        let wire = self.clone();
        self.beside_the_driver(async move { wire.write(&mut stream, pieces).await }).await
    }

    async fn beside_the_driver<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T>> + Send + 'static,
    ) -> Result<T> {
        // Whoever gives up waiting gives up the stream too.
        let mut task = AbortOnDrop(self.runtime.spawn(work));
        (&mut task.0).await.unwrap_or_else(|error| Err(self.broken(error)))
    }

    async fn write(&self, send: &mut SendStream, mut pieces: Vec<Bytes>) -> Result<()> {
        send.write_all_chunks(&mut pieces).await.map_err(|e| self.broken(e))?;
        send.finish().map_err(|e| self.broken(e))
    }

    fn broken(&self, error: impl ToString) -> Error {
        Error::connection(self.peer.clone(), error)
    }

    /// Accepts streams until the link closes. The number of streams is bounded by the connection's own limits.
    pub(crate) async fn take_up(self, sender: mpsc::Sender<InboundFrame>) {
        loop {
            let (receive, answer) = tokio::select! {
                stream = self.connection.accept_bi() => match stream {
                    Ok((send, receive)) => (receive, Some(send)),
                    Err(_) => return,
                },
                stream = self.connection.accept_uni() => match stream {
                    Ok(receive) => (receive, None),
                    Err(_) => return,
                },
            };
            tokio::spawn(self.clone().read_one(sender.clone(), receive, answer));
        }
    }

    async fn read_one(
        self,
        sender: mpsc::Sender<InboundFrame>,
        mut receive: RecvStream,
        answer: Option<SendStream>,
    ) {
        match read_frame(&mut receive, Some(STALL_MAX)).await {
            Ok(frame) => {
                let reply = answer.map(|stream| Replier::over_quic(self, stream));
                drop(sender.send(InboundFrame { frame, reply }).await);
            }
            Err(error @ Error::Malformed { .. }) => {
                // A peer that does not speak our language is not listened to any longer.
                tracing::error!(peer = self.peer, %error, "link closed");
                self.refused.fetch_add(1, Ordering::Relaxed);
                self.connection.close(VarInt::from_u32(0), b"malformed frame");
            }
            // It gave the stream up, or is gone.
            Err(_) => {}
        }
    }
}

/// Reads one frame. Memory is reserved only after every length has been checked; where there is a limit to patience, something
/// must come within it, again and again, until all is there.
async fn read_frame(stream: &mut RecvStream, patience: Option<Duration>) -> Result<Frame> {
    let mut fixed = [0; FIXED];
    exact(stream, &mut fixed, patience).await?;
    let fixed = Fixed::decode(&fixed)?;
    let mut meta = vec![0; fixed.meta];
    exact(stream, &mut meta, patience).await?;
    let mut heads = Vec::new();
    for _ in 0..fixed.parts {
        let mut start = [0; 2];
        exact(stream, &mut start, patience).await?;
        let mut rest = vec![0; PartHead::rest(start[1])?];
        exact(stream, &mut rest, patience).await?;
        heads.push(PartHead::decode(start[0], start[1], &rest)?);
    }
    check_total(&heads)?;
    let mut parts = Vec::with_capacity(heads.len());
    for head in heads {
        let data = read_part(stream, head.bytes as usize, patience).await?;
        parts.push(Part { dtype: head.dtype, shape: head.shape, data });
    }
    Ok(fixed.frame(meta.into(), parts))
}

/// Reads a tensor into one buffer of its size. A peer's word is good for [`RESERVE_BYTES_MAX`]; room for more than that is
/// made once so much has really come.
async fn read_part(stream: &mut RecvStream, bytes: usize, patience: Option<Duration>) -> Result<Bytes> {
    let mut data = Aligned::with_room(bytes.min(RESERVE_BYTES_MAX))?;
    while data.len() < bytes {
        if data.len() == RESERVE_BYTES_MAX {
            data = data.moved_to(bytes)?;
        }
        let room = if data.len() < RESERVE_BYTES_MAX { bytes.min(RESERVE_BYTES_MAX) } else { bytes };
        match within(patience, stream.read_chunk(room - data.len(), true)).await? {
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

async fn exact(stream: &mut RecvStream, buffer: &mut [u8], patience: Option<Duration>) -> Result<()> {
    within(patience, stream.read_exact(buffer)).await?.map_err(|error| match error {
        quinn::ReadExactError::FinishedEarly(_) => Error::malformed("frame", "it is cut short"),
        quinn::ReadExactError::ReadError(error) => Error::connection("a stream", error),
    })
}

async fn within<T>(patience: Option<Duration>, work: impl Future<Output = T>) -> Result<T> {
    let Some(patience) = patience else { return Ok(work.await) };
    let stalled = |_| Error::malformed("frame", format!("nothing came of it for {patience:?}"));
    tokio::time::timeout(patience, work).await.map_err(stalled)
}

fn is_aligned(bytes: &[u8]) -> bool {
    bytes.as_ptr().align_offset(ALIGNMENT_BYTES) == 0
}

/// A buffer whose content begins at a multiple of [`ALIGNMENT_BYTES`]: matrix products must not depend on where a tensor
/// happens to lie.
struct Aligned {
    buffer: Vec<u8>,
    start: usize,
}

impl Aligned {
    fn with_room(bytes: usize) -> Result<Self> {
        let mut buffer = Vec::<u8>::new();
        buffer
            .try_reserve_exact(bytes + ALIGNMENT_BYTES - 1)
            .map_err(|_| Error::malformed("frame", format!("no memory for a tensor of {bytes} bytes")))?;
        let start = buffer.as_ptr().align_offset(ALIGNMENT_BYTES).min(ALIGNMENT_BYTES - 1);
        buffer.resize(start, 0);
        Ok(Self { buffer, start })
    }

    fn moved_to(self, bytes: usize) -> Result<Self> {
        let mut larger = Self::with_room(bytes)?;
        larger.extend(&self.buffer[self.start..]);
        Ok(larger)
    }

    fn len(&self) -> usize {
        self.buffer.len() - self.start
    }

    fn extend(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    fn finish(self) -> Bytes {
        // `slice` keeps the allocation and with it the alignment.
        Bytes::from(self.buffer).slice(self.start..)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_begins_at_a_boundary_and_keeps_its_content_when_it_moves() {
        for bytes in [0, 1, 63, 64, 65, 4_097, 1 << 20] {
            let mut data = Aligned::with_room(bytes).unwrap();
            data.extend(&vec![5; bytes]);
            let moved = data.moved_to(2 * bytes + 7).unwrap();
            assert_eq!(moved.len(), bytes);
            let finished = moved.finish();
            assert!(is_aligned(&finished), "{bytes}");
            assert_eq!(finished, vec![5; bytes]);
        }
    }

    #[test]
    fn a_buffer_that_is_filled_never_moves_by_itself() {
        let mut data = Aligned::with_room(10_000).unwrap();
        let before = data.buffer.as_ptr();
        data.extend(&[1; 10_000]);
        assert_eq!(data.buffer.as_ptr(), before);
    }
}
