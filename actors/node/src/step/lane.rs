//! The lane actor: takes one lane's tokens through the model and back.
//!
//! Supervised by the agent. **Start reading here**: a token's path, top to bottom, is [`LanePass::forward`]
//! (embedding, then stage by stage the layers, see [`super::stage`]), and [`LanePass::run`] adds the loss
//! and the way back. Experts may be on any node ([`super::router`]).
//!
//! A pass in flight is canceled when its epoch ends; a failed one is reported to the agent.

use crate::context::NodeContext;
use crate::error::Result;
use crate::ids::LaneStep;
use crate::messages::{LaneMsg, NodeMsg, notify};
use crate::step::stage::StagePass;
use crate::trace::{LaneTrace, TraceContext};
use ractor::{Actor, ActorProcessingErr, ActorRef};
use std::marker::PhantomData;
use std::sync::Arc;
use std::time::Instant;
use tokio::task::JoinHandle;
use volary_core::compute::{Compute, ComputeError};
use volary_core::messages::{LaneReport, Pass};
use volary_core::placement::Stage;
use volary_protocol::frames::MoeLayerStats;
use volary_telemetry::metrics::Phase;

/// The lane's state.
pub(crate) struct LaneState<B: Compute> {
    node: Arc<NodeContext<B>>,
    agent: ActorRef<NodeMsg>,
    running: Option<JoinHandle<()>>,
}

/// See the module.
pub(crate) struct LaneActor<B>(pub(crate) PhantomData<B>);

impl<B: Compute> Actor for LaneActor<B> {
    type Msg = LaneMsg;
    type State = LaneState<B>;
    type Arguments = (Arc<NodeContext<B>>, ActorRef<NodeMsg>);

    async fn pre_start(
        &self,
        _: ActorRef<Self::Msg>,
        (node, agent): Self::Arguments,
    ) -> std::result::Result<Self::State, ActorProcessingErr> {
        Ok(LaneState { node, agent, running: None })
    }

    async fn handle(
        &self,
        _: ActorRef<Self::Msg>,
        message: Self::Msg,
        state: &mut Self::State,
    ) -> std::result::Result<(), ActorProcessingErr> {
        match message {
            LaneMsg::Run { at, pass, tokens, trace } => state.on_run(at, pass, tokens, trace),
            LaneMsg::Cancel => state.on_cancel(),
        }
        Ok(())
    }

    async fn post_stop(
        &self,
        _: ActorRef<Self::Msg>,
        state: &mut Self::State,
    ) -> std::result::Result<(), ActorProcessingErr> {
        state.on_cancel();
        Ok(())
    }
}

impl<B: Compute> LaneState<B> {
    fn on_run(&mut self, at: LaneStep, pass: Pass, tokens: Vec<u32>, trace: LaneTrace) {
        self.on_cancel();
        let (node, agent) = (Arc::clone(&self.node), self.agent.clone());
        // A task and not the handler: the mailbox must stay open for `Cancel`.
        self.running = Some(tokio::spawn(async move {
            let queued = Instant::now();
            let (mut span, trace) = trace.begin(at);
            let wait = trace.scope.span("lane.wait");
            // The semaphore is never closed while the node lives.
            let Ok(_permit) = node.lanes_in_flight.acquire().await else { return };
            if pass == Pass::Train {
                node.until_lane_may_begin().await;
            }
            drop(wait);
            node.metrics.phase(Phase::Wait, queued.elapsed());
            let pass_of_lane = LanePass { node: &node, at, train: pass == Pass::Train, trace: &trace };
            let outcome = pass_of_lane.run(tokens).await;
            if let Err(error) = &outcome {
                span.fail(&error.to_string());
            }
            drop(span);
            notify(&agent, NodeMsg::LaneDone { at, pass, outcome });
        }));
    }

    fn on_cancel(&mut self) {
        if let Some(running) = self.running.take() {
            running.abort();
        }
    }
}

/// One pass of one lane.
struct LanePass<'a, B: Compute> {
    node: &'a NodeContext<B>,
    at: LaneStep,
    train: bool,
    trace: &'a TraceContext,
}

impl<B: Compute> LanePass<'_, B> {
    /// Forward, loss and, in training, backward.
    async fn run(self, tokens: Vec<u32>) -> Result<LaneReport> {
        let Self { node, at, train, trace } = self;
        let (tokens, began) = (Arc::new(tokens), Instant::now());
        let placement = node.placement();
        let pass = StagePass { node, at, train, trace };
        let embedding = node.shard_actors().embedding()?;

        let (x, mut report) = self.forward(&placement.stages, &pass, &tokens).await?;
        let forward_done = Instant::now();
        let tokens_for_loss = Arc::clone(&tokens);
        let loss = |meter| embedding.loss(at, x, tokens_for_loss, train, meter);
        let (loss, dx) = trace.span("dense.loss", loss).await?;
        (report.loss, report.sequence_losses) = (loss.mean, loss.sequences);
        if !train {
            return Ok(report);
        }

        let loss_done = Instant::now();
        let no_gradient = || ComputeError("the loss of a lane in training has no gradient".into());
        let mut dx = dx.ok_or_else(no_gradient)?;
        let load = load_of_all_layers(&report, node.architecture.experts);
        for stage in placement.stages.iter().rev() {
            dx = pass.backward(stage, dx, &load).await?;
        }
        let backward = |meter| embedding.embed_backward(at, dx, tokens, meter);
        trace.span("dense.embed.backward", backward).await?;

        node.metrics.phase(Phase::Forward, forward_done - began);
        node.metrics.phase(Phase::Loss, loss_done - forward_done);
        node.metrics.phase(Phase::Backward, loss_done.elapsed());
        node.metrics.tokens(node.tokens_per_lane);
        Ok(report)
    }

    /// Embedding, then stage by stage the layers: the residual stream, and a report without its loss.
    async fn forward(
        &self,
        stages: &[Stage],
        pass: &StagePass<'_, B>,
        tokens: &Arc<Vec<u32>>,
    ) -> Result<(B::Tensor, LaneReport)> {
        let Self { node, trace, .. } = *self;
        let (embedding, tokens) = (node.shard_actors().embedding()?, Arc::clone(tokens));
        let mut x = trace.span("dense.embed", |meter| embedding.embed(tokens, meter)).await?;
        let moe_layers = node.architecture.moe_layers().count().max(1) as f64;
        let mut report = LaneReport::default();
        for stage in stages {
            let stats;
            (x, stats) = pass.forward(stage, x).await?;
            for MoeLayerStats { aux_loss, entropy, load, dropped } in stats {
                report.aux_loss += aux_loss / moe_layers;
                report.gate_entropy += entropy / moe_layers;
                report.load.push(load);
                report.dropped += dropped;
            }
        }
        Ok((x, report))
    }
}

/// A lane's assignments to each expert, over all MoE layers.
fn load_of_all_layers(report: &LaneReport, experts: usize) -> Arc<[u32]> {
    let mut load = vec![0; experts];
    for layer in &report.load {
        load.iter_mut().zip(layer).for_each(|(all, count)| *all += count);
    }
    load.into()
}
