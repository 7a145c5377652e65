//! The reducer actor: sums the weight gradients of every shard over the fixed tree of lanes.
//!
//! One per node, supervised by the agent. Shard actors send it the leaves that this node computes. A node
//! makes the sums that the placement assigns to it ([`Placement::reducer`]): those over leaves that it
//! computes alone and, as the owner of a shard or on the way there, those over what others send. The owner
//! ends with the root and sends it to the other holders, some of which forward it. When the root of every
//! held shard is here, the agent gets the norms, and the gradients wait for the commit.
//!
//! Invariant: which additions are made, and in which order, depends on the tree alone
//! ([`volary_core::tree`]). A gradient that cannot be computed, sent or read fails the epoch.

use crate::context::NodeContext;
use crate::device::credit::LeafCredit;
use crate::device::executor::Priority;
use crate::error::{Error, Result};
use crate::ids::PassId;
use crate::limits::LEARNED_GRACE;
use crate::messages::{NodeMsg, ReducerMsg, Sum, notify, respond};
use futures::future::join_all;
use ractor::{Actor, ActorProcessingErr, ActorRef, RpcReplyPort};
use std::collections::BTreeMap;
use std::marker::PhantomData;
use std::sync::Arc;
use std::time::Instant;
use volary_core::compute::Compute;
use volary_core::messages::Norm;
use volary_core::placement::Placement;
use volary_core::tree::{Fold, LeafSpan, Next};
use volary_core::{Epoch, NodeId, ShardId, Step};
use volary_protocol::frames::{self, GradientSum};
use volary_transport::{Frame, FrameKind};

/// The step that is being reduced.
struct Reduction<B: Compute> {
    epoch: Epoch,
    step: Step,
    placement: Arc<Placement>,
    folds: BTreeMap<ShardId, Fold<Sum<B>>>,
    roots: BTreeMap<ShardId, (Sum<B>, Norm)>,
    /// Shards that this node holds and whose root is missing.
    missing_held: usize,
    /// Shards that it learns and whose root is missing.
    missing_learned: usize,
    /// Whether it waits for learned shards for a limited time only: it holds something.
    is_member: bool,
    began: Instant,
    /// How far the wait for roots is.
    progress: Progress,
}

/// The wait for roots. Nobody else waits for what this node only learns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Progress {
    Waiting,
    /// Only roots of learned shards are missing, for a limited time.
    Grace,
    Reported,
}

/// The reducer's state.
pub(crate) struct ReducerState<B: Compute> {
    me: ActorRef<ReducerMsg<B>>,
    node: Arc<NodeContext<B>>,
    agent: ActorRef<NodeMsg>,
    current: Option<Reduction<B>>,
}

/// See the module.
pub(crate) struct ReducerActor<B>(pub(crate) PhantomData<B>);

impl<B: Compute> Actor for ReducerActor<B> {
    type Msg = ReducerMsg<B>;
    type State = ReducerState<B>;
    type Arguments = (Arc<NodeContext<B>>, ActorRef<NodeMsg>);

    async fn pre_start(
        &self,
        me: ActorRef<Self::Msg>,
        (node, agent): Self::Arguments,
    ) -> std::result::Result<Self::State, ActorProcessingErr> {
        Ok(ReducerState { me, node, agent, current: None })
    }

    async fn handle(
        &self,
        _: ActorRef<Self::Msg>,
        message: Self::Msg,
        state: &mut Self::State,
    ) -> std::result::Result<(), ActorProcessingErr> {
        match message {
            ReducerMsg::Begin { epoch, step, placement } => state.on_begin(epoch, step, placement),
            ReducerMsg::Leaf { epoch, step, shard, leaf, gradient, credit } => {
                let span = LeafSpan { start: leaf, end: leaf + 1 };
                state.on_summed(epoch, step, GradientSum { shard, span }, gradient, Some(credit));
            }
            ReducerMsg::Summed { epoch, step, shard, span, gradient, credit } => {
                state.on_summed(epoch, step, GradientSum { shard, span }, gradient, credit);
            }
            ReducerMsg::Root { epoch, step, shard, gradient, frame } => {
                state.forward_root(epoch, step, shard, frame);
                state.on_root(epoch, step, shard, gradient);
            }
            ReducerMsg::GraceOver { epoch, step } => {
                if state.at(epoch, step).is_some() {
                    state.report();
                }
            }
            ReducerMsg::Take { epoch, step, reply } => state.on_take(epoch, step, reply),
            ReducerMsg::Discard { epoch } => {
                if state.current.as_ref().is_some_and(|current| current.epoch < epoch) {
                    state.current = None;
                }
            }
        }
        Ok(())
    }
}

