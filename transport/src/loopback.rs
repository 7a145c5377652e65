//! A benchmark of this machine's loopback, for `volary doctor` and `benches/loopback.rs`.

use crate::endpoint::Endpoint;
use crate::error::{Error, Result};
use crate::frame::{Dtype, Frame, FrameKind, Part, TraceHeader};
use crate::identity::Authority;
use crate::options::TransportOptions;
use crate::tls::ClientAuth;
use bytes::Bytes;
use std::time::{Duration, Instant};

/// Throughput and latency of loopback.
#[derive(Clone, Copy, Debug)]
pub struct LoopbackReport {
    /// Throughput in one direction, in 10^9 bytes per second.
    pub gigabytes_per_second: f64,
    /// Median round-trip time of a small request.
    pub round_trip: Duration,
}

/// A frame with one tensor of shape `[bytes]` and dtype [`Dtype::U8`].
#[must_use]
pub fn probe_frame(bytes: usize) -> Frame {
    let part = Part { dtype: Dtype::U8, shape: vec![bytes as u64], data: Bytes::from(vec![7; bytes]) };
    Frame {
        kind: FrameKind::Probe,
        epoch: volary_core::Epoch(0),
        step: volary_core::Step(0),
        trace: TraceHeader::default(),
        meta: Bytes::new(),
        parts: vec![part],
    }
}

/// Sends about `total_bytes` in frames of `frame_bytes` between two endpoints of this process.
///
/// # Errors
/// As [`Network::bind`](crate::Network::bind) and [`Endpoint::connect`].
pub async fn measure_loopback(total_bytes: usize, frame_bytes: usize) -> Result<LoopbackReport> {
    let authority = Authority::create()?;
    let options = TransportOptions { idle_timeout_ms: 10_000, ..TransportOptions::default() };
    let end = |name: &str| {
        Endpoint::bind(([127, 0, 0, 1], 0).into(), authority.identity(name)?, ClientAuth::Required, &options)
    };
    let (left, right) = (end("left")?, end("right")?);
    let accept = right.clone();
    let accepting = tokio::spawn(async move { accept.next_peer().await });
    let link = left.connect(right.local_addr(), "right").await?;
    let other = accepting
        .await
        .ok()
        .flatten()
        .ok_or_else(|| Error::connection("right", "no connection was accepted"))?;
    let frames = total_bytes.div_ceil(frame_bytes);
    let mut inbound = other.serve();
    let receiver = tokio::spawn(async move {
        let mut left = frames;
        while let Some(inbound) = inbound.next().await {
            match inbound.reply {
                Some(reply) => drop(reply.reply(probe_frame(1)).await),
                None => left -= 1,
            }
            if left == 0 {
                return;
            }
        }
    });
    let mut trips = Vec::new();
    for _ in 0..50 {
        let start = Instant::now();
        link.request(probe_frame(1)).await?;
        trips.push(start.elapsed());
    }
    trips.sort_unstable();
    let frame = probe_frame(frame_bytes);
    let start = Instant::now();
    for _ in 0..frames {
        link.send(frame.clone()).await?;
    }
    drop(receiver.await);
    let seconds = start.elapsed().as_secs_f64();
    let gigabytes_per_second = (frames * frame_bytes) as f64 / seconds / 1e9;
    Ok(LoopbackReport { gigabytes_per_second, round_trip: trips[trips.len() / 2] })
}
