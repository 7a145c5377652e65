//! Detects the death of a process at once, by a TCP connection that its kernel closes.
//!
//! QUIC detects a death by silence alone, with a timeout that must be long enough for a busy machine. The
//! kernel closes the TCP connections of a dead process within milliseconds. A connection carries only a
//! secret key that its owner got over QUIC; without one the port is useless.

use crate::error::{Error, Result};
use crate::limits::{CANARY_KEY_MAX, CANARY_STRANGERS_MAX};
use parking_lot::Mutex;
use rustls::crypto::ring::default_provider;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, oneshot};

const KEY_BYTES: usize = 16;

/// The secret key of one connection to a canary.
#[derive(Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct CanaryKey([u8; KEY_BYTES]);

impl fmt::Debug for CanaryKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("CanaryKey")
    }
}

impl CanaryKey {
    fn draw() -> Result<Self> {
        let mut bytes = [0; KEY_BYTES];
        let random = default_provider().secure_random;
        random.fill(&mut bytes).map_err(|_| Error::identity("the machine provides no random numbers"))?;
        Ok(Self(bytes))
    }
}

/// The expected connections by their keys. Each side holds a channel half that is dropped at its end.
type Expected = Arc<Mutex<HashMap<CanaryKey, (oneshot::Sender<()>, oneshot::Receiver<()>)>>>;

/// The listening end. It closes when it is dropped.
#[derive(Debug)]
pub struct Canary {
    address: SocketAddr,
    expected: Expected,
    listener: tokio::task::JoinHandle<()>,
}

impl Drop for Canary {
    fn drop(&mut self) {
        self.listener.abort();
    }
}

impl Canary {
    /// Listens on a TCP port, or on any free port of the same host if it is in use. Call it in a tokio
    /// runtime.
    ///
    /// # Errors
    /// [`Error::Bind`] when the host has no free port.
    pub fn listen(address: SocketAddr) -> Result<Self> {
        let bind = |address: SocketAddr| {
            let listener = std::net::TcpListener::bind(address)?;
            listener.set_nonblocking(true)?;
            let address = listener.local_addr()?;
            Ok::<_, std::io::Error>((TcpListener::from_std(listener)?, address))
        };
        let bound = bind(address).or_else(|_| bind(SocketAddr::new(address.ip(), 0)));
        let (listener, address) =
            bound.map_err(|error| Error::Bind { address, reason: error.to_string() })?;
        let expected = Expected::default();
        let listener = tokio::spawn(accept(listener, Arc::clone(&expected)));
        Ok(Self { address, expected, listener })
    }

    /// The listening address.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// A key for one connection, and the watch that detects its end.
    ///
    /// # Errors
    /// [`Error::Identity`] when the machine provides no random numbers.
    pub fn expect(&self) -> Result<(CanaryKey, CanaryWatch)> {
        let key = CanaryKey::draw()?;
        let (held, ended) = oneshot::channel();
        let (alive, dropped) = oneshot::channel();
        self.expected.lock().insert(key.clone(), (held, dropped));
        let watch =
            CanaryWatch { key: key.clone(), ended, expected: Arc::clone(&self.expected), _alive: alive };
        Ok((key, watch))
    }
}

/// Detects the end of one connection. The connection closes when the watch is dropped.
#[derive(Debug)]
pub struct CanaryWatch {
    key: CanaryKey,
    ended: oneshot::Receiver<()>,
    expected: Expected,
    _alive: oneshot::Sender<()>,
}

impl CanaryWatch {
    /// Resolves when the connection with the key has ended; never if there was none.
    pub async fn ended(&mut self) {
        // Nothing is ever sent: the other half is dropped with the connection.
        let _ = (&mut self.ended).await;
    }
}

impl Drop for CanaryWatch {
    fn drop(&mut self) {
        self.expected.lock().remove(&self.key);
    }
}

