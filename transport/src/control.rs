//! The control stream: small typed messages, length first, ahead of all tensors.

use crate::error::{Error, Result};
use crate::limits::CONTROL_BYTES_MAX;
use crate::memory::{WordReceiver, WordSender};
use quinn::{RecvStream, SendStream};
use serde::Serialize;
use serde::de::DeserializeOwned;

fn encode<T: Serialize>(message: &T, most: usize) -> Result<Vec<u8>> {
    let body = postcard::to_stdvec(message).map_err(|e| Error::malformed("message", e.to_string()))?;
    check_length(body.len(), most)?;
    Ok(body)
}

fn decode<T: DeserializeOwned>(body: &[u8]) -> Result<T> {
    postcard::from_bytes(body).map_err(|error| Error::malformed("message", error.to_string()))
}

fn check_length(length: usize, most: usize) -> Result<()> {
    if length > most {
        return Err(Error::malformed("message", format!("{length} bytes, at most {most}")));
    }
    Ok(())
}

fn broken(error: impl ToString) -> Error {
    Error::connection("the control stream", error)
}

pub(crate) async fn write_message<T: Serialize>(
    send: &mut SendStream,
    message: &T,
    most: usize,
) -> Result<()> {
    let body = encode(message, most)?;
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
        Err(error) => return Err(broken(error)),
    }
    let length = u32::from_le_bytes(length) as usize;
    check_length(length, most)?;
    let mut body = vec![0; length];
    receive.read_exact(&mut body).await.map_err(broken)?;
    decode(&body).map(Some)
}

/// Ends a stream and waits until the peer has everything, or is gone.
pub(crate) async fn finish(mut stream: SendStream) {
    if stream.finish().is_ok() {
        drop(stream.stopped().await);
    }
}

/// The sending half.
#[derive(Debug)]
pub struct ControlSender(Sending);

#[derive(Debug)]
enum Sending {
    Quic(SendStream),
    Memory(WordSender),
}

impl ControlSender {
    pub(crate) fn new(stream: SendStream) -> Self {
        Self(Sending::Quic(stream))
    }

    pub(crate) fn in_memory(words: WordSender) -> Self {
        Self(Sending::Memory(words))
    }

    /// Sends a message.
    ///
    /// # Errors
    /// When it is over the bound or the connection is gone.
    pub async fn send<T: Serialize>(&mut self, message: &T) -> Result<()> {
        match &mut self.0 {
            Sending::Quic(stream) => write_message(stream, message, CONTROL_BYTES_MAX).await,
            Sending::Memory(words) => words.send(encode(message, CONTROL_BYTES_MAX)?).await,
        }
    }

    /// Ends the stream and waits until the peer has everything.
    pub async fn finish(self) {
        match self.0 {
            Sending::Quic(stream) => finish(stream).await,
            Sending::Memory(words) => drop(words),
        }
    }
}

/// The receiving half.
#[derive(Debug)]
pub struct ControlReceiver(Receiving);

#[derive(Debug)]
enum Receiving {
    Quic(RecvStream),
    Memory(WordReceiver),
}

impl ControlReceiver {
    pub(crate) fn new(stream: RecvStream) -> Self {
        Self(Receiving::Quic(stream))
    }

    pub(crate) fn in_memory(words: WordReceiver) -> Self {
        Self(Receiving::Memory(words))
    }

    /// The next message, or `None` at the stream's end.
    ///
    /// # Errors
    /// When what comes is no message, or the connection is gone.
    pub async fn recv<T: DeserializeOwned>(&mut self) -> Result<Option<T>> {
        match &mut self.0 {
            Receiving::Quic(stream) => read_message(stream, CONTROL_BYTES_MAX).await,
            Receiving::Memory(words) => words.recv().await?.as_deref().map(decode).transpose(),
        }
    }
}
