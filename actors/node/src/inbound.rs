//! Frames from other nodes: rows for experts, lanes for stages, sums of gradients, requests for shards.
//!
//! Each frame is answered by a task of its own, since one that waits for its step must not hold up the
//! others. What they wait for arrives on the supervisor's link, so that a full set of tasks drains by
//! itself.

use crate::context::NodeContext;
use crate::device::executor::Priority;
use crate::error::{Error, Result};
use crate::ids::{LaneStep, PassId};
use crate::limits::{ANSWERS_MAX, UNKNOWN_PEER_MAX};
use crate::messages::{ReducerMsg, notify};
use crate::net::permission::check;
use crate::step::dispatch::{ExpertPass, expert_span, run_experts};
use crate::step::reducer::with_norm;
use crate::step::stage;
use std::sync::Arc;
use std::time::Instant;
use tokio::sync::{Semaphore, oneshot};
use volary_core::compute::Compute;
use volary_core::placement::Traffic;
use volary_core::{ExpertId, NodeId};
use volary_protocol::frames::{self, ExpertReply, ExpertRequest, GradientSum, ShardRequest, StoredShard};
use volary_transport::{Endpoint, Frame, FrameKind, InboundFrame, Link, Refusal, RefusalCode, SUPERVISOR};

/// Accepts links from other nodes for as long as the endpoint is open.
pub(crate) async fn accept<B: Compute>(node: Arc<NodeContext<B>>, endpoint: Endpoint) {
    while let Some(accepted) = endpoint.accept().await {
        // A task each: a peer that does not take its answer must not hold up the others.
        let (node, endpoint) = (Arc::clone(&node), endpoint.clone());
        tokio::spawn(async move {
            if let Some(link) = endpoint.accept_peer(accepted).await {
                serve(node, link).await;
            }
        });
    }
}

/// Answers the frames of one link until it closes.
async fn serve<B: Compute>(node: Arc<NodeContext<B>>, link: Link) {
    let peer = NodeId::new(link.peer());
    if link.peer() == SUPERVISOR {
        // It looks whether this node can be reached, and closes the link when it has seen that it can.
        drop(tokio::time::timeout(UNKNOWN_PEER_MAX, link.closed()).await);
        return;
    }
    // The certificate is valid, but the node was fenced or is not placed yet: nothing is read from it.
    if !node.peers.until_known(&peer).await {
        node.peers.count_refused();
        return link.close("this node has no part in the run");
    }
    let mut inbound = link.serve();
    let permits = Arc::new(Semaphore::new(ANSWERS_MAX));
    while let Some(frame) = inbound.next().await {
        let Ok(permit) = Arc::clone(&permits).acquire_owned().await else { return };
        if node.peers.is_revoked(&link) {
            node.peers.count_refused();
            return link.refuse(&Refusal::new(RefusalCode::CertificateRevoked, "the certificate is revoked"));
        }
        let (node, peer) = (Arc::clone(&node), peer.clone());
        tokio::spawn(async move {
            answer(node, peer, frame).await;
            drop(permit);
        });
    }
}

async fn answer<B: Compute>(node: Arc<NodeContext<B>>, peer: NodeId, inbound: InboundFrame) {
    let InboundFrame { frame, reply, .. } = inbound;
    let (kind, epoch, step) = (frame.kind, frame.epoch, frame.step);
    // It may have been fenced since its link was accepted.
    if !node.peers.until_known(&peer).await {
        tracing::warn!(%peer, ?kind, "frame dropped: the node has no part in the run");
        node.peers.count_refused();
        return;
    }
    let answer = match kind {
        FrameKind::Forward | FrameKind::Backward => experts(&node, &peer, frame).await,
        FrameKind::StageForward | FrameKind::StageBackward => stage::serve(&node, &peer, frame).await,
        // The probe itself is large: what it measures is the way here.
        FrameKind::Probe => {
            frames::frame(FrameKind::Reply, epoch, step, &(), Vec::new()).map_err(Error::from)
        }
        FrameKind::Partial | FrameKind::Sum => gradient(&node, &peer, frame).await,
        FrameKind::ShardRequest => shard(&node, &peer, &frame).await,
        kind => Err(Error::UnexpectedFrame { kind }),
    };
    let answer = answer.unwrap_or_else(|error| {
        tracing::debug!(%peer, ?kind, %epoch, %step, %error, "frame refused");
        frames::refused(epoch, step, &error.refusal())
    });
    if let Some(reply) = reply
        && let Err(error) = reply.reply(answer).await
    {
        tracing::debug!(%peer, %error, "an answer was not delivered");
    }
}

