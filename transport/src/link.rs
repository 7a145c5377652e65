//! A link to one authenticated peer: requests with answers, frames without, each on a stream of its own, so that a big
//! one never holds up a small one.
//!
//! Two wires carry links: QUIC, and [`crate::memory`] for tests. Their promises are the same.

use crate::accept::{Refused, presented};
use crate::control::{ControlReceiver, ControlSender};
use crate::error::{Error, Result};
use crate::frame::Frame;
use crate::identity::fingerprint;
use crate::limits::INBOUND_MAX;
use crate::memory;
use crate::stream;
use quinn::{Connection, SendStream, VarInt};
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::sync::mpsc;

/// The control stream goes before everything else.
pub(crate) const CONTROL_PRIORITY: i32 = 1;

type Control = (ControlSender, ControlReceiver);

/// A link to one peer; clones are the same link, which ends with the last of them.
#[derive(Clone, Debug)]
pub struct Link {
    wire: Wire,
    peer: String,
    control: Arc<Mutex<Option<Control>>>,
}

#[derive(Clone, Debug)]
enum Wire {
    Quic(stream::Wire),
    Memory(memory::End),
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
    /// Packets that were lost on the way and sent again.
    pub lost_packets: u64,
    /// Bytes that may be on their way at a time, as congestion control sees it.
    pub window: u64,
}

impl Link {
    pub(crate) fn new(connection: Connection, peer: String, runtime: Handle, refused: Refused) -> Self {
        let wire = stream::Wire { connection, peer: peer.clone(), runtime, refused };
        Self { wire: Wire::Quic(wire), peer, control: Arc::default() }
    }

    pub(crate) fn in_memory(end: memory::End, peer: String) -> Self {
        Self { wire: Wire::Memory(end), peer, control: Arc::default() }
    }

    pub(crate) fn with_control(self, sender: ControlSender, receiver: ControlReceiver) -> Self {
        Self { control: Arc::new(Mutex::new(Some((sender, receiver)))), ..self }
    }

    /// The control stream between two nodes; `None` once it is taken, and where it was handed out with the link.
    #[must_use]
    pub fn control(&self) -> Option<Control> {
        self.control.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// The peer's proven name.
    #[must_use]
    pub fn peer(&self) -> &str {
        &self.peer
    }

    /// Where the peer is; port 0 of localhost in memory.
    #[must_use]
    pub fn remote_address(&self) -> SocketAddr {
        match &self.wire {
            Wire::Quic(wire) => wire.connection.remote_address(),
            Wire::Memory(_) => (Ipv4Addr::LOCALHOST, 0).into(),
        }
    }

    /// Sends a frame and awaits the answer on the same stream.
    ///
    /// # Errors
    /// When the frame is over a bound, the connection breaks, or the answer is malformed.
    pub async fn request(&self, frame: Frame) -> Result<Frame> {
        let pieces = frame.encode()?;
        match &self.wire {
            Wire::Quic(wire) => wire.request(pieces).await,
            Wire::Memory(end) => end.request(frame, &pieces).await,
        }
    }

    /// [`Link::request`], given up when there is no answer within `limit`; the peer may have acted on it all the same.
    ///
    /// # Errors
    /// As [`Link::request`], and when the time is over.
    pub async fn request_within(&self, frame: Frame, limit: Duration) -> Result<Frame> {
        let answer = tokio::time::timeout(limit, self.request(frame)).await;
        answer.unwrap_or_else(|_| {
            Err(Error::connection(self.peer.clone(), format!("no answer within {limit:?}")))
        })
    }

    /// Sends a frame that has no answer; returns when all of it is on its way.
    ///
    /// # Errors
    /// As [`Link::request`].
    pub async fn send(&self, frame: Frame) -> Result<()> {
        let pieces = frame.encode()?;
        match &self.wire {
            Wire::Quic(wire) => wire.send(pieces).await,
            Wire::Memory(end) => end.send(frame, &pieces).await,
        }
    }

    /// Takes up the frames that the peer sends. To be called once.
    #[must_use]
    pub fn serve(&self) -> Inbound {
        let (sender, frames) = mpsc::channel(INBOUND_MAX);
        match &self.wire {
            Wire::Quic(wire) => drop(wire.runtime.spawn(wire.clone().take_up(sender))),
            Wire::Memory(end) => drop(tokio::spawn(end.clone().take_up(sender))),
        }
        Inbound { frames }
    }

    /// Waits until the link is closed, and says why.
    pub async fn closed(&self) -> String {
        match &self.wire {
            Wire::Quic(wire) => wire.connection.closed().await.to_string(),
            Wire::Memory(end) => end.closed().await,
        }
    }

    /// Whether the link still holds, as far as this end knows.
    #[must_use]
    pub fn is_open(&self) -> bool {
        match &self.wire {
            Wire::Quic(wire) => wire.connection.close_reason().is_none(),
            Wire::Memory(end) => end.is_open(),
        }
    }

    /// Whether both are handles of one link.
    #[must_use]
    pub fn same_as(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.control, &other.control)
    }

    /// Closes the link.
    pub fn close(&self, reason: &str) {
        self.close_with(0, reason);
    }

    /// Closes the link with a number for the peer's program and a reason for its log.
    pub fn close_with(&self, code: u32, reason: &str) {
        match &self.wire {
            Wire::Quic(wire) => wire.connection.close(VarInt::from_u32(code), reason.as_bytes()),
            Wire::Memory(end) => end.close(code, reason),
        }
    }

    /// The SHA-256 hash of the certificate that the other end has shown; none in memory, and of operators.
    #[must_use]
    pub fn certificate(&self) -> Option<[u8; 32]> {
        match &self.wire {
            Wire::Quic(wire) => presented(&wire.connection).map(|certificate| fingerprint(&certificate)),
            Wire::Memory(_) => None,
        }
    }

    /// What the link has carried.
    #[must_use]
    pub fn stats(&self) -> LinkStats {
        match &self.wire {
            Wire::Quic(wire) => {
                let stats = wire.connection.stats();
                LinkStats {
                    bytes_sent: stats.udp_tx.bytes,
                    bytes_received: stats.udp_rx.bytes,
                    round_trip: wire.connection.rtt(),
                    lost_packets: stats.path.lost_packets,
                    window: stats.path.cwnd,
                }
            }
            Wire::Memory(end) => end.stats(),
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

/// Answers one request; dropped without an answer, the request fails.
#[derive(Debug)]
pub struct Replier(Answering);

#[derive(Debug)]
enum Answering {
    Quic { wire: stream::Wire, stream: SendStream },
    Memory(memory::Answer),
}

impl Replier {
    pub(crate) fn over_quic(wire: stream::Wire, stream: SendStream) -> Self {
        Self(Answering::Quic { wire, stream })
    }

    pub(crate) fn in_memory(answer: memory::Answer) -> Self {
        Self(Answering::Memory(answer))
    }

    /// Sends the answer.
    ///
    /// # Errors
    /// As [`Link::send`].
    pub async fn reply(self, frame: Frame) -> Result<()> {
        let pieces = frame.encode()?;
        match self.0 {
            Answering::Quic { wire, stream } => wire.answer(stream, pieces).await,
            Answering::Memory(answer) => answer.give(frame, &pieces).await,
        }
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
