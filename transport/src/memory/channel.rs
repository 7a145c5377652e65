//! The state that both ends of a link share, and its faults.

use super::wire::Parcel;
use crate::link::{CLOSE_NORMAL, CloseReason};
use parking_lot::Mutex;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::{oneshot, watch};
use tokio::time::{Instant, sleep_until};

/// Faults of a link, in both directions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Faults {
    /// Every `drop`-th frame is lost, requests and replies included; 0 loses none, 1 all. Control messages
    /// are never lost.
    pub drop: u32,
    /// The delay of each frame and control message, in milliseconds.
    pub delay_ms: u64,
    /// Nothing arrives. Senders wait; after the idle timeout both ends close.
    pub partition: bool,
}

/// Sets the faults of one pair of links. It does not keep them open.
#[derive(Clone, Debug)]
pub struct Switch(pub(super) Arc<Channel>);

impl Switch {
    /// Replaces the faults. Call it in a tokio runtime.
    pub fn set(&self, faults: Faults) {
        self.0.set_faults(faults);
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    A,
    B,
}

#[derive(Clone, Debug)]
enum Closing {
    By {
        side: Side,
        code: u32,
        reason: String,
    },
    TimedOut,
    /// A process crashed.
    Reset,
}

#[derive(Debug)]
pub(super) struct Channel {
    faults: watch::Sender<Faults>,
    closing: watch::Sender<Option<Closing>>,
    idle_timeout: Duration,
    frames: AtomicU64,
    /// The reply sides of lost requests and replies: their requests wait, as over a real network.
    lost: Mutex<Vec<oneshot::Sender<Parcel>>>,
}

impl Channel {
    pub(super) fn new(faults: Faults, idle_timeout_ms: u64) -> Self {
        Self {
            faults: watch::Sender::new(faults),
            closing: watch::Sender::new(None),
            idle_timeout: Duration::from_millis(idle_timeout_ms),
            frames: AtomicU64::new(0),
            lost: Mutex::default(),
        }
    }

    pub(super) fn set_faults(self: &Arc<Self>, faults: Faults) {
        let before = self.faults.send_replace(faults);
        if faults.partition && !before.partition {
            self.start_idle_timeout();
        }
    }

    /// Closes the channel when the partition that has just begun outlasts the idle timeout.
    pub(super) fn start_idle_timeout(self: &Arc<Self>) {
        let (mut faults, idle_timeout) = (self.faults.subscribe(), self.idle_timeout);
        // A link that closes otherwise drops its channel.
        let channel = Arc::downgrade(self);
        tokio::spawn(async move {
            let healed = async { faults.wait_for(|faults| !faults.partition).await.is_ok() };
            if tokio::time::timeout(idle_timeout, healed).await.is_err()
                && let Some(channel) = channel.upgrade()
            {
                channel.close(Closing::TimedOut);
            }
        });
    }

    /// Ends the channel as the death of a process does.
    pub(super) fn reset(&self) {
        self.close(Closing::Reset);
    }

    pub(super) fn close_by(&self, side: Side, code: u32, reason: &str) {
        self.close(Closing::By { side, code, reason: reason.to_owned() });
    }

    /// The first reason stays.
    fn close(&self, closing: Closing) {
        self.closing.send_if_modified(|current| {
            let first = current.is_none();
            if first {
                *current = Some(closing);
            }
            first
        });
    }

    /// Counts a frame; whether it is lost.
    pub(super) fn loses_frame(&self, faults: Faults) -> bool {
        let number = self.frames.fetch_add(1, Ordering::Relaxed) + 1;
        faults.drop > 0 && number.is_multiple_of(u64::from(faults.drop))
    }

    pub(super) fn lose(&self, reply: oneshot::Sender<Parcel>) {
        let mut lost = self.lost.lock();
        lost.retain(|reply| !reply.is_closed());
        lost.push(reply);
    }

    pub(super) fn delay(&self) -> Duration {
        Duration::from_millis(self.faults.borrow().delay_ms)
    }
}

/// A handle of one end of a channel; the channel closes when the last one of an end is dropped.
#[derive(Debug)]
pub(super) struct Guard {
    pub(super) channel: Arc<Channel>,
    pub(super) side: Side,
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.channel.close_by(self.side, CLOSE_NORMAL, "");
    }
}

impl Guard {
    pub(super) fn close_reason(&self) -> Option<CloseReason> {
        let closing = self.channel.closing.borrow();
        closing.as_ref().map(|closing| self.seen_from_here(closing))
    }

    pub(super) async fn closed(&self) -> CloseReason {
        let mut closing = self.channel.closing.subscribe();
        match closing.wait_for(Option::is_some).await.as_deref() {
            Ok(Some(closing)) => self.seen_from_here(closing),
            Ok(None) | Err(_) => CloseReason::Local,
        }
    }

    fn seen_from_here(&self, closing: &Closing) -> CloseReason {
        match closing {
            Closing::By { side, .. } if *side == self.side => CloseReason::Local,
            Closing::By { code, reason, .. } => CloseReason::Peer { code: *code, reason: reason.clone() },
            Closing::TimedOut => CloseReason::TimedOut,
            Closing::Reset => CloseReason::Broken("reset by peer".into()),
        }
    }

    /// Waits for the end of a partition; the faults then.
    pub(super) async fn pass(&self) -> Result<Faults, CloseReason> {
        let mut faults = self.channel.faults.subscribe();
        tokio::select! {
            biased;
            reason = self.closed() => Err(reason),
            open = async { faults.wait_for(|faults| !faults.partition).await.map(|faults| *faults) } => {
                open.map_err(|_| CloseReason::Local)
            }
        }
    }

    pub(super) async fn await_due(&self, due: Instant) -> Result<(), CloseReason> {
        if due <= Instant::now() {
            return Ok(());
        }
        tokio::select! {
            biased;
            () = sleep_until(due) => Ok(()),
            reason = self.closed() => Err(reason),
        }
    }
}

/// The arrival time of a message that leaves now.
pub(super) fn due(faults: Faults) -> Instant {
    Instant::now() + Duration::from_millis(faults.delay_ms)
}
