//! A listener with a bounded number of connections, in total and per address. A newcomer beyond the bound
//! takes the place of the connection that was idle for the longest time: neither a browser's forgotten tabs
//! nor an attacker's idle connections keep a probe out. Each connection ends when its peer is idle for too
//! long.

use crate::limits::{HTTP_ACCEPT_RETRY, HttpBounds};
use futures::task::AtomicWaker;
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::future::Future;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, Sleep};

/// See the module.
pub(super) struct BoundedListener {
    listener: TcpListener,
    connections: Connections,
    bounds: HttpBounds,
    /// Whether the last accept failed.
    failing: bool,
}

impl BoundedListener {
    pub(super) fn new(listener: TcpListener, bounds: HttpBounds) -> Self {
        Self { listener, connections: Connections::default(), bounds, failing: false }
    }
}

/// The open connections by number, in the order of their arrival.
#[derive(Clone, Default)]
struct Connections(Arc<Mutex<BTreeMap<u64, Arc<Seat>>>>);

/// The place of one connection.
struct Seat {
    address: IpAddr,
    last_active: Mutex<Instant>,
    evicted: AtomicBool,
    /// The task of the connection, which waits for its peer.
    waker: AtomicWaker,
}

impl Seat {
    fn evict(&self) {
        self.evicted.store(true, Ordering::Release);
        self.waker.wake();
    }
}

impl Connections {
    /// A place for a connection from `address`, if need be that of another one.
    fn admit(&self, address: IpAddr, bounds: HttpBounds) -> Guest {
        let mut seats = self.0.lock();
        let of_address = seats.values().filter(|seat| seat.address == address).count();
        if of_address >= bounds.per_address {
            evict_idlest(&mut seats, |seat| seat.address == address);
        } else if seats.len() >= bounds.in_all {
            evict_idlest(&mut seats, |_| true);
        }
        let number = seats.last_key_value().map_or(0, |(last, _)| last + 1);
        let seat = Arc::new(Seat {
            address,
            last_active: Mutex::new(Instant::now()),
            evicted: AtomicBool::new(false),
            waker: AtomicWaker::new(),
        });
        seats.insert(number, Arc::clone(&seat));
        Guest { connections: self.clone(), number, seat }
    }

    /// Frees the descriptor of the connection that was idle for the longest time. Returns whether there is
    /// one.
    fn evict_one(&self) -> bool {
        evict_idlest(&mut self.0.lock(), |_| true)
    }
}

fn evict_idlest(seats: &mut BTreeMap<u64, Arc<Seat>>, of: impl Fn(&Seat) -> bool) -> bool {
    let candidates = seats.iter().filter(|(_, seat)| of(seat));
    let Some(number) = candidates.min_by_key(|(_, seat)| *seat.last_active.lock()).map(|(number, _)| *number)
    else {
        return false;
    };
    if let Some(seat) = seats.remove(&number) {
        tracing::debug!(address = %seat.address, "an idle connection makes room for another one");
        seat.evict();
    }
    true
}

/// A connection's hold on its seat.
struct Guest {
    connections: Connections,
    number: u64,
    seat: Arc<Seat>,
}

impl Drop for Guest {
    fn drop(&mut self) {
        let mut seats = self.connections.0.lock();
        // After an eviction another connection may have the number.
        if seats.get(&self.number).is_some_and(|seat| Arc::ptr_eq(seat, &self.seat)) {
            seats.remove(&self.number);
        }
    }
}

impl axum::serve::Listener for BoundedListener {
    type Io = Connection;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        loop {
            match self.listener.accept().await {
                Ok((stream, from)) => {
                    self.failing = false;
                    let guest = self.connections.admit(from.ip(), self.bounds);
                    let idle_max = self.bounds.idle;
                    let idle = Box::pin(tokio::time::sleep(idle_max));
                    return (Connection { stream, idle, idle_max, guest }, from);
                }
                // Out of descriptors, or a peer that closed early: the listener continues.
                Err(error) => {
                    if !std::mem::replace(&mut self.failing, true) {
                        tracing::warn!(%error, "cannot accept an HTTP connection; idle ones make room");
                    }
                    self.connections.evict_one();
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
    idle_max: Duration,
    guest: Guest,
}

impl Connection {
    /// Turns a pending operation into an error when the peer was idle for too long or another connection
    /// needs the place, and restarts the timer when it was not idle.
    fn unless_idle<T>(
        &mut self,
        context: &mut Context<'_>,
        polled: Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        let seat = &self.guest.seat;
        if polled.is_ready() {
            let now = Instant::now();
            *seat.last_active.lock() = now;
            self.idle.as_mut().reset(now + self.idle_max);
            return polled;
        }
        seat.waker.register(context.waker());
        if seat.evicted.load(Ordering::Acquire) {
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        match self.idle.as_mut().poll(context) {
            Poll::Ready(()) => Poll::Ready(Err(io::ErrorKind::TimedOut.into())),
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
    use crate::limits::DASHBOARD_BOUNDS;

    const ONE: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 1));
    const OTHER: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 2));

    fn is_evicted(guest: &Guest) -> bool {
        guest.seat.evicted.load(Ordering::Acquire)
    }

    #[test]
    fn a_newcomer_takes_the_place_of_the_idlest_connection_of_its_address() {
        let connections = Connections::default();
        let other = connections.admit(OTHER, DASHBOARD_BOUNDS);
        let mut held = Vec::new();
        let began = Instant::now();
        for at in 0..DASHBOARD_BOUNDS.per_address {
            held.push(connections.admit(ONE, DASHBOARD_BOUNDS));
            *held[at].seat.last_active.lock() = began + Duration::from_millis(at as u64);
        }
        *held[0].seat.last_active.lock() = began + Duration::from_secs(1);
        let newcomer = connections.admit(ONE, DASHBOARD_BOUNDS);
        let evicted: Vec<usize> = (0..held.len()).filter(|at| is_evicted(&held[*at])).collect();
        assert_eq!(evicted, [1]);
        assert!(!is_evicted(&other) && !is_evicted(&newcomer));
        drop((held, newcomer));
        assert_eq!(connections.0.lock().len(), 1);
    }

    #[test]
    fn all_addresses_together_are_bounded_too() {
        let connections = Connections::default();
        let address = |n: usize| IpAddr::from([10, 1, (n / 250) as u8, (n % 250) as u8]);
        let guests: Vec<_> = (0..DASHBOARD_BOUNDS.in_all + 40)
            .map(|n| connections.admit(address(n), DASHBOARD_BOUNDS))
            .collect();
        assert_eq!(guests.iter().filter(|guest| is_evicted(guest)).count(), 40);
        assert_eq!(connections.0.lock().len(), DASHBOARD_BOUNDS.in_all);
        assert!(connections.evict_one());
        drop(guests);
        assert!(!connections.evict_one(), "no connection is left");
    }
}
