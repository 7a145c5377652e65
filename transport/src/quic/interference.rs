//! Fault injection on a UDP socket: lost datagrams and partitions between real processes.

use parking_lot::Mutex;
use quinn::udp::{RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, UdpPoller};
use std::collections::HashMap;
use std::fmt;
use std::io::{self, IoSliceMut};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};
use volary_core::random::{Purpose, Stream};

/// The faults of one socket, each for a time. Clones are handles of the same faults.
#[derive(Clone, Debug, Default)]
pub struct Interference(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    /// The end of a partition from all peers.
    partition: Option<Instant>,
    /// Peers with whom no datagram is exchanged.
    blocked: HashMap<SocketAddr, Instant>,
    /// Peers from whom no datagram is received.
    blocked_inbound: HashMap<SocketAddr, Instant>,
    /// The fraction of lost datagrams.
    loss: Option<(f64, Instant)>,
    draws: Stream,
}

impl Default for State {
    fn default() -> Self {
        let draws = Stream::new(0, Purpose::Faults, &[]);
        Self { partition: None, blocked: HashMap::new(), blocked_inbound: HashMap::new(), loss: None, draws }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    In,
    Out,
}

impl Interference {
    /// Drops all datagrams in both directions.
    pub fn partition(&self, time: Duration) {
        self.0.lock().partition = Some(Instant::now() + time);
    }

    /// Drops all datagrams to and from one peer.
    pub fn block_peer(&self, peer: SocketAddr, time: Duration) {
        self.0.lock().blocked.insert(peer, Instant::now() + time);
    }

    /// Drops all datagrams from one peer; those to it arrive.
    pub fn block_inbound(&self, peer: SocketAddr, time: Duration) {
        self.0.lock().blocked_inbound.insert(peer, Instant::now() + time);
    }

    /// Drops this fraction of the datagrams in both directions, at random.
    pub fn drop_fraction(&self, fraction: f64, time: Duration) {
        self.0.lock().loss = Some((fraction, Instant::now() + time));
    }

    fn drops(&self, peer: SocketAddr, direction: Direction) -> bool {
        let now = Instant::now();
        let mut state = self.0.lock();
        let is_active = |until: Option<&Instant>| until.is_some_and(|&until| until > now);
        if is_active(state.partition.as_ref())
            || is_active(state.blocked.get(&peer))
            || (direction == Direction::In && is_active(state.blocked_inbound.get(&peer)))
        {
            return true;
        }
        match state.loss {
            Some((fraction, until)) if until > now => state.draws.next_f64() < fraction,
            _ => false,
        }
    }
}

/// A socket with fault injection.
pub(super) struct FaultySocket {
    pub(super) socket: Arc<dyn AsyncUdpSocket>,
    pub(super) interference: Interference,
}

impl fmt::Debug for FaultySocket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FaultySocket").field("socket", &self.socket).finish_non_exhaustive()
    }
}

impl AsyncUdpSocket for FaultySocket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Arc::clone(&self.socket).create_io_poller()
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        if self.interference.drops(transmit.destination, Direction::Out) {
            // The sender cannot tell.
            return Ok(());
        }
        self.socket.try_send(transmit)
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        loop {
            let count = match self.socket.poll_recv(cx, bufs, meta) {
                Poll::Ready(Ok(count)) => count,
                other => return other,
            };
            let mut kept = 0;
            for index in 0..count {
                if self.interference.drops(meta[index].addr, Direction::In) {
                    continue;
                }
                meta[kept] = meta[index];
                bufs.swap(kept, index);
                kept += 1;
            }
            // When all were dropped, poll again, so that the socket registers this task's waker.
            if kept > 0 {
                return Poll::Ready(Ok(kept));
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        self.socket.max_transmit_segments()
    }

    fn max_receive_segments(&self) -> usize {
        self.socket.max_receive_segments()
    }

    fn may_fragment(&self) -> bool {
        self.socket.may_fragment()
    }
}
