//! A QUIC connection that carries frames, each on a stream of its own.

use super::frames::{read_frame, read_frame_within};
use crate::accept::RefusedCount;
use crate::budget::ByteBudget;
use crate::error::{Error, Result};
use crate::frame::Frame;
use crate::identity::fingerprint;
use crate::limits::STALL_MAX;
use crate::link::{CloseReason, InboundFrame, LinkStats, Replier};
use crate::refusal::RefusalCode;
use crate::wire::{BoxFuture, ReplyStream, Wire};
use bytes::Bytes;
use quinn::{Connection, ConnectionError, RecvStream, SendStream, VarInt};
use rustls::pki_types::CertificateDer;
use std::net::SocketAddr;
use std::sync::atomic::Ordering;
use tokio::runtime::Handle;
use tokio::sync::mpsc;

/// A connection that carries frames; clones are handles of the same connection.
#[derive(Clone, Debug)]
pub(super) struct QuicWire {
    pub(super) connection: Connection,
    pub(super) peer: String,
    /// The socket's runtime: whole frames are written and read there, beside the connection's driver, so that
    /// a frame costs one thread switch instead of one per window of data.
    pub(super) runtime: Handle,
    pub(super) refused: RefusedCount,
}

struct AbortOnDrop<T>(tokio::task::JoinHandle<T>);

impl<T> Drop for AbortOnDrop<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Wire for QuicWire {
    fn request(&self, pieces: Vec<Bytes>) -> BoxFuture<'_, Result<Frame>> {
        let wire = self.clone();
        Box::pin(self.beside_the_driver(async move {
            let (mut send, mut receive) = wire.connection.open_bi().await.map_err(|e| wire.broken(e))?;
            wire.write(&mut send, pieces).await?;
            // The reply may take any time.
            read_frame(&mut receive, None).await
        }))
    }

    fn send(&self, pieces: Vec<Bytes>) -> BoxFuture<'_, Result<()>> {
        let wire = self.clone();
        Box::pin(self.beside_the_driver(async move {
            let mut send = wire.connection.open_uni().await.map_err(|e| wire.broken(e))?;
            wire.write(&mut send, pieces).await
        }))
    }

    fn serve(&self, frames: mpsc::Sender<InboundFrame>, budget: Option<ByteBudget>) {
        drop(self.runtime.spawn(self.clone().receive_frames(frames, budget)));
    }

    fn closed(&self) -> BoxFuture<'_, CloseReason> {
        Box::pin(async move { close_reason(&self.connection.closed().await) })
    }

    fn close_reason(&self) -> Option<CloseReason> {
        self.connection.close_reason().as_ref().map(close_reason)
    }

    fn close(&self, code: u32, reason: &str) {
        self.connection.close(VarInt::from_u32(code), reason.as_bytes());
    }

    fn stats(&self) -> LinkStats {
        let stats = self.connection.stats();
        LinkStats {
            bytes_sent: stats.udp_tx.bytes,
            bytes_received: stats.udp_rx.bytes,
            round_trip: self.connection.rtt(),
            lost_packets: stats.path.lost_packets,
            window: stats.path.cwnd,
        }
    }

    fn certificate(&self) -> Option<[u8; 32]> {
        peer_certificate(&self.connection).map(|certificate| fingerprint(&certificate))
    }

    fn remote_address(&self) -> SocketAddr {
        self.connection.remote_address()
    }
}

impl QuicWire {
    async fn beside_the_driver<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T>> + Send + 'static,
    ) -> Result<T> {
        // A caller that stops waiting cancels the stream too.
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

    /// Accepts streams until the connection closes. Its own limits bound the number of streams.
    async fn receive_frames(self, frames: mpsc::Sender<InboundFrame>, budget: Option<ByteBudget>) {
        loop {
            let (receive, reply) = tokio::select! {
                stream = self.connection.accept_bi() => match stream {
                    Ok((send, receive)) => (receive, Some(send)),
                    Err(_) => return,
                },
                stream = self.connection.accept_uni() => match stream {
                    Ok(receive) => (receive, None),
                    Err(_) => return,
                },
            };
            tokio::spawn(self.clone().receive_frame(frames.clone(), receive, reply, budget.clone()));
        }
    }

    async fn receive_frame(
        self,
        frames: mpsc::Sender<InboundFrame>,
        mut receive: RecvStream,
        reply: Option<SendStream>,
        budget: Option<ByteBudget>,
    ) {
        match read_frame_within(&mut receive, Some(STALL_MAX), budget.as_ref()).await {
            Ok((frame, permit)) => {
                let reply = reply.map(|stream| Replier::new(QuicReply { wire: self, stream }));
                drop(frames.send(InboundFrame { frame, reply, permit }).await);
            }
            Err(error @ Error::Malformed { .. }) => {
                tracing::error!(peer = self.peer, %error, "link closed");
                self.refused.fetch_add(1, Ordering::Relaxed);
                self.close(RefusalCode::Malformed.into(), "malformed frame");
            }
            // The peer reset the stream, or is disconnected.
            Err(_) => {}
        }
    }
}

/// The reply side of one request.
#[derive(Debug)]
struct QuicReply {
    wire: QuicWire,
    stream: SendStream,
}

impl ReplyStream for QuicReply {
    fn reply(self: Box<Self>, pieces: Vec<Bytes>) -> BoxFuture<'static, Result<()>> {
        let Self { wire, mut stream } = *self;
        Box::pin(async move {
            let writer = wire.clone();
            wire.beside_the_driver(async move { writer.write(&mut stream, pieces).await }).await
        })
    }
}

/// The peer's own certificate, if it has presented one; it is the authority's, or there would be no
/// connection.
pub(super) fn peer_certificate(connection: &Connection) -> Option<CertificateDer<'static>> {
    let chain = connection.peer_identity()?.downcast::<Vec<CertificateDer<'static>>>().ok()?;
    chain.first().cloned()
}

fn close_reason(error: &ConnectionError) -> CloseReason {
    match error {
        ConnectionError::LocallyClosed => CloseReason::Local,
        ConnectionError::TimedOut => CloseReason::TimedOut,
        ConnectionError::ApplicationClosed(close) => CloseReason::Peer {
            code: u32::try_from(close.error_code.into_inner()).unwrap_or(u32::MAX),
            reason: String::from_utf8_lossy(&close.reason).into_owned(),
        },
        other => CloseReason::Broken(other.to_string()),
    }
}
