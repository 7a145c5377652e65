//! The control stream: small typed messages, length first, ahead of all tensors.

use crate::error::{Error, Result};
use crate::limits::CONTROL_BYTES_MAX;
use quinn::{RecvStream, SendStream};
use serde::Serialize;
use serde::de::DeserializeOwned;

pub(crate) async fn write_message<T: Serialize>(
    send: &mut SendStream,
    message: &T,
    most: usize,
) -> Result<()> {
    let body = postcard::to_stdvec(message).map_err(|e| Error::malformed("message", e.to_string()))?;
    if body.len() > most {
        return Err(Error::malformed("message", format!("{} bytes, at most {most}", body.len())));
    }
    let broken = |error: quinn::WriteError| Error::connection("the control stream", error);
    send.write_all(&(body.len() as u32).to_le_bytes()).await.map_err(broken)?;
    send.write_all(&body).await.map_err(broken)
}

/// The next message, or `None` when the peer has ended the stream between two.
pub(crate) async fn read_message<T: DeserializeOwned>(
    receive: &mut RecvStream,
    most: usize,
) -> Result<Option<T>> {
    let mut length = [0; 4];
    match receive.read_exact(&mut length).await {
        Ok(()) => {}
        Err(quinn::ReadExactError::FinishedEarly(0)) => return Ok(None),
        Err(error) => return Err(Error::connection("the control stream", error)),
    }
    let length = u32::from_le_bytes(length) as usize;
    if length > most {
        return Err(Error::malformed("message", format!("{length} bytes, at most {most}")));
    }
    let mut body = vec![0; length];
    receive.read_exact(&mut body).await.map_err(|error| Error::connection("the control stream", error))?;
    postcard::from_bytes(&body).map(Some).map_err(|error| Error::malformed("message", error.to_string()))
}

/// The sending half.
#[derive(Debug)]
pub struct ControlSender {
    pub(crate) stream: SendStream,
}

impl ControlSender {
    /// Sends a message.
    ///
    /// # Errors
    /// When it is over the bound or the connection is gone.
    pub async fn send<T: Serialize>(&mut self, message: &T) -> Result<()> {
        write_message(&mut self.stream, message, CONTROL_BYTES_MAX).await
    }

    /// Ends the stream and waits until the peer has everything.
    pub async fn finish(mut self) {
        if self.stream.finish().is_ok() {
            drop(self.stream.stopped().await);
        }
    }
}

/// The receiving half.
#[derive(Debug)]
pub struct ControlReceiver {
    pub(crate) stream: RecvStream,
}

impl ControlReceiver {
    /// The next message, or `None` at the stream's end.
    ///
    /// # Errors
    /// When what comes is no message, or the connection is gone.
    pub async fn recv<T: DeserializeOwned>(&mut self) -> Result<Option<T>> {
        read_message(&mut self.stream, CONTROL_BYTES_MAX).await
    }
}
