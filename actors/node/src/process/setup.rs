//! What a node reports about itself: its profile, its spans, its metrics.

use super::error::ProcessError;
use crate::context::NodeContext;
use crate::device::benchmark::benchmark;
use crate::device::executor::Priority;
use crate::limits::SPAN_BATCHES_AHEAD;
use crate::net::probe::probe;
use crate::options::NodeOptions;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot};
use volary_core::NodeId;
use volary_core::compute::Compute;
use volary_core::profile::Profile;
use volary_protocol::{LinkReport, RunInfo};
use volary_telemetry::{Identity, Pipeline, SpanRecord};
use volary_transport::Link;

/// Processor seconds per byte on the wire: encryption, checksums and copies, measured on loopback
/// (`cargo bench -p volary-transport`).
const NETWORK_S_PER_BYTE: f64 = 1.3e-9;

/// Measures what this node can do. A device that cannot be benchmarked is measured in training.
pub(super) async fn measure_profile<B: Compute>(
    node: &NodeContext<B>,
    options: &NodeOptions,
    run: &RunInfo,
    link: &Link,
) -> Profile {
    let began = Instant::now();
    let mut profile = Profile {
        memory_bytes: options.memory_bytes,
        zone: options.zone.clone(),
        threads: node.executor.threads(),
        network_s_per_byte: NETWORK_S_PER_BYTE,
        ..Profile::relative(node.executor.threads() as f64)
    };
    let (answer, arithmetic) = oneshot::channel();
    node.executor.submit(Priority::Urgent, move |backend| drop(answer.send(backend.arithmetic())));
    match arithmetic.await {
        Ok(Ok(digest)) => profile.arithmetic = Some(digest),
        Ok(Err(error)) => tracing::warn!(%error, "the arithmetic kind of the device is unknown"),
        Err(_) => {}
    }
    if !run.measure {
        return profile;
    }
    let measured = benchmark(&node.executor, &run.architecture, &run.training, &mut profile).await;
    if let Err(error) = measured {
        tracing::warn!(%error, "no device benchmark; speeds will be measured in training");
    }
    if let Some(probe) = probe(link, || link.stats().bytes_sent).await {
        profile.round_trip_s = probe.round_trip.as_secs_f64();
        profile.bandwidth = probe.bandwidth;
    }
    let costs = &node.costs;
    let per_second = |flops: f64, rate: f64| (rate / flops).round();
    let token: f64 = costs.dense_flops.iter().sum();
    tracing::info!(
        dense_forward_tokens_per_s = per_second(token, profile.dense.forward),
        dense_backward_tokens_per_s = per_second(2.0 * token, profile.dense.backward),
        expert_forward_rows_per_s = per_second(costs.expert_flops, profile.expert.forward),
        expert_backward_rows_per_s = per_second(2.0 * costs.expert_flops, profile.expert.backward),
        round_trip_ms = profile.round_trip_s * 1e3,
        bandwidth_mb_per_s = (profile.bandwidth / 1e6).round(),
        took_ms = began.elapsed().as_millis() as u64,
        "measured"
    );
    profile
}

/// The pipeline of this node's spans, and the ended spans as lines of JSON, for the supervisor to keep.
pub(super) fn start_telemetry(
    run: &RunInfo,
    name: &NodeId,
    device: &str,
) -> Result<(Pipeline, mpsc::Receiver<Vec<String>>), ProcessError> {
    let identity =
        Identity { run: run.run.clone(), process: name.0.clone(), device: Some(device.to_owned()) };
    let (sender, spans) = mpsc::channel(SPAN_BATCHES_AHEAD);
    let keep = move |records: Vec<SpanRecord>| {
        let lines: Vec<String> = records.iter().filter_map(|r| serde_json::to_string(r).ok()).collect();
        // A supervisor that is away or slow costs spans, not time.
        sender.try_send(lines).map_or(records.len() as u64, |()| 0)
    };
    let pipeline = Pipeline::start(&run.telemetry, &identity, Box::new(keep))
        .map_err(|error| ProcessError::start("the telemetry thread", error))?;
    Ok((pipeline, spans))
}

/// Registers what is read when this node's metrics are scraped.
pub(super) fn register_scrape_hooks<B: Compute>(node: &Arc<NodeContext<B>>, pipeline: &Pipeline) {
    let (weak, counts) = (Arc::downgrade(node), pipeline.counts());
    node.metrics.scrape().before_scrape(move || {
        let Some(node) = weak.upgrade() else { return };
        node.metrics.executor(node.executor.totals());
        node.metrics.spans(&counts);
        node.metrics.refused(node.peers.refused());
        let links = node.peers.reports();
        for LinkReport { peer, round_trip_ms, sent_bytes, received_bytes, .. } in &links {
            let round_trip = Duration::from_secs_f64(round_trip_ms / 1e3);
            node.metrics.link(&node.id.0, peer, *sent_bytes, *received_bytes, round_trip);
        }
        node.metrics.retain_peers(|peer| links.iter().any(|link| link.peer == peer));
    });
}
