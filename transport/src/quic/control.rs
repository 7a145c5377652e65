//! The control stream over QUIC: each message after its length, ahead of all other streams.

use crate::control::{ControlReceiver, ControlSender, check_length};
use crate::error::{Error, Result};
use crate::wire::{BoxFuture, Control, MessageReceiver, MessageSender};
use quinn::{RecvStream, SendStream};

/// Priority over the streams of frames, which have 0.
const CONTROL_PRIORITY: i32 = 1;

/// Both halves of a control stream that was just opened.
pub(super) fn control_stream((send, receive): (SendStream, RecvStream)) -> Control {
    // It fails on a closed stream, and then the first write does too.
    let _ = send.set_priority(CONTROL_PRIORITY);
    (ControlSender::new(QuicSender(send)), ControlReceiver::new(QuicReceiver(receive)))
}

#[derive(Debug)]
struct QuicSender(SendStream);

impl MessageSender for QuicSender {
    fn send(&mut self, message: Vec<u8>) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            self.0.write_all(&(message.len() as u32).to_le_bytes()).await.map_err(broken)?;
            self.0.write_all(&message).await.map_err(broken)
        })
    }

    fn finish(mut self: Box<Self>) -> BoxFuture<'static, ()> {
        Box::pin(async move {
            if self.0.finish().is_ok() {
                drop(self.0.stopped().await);
            }
        })
    }
}

#[derive(Debug)]
struct QuicReceiver(RecvStream);

impl MessageReceiver for QuicReceiver {
    fn receive(&mut self, bytes_max: usize) -> BoxFuture<'_, Result<Option<Vec<u8>>>> {
        Box::pin(async move {
            let mut length = [0; 4];
            match self.0.read_exact(&mut length).await {
                Ok(()) => {}
                Err(quinn::ReadExactError::FinishedEarly(0)) => return Ok(None),
                Err(error) => return Err(broken(error)),
            }
            let length = u32::from_le_bytes(length) as usize;
            check_length(length, bytes_max)?;
            let mut body = vec![0; length];
            self.0.read_exact(&mut body).await.map_err(broken)?;
            Ok(Some(body))
        })
    }
}

/// quinn says only that a connection is lost, and why in the error below that.
fn broken(error: impl std::error::Error) -> Error {
    let mut reason = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        reason = error.to_string();
        cause = error.source();
    }
    Error::connection("the control stream", reason)
}
