//! The lane actor: takes one lane's tokens through the model and back.
//!
//! Supervised by the node's agent. It calls the dense and router actors layer by layer, through [`crate::stage`], stage
//! after stage; experts may be anywhere. The way of a token, top to bottom, is [`LanePass::forward`]; the rest of [`LanePass::run`] is the
//! way back. A lane in flight is dropped when its epoch ends; one that fails tells the agent.

use crate::ask::ask;
use crate::dense::DenseMsg;
use crate::node::NodeMsg;
use crate::node_context::NodeContext;
use crate::shard::LaneStep;
use crate::stage::{MoeLayerStats, StagePass};
use crate::trace::{SampledToken, TraceContext};
use ractor::{Actor, ActorProcessingErr, ActorRef};
use std::marker::PhantomData;
use std::sync::Arc;
use std::time::Instant;
use tokio::task::JoinHandle;
use volary_core::compute::{Compute, ComputeError, Computed};
use volary_core::messages::{LaneReport, Pass};
use volary_core::placement::Stage;
use volary_telemetry::metrics::Phase;
use volary_telemetry::{Scope, Span};

/// What a lane actor is asked.
pub(crate) enum LaneMsg {
    /// Run these tokens, `[sequences, sequence_length + 1]`.
    Run { at: LaneStep, pass: Pass, tokens: Vec<u32>, trace: LaneTrace },
    /// Drop what is in flight.
    Drop,
}

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
    ) -> Result<Self::State, ActorProcessingErr> {
        Ok(LaneState { node, agent, running: None })
    }

    async fn handle(
        &self,
        _: ActorRef<Self::Msg>,
        message: Self::Msg,
        state: &mut Self::State,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            LaneMsg::Run { at, pass, tokens, trace } => state.on_run(at, pass, tokens, trace),
            LaneMsg::Drop => state.on_drop(),
        }
        Ok(())
    }

    async fn post_stop(
        &self,
        _: ActorRef<Self::Msg>,
        state: &mut Self::State,
    ) -> Result<(), ActorProcessingErr> {
        state.on_drop();
        Ok(())
    }
}

impl<B: Compute> LaneState<B> {
    fn on_run(&mut self, at: LaneStep, pass: Pass, tokens: Vec<u32>, trace: LaneTrace) {
        self.on_drop();
        let (node, agent) = (Arc::clone(&self.node), self.agent.clone());
        // A task and not the handler: the mailbox must stay open for the order to drop it.
        self.running = Some(tokio::spawn(async move {
            let asked = Instant::now();
            let (mut span, trace) = trace.begin(at);
            let wait = trace.scope.span("lane.wait");
            // The semaphore is never closed while the node lives.
            let Ok(_permit) = node.lanes_in_flight.acquire().await else { return };
            drop(wait);
            node.metrics.phase(Phase::Wait, asked.elapsed());
            let outcome =
                LanePass { node: &node, at, train: pass == Pass::Train, trace: &trace }.run(tokens).await;
            if let Err(error) = &outcome {
                span.fail(&error.0);
            }
            drop(span);
            drop(agent.cast(NodeMsg::LaneDone { at, pass, outcome }));
        }));
    }

    fn on_drop(&mut self) {
        if let Some(running) = self.running.take() {
            running.abort();
        }
    }
}

/// What a lane is told of a traced step; nothing in one that is not.
#[derive(Default)]
pub(crate) struct LaneTrace {
    /// Where the lane's span goes.
    pub(crate) step: Scope,
    /// Whether it has spans below it.
    pub(crate) whole: bool,
    pub(crate) sampled_tokens: Arc<[SampledToken]>,
}

impl LaneTrace {
    /// The lane's span, and what goes with it through the layers.
    fn begin(self, at: LaneStep) -> (Span, TraceContext) {
        let span = self.step.span("lane").with("volary.lane", i64::from(at.lane));
        let span = span.with("volary.step", at.step as i64).with("volary.epoch", at.epoch as i64);
        let scope = if self.whole { span.scope() } else { Scope::default() };
        (span, TraceContext { scope, sampled_tokens: self.sampled_tokens })
    }
}

/// One lane on its way.
struct LanePass<'a, B: Compute> {
    node: &'a NodeContext<B>,
    at: LaneStep,
    train: bool,
    trace: &'a TraceContext,
}

impl<B: Compute> LanePass<'_, B> {
    async fn run(self, tokens: Vec<u32>) -> Computed<LaneReport> {
        let Self { node, at, train, trace } = self;
        let (tokens, began) = (Arc::new(tokens), Instant::now());
        let (placement, pass) = (node.placement(), StagePass { node, at, train, trace });
        let mut report = LaneReport::default();
        let x = self.forward(&placement.stages, &pass, &tokens, &mut report).await?;
        let embedding = node.shard_actors().embedding()?;
        let own = Arc::clone(&tokens);
        let looked_at = Instant::now();
        let mut span = trace.scope.span("dense.loss");
        let meter = span.meter();
        let (loss, dx) =
            ask(&embedding, |reply| DenseMsg::Loss { at, x, tokens: own, train, meter, reply }).await?;
        drop(span);
        report.loss = loss;
        if !train {
            return Ok(report);
        }
        let turned = Instant::now();
        let mut dx =
            dx.ok_or_else(|| ComputeError("a lane in training came back without a gradient".into()))?;
        for stage in placement.stages.iter().rev() {
            dx = pass.backward(stage, dx).await?;
        }
        let mut span = trace.scope.span("dense.embed.backward");
        let meter = span.meter();
        ask(&embedding, |reply| DenseMsg::EmbedBackward { at, dx, tokens, meter, reply }).await?;
        drop(span);
        node.metrics.phase(Phase::Forward, looked_at - began);
        node.metrics.phase(Phase::Loss, turned - looked_at);
        node.metrics.phase(Phase::Backward, turned.elapsed());
        node.metrics.tokens(node.tokens_per_lane);
        Ok(report)
    }

    /// The way of the tokens: embedding, then stage by stage the layers.
    async fn forward(
        &self,
        stages: &[Stage],
        pass: &StagePass<'_, B>,
        tokens: &Arc<Vec<u32>>,
        report: &mut LaneReport,
    ) -> Computed<B::Tensor> {
        let Self { node, trace, .. } = *self;
        let own = Arc::clone(tokens);
        let mut span = trace.scope.span("dense.embed");
        let meter = span.meter();
        let embedding = node.shard_actors().embedding()?;
        let mut x = ask(&embedding, |reply| DenseMsg::Embed { tokens: own, meter, reply }).await?;
        drop(span);
        let moe_layers = node.architecture.moe_layers().count().max(1) as f64;
        for stage in stages {
            let found;
            (x, found) = pass.forward(stage, x).await?;
            for MoeLayerStats { aux_loss, entropy, load, dropped } in found {
                report.aux_loss += aux_loss / moe_layers;
                report.gate_entropy += entropy / moe_layers;
                report.load.push(load);
                report.dropped += dropped;
            }
        }
        Ok(x)
    }
}