impl<B: Compute> ReducerState<B> {
    fn on_begin(&mut self, epoch: Epoch, step: Step, placement: Arc<Placement>) {
        let me = &self.node.id;
        let (mut folds, mut missing_held, mut missing_learned) = (BTreeMap::new(), 0, 0);
        for shard in self.node.architecture.shards() {
            let held = placement.holds(me, shard);
            missing_held += usize::from(held);
            missing_learned += usize::from(!held && placement.holds_or_learns(me, shard));
            folds.insert(shard, Fold::new(placement.leaves(shard)));
        }
        self.current = Some(Reduction {
            epoch,
            step,
            is_member: placement.is_member(me),
            placement,
            folds,
            roots: BTreeMap::new(),
            missing_held,
            missing_learned,
            began: Instant::now(),
            progress: Progress::Waiting,
        });
        // A node that holds nothing expects nothing.
        self.when_reduced();
    }

    /// The reduction of a step, if it is the current one.
    fn at(&mut self, epoch: Epoch, step: Step) -> Option<&mut Reduction<B>> {
        self.current.as_mut().filter(|current| (current.epoch, current.step) == (epoch, step))
    }

    fn fail(&self, epoch: Epoch, error: Error) {
        notify(&self.agent, NodeMsg::Failed { epoch, error });
    }

    /// Takes a sum as far as it goes here. Its leaf is open until then.
    fn on_summed(
        &mut self,
        epoch: Epoch,
        step: Step,
        sum: GradientSum,
        gradient: Result<Sum<B>>,
        credit: Option<LeafCredit>,
    ) {
        let value = match gradient {
            Ok(value) => value,
            Err(error) => return self.fail(epoch, error.of(format_args!("the gradient of {}", sum.shard))),
        };
        let me = self.node.id.clone();
        let Some(current) = self.at(epoch, step) else { return };
        let (placement, shard) = (&current.placement, sum.shard);
        let Some(fold) = current.folds.get_mut(&shard) else { return };
        match fold.put(sum.span, value, |parent| placement.reducer(shard, parent) == Some(&me)) {
            Next::Wait => {}
            Next::Add { span, left, right } => {
                self.add(epoch, step, GradientSum { shard, span }, (left, right), credit);
            }
            Next::Done { span, value } => self.done(epoch, step, GradientSum { shard, span }, value),
        }
    }

    /// Adds two sums on the device; a missing one counts as zero and costs nothing.
    fn add(
        &self,
        epoch: Epoch,
        step: Step,
        sum: GradientSum,
        halves: (Sum<B>, Sum<B>),
        credit: Option<LeafCredit>,
    ) {
        let me = self.me.clone();
        let GradientSum { shard, span } = sum;
        let summed = move |gradient| {
            notify(&me, ReducerMsg::Summed { epoch, step, shard, span, gradient, credit });
        };
        match halves {
            (Some(left), Some(right)) => {
                self.node.executor.submit(Priority::Deferred, move |backend| {
                    summed(backend.add(left, right).map(Some).map_err(Error::from));
                });
            }
            (left, right) => summed(Ok(left.or(right))),
        }
    }

    /// A sum that this node takes no further: either a part for the node that adds it, or the root. The
    /// root belongs to the owner, wherever it was summed, and goes from there to the other holders and the
    /// learners.
    fn done(&mut self, epoch: Epoch, step: Step, sum: GradientSum, value: Sum<B>) {
        let me = self.node.id.clone();
        let Some(current) = self.at(epoch, step) else { return };
        let (placement, shard) = (Arc::clone(&current.placement), sum.shard);
        let next = match sum.span.parent(placement.leaves(shard)) {
            Some((parent, _)) => placement.reducer(shard, parent),
            None => placement.owner(shard).filter(|owner| **owner != me),
        };
        let is_root = next.is_none();
        let (kind, targets, learners) = match next {
            Some(next) => (FrameKind::Partial, vec![next.clone()], Vec::new()),
            None => {
                let learners = placement.learners.get(&shard).into_iter().flatten().cloned().collect();
                (FrameKind::Sum, placement.broadcast_children(shard, &me), learners)
            }
        };
        let (reducer, node, agent) = (self.me.clone(), Arc::clone(&self.node), self.agent.clone());
        let runtime = tokio::runtime::Handle::current();
        self.node.executor.submit(Priority::Deferred, move |backend| {
            if !targets.is_empty() || !learners.is_empty() {
                match to_frame(backend, kind, epoch, step, &sum, value.as_ref()) {
                    Ok(frame) => {
                        let update =
                            update_learners(Arc::clone(&node), agent.clone(), learners, frame.clone());
                        runtime.spawn(update);
                        runtime.spawn(deliver(node, agent, targets, frame));
                    }
                    Err(error) => notify(&agent, NodeMsg::Failed { epoch, error }),
                }
            }
            if is_root {
                let gradient = with_norm(backend, value);
                notify(&reducer, ReducerMsg::Root { epoch, step, shard, gradient, frame: None });
            }
        });
    }

    /// Sends a root that came from another holder on to the holders that get it from here.
    fn forward_root(&mut self, epoch: Epoch, step: Step, shard: ShardId, frame: Option<Frame>) {
        let Some((current, frame)) = self.at(epoch, step).zip(frame) else { return };
        let placement = Arc::clone(&current.placement);
        let targets = placement.broadcast_children(shard, &self.node.id);
        if !targets.is_empty() {
            tokio::spawn(deliver(Arc::clone(&self.node), self.agent.clone(), targets, frame));
        }
    }

