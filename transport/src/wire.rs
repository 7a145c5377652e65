//! The connection below a link, as object-safe traits: QUIC implements them, and so does the in-memory
//! network of the tests.

use crate::budget::ByteBudget;
use crate::control::{ControlReceiver, ControlSender};
use crate::error::Result;
use crate::frame::Frame;
use crate::link::{CloseReason, InboundFrame, LinkStats};
use bytes::Bytes;
use std::fmt::Debug;
use std::net::SocketAddr;
use std::pin::Pin;
use tokio::sync::mpsc;

/// A boxed future, so that a trait with asynchronous methods stays object-safe.
pub(crate) type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// Both halves of a control stream.
pub(crate) type Control = (ControlSender, ControlReceiver);

/// A connection to one peer. It closes when its last handle is dropped.
pub(crate) trait Wire: Debug + Send + Sync {
    /// Sends a frame, as [`Frame::encode`] returns it, and waits for the reply on the same stream.
    fn request(&self, pieces: Vec<Bytes>) -> BoxFuture<'_, Result<Frame>>;

    /// Sends a frame without a reply; resolves when all of it is handed to the connection.
    fn send(&self, pieces: Vec<Bytes>) -> BoxFuture<'_, Result<()>>;

    /// Starts a task that passes the peer's frames to `frames` until the connection closes. The bytes of a
    /// frame's tensors are taken from the budget before they are read.
    fn serve(&self, frames: mpsc::Sender<InboundFrame>, budget: Option<ByteBudget>);

    /// Waits until the connection is closed.
    fn closed(&self) -> BoxFuture<'_, CloseReason>;

    /// Why the connection is closed; `None` while it is open.
    fn close_reason(&self) -> Option<CloseReason>;

    /// Closes the connection with a code for the peer's program and a reason for its log.
    fn close(&self, code: u32, reason: &str);

    fn stats(&self) -> LinkStats;

    /// The SHA-256 hash of the peer's certificate, if it has presented one.
    fn certificate(&self) -> Option<[u8; 32]>;

    fn remote_address(&self) -> SocketAddr;
}

/// The reply side of one request; the request fails when it is dropped.
pub(crate) trait ReplyStream: Debug + Send {
    fn reply(self: Box<Self>, pieces: Vec<Bytes>) -> BoxFuture<'static, Result<()>>;
}

/// The sending half of a control stream: whole messages in order.
pub(crate) trait MessageSender: Debug + Send {
    fn send(&mut self, message: Vec<u8>) -> BoxFuture<'_, Result<()>>;

    /// Ends the stream and waits until the peer has received everything, or is disconnected.
    fn finish(self: Box<Self>) -> BoxFuture<'static, ()>;
}

/// The receiving half of a control stream.
pub(crate) trait MessageReceiver: Debug + Send {
    /// The next message of at most `bytes_max` bytes, or `None` at the end of the stream.
    fn receive(&mut self, bytes_max: usize) -> BoxFuture<'_, Result<Option<Vec<u8>>>>;
}