async fn accept(listener: TcpListener, expected: Expected) {
    let strangers = Arc::new(Semaphore::new(CANARY_STRANGERS_MAX));
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            // Most likely out of file descriptors; existing connections stay.
            tokio::time::sleep(CANARY_KEY_MAX).await;
            continue;
        };
        let Ok(place) = Arc::clone(&strangers).try_acquire_owned() else { continue };
        let expected = Arc::clone(&expected);
        tokio::spawn(async move {
            let mut stream = stream;
            let Some((held, dropped)) = present_key(&mut stream, &expected).await else { return };
            drop(place);
            // Nothing more is expected: a byte ends the connection as its close does.
            tokio::select! {
                _ = stream.read_u8() => {}
                _ = dropped => {}
            }
            drop(held);
        });
    }
}

async fn present_key(
    stream: &mut TcpStream,
    expected: &Expected,
) -> Option<(oneshot::Sender<()>, oneshot::Receiver<()>)> {
    let mut key = [0; KEY_BYTES];
    tokio::time::timeout(CANARY_KEY_MAX, stream.read_exact(&mut key)).await.ok()?.ok()?;
    // A hash map with a random seed: the timing of a lookup reveals nothing about a 128-bit secret.
    expected.lock().remove(&CanaryKey(key))
}

/// The connecting end.
#[derive(Debug)]
pub struct CanaryHeld {
    stream: TcpStream,
}

impl CanaryHeld {
    /// Resolves when the listening end has closed the connection.
    pub async fn ended(&mut self) {
        let _ = self.stream.read_u8().await;
    }
}

/// Connects to a canary and presents the key.
///
/// # Errors
/// [`Error::Connection`] when no process listens there.
pub async fn hold(address: SocketAddr, key: &CanaryKey) -> Result<CanaryHeld> {
    let broken = |error: std::io::Error| Error::connection(format!("the canary at {address}"), error);
    let connecting = TcpStream::connect(address);
    let connected = tokio::time::timeout(CANARY_KEY_MAX, connecting).await;
    let timed_out = || Error::connection(format!("the canary at {address}"), "no answer");
    let mut stream = connected.map_err(|_| timed_out())?.map_err(broken)?;
    stream.write_all(&key.0).await.map_err(broken)?;
    Ok(CanaryHeld { stream })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    const SOON: Duration = Duration::from_millis(500);

    fn listen() -> Canary {
        Canary::listen(([127, 0, 0, 1], 0).into()).unwrap()
    }

    #[tokio::test]
    async fn the_close_of_either_end_is_detected_at_once() {
        let canary = listen();
        let (key, mut watch) = canary.expect().unwrap();
        let held = hold(canary.address(), &key).await.unwrap();
        assert!(tokio::time::timeout(SOON, watch.ended()).await.is_err(), "it is open");
        drop(held);
        tokio::time::timeout(SOON, watch.ended()).await.expect("its close is detected");

        let (key, watch) = canary.expect().unwrap();
        let mut held = hold(canary.address(), &key).await.unwrap();
        tokio::time::sleep(SOON / 10).await;
        drop(watch);
        tokio::time::timeout(SOON, held.ended()).await.expect("the listener's close is detected");
    }

    #[tokio::test]
    async fn an_unknown_key_closes_no_other_connection() {
        let canary = listen();
        let (key, mut watch) = canary.expect().unwrap();
        let _held = hold(canary.address(), &key).await.unwrap();
        let mut stranger = hold(canary.address(), &CanaryKey([7; KEY_BYTES])).await.unwrap();
        tokio::time::timeout(SOON, stranger.ended()).await.expect("it is refused");
        // A key is valid once.
        let mut second = hold(canary.address(), &key).await.unwrap();
        tokio::time::timeout(SOON, second.ended()).await.expect("it is refused");
        assert!(tokio::time::timeout(SOON, watch.ended()).await.is_err(), "the first one is open");
    }

    #[tokio::test]
    async fn a_connection_without_a_key_is_closed() {
        let canary = listen();
        let mut silent = TcpStream::connect(canary.address()).await.unwrap();
        let cut = tokio::time::timeout(CANARY_KEY_MAX * 2, silent.read_u8()).await;
        assert!(cut.expect("it is closed").is_err());
    }

    #[test]
    fn a_key_is_hidden_in_debug_output() {
        assert_eq!(format!("{:?}", CanaryKey([1; KEY_BYTES])), "CanaryKey");
    }
}
