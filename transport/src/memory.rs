//! Links in memory, for tests of what is built on links: the same promises as over QUIC, and faults at the flick of a
//! [`Switch`].
//!
//! Time is tokio's, so a paused clock works. As over QUIC, a frame is whole or not there, control messages keep their
//! order, a request whose [`crate::Replier`] is dropped fails, and a link ends with its last handle. Unlike over QUIC, a sender
//! waits while the wire is partitioned.

use crate::error::{Error, Result};
use crate::frame::Frame;
use crate::limits::{CONTROL_AHEAD_MAX, INBOUND_MAX};
use crate::link::{InboundFrame, Link, LinkStats, Replier};
use crate::options::TransportOptions;
use crate::{ControlReceiver, ControlSender};
use bytes::Bytes;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, sleep_until};

/// What goes wrong on a wire, both ways.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Faults {
    /// One frame in so many is lost, requests and answers included; 0 is none, 1 is all. Control messages are never lost.
    pub drop: u32,
    /// Milliseconds that every frame and control message takes.
    pub delay_ms: u64,
    /// Nothing passes. What is sent waits; after the default idle timeout both links close.
    pub partition: bool,
}

/// Sets the faults of one pair of links. It does not keep them open.
#[derive(Clone, Debug)]
pub struct Switch(Arc<Shared>);

impl Switch {
    /// From now on these faults, and no others. To be called in a tokio runtime.
    pub fn set(&self, faults: Faults) {
        let before = self.0.faults.send_replace(faults);
        if faults.partition && !before.partition {
            tokio::spawn(time_out(Arc::clone(&self.0)));
        }
    }
}

async fn time_out(shared: Arc<Shared>) {
    let idle = Duration::from_millis(TransportOptions::default().idle_timeout_ms);
    let mut faults = shared.faults.subscribe();
    let healed = async { faults.wait_for(|faults| !faults.partition).await.is_ok() };
    if tokio::time::timeout(idle, healed).await.is_err() {
        shared.close(Closing::TimedOut);
    }
}

/// Two ends of one link: `a`'s, whose peer is `b`, and `b`'s, whose peer is `a`.
#[must_use]
pub fn pair(a: &str, b: &str) -> (Link, Link) {
    let (left, right, _) = faulty_pair(a, b);
    (left, right)
}

/// [`pair`], with a switch for faults.
#[must_use]
pub fn faulty_pair(a: &str, b: &str) -> (Link, Link, Switch) {
    let shared = Arc::new(Shared {
        faults: watch::Sender::new(Faults::default()),
        closing: watch::Sender::new(None),
        frames: AtomicU64::new(0),
        lost: Mutex::default(),
    });
    let (to_b, from_a) = mpsc::channel(INBOUND_MAX);
    let (to_a, from_b) = mpsc::channel(INBOUND_MAX);
    let left = End::new(&shared, Side::A, b, to_b, from_b);
    let right = End::new(&shared, Side::B, a, to_a, from_a);
    let (words_b, heard_b) = mpsc::channel(CONTROL_AHEAD_MAX);
    let (words_a, heard_a) = mpsc::channel(CONTROL_AHEAD_MAX);
    let link = |end: End, peer: &str, words, heard| {
        let sender = ControlSender::in_memory(WordSender { end: end.clone(), words });
        let receiver = ControlReceiver::in_memory(WordReceiver { end: end.clone(), words: heard });
        Link::in_memory(end, peer.to_owned()).with_control(sender, receiver)
    };
    (link(left, b, words_b, heard_a), link(right, a, words_a, heard_b), Switch(shared))
}

/// What both ends share.
#[derive(Debug)]
struct Shared {
    faults: watch::Sender<Faults>,
    closing: watch::Sender<Option<Closing>>,
    frames: AtomicU64,
    /// Answers that will never come: their requests wait, as they would over a wire.
    lost: Mutex<Vec<oneshot::Sender<Parcel>>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    A,
    B,
}

#[derive(Clone, Debug)]
enum Closing {
    By { side: Side, code: u32, reason: String },
    TimedOut,
}

impl Shared {
    /// The first reason stays.
    fn close(&self, closing: Closing) {
        self.closing.send_if_modified(|now| {
            let first = now.is_none();
            if first {
                *now = Some(closing);
            }
            first
        });
    }

