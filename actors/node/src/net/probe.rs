//! Measures a link: its round trip, and the bandwidth in one direction.

use crate::limits::{PROBE_FRAMES, PROBE_MAX};
use std::time::{Duration, Instant};
use volary_core::{Epoch, Step};
use volary_protocol::frames;
use volary_protocol::limits::PROBE_BYTES;
use volary_transport::{FrameKind, Link};

/// A link's properties.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LinkProbe {
    /// Without queues.
    pub(crate) round_trip: Duration,
    /// Bytes per second in one direction.
    pub(crate) bandwidth: f64,
}

/// Measures a link with a few frames, of which the quickest counts: the first ones open the congestion
/// window, and any of them may wait for a busy processor. What else this node sends meanwhile, as counted
/// by `sent`, shares the link and counts as well.
///
/// Nothing when the peer does not answer in time.
pub(crate) async fn probe(link: &Link, sent: impl Fn() -> u64) -> Option<LinkProbe> {
    let payload = vec![0; PROBE_BYTES];
    let frame = frames::blob(FrameKind::Probe, Epoch(0), Step(0), &(), payload).ok()?;
    let mut best: Option<LinkProbe> = None;
    // Of the idle link: a probe fills the queue before a slow link, and its wait there is wire time.
    let mut round_trip = link.stats().round_trip;
    for _ in 0..PROBE_FRAMES {
        let (start, before) = (Instant::now(), sent());
        tokio::time::timeout(PROBE_MAX, link.request(frame.clone())).await.ok()?.ok()?;
        round_trip = round_trip.min(link.stats().round_trip);
        let seconds = start.elapsed().saturating_sub(round_trip).as_secs_f64().max(1e-6);
        let bytes = sent().saturating_sub(before).max(PROBE_BYTES as u64);
        let bandwidth = (bytes as f64 / seconds).max(best.map_or(0.0, |best| best.bandwidth));
        best = Some(LinkProbe { round_trip, bandwidth });
    }
    best
}
