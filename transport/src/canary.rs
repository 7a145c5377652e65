//! Notices at once that a process has died: by a TCP connection whose other end the kernel closes.
//!
//! QUIC learns of a death by silence alone, which must be long enough for a busy machine. A kernel that lives ends the
//! connections of a process that does not, within milliseconds. A connection says nothing but a secret that its owner
//! got over QUIC; to a stranger the port is good for nothing.

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

/// The secret that a canary is known by.
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
        random.fill(&mut bytes).map_err(|_| Error::identity("the machine gives no random numbers"))?;
        Ok(Self(bytes))
    }
}

/// Who is waited for: dropped when its canary ends, which its watch notices.
type Expected = Arc<Mutex<HashMap<CanaryKey, (oneshot::Sender<()>, oneshot::Receiver<()>)>>>;

/// The listening end; clones are the same one, which ends with the last of them.
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
    /// Listens on the port that is given, or on any of the same host when that is taken. To be called in a tokio
    /// runtime.
    ///
    /// # Errors
    /// When the host has no port left.
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

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// A key for somebody, and what tells that the connection with this key has ended.
    ///
    /// # Errors
    /// When the machine gives no random numbers.
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

/// Tells when a connection has ended. Dropped, it ends the connection.
#[derive(Debug)]
pub struct CanaryWatch {
    key: CanaryKey,
    ended: oneshot::Receiver<()>,
    expected: Expected,
    _alive: oneshot::Sender<()>,
}

impl CanaryWatch {
    /// Resolves when the connection that showed the key has ended; never, when none ever shows it.
    pub async fn ended(&mut self) {
        // Nothing is ever sent: the other half goes when the connection does.
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
            // Out of file descriptors, most likely: those who are connected go on.
            tokio::time::sleep(CANARY_KEY_MAX).await;
            continue;
        };
        let Ok(place) = Arc::clone(&strangers).try_acquire_owned() else { continue };
        let expected = Arc::clone(&expected);
        tokio::spawn(async move {
            let mut stream = stream;
            let Some((held, dropped)) = introduce(&mut stream, &expected).await else { return };
            drop(place);
            // Nothing more is ever said: whatever comes, an end or a byte, ends it.
            tokio::select! {
                _ = stream.read_u8() => {}
                _ = dropped => {}
            }
            drop(held);
        });
    }
}

async fn introduce(
    stream: &mut TcpStream,
    expected: &Expected,
) -> Option<(oneshot::Sender<()>, oneshot::Receiver<()>)> {
    let mut key = [0; KEY_BYTES];
    tokio::time::timeout(CANARY_KEY_MAX, stream.read_exact(&mut key)).await.ok()?.ok()?;
    // Looked up in a hash map under a random seed: its timing tells nothing about a secret of 128 bits.
    expected.lock().remove(&CanaryKey(key))
}

/// The holding end.
#[derive(Debug)]
pub struct CanaryHeld {
    stream: TcpStream,
}

impl CanaryHeld {
    /// Resolves when the listening end has gone.
    pub async fn ended(&mut self) {
        let _ = self.stream.read_u8().await;
    }
}

/// Connects to a canary and shows the key.
///
/// # Errors
/// When nobody listens there.
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
    async fn the_end_of_either_end_is_noticed_at_once() {
        let canary = listen();
        let (key, mut watch) = canary.expect().unwrap();
        let held = hold(canary.address(), &key).await.unwrap();
        assert!(tokio::time::timeout(SOON, watch.ended()).await.is_err(), "it lives");
        drop(held);
        tokio::time::timeout(SOON, watch.ended()).await.expect("its end is noticed");

        let (key, watch) = canary.expect().unwrap();
        let mut held = hold(canary.address(), &key).await.unwrap();
        tokio::time::sleep(SOON / 10).await;
        drop(watch);
        tokio::time::timeout(SOON, held.ended()).await.expect("the listener's end is noticed");
    }

    #[tokio::test]
    async fn a_stranger_ends_nothing() {
        let canary = listen();
        let (key, mut watch) = canary.expect().unwrap();
        let _held = hold(canary.address(), &key).await.unwrap();
        let mut stranger = hold(canary.address(), &CanaryKey([7; KEY_BYTES])).await.unwrap();
        tokio::time::timeout(SOON, stranger.ended()).await.expect("it is turned away");
        // The key is good once: who shows it again is a stranger as well.
        let mut again = hold(canary.address(), &key).await.unwrap();
        tokio::time::timeout(SOON, again.ended()).await.expect("it is turned away");
        assert!(tokio::time::timeout(SOON, watch.ended()).await.is_err(), "the first one lives");
    }

    #[tokio::test]
    async fn who_says_nothing_is_cut_off() {
        let canary = listen();
        let mut silent = TcpStream::connect(canary.address()).await.unwrap();
        let cut = tokio::time::timeout(CANARY_KEY_MAX * 2, silent.read_u8()).await;
        assert!(cut.expect("it is cut off").is_err());
    }

    #[test]
    fn a_key_does_not_show_itself() {
        assert_eq!(format!("{:?}", CanaryKey([1; KEY_BYTES])), "CanaryKey");
    }
}
