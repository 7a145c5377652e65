//! A link to one authenticated peer: requests with answers, frames without, each on a stream of its own, so that a big
//! one never holds up a small one.

use crate::error::{Error, Result};
use crate::frame::{FIXED, Fixed, Frame, Part, PartHead, check_total};
use crate::limits::{INBOUND_MAX, RESERVE_BYTES_MAX};
use bytes::Bytes;
use quinn::{Connection, RecvStream, SendStream, VarInt};
use std::net::SocketAddr;
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::sync::mpsc;

/// The control stream goes before everything else.
pub(crate) const CONTROL_PRIORITY: i32 = 1;

/// A link to one peer; clones are the same link.
#[derive(Clone, Debug)]
pub struct Link {
    connection: Connection,
    peer: String,
    /// The endpoint's: whole frames are written and read there, beside the connection's driver, so that a frame costs
    /// one change of threads and not one for every window of data.
    runtime: Handle,
}

struct AbortOnDrop<T>(tokio::task::JoinHandle<T>);

impl<T> Drop for AbortOnDrop<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// What a link has carried.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LinkStats {
    /// UDP bytes sent.
    pub bytes_sent: u64,
    /// UDP bytes received.
    pub bytes_received: u64,
    /// The current estimate of the round trip.
    pub round_trip: Duration,
}

impl Link {
    pub(crate) fn new(connection: Connection, peer: String, runtime: Handle) -> Self {
        Self { connection, peer, runtime }
    }

    /// The peer's proven name.
    #[must_use]
    pub fn peer(&self) -> &str {
        &self.peer
    }

    /// Where the peer is.
    #[must_use]
    pub fn remote_address(&self) -> SocketAddr {
        self.connection.remote_address()
    }

    fn broken(&self, error: impl ToString) -> Error {
        Error::connection(self.peer.clone(), error)
    }

    /// Sends a frame and awaits the answer on the same stream.
    ///
    /// # Errors
    /// When the frame is over a bound, the connection breaks, or the answer is malformed.
    pub async fn request(&self, frame: Frame) -> Result<Frame> {
        let pieces = frame.encode()?;
        let link = self.clone();
        self.beside_the_driver(async move {
            let (mut send, mut receive) = link.connection.open_bi().await.map_err(|e| link.broken(e))?;
            link.write(&mut send, pieces).await?;
            read_frame(&mut receive).await
        })
        .await
    }

    async fn beside_the_driver<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T>> + Send + 'static,
    ) -> Result<T> {
        // Whoever gives up waiting gives up the stream too.
        let mut task = AbortOnDrop(self.runtime.spawn(work));
        (&mut task.0).await.unwrap_or_else(|error| Err(self.broken(error)))
    }

    /// Sends a frame that has no answer; returns when all of it is on its way.
    ///
    /// # Errors
    /// As [`Link::request`].
    pub async fn send(&self, frame: Frame) -> Result<()> {
        let pieces = frame.encode()?;
        let link = self.clone();
        self.beside_the_driver(async move {
            let mut send = link.connection.open_uni().await.map_err(|e| link.broken(e))?;
            link.write(&mut send, pieces).await
        })
        .await
    }

    async fn write(&self, send: &mut SendStream, mut pieces: Vec<Bytes>) -> Result<()> {
        send.write_all_chunks(&mut pieces).await.map_err(|e| self.broken(e))?;
        send.finish().map_err(|e| self.broken(e))
    }

    /// Takes up the frames that the peer sends. To be called once.
    #[must_use]
    pub fn serve(&self) -> Inbound {
        let (sender, frames) = mpsc::channel(INBOUND_MAX);
        self.runtime.spawn(take_up(self.clone(), sender));
        Inbound { frames }
    }

    /// Waits until the link is closed, and says why.
    pub async fn closed(&self) -> String {
        self.connection.closed().await.to_string()
    }

    /// Closes the link.
    pub fn close(&self, reason: &str) {
        self.connection.close(VarInt::from_u32(0), reason.as_bytes());
    }

    /// What the link has carried.
    #[must_use]
    pub fn stats(&self) -> LinkStats {
        let stats = self.connection.stats();
        LinkStats {
            bytes_sent: stats.udp_tx.bytes,
            bytes_received: stats.udp_rx.bytes,
            round_trip: self.connection.rtt(),
        }
    }
}