    fn on_root(&mut self, epoch: Epoch, step: Step, shard: ShardId, gradient: Result<(Sum<B>, Norm)>) {
        let root = match gradient {
            Ok(root) => root,
            Err(error) => return self.fail(epoch, error.of(format_args!("the gradient of {shard}"))),
        };
        let me = self.node.id.clone();
        let Some(current) = self.at(epoch, step) else { return };
        // The first one counts: its norm may be reported already.
        if current.roots.contains_key(&shard) {
            return;
        }
        current.roots.insert(shard, root);
        match current.placement.holds(&me, shard) {
            true => current.missing_held -= 1,
            false => current.missing_learned = current.missing_learned.saturating_sub(1),
        }
        self.when_reduced();
    }

    /// Reports when the roots of all shards are here, or those of all held ones, and the others had their
    /// time.
    fn when_reduced(&mut self) {
        let Some(current) = &mut self.current else { return };
        let (epoch, step) = (current.epoch, current.step);
        match (current.missing_held, current.missing_learned) {
            (0, 0) => self.report(),
            (0, _) if current.is_member && current.progress == Progress::Waiting => {
                current.progress = Progress::Grace;
                // As much time again as the step has taken so far.
                let grace = current.began.elapsed().max(LEARNED_GRACE);
                self.me.send_after(grace, move || ReducerMsg::GraceOver { epoch, step });
            }
            _ => {}
        }
    }

    /// Reports the norms of the roots that are here, once.
    fn report(&mut self) {
        let Some(current) = self.current.as_mut().filter(|now| now.progress != Progress::Reported) else {
            return;
        };
        current.progress = Progress::Reported;
        let norms = current.roots.iter().map(|(&shard, (_, norm))| (shard, *norm)).collect();
        notify(&self.agent, NodeMsg::Reduced { epoch: current.epoch, step: current.step, norms });
    }

    fn on_take(&mut self, epoch: Epoch, step: Step, reply: RpcReplyPort<BTreeMap<ShardId, Sum<B>>>) {
        let taken = self.current.take_if(|current| (current.epoch, current.step) == (epoch, step));
        let roots = taken.map(|current| current.roots).unwrap_or_default();
        respond(reply, roots.into_iter().map(|(shard, (gradient, _))| (shard, gradient)).collect());
    }
}

/// A root with its norm: 0 when no token reached the expert.
pub(crate) fn with_norm<B: Compute>(backend: &B, value: Sum<B>) -> Result<(Sum<B>, Norm)> {
    let norm = match &value {
        Some(gradient) => backend.norm(gradient)?,
        None => Norm { squared: 0.0, finite: true },
    };
    Ok((value, norm))
}

fn to_frame<B: Compute>(
    backend: &B,
    kind: FrameKind,
    epoch: Epoch,
    step: Step,
    sum: &GradientSum,
    value: Option<&B::Gradient>,
) -> Result<Frame> {
    let tensors = value.map(|gradient| backend.export_gradient(gradient)).transpose()?.unwrap_or_default();
    Ok(frames::frame(kind, epoch, step, sum, tensors)?)
}

/// Sends a root to learners. One that does not take it delays no other: the supervisor decides what becomes
/// of it.
async fn update_learners<B: Compute>(
    node: Arc<NodeContext<B>>,
    agent: ActorRef<NodeMsg>,
    learners: Vec<NodeId>,
    frame: Frame,
) {
    let epoch = frame.epoch;
    let update = async |learner: NodeId| {
        if let Err(error) = acknowledged(&node, &learner, &frame).await {
            let reason = error.to_string();
            notify(&agent, NodeMsg::LearnerUnreached { epoch, learner, reason });
        }
    };
    join_all(learners.into_iter().map(update)).await;
}

/// Sends a sum to nodes that need it for the step; the epoch fails when one does not take it.
async fn deliver<B: Compute>(
    node: Arc<NodeContext<B>>,
    agent: ActorRef<NodeMsg>,
    targets: Vec<NodeId>,
    frame: Frame,
) {
    let epoch = frame.epoch;
    let deliver = async |target: NodeId| {
        if let Err(error) = acknowledged(&node, &target, &frame).await {
            notify(&agent, NodeMsg::Failed { epoch, error });
        }
    };
    join_all(targets.into_iter().map(deliver)).await;
}

/// Sends a sum and waits until it is taken, or until it is no longer needed: a later step or placement has
/// begun here.
async fn acknowledged<B: Compute>(node: &NodeContext<B>, target: &NodeId, frame: &Frame) -> Result<()> {
    let pass = PassId { epoch: frame.epoch, step: frame.step, train: true };
    tokio::select! {
        taken = node.peers.request(target, frame.clone()) => taken.map(drop),
        () = node.until_over(pass) => Ok(()),
    }
}
