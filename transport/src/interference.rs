//! A hook into a real UDP socket: what is lost between two processes, for tests of faults that no signal makes.

use quinn::udp::{RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, UdpPoller};
use std::collections::HashMap;
use std::fmt;
use std::io::{self, IoSliceMut};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};
use volary_core::random::{Purpose, Stream};

/// What goes wrong on one socket, each for a time. Clones are the same.
#[derive(Clone, Debug, Default)]
pub struct Interference(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    all: Option<Instant>,
    /// Peers to and from whom nothing passes.
    cut: HashMap<SocketAddr, Instant>,
    /// Peers who are not heard, and hear.
    deaf: HashMap<SocketAddr, Instant>,
    lose: Option<(f64, Instant)>,
    draws: Stream,
}

impl Default for State {
    fn default() -> Self {
        let draws = Stream::new(0, Purpose::Faults, &[]);
        Self { all: None, cut: HashMap::new(), deaf: HashMap::new(), lose: None, draws }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    In,
    Out,
}

impl Interference {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Nothing passes, either way.
    pub fn partition(&self, time: Duration) {
        self.lock().all = Some(Instant::now() + time);
    }

    /// Nothing passes to or from one peer.
    pub fn cut(&self, peer: SocketAddr, time: Duration) {
        self.lock().cut.insert(peer, Instant::now() + time);
    }

    /// What comes from one peer is lost; what is sent to it arrives.
    pub fn deafen(&self, peer: SocketAddr, time: Duration) {
        self.lock().deaf.insert(peer, Instant::now() + time);
    }

    /// This share of datagrams is lost, either way.
    pub fn lose(&self, fraction: f64, time: Duration) {
        self.lock().lose = Some((fraction, Instant::now() + time));
    }

    fn drops(&self, peer: SocketAddr, way: Way) -> bool {
        let now = Instant::now();
        let mut state = self.lock();
        let on = |until: Option<&Instant>| until.is_some_and(|&until| until > now);
        if on(state.all.as_ref()) || on(state.cut.get(&peer)) || (way == Way::In && on(state.deaf.get(&peer)))
        {
            return true;
        }
        match state.lose {
            Some((fraction, until)) if until > now => state.draws.next_f64() < fraction,
            _ => false,
        }
    }
}

/// A socket with a hook.
pub(crate) struct Disturbed {
    pub(crate) socket: Arc<dyn AsyncUdpSocket>,
    pub(crate) interference: Interference,
}

impl fmt::Debug for Disturbed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Disturbed").field("socket", &self.socket).finish_non_exhaustive()
    }
}

impl AsyncUdpSocket for Disturbed {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Arc::clone(&self.socket).create_io_poller()
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        if self.interference.drops(transmit.destination, Way::Out) {
            // As far as the sender knows, it is on its way.
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
                if self.interference.drops(meta[index].addr, Way::In) {
                    continue;
                }
                meta[kept] = meta[index];
                bufs.swap(kept, index);
                kept += 1;
            }
            // With nothing left, the socket is asked again, until it wakes this task by itself.
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
