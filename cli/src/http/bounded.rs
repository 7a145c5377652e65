//! A listener with a bounded number of connections, in total and per address. Each connection ends when its
//! peer is idle for too long.

use crate::limits::{HTTP_ACCEPT_RETRY, HTTP_CONNECTIONS_MAX, HTTP_CONNECTIONS_PER_ADDRESS, HTTP_IDLE_MAX};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::future::Future;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, Sleep};

/// See the module.
pub(super) struct BoundedListener {
    listener: TcpListener,
    slots: Arc<Semaphore>,
    addresses: Addresses,
}

impl BoundedListener {
    pub(super) fn new(listener: TcpListener) -> Self {
        let slots = Arc::new(Semaphore::new(HTTP_CONNECTIONS_MAX));
        Self { listener, slots, addresses: Addresses::default() }
    }
}

/// The number of connections of each address.
#[derive(Clone, Default)]
struct Addresses(Arc<Mutex<HashMap<IpAddr, usize>>>);

impl Addresses {
    /// A slot for a connection of an address, if one is free.
    fn acquire(&self, address: IpAddr) -> Option<AddressSlot> {
        let mut counts = self.0.lock();
        let count = counts.entry(address).or_default();
        if *count >= HTTP_CONNECTIONS_PER_ADDRESS {
            return None;
        }
        *count += 1;
        Some(AddressSlot { addresses: self.clone(), address })
    }
}

/// The slot of one connection; dropping it frees the slot.
struct AddressSlot {
    addresses: Addresses,
    address: IpAddr,
}

impl Drop for AddressSlot {
    fn drop(&mut self) {
        let mut counts = self.addresses.0.lock();
        if let Some(count) = counts.get_mut(&self.address) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.address);
            }
        }
    }
}

impl axum::serve::Listener for BoundedListener {
    type Io = Connection;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        loop {
            // The semaphore is never closed.
            let Ok(slot) = Arc::clone(&self.slots).acquire_owned().await else { continue };
            match self.listener.accept().await {
                Ok((stream, from)) => {
                    let Some(address_slot) = self.addresses.acquire(from.ip()) else {
                        tracing::debug!(%from, "connection dropped: too many from this address");
                        continue;
                    };
                    let idle = Box::pin(tokio::time::sleep(HTTP_IDLE_MAX));
                    return (Connection { stream, idle, _slot: slot, _address_slot: address_slot }, from);
                }
                // Out of descriptors, or a peer that closed early: the listener continues.
                Err(error) => {
                    tracing::debug!(%error, "cannot accept a connection");
                    tokio::time::sleep(HTTP_ACCEPT_RETRY).await;
                }
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

/// One connection.
pub(super) struct Connection {
    stream: TcpStream,
    idle: Pin<Box<Sleep>>,
    _slot: OwnedSemaphorePermit,
    _address_slot: AddressSlot,
}

impl Connection {
    /// Turns a pending operation into an error when the peer was idle for too long, and restarts the timer
    /// when it was not.
    fn unless_idle<T>(
        &mut self,
        context: &mut Context<'_>,
        polled: Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        match polled {
            Poll::Ready(done) => {
                self.idle.as_mut().reset(Instant::now() + HTTP_IDLE_MAX);
                Poll::Ready(done)
            }
            Poll::Pending if self.idle.as_mut().poll(context).is_ready() => {
                Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
            }
            Poll::Pending => Poll::Pending,
        }
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let polled = Pin::new(&mut self.stream).poll_read(context, buffer);
        self.unless_idle(context, polled)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.unless_idle(context, polled)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_address_cannot_occupy_all_slots_and_its_slots_become_free_again() {
        let addresses = Addresses::default();
        let (one, other) = (IpAddr::from([10, 0, 0, 1]), IpAddr::from([10, 0, 0, 2]));
        let held: Vec<AddressSlot> =
            (0..HTTP_CONNECTIONS_PER_ADDRESS).filter_map(|_| addresses.acquire(one)).collect();
        assert_eq!(held.len(), HTTP_CONNECTIONS_PER_ADDRESS);
        assert!(addresses.acquire(one).is_none() && addresses.acquire(other).is_some());
        drop(held);
        assert!(addresses.acquire(one).is_some());
    }
}
