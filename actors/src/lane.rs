//! The lane actor: takes one lane's tokens through the model and back.
//!
//! Supervised by the node's agent. It calls the dense and router actors of its node layer by layer; experts may be
//! anywhere. The way of a token, top to bottom, is [`forward`], and [`backward`] is the same in reverse. A lane in flight is dropped
//! when its epoch ends; one that fails tells the agent.

use crate::ask::ask;
use crate::dense::DenseMsg;
use crate::keeper::At;
use crate::node::NodeMsg;
use crate::node_context::NodeContext;
use crate::router::RouterMsg;
use ractor::{Actor, ActorProcessingErr, ActorRef};
use std::marker::PhantomData;
use std::sync::Arc;
use tokio::task::JoinHandle;
use volary_core::compute::{Compute, ComputeError, Computed};
use volary_core::messages::{LaneReport, Pass};

/// What a lane actor is asked.
pub(crate) enum LaneMsg {
    /// Run these tokens, `[sequences, sequence_length + 1]`.
    Run { at: At, pass: Pass, tokens: Vec<u32> },
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
            LaneMsg::Run { at, pass, tokens } => state.on_run(at, pass, tokens),
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
    fn on_run(&mut self, at: At, pass: Pass, tokens: Vec<u32>) {
        self.on_drop();
        let (node, agent) = (Arc::clone(&self.node), self.agent.clone());
        // A task and not the handler: the mailbox must stay open for the order to drop it.
        self.running = Some(tokio::spawn(async move {
            // The semaphore is never closed while the node lives.
            let Ok(_permit) = node.lanes_in_flight.acquire().await else { return };
            let outcome = run(&node, at, pass, Arc::new(tokens)).await;
            drop(agent.cast(NodeMsg::LaneDone { at, pass, outcome }));
        }));
    }

    fn on_drop(&mut self) {
        if let Some(running) = self.running.take() {
            running.abort();
        }
    }
}

async fn run<B: Compute>(
    node: &NodeContext<B>,
    at: At,
    pass: Pass,
    tokens: Arc<Vec<u32>>,
) -> Computed<LaneReport> {
    let train = pass == Pass::Train;
    let mut report = LaneReport::default();
    let x = forward(node, at, train, &tokens, &mut report).await?;
    let embedding = node.directory().embedding()?;
    let own = Arc::clone(&tokens);
    let (loss, dx) = ask(&embedding, |reply| DenseMsg::Loss { at, x, tokens: own, train, reply }).await?;
    report.loss = loss;
    if train {
        let dx = dx.ok_or_else(|| ComputeError("a lane in training came back without a gradient".into()))?;
        let dx = backward(node, at, dx).await?;
        ask(&embedding, |reply| DenseMsg::EmbedBackward { at, dx, tokens, reply }).await?;
    }
    Ok(report)
}

/// The way of the tokens: embedding, then layer by layer attention and either the feed-forward or the experts.
async fn forward<B: Compute>(
    node: &NodeContext<B>,
    at: At,
    train: bool,
    tokens: &Arc<Vec<u32>>,
    report: &mut LaneReport,
) -> Computed<B::Tensor> {
    let directory = node.directory();
    let own = Arc::clone(tokens);
    let mut x = ask(&directory.embedding()?, |reply| DenseMsg::Embed { tokens: own, reply }).await?;
    let moe_layers = node.architecture.moe_layers().count().max(1) as f64;
    for layer in 0..node.architecture.layers as u16 {
        x = ask(&directory.dense(layer)?, |reply| DenseMsg::Forward { at, x, train, reply }).await?;
        if node.architecture.is_moe(layer.into()) {
            let routed =
                ask(&directory.router(layer)?, |reply| RouterMsg::Forward { at, x, train, reply }).await?;
            x = routed.y;
            report.aux_loss += routed.aux_loss / moe_layers;
            report.load.push(routed.load);
            report.dropped += routed.dropped;
        }
    }
    Ok(x)
}

/// The way of the gradient, from the loss to the embedded input.
async fn backward<B: Compute>(node: &NodeContext<B>, at: At, mut dx: B::Tensor) -> Computed<B::Tensor> {
    let directory = node.directory();
    for layer in (0..node.architecture.layers as u16).rev() {
        if node.architecture.is_moe(layer.into()) {
            dx = ask(&directory.router(layer)?, |reply| RouterMsg::Backward { at, dy: dx, reply }).await?;
        }
        dx = ask(&directory.dense(layer)?, |reply| DenseMsg::Backward { at, dy: dx, reply }).await?;
    }
    Ok(dx)
}
