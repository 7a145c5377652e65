//! Frames and requests in memory.

use super::channel::{Channel, Guard, Side, due};
use super::control;
use crate::budget::ByteBudget;
use crate::error::{Error, Result};
use crate::frame::Frame;
use crate::limits::INBOUND_MAX;
use crate::link::{CloseReason, InboundFrame, LinkStats, Replier};
use crate::wire::{BoxFuture, Control, ReplyStream, Wire};
use bytes::Bytes;
use parking_lot::Mutex;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

/// A frame in flight.
#[derive(Debug)]
pub(super) struct Parcel {
    frame: Frame,
    bytes: u64,
    due: Instant,
    reply: Option<oneshot::Sender<Parcel>>,
}

/// One end of a new link: its frames, and its control stream.
pub(super) struct End {
    pub(super) frames: FrameEnd,
    pub(super) control: Control,
}

pub(super) struct FrameEnd {
    guard: Arc<Guard>,
    outbox: mpsc::Sender<Parcel>,
    inbox: mpsc::Receiver<Parcel>,
}

/// Both ends of a new link.
pub(super) fn ends(channel: &Arc<Channel>) -> (End, End) {
    let guard = |side| Arc::new(Guard { channel: Arc::clone(channel), side });
    let (a, b) = (guard(Side::A), guard(Side::B));
    let (to_b, from_a) = mpsc::channel(INBOUND_MAX);
    let (to_a, from_b) = mpsc::channel(INBOUND_MAX);
    let (send_to_b, receive_from_a) = control::stream(&a, &b);
    let (send_to_a, receive_from_b) = control::stream(&b, &a);
    let frames = |guard, outbox, inbox| FrameEnd { guard, outbox, inbox };
    (
        End { frames: frames(a, to_b, from_b), control: (send_to_b, receive_from_b) },
        End { frames: frames(b, to_a, from_a), control: (send_to_a, receive_from_a) },
    )
}

/// The other end, as this one knows it.
#[derive(Clone, Debug)]
pub(super) struct Peer {
    pub(super) name: String,
    pub(super) address: SocketAddr,
    pub(super) certificate: Option<[u8; 32]>,
}

/// One end of a link; clones are handles of the same end.
#[derive(Clone, Debug)]
pub(super) struct MemoryWire(Arc<State>);

#[derive(Debug)]
struct State {
    guard: Arc<Guard>,
    peer: Peer,
    outbox: mpsc::Sender<Parcel>,
    inbox: Mutex<Option<mpsc::Receiver<Parcel>>>,
    sent: AtomicU64,
    received: AtomicU64,
}

impl Wire for MemoryWire {
    fn request(&self, pieces: Vec<Bytes>) -> BoxFuture<'_, Result<Frame>> {
        Box::pin(async move {
            let (reply, replied) = oneshot::channel();
            match self.wrap(&pieces, Some(reply)).await? {
                (parcel, false) => self.post(parcel).await?,
                (parcel, true) => parcel.reply.into_iter().for_each(|reply| self.0.guard.channel.lose(reply)),
            }
            let replied = tokio::select! {
                biased;
                replied = replied => replied,
                reason = self.0.guard.closed() => return Err(self.broken(reason)),
            };
            let parcel = replied.map_err(|_| Error::malformed("frame", "it is cut short"))?;
            self.0.guard.await_due(parcel.due).await.map_err(|reason| self.broken(reason))?;
            self.0.received.fetch_add(parcel.bytes, Ordering::Relaxed);
            Ok(parcel.frame)
        })
    }

    fn send(&self, pieces: Vec<Bytes>) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            match self.wrap(&pieces, None).await? {
                (parcel, false) => self.post(parcel).await,
                (_, true) => Ok(()),
            }
        })
    }

    fn serve(&self, frames: mpsc::Sender<InboundFrame>, budget: Option<ByteBudget>) {
        drop(tokio::spawn(self.clone().receive_frames(frames, budget)));
    }

    fn closed(&self) -> BoxFuture<'_, CloseReason> {
        Box::pin(self.0.guard.closed())
    }

    fn close_reason(&self) -> Option<CloseReason> {
        self.0.guard.close_reason()
    }

    fn close(&self, code: u32, reason: &str) {
        self.0.guard.channel.close_by(self.0.guard.side, code, reason);
    }

    fn stats(&self) -> LinkStats {
        LinkStats {
            bytes_sent: self.0.sent.load(Ordering::Relaxed),
            bytes_received: self.0.received.load(Ordering::Relaxed),
            round_trip: 2 * self.0.guard.channel.delay(),
            lost_packets: 0,
            window: u64::MAX,
        }
    }

    fn certificate(&self) -> Option<[u8; 32]> {
        self.0.peer.certificate
    }

    fn remote_address(&self) -> SocketAddr {
        self.0.peer.address
    }
}

