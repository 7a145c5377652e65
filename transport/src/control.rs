//! The control stream: small typed messages, ordered, ahead of all tensors.

use crate::error::{Error, Result};
use crate::limits::CONTROL_BYTES_MAX;
use crate::wire::{MessageReceiver, MessageSender};
use serde::Serialize;
use serde::de::DeserializeOwned;

fn encode<T: Serialize>(message: &T, bytes_max: usize) -> Result<Vec<u8>> {
    let body = postcard::to_stdvec(message).map_err(|e| Error::malformed("message", e.to_string()))?;
    if body.len() > bytes_max {
        return Err(Error::too_large(format!("a message of {} bytes, at most {bytes_max}", body.len())));
    }
    Ok(body)
}

fn decode<T: DeserializeOwned>(body: &[u8]) -> Result<T> {
    postcard::from_bytes(body).map_err(|error| Error::malformed("message", error.to_string()))
}

pub(crate) fn check_length(length: usize, bytes_max: usize) -> Result<()> {
    if length > bytes_max {
        return Err(Error::malformed("message", format!("{length} bytes, at most {bytes_max}")));
    }
    Ok(())
}

/// The sending half of a control stream.
#[derive(Debug)]
pub struct ControlSender(Box<dyn MessageSender>);

impl ControlSender {
    pub(crate) fn new(messages: impl MessageSender + 'static) -> Self {
        Self(Box::new(messages))
    }

    /// Sends a message.
    ///
    /// # Errors
    /// [`Error::TooLarge`] when it is larger than [`CONTROL_BYTES_MAX`], [`Error::Connection`] when the
    /// connection is closed.
    pub async fn send<T: Serialize>(&mut self, message: &T) -> Result<()> {
        self.send_within(message, CONTROL_BYTES_MAX).await
    }

    /// [`ControlSender::send`] with a bound of its own.
    pub(crate) async fn send_within<T: Serialize>(&mut self, message: &T, bytes_max: usize) -> Result<()> {
        let message = encode(message, bytes_max)?;
        self.0.send(message).await
    }

    /// Ends the stream and waits until the peer has received everything.
    pub async fn finish(self) {
        self.0.finish().await;
    }
}

/// The receiving half of a control stream.
#[derive(Debug)]
pub struct ControlReceiver(Box<dyn MessageReceiver>);

impl ControlReceiver {
    pub(crate) fn new(messages: impl MessageReceiver + 'static) -> Self {
        Self(Box::new(messages))
    }

    /// The next message, or `None` at the end of the stream. Not cancel-safe: a message may be lost with a
    /// dropped future.
    ///
    /// # Errors
    /// [`Error::Malformed`] when the bytes are not such a message, [`Error::Connection`] when the connection
    /// is closed.
    pub async fn recv<T: DeserializeOwned>(&mut self) -> Result<Option<T>> {
        self.recv_bytes(CONTROL_BYTES_MAX).await?.as_deref().map(decode).transpose()
    }

    /// The next message as it is encoded.
    pub(crate) async fn recv_bytes(&mut self, bytes_max: usize) -> Result<Option<Vec<u8>>> {
        self.0.receive(bytes_max).await
    }
}
