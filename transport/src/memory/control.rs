//! Control messages in memory.

use super::channel::{Guard, due};
use crate::control::{ControlReceiver, ControlSender, check_length};
use crate::error::{Error, Result};
use crate::limits::CONTROL_AHEAD_MAX;
use crate::wire::{BoxFuture, MessageReceiver, MessageSender};
use std::sync::Arc;
use tokio::sync::mpsc;
use tokio::time::Instant;

type Message = (Instant, Vec<u8>);

/// One direction of a control stream, from one end to the other.
pub(super) fn stream(from: &Arc<Guard>, to: &Arc<Guard>) -> (ControlSender, ControlReceiver) {
    let (sender, receiver) = mpsc::channel(CONTROL_AHEAD_MAX);
    let sender = MemorySender { guard: Arc::clone(from), messages: sender, due: Instant::now() };
    let receiver = MemoryReceiver { guard: Arc::clone(to), messages: receiver };
    (ControlSender::new(sender), ControlReceiver::new(receiver))
}

#[derive(Debug)]
struct MemorySender {
    guard: Arc<Guard>,
    messages: mpsc::Sender<Message>,
    /// The arrival time of the last message.
    due: Instant,
}

impl MessageSender for MemorySender {
    fn send(&mut self, message: Vec<u8>) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            // Messages keep their order, whatever their delays.
            self.due = self.due.max(due(self.guard.pass().await.map_err(broken)?));
            tokio::select! {
                biased;
                reason = self.guard.closed() => Err(broken(reason)),
                sent = self.messages.send((self.due, message)) => sent.map_err(|_| broken("stopped by peer")),
            }
        })
    }

    fn finish(self: Box<Self>) -> BoxFuture<'static, ()> {
        Box::pin(async move {
            // All places are free when the peer has taken every message. A link that closes earlier has
            // nothing more to wait for.
            if self.guard.await_due(self.due).await.is_err() {
                return;
            }
            tokio::select! {
                biased;
                _ = self.guard.closed() => {}
                places = self.messages.reserve_many(CONTROL_AHEAD_MAX) => drop(places),
            }
        })
    }
}

#[derive(Debug)]
struct MemoryReceiver {
    guard: Arc<Guard>,
    messages: mpsc::Receiver<Message>,
}

impl MessageReceiver for MemoryReceiver {
    /// A close overtakes what was sent just before it, as it may over QUIC.
    fn receive(&mut self, bytes_max: usize) -> BoxFuture<'_, Result<Option<Vec<u8>>>> {
        Box::pin(async move {
            let message = tokio::select! {
                biased;
                reason = self.guard.closed() => return Err(broken(reason)),
                message = self.messages.recv() => message,
            };
            let Some((due, message)) = message else {
                return Ok(None);
            };
            self.guard.await_due(due).await.map_err(broken)?;
            check_length(message.len(), bytes_max)?;
            Ok(Some(message))
        })
    }
}

fn broken(reason: impl ToString) -> Error {
    Error::connection("the control stream", reason)
}