impl MemoryWire {
    pub(super) fn new(end: FrameEnd, peer: Peer) -> Self {
        let FrameEnd { guard, outbox, inbox } = end;
        let inbox = Mutex::new(Some(inbox));
        Self(Arc::new(State {
            guard,
            peer,
            outbox,
            inbox,
            sent: AtomicU64::default(),
            received: AtomicU64::default(),
        }))
    }

    /// Resolves when something that is sent now reaches the peer.
    pub(super) async fn reach_peer(&self) -> Result<()> {
        let reached = async { self.0.guard.await_due(due(self.0.guard.pass().await?)).await };
        reached.await.map_err(|reason| self.broken(reason))
    }

    /// The parcel of a frame, when there is no partition, and whether it is lost.
    async fn wrap(&self, pieces: &[Bytes], reply: Option<oneshot::Sender<Parcel>>) -> Result<(Parcel, bool)> {
        let frame = Frame::from_pieces(pieces)?;
        let faults = self.0.guard.pass().await.map_err(|reason| self.broken(reason))?;
        let bytes = pieces.iter().map(|piece| piece.len() as u64).sum();
        self.0.sent.fetch_add(bytes, Ordering::Relaxed);
        let lost = self.0.guard.channel.loses_frame(faults);
        Ok((Parcel { frame, bytes, due: due(faults), reply }, lost))
    }

    async fn post(&self, parcel: Parcel) -> Result<()> {
        tokio::select! {
            biased;
            reason = self.0.guard.closed() => Err(self.broken(reason)),
            posted = self.0.outbox.send(parcel) => posted.map_err(|_| self.broken("closed by peer: 0")),
        }
    }

    /// Passes the peer's frames to `frames` until the link closes.
    async fn receive_frames(self, frames: mpsc::Sender<InboundFrame>, budget: Option<ByteBudget>) {
        let Some(mut inbox) = self.0.inbox.lock().take() else { return };
        loop {
            let parcel = tokio::select! {
                _ = self.0.guard.closed() => return,
                parcel = inbox.recv() => parcel,
            };
            let Some(parcel) = parcel else { return };
            let is_late = parcel.due > Instant::now();
            // A delayed frame, or one that waits for the budget, does not block later ones, as on streams of
            // their own.
            let delivery = self.clone().deliver(frames.clone(), parcel, budget.clone());
            if is_late || budget.is_some() {
                tokio::spawn(delivery);
            } else {
                delivery.await;
            }
        }
    }

    async fn deliver(self, frames: mpsc::Sender<InboundFrame>, parcel: Parcel, budget: Option<ByteBudget>) {
        if self.0.guard.await_due(parcel.due).await.is_err() {
            return;
        }
        let permit = match budget {
            Some(budget) => {
                budget.take(parcel.frame.parts.iter().map(|part| part.data.len() as u64).sum()).await
            }
            None => None,
        };
        self.0.received.fetch_add(parcel.bytes, Ordering::Relaxed);
        let reply = parcel.reply.map(|reply| Replier::new(MemoryReply { wire: self, reply }));
        drop(frames.send(InboundFrame { frame: parcel.frame, reply, permit }).await);
    }

    fn broken(&self, reason: impl ToString) -> Error {
        Error::connection(self.0.peer.name.clone(), reason)
    }
}

/// The reply side of one request.
#[derive(Debug)]
struct MemoryReply {
    wire: MemoryWire,
    reply: oneshot::Sender<Parcel>,
}

impl ReplyStream for MemoryReply {
    fn reply(self: Box<Self>, pieces: Vec<Bytes>) -> BoxFuture<'static, Result<()>> {
        Box::pin(async move {
            match self.wire.wrap(&pieces, None).await? {
                // The requester may have given up.
                (parcel, false) => drop(self.reply.send(parcel)),
                (_, true) => self.wire.0.guard.channel.lose(self.reply),
            }
            Ok(())
        })
    }
}
