//! What other nodes send to this one: rows for its experts, parts and roots of gradients, wishes for shards.

use crate::executor::Priority;
use crate::limits::ANSWERS_MAX;
use crate::node_context::{Begun, NodeContext};
use crate::reducer::{ReducerMsg, with_norm};
use crate::router::{expert_span, run_experts};
use crate::shard::{LaneStep, ShardMsg};
use crate::stage;
use crate::wire::{self, Answered, Batch, ShardAt, ShardWish, SumOf};
use std::sync::Arc;
use std::time::Instant;
use tokio::sync::Semaphore;
use volary_core::NodeId;
use volary_core::compute::{Compute, ComputeError, Computed};
use volary_transport::{Endpoint, Frame, InboundFrame, Kind, Link};

/// Accepts links from other nodes for as long as the endpoint is open.
pub(crate) async fn accept<B: Compute>(node: Arc<NodeContext<B>>, endpoint: Endpoint) {
    while let Some(accepted) = endpoint.accept().await {
        // A task each: one that does not take its answer must not hold up the others.
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
    // Nothing is read of a node that has no part in the run: its certificate is good, and it was shut out or never placed.
    if !node.peers.until_known(&peer).await {
        node.peers.count_refused();
        return link.close("this node has no part in the run");
    }
    let mut inbound = link.serve();
    let room = Arc::new(Semaphore::new(ANSWERS_MAX));
    while let Some(frame) = inbound.next().await {
        // A task each: one that waits for its step must not hold up the others. What they wait for comes on the
        // supervisor's link, so that a full room empties itself.
        let Ok(place) = Arc::clone(&room).acquire_owned().await else { return };
        if node.peers.is_revoked(&link) {
            node.peers.count_refused();
            return link.close("the certificate is not good any more");
        }
        let (node, peer) = (Arc::clone(&node), NodeId::new(link.peer()));
        tokio::spawn(async move {
            answer(node, peer, frame).await;
            drop(place);
        });
    }
}

async fn answer<B: Compute>(node: Arc<NodeContext<B>>, peer: NodeId, inbound: InboundFrame) {
    let InboundFrame { frame, reply } = inbound;
    let (kind, epoch, step) = (frame.kind, frame.epoch, frame.step);
    if !node.peers.until_known(&peer).await {
        // Its certificate is good and it has no part in the run: shut out, or never placed.
        tracing::warn!(%peer, ?kind, "a frame of a node that has no part in the run");
        node.peers.count_refused();
        return;
    }
    let answer = match kind {
        Kind::Forward | Kind::Backward => experts(&node, frame).await.map(Some),
        Kind::StageForward | Kind::StageBackward => stage::serve(&node, frame).await.map(Some),
        // As long as it is large: what it measures is the way here.
        Kind::Probe => wire::frame(Kind::Reply, epoch, step, &(), Vec::new()).map(Some),
        Kind::Partial | Kind::Sum => gradient(&node, frame).await.map(|()| None),
        Kind::ShardRequest => shard(&node, &frame).await.map(Some),
        other => Err(ComputeError(format!("a {other:?} frame has no business here"))),
    };
    let answer = answer.unwrap_or_else(|error| {
        tracing::debug!(%peer, ?kind, epoch, step, %error, "refused");
        Some(wire::refusal(epoch, step, &error.to_string()))
    });
    if let (Some(reply), Some(answer)) = (reply, answer)
        && let Err(error) = reply.reply(answer).await
    {
        tracing::debug!(%peer, %error, "an answer did not get through");
    }
}

/// A batch of a lane's rows for experts here; the answer has as many rows in the same order.
async fn experts<B: Compute>(node: &Arc<NodeContext<B>>, frame: Frame) -> Computed<Frame> {
    let arrived = Instant::now();
    let (kind, epoch, step) = (frame.kind, frame.epoch, frame.step);
    let batch: Batch = wire::decode(&frame)?;
    let scope = node.tracer.remote(wire::origin(&frame));
    let mut span = expert_span(&scope, kind, batch.layer, batch.lane, &batch.experts);
    let meter = span.meter();
    node.until_begun(Begun { epoch, step, train: batch.train }).await?;
    let wanted = batch.experts.clone();
    let split = move |backend: &B| {
        let whole = wire::import_one(backend, &frame)?;
        let mut start = 0;
        let cut = |&(expert, count): &(u16, u32)| {
            let rows = backend.rows(&whole, start, count as usize)?;
            start += count as usize;
            Ok((expert, rows))
        };
        wanted.iter().map(cut).collect::<Computed<Vec<_>>>()
    };
    let parts = node.executor.run(&meter, split).await?;
    let at = LaneStep { epoch, step, lane: batch.lane };
    let outputs = run_experts(node, batch.layer, at, kind, batch.train, parts, &meter).await?;
    let join = move |backend: &B| {
        let whole = backend.concatenate(outputs.into_iter().map(|(_, rows)| rows).collect())?;
        backend.export(&whole)
    };
    let rows = node.executor.run(&meter, join).await?;
    if kind == Kind::Forward {
        node.metrics.rows(batch.experts.iter().map(|(_, rows)| u64::from(*rows)).sum());
    }
    let here_us = u64::try_from(arrived.elapsed().as_micros()).unwrap_or(u64::MAX);
    wire::frame(Kind::Reply, epoch, step, &Answered { lane: batch.lane, here_us }, vec![rows])
}

/// A part of a gradient for its owner, or the root from its owner.
async fn gradient<B: Compute>(node: &Arc<NodeContext<B>>, frame: Frame) -> Computed<()> {
    let (kind, epoch, step) = (frame.kind, frame.epoch, frame.step);
    node.until_begun(Begun { epoch, step, train: true }).await?;
    let SumOf { shard, span } = wire::decode(&frame)?;
    let reducer = node.reducer();
    node.executor.submit(Priority::Deferred, move |backend| {
        let import = || {
            if frame.parts.is_empty() {
                return Ok(None);
            }
            let parts = frame.parts.iter().map(wire::floats).collect::<Computed<Vec<_>>>()?;
            backend.import_gradient(shard, &parts).map(Some)
        };
        let told = if kind == Kind::Sum {
            let gradient = import().and_then(|value| with_norm(backend, value));
            reducer.cast(ReducerMsg::Root { epoch, step, shard, gradient, frame: Some(frame) })
        } else {
            reducer.cast(ReducerMsg::Summed { epoch, step, shard, span, gradient: import() })
        };
        drop(told);
    });
    Ok(())
}

/// A shard for a node that is to hold it too.
async fn shard<B: Compute>(node: &Arc<NodeContext<B>>, frame: &Frame) -> Computed<Frame> {
    let ShardWish { shard, version } = wire::decode(frame)?;
    let actors = node.shard_actors();
    let owner = actors.get(shard)?;
    let (version, stored) = owner.ask(|reply| ShardMsg::Store { version, reply }).await?;
    wire::blob(Kind::Shard, frame.epoch, version, &ShardAt { shard, version }, stored)
}