    fn lose(&self, answer: oneshot::Sender<Parcel>) {
        let mut lost = self.lost.lock().unwrap_or_else(PoisonError::into_inner);
        lost.retain(|answer| !answer.is_closed());
        lost.push(answer);
    }
}

/// A frame under way.
#[derive(Debug)]
struct Parcel {
    frame: Frame,
    bytes: u64,
    due: Instant,
    answer: Option<oneshot::Sender<Parcel>>,
}

/// One end of the wire; clones are the same end, and the link closes with the last of them.
#[derive(Clone, Debug)]
pub(crate) struct End(Arc<EndState>);

#[derive(Debug)]
struct EndState {
    shared: Arc<Shared>,
    side: Side,
    peer: String,
    outbox: mpsc::Sender<Parcel>,
    inbox: Mutex<Option<mpsc::Receiver<Parcel>>>,
    sent: AtomicU64,
    received: AtomicU64,
}

impl Drop for EndState {
    fn drop(&mut self) {
        self.shared.close(Closing::By { side: self.side, code: 0, reason: String::new() });
    }
}

impl End {
    fn new(
        shared: &Arc<Shared>,
        side: Side,
        peer: &str,
        outbox: mpsc::Sender<Parcel>,
        inbox: mpsc::Receiver<Parcel>,
    ) -> Self {
        Self(Arc::new(EndState {
            shared: Arc::clone(shared),
            side,
            peer: peer.to_owned(),
            outbox,
            inbox: Mutex::new(Some(inbox)),
            sent: AtomicU64::new(0),
            received: AtomicU64::new(0),
        }))
    }

    pub(crate) async fn send(&self, frame: Frame, pieces: &[Bytes]) -> Result<()> {
        match self.wrap(frame, pieces, None).await? {
            (parcel, false) => self.post(parcel).await,
            (_, true) => Ok(()),
        }
    }

    pub(crate) async fn request(&self, frame: Frame, pieces: &[Bytes]) -> Result<Frame> {
        let (answer, answered) = oneshot::channel();
        match self.wrap(frame, pieces, Some(answer)).await? {
            (parcel, false) => self.post(parcel).await?,
            (parcel, true) => parcel.answer.into_iter().for_each(|answer| self.0.shared.lose(answer)),
        }
        let answered = tokio::select! {
            biased;
            answered = answered => answered,
            reason = self.closed() => return Err(self.broken(reason)),
        };
        let parcel = answered.map_err(|_| Error::malformed("frame", "it is cut short"))?;
        self.await_due(parcel.due).await?;
        self.0.received.fetch_add(parcel.bytes, Ordering::Relaxed);
        Ok(parcel.frame)
    }

    /// Hands the peer's frames to `sender` until the link closes.
    pub(crate) async fn take_up(self, sender: mpsc::Sender<InboundFrame>) {
        let inbox = self.0.inbox.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(mut inbox) = inbox else { return };
        loop {
            let parcel = tokio::select! {
                _ = self.closed() => return,
                parcel = inbox.recv() => parcel,
            };
            let Some(parcel) = parcel else { return };
            // A late one does not hold up those behind it, as on streams of their own.
            if parcel.due > Instant::now() {
                tokio::spawn(deliver(self.clone(), sender.clone(), parcel));
            } else {
                deliver(self.clone(), sender.clone(), parcel).await;
            }
        }
    }

    /// A frame that has got over the wire, and whether it is lost.
    async fn wrap(
        &self,
        frame: Frame,
        pieces: &[Bytes],
        answer: Option<oneshot::Sender<Parcel>>,
    ) -> Result<(Parcel, bool)> {
        let faults = self.pass().await?;
        let bytes = pieces.iter().map(|piece| piece.len() as u64).sum();
        self.0.sent.fetch_add(bytes, Ordering::Relaxed);
        let number = self.0.shared.frames.fetch_add(1, Ordering::Relaxed) + 1;
        let lost = faults.drop > 0 && number.is_multiple_of(u64::from(faults.drop));
        Ok((Parcel { frame, bytes, due: due(faults), answer }, lost))
    }

    /// Waits for the end of a partition.
    async fn pass(&self) -> Result<Faults> {
        let mut faults = self.0.shared.faults.subscribe();
        tokio::select! {
            biased;
            reason = self.closed() => Err(self.broken(reason)),
            open = async { faults.wait_for(|faults| !faults.partition).await.map(|faults| *faults) } => {
                open.map_err(|_| self.broken("closed"))
            }
        }
    }

