//! A link to one authenticated peer: requests with replies and frames without, each on a stream of its own,
//! so that a large frame never blocks a small one.

use crate::budget::{ByteBudget, BytePermit};
use crate::control::{ControlReceiver, ControlSender};
use crate::error::{Error, Result};
use crate::frame::Frame;
use crate::limits::INBOUND_MAX;
use crate::refusal::{Refusal, RefusalCode};
use crate::wire::{Control, ReplyStream, Wire};
use parking_lot::Mutex;
use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;

/// The code of a close that is neither an error nor a refusal.
pub(crate) const CLOSE_NORMAL: u32 = 0;

/// A link to one peer. Clones are handles of the same link; it closes when the last of them is dropped.
#[derive(Clone, Debug)]
pub struct Link {
    wire: Arc<dyn Wire>,
    peer: String,
    control: Arc<Mutex<Option<Control>>>,
}

/// Traffic of a link since its start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LinkStats {
    /// UDP bytes sent.
    pub bytes_sent: u64,
    /// UDP bytes received.
    pub bytes_received: u64,
    /// The current estimate of the round-trip time.
    pub round_trip: Duration,
    /// Packets that were lost and retransmitted.
    pub lost_packets: u64,
    /// The congestion window in bytes.
    pub window: u64,
}

/// Why a link is closed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CloseReason {
    /// This end closed it.
    Local,
    /// The peer closed it.
    Peer {
        /// The peer's code: 0, or a [`RefusalCode`].
        code: u32,
        /// The peer's reason; may be empty.
        reason: String,
    },
    /// Nothing arrived within the idle timeout.
    TimedOut,
    /// The connection broke otherwise, e.g. with a reset.
    Broken(String),
}

impl CloseReason {
    /// The code, where the peer closed the link with a refusal.
    #[must_use]
    pub fn refusal_code(&self) -> Option<RefusalCode> {
        match self {
            Self::Peer { code, .. } => RefusalCode::from_close_code(*code),
            _ => None,
        }
    }
}

impl fmt::Display for CloseReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Local => f.write_str("closed"),
            Self::Peer { code, reason } if reason.is_empty() => write!(f, "closed by peer: {code}"),
            Self::Peer { code, reason } => write!(f, "closed by peer: {reason} (code {code})"),
            Self::TimedOut => f.write_str("timed out"),
            Self::Broken(reason) => f.write_str(reason),
        }
    }
}

impl Link {
    pub(crate) fn new(wire: Arc<dyn Wire>, peer: String) -> Self {
        Self { wire, peer, control: Arc::default() }
    }

    pub(crate) fn with_control(self, sender: ControlSender, receiver: ControlReceiver) -> Self {
        Self { control: Arc::new(Mutex::new(Some((sender, receiver)))), ..self }
    }

    /// Takes the control stream between two nodes. `None` when it is already taken, and on links that were
    /// returned together with their control stream.
    #[must_use]
    pub fn take_control(&self) -> Option<Control> {
        self.control.lock().take()
    }

    /// The peer's proven name.
    #[must_use]
    pub fn peer(&self) -> &str {
        &self.peer
    }

    /// The peer's address.
    #[must_use]
    pub fn remote_address(&self) -> SocketAddr {
        self.wire.remote_address()
    }

    /// Sends a frame and waits for the reply on the same stream.
    ///
    /// # Errors
    /// [`Error::TooLarge`] when the frame exceeds a bound, [`Error::Malformed`] when the reply is malformed,
    /// [`Error::Connection`] when the link is closed.
    pub async fn request(&self, frame: Frame) -> Result<Frame> {
        self.wire.request(frame.encode()?).await
    }

    /// [`Link::request`] with a timeout; the peer may have processed the request all the same.
    ///
    /// # Errors
    /// As [`Link::request`], and when there is no reply within `limit`.
    pub async fn request_within(&self, frame: Frame, limit: Duration) -> Result<Frame> {
        let reply = tokio::time::timeout(limit, self.request(frame)).await;
        reply.unwrap_or_else(|_| {
            Err(Error::connection(self.peer.clone(), format!("no answer within {limit:?}")))
        })
    }

    /// Sends a frame without a reply; resolves when all of it is handed to the connection.
    ///
    /// # Errors
    /// As [`Link::request`].
    pub async fn send(&self, frame: Frame) -> Result<()> {
        self.wire.send(frame.encode()?).await
    }

    /// Starts to receive the peer's frames. Call it once.
    #[must_use]
    pub fn serve(&self) -> Inbound {
        self.serve_within(None)
    }

    /// [`Link::serve`], where the frames' bytes are taken from a budget before they are read.
    #[must_use]
    pub fn serve_within(&self, budget: Option<ByteBudget>) -> Inbound {
        let (sender, frames) = mpsc::channel(INBOUND_MAX);
        self.wire.serve(sender, budget);
        Inbound { frames }
    }

    /// Waits until the link is closed.
    pub async fn closed(&self) -> CloseReason {
        self.wire.closed().await
    }

    /// Why the link is closed; `None` while it is open, as far as this end knows.
    #[must_use]
    pub fn close_reason(&self) -> Option<CloseReason> {
        self.wire.close_reason()
    }

    /// Whether the link is open, as far as this end knows.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.close_reason().is_none()
    }

    /// Whether both are handles of the same link.
    #[must_use]
    pub fn same_as(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.control, &other.control)
    }

    /// Closes the link normally.
    pub fn close(&self, reason: &str) {
        self.close_with(CLOSE_NORMAL, reason);
    }

    /// Closes the link as refused: the peer's [`CloseReason`] has the code.
    pub fn refuse(&self, refusal: &Refusal) {
        self.close_with(refusal.code.into(), &refusal.reason);
    }

    /// Closes the link with a code for the peer's program and a reason for its log.
    pub fn close_with(&self, code: u32, reason: &str) {
        self.wire.close(code, reason);
    }

    /// The SHA-256 hash of the peer's certificate; `None` for operators, who have no certificate.
    #[must_use]
    pub fn certificate(&self) -> Option<[u8; 32]> {
        self.wire.certificate()
    }

    /// Traffic since the link's start.
    #[must_use]
    pub fn stats(&self) -> LinkStats {
        self.wire.stats()
    }
}

/// A frame from the peer.
#[derive(Debug)]
pub struct InboundFrame {
    /// The frame.
    pub frame: Frame,
    /// The reply side, when the peer waits for a reply.
    pub reply: Option<Replier>,
    /// Its bytes of the budget, if there is one.
    pub permit: Option<BytePermit>,
}

/// Replies to one request; the request fails when it is dropped.
#[derive(Debug)]
pub struct Replier(Box<dyn ReplyStream>);

impl Replier {
    pub(crate) fn new(stream: impl ReplyStream + 'static) -> Self {
        Self(Box::new(stream))
    }

    /// Sends the reply.
    ///
    /// # Errors
    /// As [`Link::send`].
    pub async fn reply(self, frame: Frame) -> Result<()> {
        self.0.reply(frame.encode()?).await
    }
}

/// The frames from the peer, in the order in which they were complete.
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