/// Runs a batch of a lane's rows through experts of this node; the answer has as many rows in the same order.
async fn experts<B: Compute>(node: &Arc<NodeContext<B>>, peer: &NodeId, frame: Frame) -> Result<Frame> {
    let arrived = Instant::now();
    let (kind, epoch, step) = (frame.kind, frame.epoch, frame.step);
    let ExpertRequest { layer, lane, train, experts } = frames::decode(&frame)?;
    let direction = match kind {
        FrameKind::Backward => ExpertPass::Backward,
        _ => ExpertPass::Forward { train },
    };
    let scope = node.tracer.remote(frames::origin(&frame));
    let mut span = expert_span(&scope, direction, layer, lane, &experts);
    let meter = span.meter();
    node.until_begun(PassId { epoch, step, train }).await?;
    check(node, epoch, peer, Traffic::Rows { layer, lane, experts: &experts })?;
    let wanted = experts.clone();
    let split = move |backend: &B| {
        let whole = frames::import_one(backend, &frame)?;
        let mut start = 0;
        let cut = |&(expert, count): &(ExpertId, u32)| {
            let rows = backend.rows(&whole, start, count as usize)?;
            start += count as usize;
            Ok((expert, rows))
        };
        wanted.iter().map(cut).collect::<Result<Vec<_>>>()
    };
    let parts = node.executor.run(&meter, split).await?;
    let at = LaneStep { epoch, step, lane };
    let outputs = run_experts(node, layer, at, direction, parts, &meter).await?;
    let join = move |backend: &B| {
        let whole = backend.concatenate(outputs.into_iter().map(|(_, rows)| rows).collect())?;
        Ok(backend.export(&whole)?)
    };
    let rows = node.executor.run(&meter, join).await?;
    if direction != ExpertPass::Backward {
        node.metrics.expert_tokens(experts.iter().map(|(_, rows)| u64::from(*rows)).sum());
    }
    let remote_us = u64::try_from(arrived.elapsed().as_micros()).unwrap_or(u64::MAX);
    Ok(frames::frame(FrameKind::Reply, epoch, step, &ExpertReply { lane, remote_us }, vec![rows])?)
}

/// Takes a part of a gradient, or the root from its owner, and answers when the reducer has it. A malformed
/// one is refused: the fault is its sender's.
async fn gradient<B: Compute>(node: &Arc<NodeContext<B>>, peer: &NodeId, frame: Frame) -> Result<Frame> {
    let (kind, epoch, step) = (frame.kind, frame.epoch, frame.step);
    node.until_begun(PassId { epoch, step, train: true }).await?;
    let GradientSum { shard, span } = frames::decode(&frame)?;
    let is_root = kind == FrameKind::Sum;
    let traffic = if is_root { Traffic::Root { shard } } else { Traffic::Partial { shard, span } };
    check(node, epoch, peer, traffic)?;
    let reducer = node.reducer().clone();
    let (read, was_read) = oneshot::channel();
    node.executor.submit(Priority::Deferred, move |backend| {
        let import = || {
            if frame.parts.is_empty() {
                return Ok(None);
            }
            let floats = |part| frames::floats(kind, part).map_err(Error::from);
            let parts = frame.parts.iter().map(floats).collect::<Result<Vec<_>>>()?;
            Ok(Some(backend.import_gradient(shard, &parts)?))
        };
        let gradient = match import() {
            // The sender may have given up.
            Err(malformed @ Error::Frame(_)) => return drop(read.send(Err(malformed))),
            // A failure of this node's device is its own.
            gradient => gradient,
        };
        let message = if is_root {
            let gradient = gradient.and_then(|value| with_norm(backend, value));
            ReducerMsg::Root { epoch, step, shard, gradient, frame: Some(frame) }
        } else {
            ReducerMsg::Summed { epoch, step, shard, span, gradient, credit: None }
        };
        notify(&reducer, message);
        drop(read.send(Ok(())));
    });
    was_read.await.map_err(|_| Error::ComputationDropped)??;
    Ok(frames::frame(FrameKind::Reply, epoch, step, &(), Vec::new())?)
}

/// Sends a shard to a node that is to hold it too.
async fn shard<B: Compute>(node: &Arc<NodeContext<B>>, peer: &NodeId, frame: &Frame) -> Result<Frame> {
    let ShardRequest { shard, version } = frames::decode(frame)?;
    // A node of a newer placement, which this node does not have yet, may ask for what that one gives it.
    if node.placement().epoch == frame.epoch {
        check(node, frame.epoch, peer, Traffic::Shard { shard })?;
    }
    let actors = node.shard_actors();
    let (version, stored) = actors.get(shard)?.store(version, false).await?;
    let header = StoredShard { shard, version };
    Ok(frames::blob(FrameKind::Shard, frame.epoch, version, &header, stored)?)
}