/// A frame from the peer.
#[derive(Debug)]
pub struct InboundFrame {
    /// The frame.
    pub frame: Frame,
    /// How to answer, when the peer waits for one.
    pub reply: Option<Replier>,
}

/// Answers one request.
#[derive(Debug)]
pub struct Replier {
    link: Link,
    stream: SendStream,
}

impl Replier {
    /// Sends the answer.
    ///
    /// # Errors
    /// As [`Link::send`].
    pub async fn reply(self, frame: Frame) -> Result<()> {
        let pieces = frame.encode()?;
        let Self { link, mut stream } = self;
        let own = link.clone();
        link.beside_the_driver(async move { own.write(&mut stream, pieces).await }).await
    }
}

/// The frames that a peer sends, in the order in which they are complete.
#[derive(Debug)]
pub struct Inbound {
    frames: mpsc::Receiver<InboundFrame>,
}

impl Inbound {
    /// The next frame, or `None` when the link is closed.
    pub async fn next(&mut self) -> Option<InboundFrame> {
        self.frames.recv().await
    }
}

/// Accepts streams until the link closes. The number of streams is bounded by the connection's own limits.
async fn take_up(link: Link, sender: mpsc::Sender<InboundFrame>) {
    loop {
        let (receive, answer) = tokio::select! {
            stream = link.connection.accept_bi() => match stream {
                Ok((send, receive)) => (receive, Some(send)),
                Err(_) => return,
            },
            stream = link.connection.accept_uni() => match stream {
                Ok(receive) => (receive, None),
                Err(_) => return,
            },
        };
        tokio::spawn(read_one(link.clone(), sender.clone(), receive, answer));
    }
}

async fn read_one(
    link: Link,
    sender: mpsc::Sender<InboundFrame>,
    mut receive: RecvStream,
    answer: Option<SendStream>,
) {
    match read_frame(&mut receive).await {
        Ok(frame) => {
            let reply = answer.map(|stream| Replier { link, stream });
            drop(sender.send(InboundFrame { frame, reply }).await);
        }
        Err(error @ Error::Malformed { .. }) => {
            // A peer that does not speak our language is not listened to any longer.
            tracing::error!(peer = link.peer, %error, "link closed");
            link.close("malformed frame");
        }
        // It gave the stream up, or is gone.
        Err(_) => {}
    }
}

/// Reads one frame. Memory is reserved only after every length has been checked, and no more than the bound at once.
async fn read_frame(stream: &mut RecvStream) -> Result<Frame> {
    let mut fixed = [0; FIXED];
    exact(stream, &mut fixed).await?;
    let fixed = Fixed::decode(&fixed)?;
    let mut meta = vec![0; fixed.meta];
    exact(stream, &mut meta).await?;
    let mut heads = Vec::new();
    for _ in 0..fixed.parts {
        let mut start = [0; 2];
        exact(stream, &mut start).await?;
        let mut rest = vec![0; PartHead::rest(start[1])?];
        exact(stream, &mut rest).await?;
        heads.push(PartHead::decode(start[0], start[1], &rest)?);
    }
    check_total(&heads)?;
    let mut parts = Vec::with_capacity(heads.len());
    for head in heads {
        let data = read_part(stream, head.bytes as usize).await?;
        parts.push(Part { dtype: head.dtype, shape: head.shape, data });
    }
    Ok(fixed.frame(meta.into(), parts))
}

async fn read_part(stream: &mut RecvStream, bytes: usize) -> Result<Bytes> {
    let mut data = Vec::with_capacity(bytes.min(RESERVE_BYTES_MAX));
    while data.len() < bytes {
        match stream.read_chunk(bytes - data.len(), true).await {
            Ok(Some(chunk)) if data.is_empty() && chunk.bytes.len() == bytes => return Ok(chunk.bytes),
            Ok(Some(chunk)) => data.extend_from_slice(&chunk.bytes),
            Ok(None) => return Err(Error::malformed("frame", "it is cut short")),
            Err(error) => return Err(Error::connection("a stream", error)),
        }
    }
    Ok(data.into())
}

async fn exact(stream: &mut RecvStream, buffer: &mut [u8]) -> Result<()> {
    stream.read_exact(buffer).await.map_err(|error| match error {
        quinn::ReadExactError::FinishedEarly(_) => Error::malformed("frame", "it is cut short"),
        quinn::ReadExactError::ReadError(error) => Error::connection("a stream", error),
    })
}