    async fn post(&self, parcel: Parcel) -> Result<()> {
        tokio::select! {
            biased;
            reason = self.closed() => Err(self.broken(reason)),
            posted = self.0.outbox.send(parcel) => posted.map_err(|_| self.broken("closed by peer: 0")),
        }
    }

    async fn await_due(&self, due: Instant) -> Result<()> {
        if due <= Instant::now() {
            return Ok(());
        }
        tokio::select! {
            reason = self.closed() => Err(self.broken(reason)),
            () = sleep_until(due) => Ok(()),
        }
    }

    fn broken(&self, reason: impl ToString) -> Error {
        Error::connection(self.0.peer.clone(), reason)
    }

    /// In quinn's words.
    pub(crate) fn is_open(&self) -> bool {
        self.0.shared.closing.borrow().is_none()
    }

    pub(crate) async fn closed(&self) -> String {
        let mut closing = self.0.shared.closing.subscribe();
        match closing.wait_for(Option::is_some).await.as_deref() {
            Ok(Some(Closing::By { side, .. })) if *side == self.0.side => "closed".into(),
            Ok(Some(Closing::By { code, reason, .. })) if reason.is_empty() => {
                format!("closed by peer: {code}")
            }
            Ok(Some(Closing::By { code, reason, .. })) => {
                format!("closed by peer: {reason} (code {code})")
            }
            Ok(Some(Closing::TimedOut)) => "timed out".into(),
            Ok(None) | Err(_) => "closed".into(),
        }
    }

    pub(crate) fn close(&self, code: u32, reason: &str) {
        self.0.shared.close(Closing::By { side: self.0.side, code, reason: reason.to_owned() });
    }

    pub(crate) fn stats(&self) -> LinkStats {
        LinkStats {
            bytes_sent: self.0.sent.load(Ordering::Relaxed),
            bytes_received: self.0.received.load(Ordering::Relaxed),
            round_trip: Duration::from_millis(self.0.shared.faults.borrow().delay_ms.saturating_mul(2)),
            lost_packets: 0,
            window: u64::MAX,
        }
    }
}

fn due(faults: Faults) -> Instant {
    Instant::now() + Duration::from_millis(faults.delay_ms)
}

async fn deliver(end: End, sender: mpsc::Sender<InboundFrame>, parcel: Parcel) {
    if end.await_due(parcel.due).await.is_err() {
        return;
    }
    end.0.received.fetch_add(parcel.bytes, Ordering::Relaxed);
    let reply = parcel.answer.map(|answer| Replier::in_memory(Answer { end, answer }));
    drop(sender.send(InboundFrame { frame: parcel.frame, reply }).await);
}

/// The way back of one request.
#[derive(Debug)]
pub(crate) struct Answer {
    end: End,
    answer: oneshot::Sender<Parcel>,
}

impl Answer {
    pub(crate) async fn give(self, frame: Frame, pieces: &[Bytes]) -> Result<()> {
        match self.end.wrap(frame, pieces, None).await? {
            // Whoever asked may have given up.
            (parcel, false) => drop(self.answer.send(parcel)),
            (_, true) => self.end.0.shared.lose(self.answer),
        }
        Ok(())
    }
}

/// Control messages, out.
#[derive(Debug)]
pub(crate) struct WordSender {
    end: End,
    words: mpsc::Sender<(Instant, Vec<u8>)>,
}

impl WordSender {
    pub(crate) async fn send(&mut self, word: Vec<u8>) -> Result<()> {
        let due = due(self.end.pass().await?);
        tokio::select! {
            biased;
            reason = self.end.closed() => Err(self.end.broken(reason)),
            sent = self.words.send((due, word)) => sent.map_err(|_| self.end.broken("stopped by peer")),
        }
    }
}

/// Control messages, in.
#[derive(Debug)]
pub(crate) struct WordReceiver {
    end: End,
    words: mpsc::Receiver<(Instant, Vec<u8>)>,
}

impl WordReceiver {
    /// What has come is heard even when the link has closed since.
    pub(crate) async fn recv(&mut self) -> Result<Option<Vec<u8>>> {
        let word = tokio::select! {
            biased;
            word = self.words.recv() => word,
            reason = self.end.closed() => return Err(self.end.broken(reason)),
        };
        let Some((due, word)) = word else {
            return Ok(None);
        };
        self.end.await_due(due).await?;
        Ok(Some(word))
    }
}
