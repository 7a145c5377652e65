//! The reducer actor: sums the weight gradients of every shard over the fixed tree of lanes.
//!
//! One per node, supervised by the node's agent. Dense, router and expert actors send it the leaves that this node
//! computes. A node makes the sums that are its own to make ([`Placement::reducer`]): those over what it computes alone, and as the
//! owner of a shard, or on the way there, those of what others send. The owner ends with the root and sends it to the other holders,
//! some of which pass it on. When the root of every held shard is here, the agent is told the
//! norms, and the gradients wait for the commit. Invariant: which additions are made, and in which order, depends on the
//! tree alone ([`volary_core::tree`]).

use crate::executor::Priority;
use crate::node::NodeMsg;
use crate::node_context::NodeContext;
use crate::shard::LaneStep;
use crate::wire::{self, SumOf};
use ractor::{Actor, ActorProcessingErr, ActorRef, RpcReplyPort};
use std::collections::BTreeMap;
use std::marker::PhantomData;
use std::sync::Arc;
use volary_core::compute::{Compute, Computed};
use volary_core::messages::Norm;
use volary_core::placement::Placement;
use volary_core::tree::{Fold, LeafSpan, Next};
use volary_core::{Epoch, NodeId, ShardId, Step};
use volary_transport::{Frame, Kind};

/// A gradient on its way up the tree; `None` when no token met the expert.
type Sum<B> = Option<<B as Compute>::Gradient>;

/// What the reducer is told.
pub(crate) enum ReducerMsg<B: Compute> {
    /// A step begins.
    Begin { epoch: Epoch, step: Step, placement: Arc<Placement> },
    /// A leaf that this node computed.
    Leaf { epoch: Epoch, step: Step, shard: ShardId, leaf: u32, gradient: Computed<Sum<B>> },
    /// A sum that came from another node, or out of an addition here.
    Summed { epoch: Epoch, step: Step, shard: ShardId, span: LeafSpan, gradient: Computed<Sum<B>> },
    /// The root of a shard with its norm; the frame in which it came, to be passed on.
    Root {
        epoch: Epoch,
        step: Step,
        shard: ShardId,
        gradient: Computed<(Sum<B>, Norm)>,
        frame: Option<Frame>,
    },
    /// The gradients of a step, for its commit.
    Take { epoch: Epoch, step: Step, reply: RpcReplyPort<BTreeMap<ShardId, Sum<B>>> },
    /// Everything that belongs to epochs before this one is dropped.
    Forget { epoch: Epoch },
}

impl<B: Compute> ReducerMsg<B> {
    /// A lane's gradient of a shard that every lane meets.
    pub(crate) fn lane_leaf(at: LaneStep, shard: ShardId, gradient: Computed<B::Gradient>) -> Self {
        Self::Leaf { epoch: at.epoch, step: at.step, shard, leaf: at.lane, gradient: gradient.map(Some) }
    }
}

/// The step that is being summed.
struct Current<B: Compute> {
    epoch: Epoch,
    step: Step,
    placement: Arc<Placement>,
    folds: BTreeMap<ShardId, Fold<Sum<B>>>,
    roots: BTreeMap<ShardId, (Sum<B>, Norm)>,
    held: usize,
}

/// The reducer's state.
pub(crate) struct ReducerState<B: Compute> {
    me: ActorRef<ReducerMsg<B>>,
    node: Arc<NodeContext<B>>,
    agent: ActorRef<NodeMsg>,
    current: Option<Current<B>>,
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
    ) -> Result<Self::State, ActorProcessingErr> {
        Ok(ReducerState { me, node, agent, current: None })
    }

    async fn handle(
        &self,
        _: ActorRef<Self::Msg>,
        message: Self::Msg,
        state: &mut Self::State,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            ReducerMsg::Begin { epoch, step, placement } => state.on_begin(epoch, step, placement),
            ReducerMsg::Leaf { epoch, step, shard, leaf, gradient } => {
                let span = LeafSpan { start: leaf, end: leaf + 1 };
                state.on_summed(epoch, step, shard, span, gradient);
            }
            ReducerMsg::Summed { epoch, step, shard, span, gradient } => {
                state.on_summed(epoch, step, shard, span, gradient);
            }
            ReducerMsg::Root { epoch, step, shard, gradient, frame } => {
                state.pass_on(epoch, step, shard, frame);
                state.on_root(epoch, step, shard, gradient);
            }
            ReducerMsg::Take { epoch, step, reply } => state.on_take(epoch, step, reply),
            ReducerMsg::Forget { epoch } => {
                state.current.take_if(|current| current.epoch < epoch).map_or((), drop)
            }
        }
        Ok(())
    }
}

impl<B: Compute> ReducerState<B> {
    fn on_begin(&mut self, epoch: Epoch, step: Step, placement: Arc<Placement>) {
        let me = &self.node.id;
        let mut folds = BTreeMap::new();
        let mut held = 0;
        for shard in self.node.architecture.shards() {
            held += usize::from(placement.holds_or_learns(me, shard));
            folds.insert(shard, Fold::new(placement.leaves(shard)));
        }
        self.current = Some(Current { epoch, step, placement, folds, roots: BTreeMap::new(), held });
        // A node that holds nothing has all that it waits for.
        self.when_reduced();
    }

    fn at(&mut self, epoch: Epoch, step: Step) -> Option<&mut Current<B>> {
        self.current.as_mut().filter(|current| (current.epoch, current.step) == (epoch, step))
    }

    fn failed(&self, epoch: Epoch, reason: String) {
        drop(self.agent.cast(NodeMsg::Failed { epoch, reason }));
    }

    fn on_summed(
        &mut self,
        epoch: Epoch,
        step: Step,
        shard: ShardId,
        span: LeafSpan,
        gradient: Computed<Sum<B>>,
    ) {
        let gradient = match gradient {
            Ok(gradient) => gradient,
            Err(error) => return self.failed(epoch, format!("the gradient of {shard}: {error}")),
        };
        let Some(current) = self.current.as_mut().filter(|c| (c.epoch, c.step) == (epoch, step)) else {
            return;
        };
        let (placement, me) = (&current.placement, &self.node.id);
        let Some(fold) = current.folds.get_mut(&shard) else { return };
        match fold.put(span, gradient, |above| placement.reducer(shard, above) == Some(me)) {
            Next::Wait => {}
            Next::Add { span, left, right } => self.add(epoch, step, shard, span, left, right),
            Next::Done { span, value } => self.done(epoch, step, shard, span, value),
        }
    }

    fn add(&self, epoch: Epoch, step: Step, shard: ShardId, span: LeafSpan, left: Sum<B>, right: Sum<B>) {
        let me = self.me.clone();
        let summed = move |gradient| drop(me.cast(ReducerMsg::Summed { epoch, step, shard, span, gradient }));
        match (left, right) {
            (Some(left), Some(right)) => {
                self.node.executor.submit(Priority::Deferred, move |backend| {
                    summed(backend.add(left, right).map(Some));
                });
            }
            (left, right) => summed(Ok(left.or(right))),
        }
    }

    /// A sum is complete that this node takes no further: a part for whoever adds it, or the root. That is the owner's, whoever made
    /// it, and goes from there to the other holders.
    fn done(&mut self, epoch: Epoch, step: Step, shard: ShardId, span: LeafSpan, value: Sum<B>) {
        let Some(current) = self.at(epoch, step) else { return };
        let placement = Arc::clone(&current.placement);
        let next = match span.parent(placement.leaves(shard)) {
            Some((parent, _)) => placement.reducer(shard, parent),
            None => placement.owner(shard).filter(|owner| **owner != self.node.id),
        };
        let is_last = next.is_none();
        let (kind, targets, learners) = match next {
            Some(next) => (Kind::Partial, vec![next.clone()], Vec::new()),
            None => {
                let learners = placement.learners.get(&shard).into_iter().flatten().cloned().collect();
                (Kind::Sum, placement.broadcast_children(shard, &self.node.id), learners)
            }
        };
        let (me, node, agent) = (self.me.clone(), Arc::clone(&self.node), self.agent.clone());
        let handle = tokio::runtime::Handle::current();
        self.node.executor.submit(Priority::Deferred, move |backend| {
            let frame = (!targets.is_empty() || !learners.is_empty())
                .then(|| to_frame(backend, kind, epoch, step, shard, span, value.as_ref()));
            if let Some(frame) = frame {
                handle.spawn(teach(Arc::clone(&node), learners, frame.clone()));
                handle.spawn(deliver(node, agent, targets, epoch, frame));
            }
            if is_last {
                let gradient = with_norm(backend, value);
                drop(me.cast(ReducerMsg::Root { epoch, step, shard, gradient, frame: None }));
            }
        });
    }

    /// A root that came from another holder goes on to those who get it from here.
    fn pass_on(&mut self, epoch: Epoch, step: Step, shard: ShardId, frame: Option<Frame>) {
        let Some((current, frame)) = self.at(epoch, step).zip(frame) else { return };
        let placement = Arc::clone(&current.placement);
        let targets = placement.broadcast_children(shard, &self.node.id);
        if !targets.is_empty() {
            let (node, agent) = (Arc::clone(&self.node), self.agent.clone());
            tokio::spawn(deliver(node, agent, targets, epoch, Ok(frame)));
        }
    }

    fn on_root(&mut self, epoch: Epoch, step: Step, shard: ShardId, gradient: Computed<(Sum<B>, Norm)>) {
        let root = match gradient {
            Ok(root) => root,
            Err(error) => return self.failed(epoch, format!("the summed gradient of {shard}: {error}")),
        };
        let Some(current) = self.at(epoch, step) else { return };
        // The first one counts: its norm may have been reported.
        current.roots.entry(shard).or_insert(root);
        self.when_reduced();
    }

    fn when_reduced(&self) {
        let Some(Current { epoch, step, roots, held, .. }) = &self.current else { return };
        if roots.len() == *held {
            let norms = roots.iter().map(|(&shard, (_, norm))| (shard, *norm)).collect();
            drop(self.agent.cast(NodeMsg::Reduced { epoch: *epoch, step: *step, norms }));
        }
    }

    fn on_take(&mut self, epoch: Epoch, step: Step, reply: RpcReplyPort<BTreeMap<ShardId, Sum<B>>>) {
        let taken = self.current.take_if(|current| (current.epoch, current.step) == (epoch, step));
        let roots = taken.map(|current| current.roots).unwrap_or_default();
        drop(reply.send(roots.into_iter().map(|(shard, (gradient, _))| (shard, gradient)).collect()));
    }
}

pub(crate) fn with_norm<B: Compute>(backend: &B, value: Sum<B>) -> Computed<(Sum<B>, Norm)> {
    let norm = match &value {
        Some(gradient) => backend.norm(gradient)?,
        None => Norm { squared: 0.0, finite: true },
    };
    Ok((value, norm))
}

fn to_frame<B: Compute>(
    backend: &B,
    kind: Kind,
    epoch: Epoch,
    step: Step,
    shard: ShardId,
    span: LeafSpan,
    value: Option<&B::Gradient>,
) -> Computed<Frame> {
    let tensors = value.map(|gradient| backend.export_gradient(gradient)).transpose()?.unwrap_or_default();
    wire::frame(kind, epoch, step, &SumOf { shard, span }, tensors)
}

/// A learner that cannot be reached is the supervisor's business, and holds up nobody.
async fn teach<B: Compute>(node: Arc<NodeContext<B>>, learners: Vec<NodeId>, frame: Computed<Frame>) {
    let Ok(frame) = frame else { return };
    for learner in &learners {
        if let Err(error) = node.peers.send(learner, frame.clone()).await {
            tracing::debug!(%learner, %error, "a learner did not get a gradient");
        }
    }
}

async fn deliver<B: Compute>(
    node: Arc<NodeContext<B>>,
    agent: ActorRef<NodeMsg>,
    targets: Vec<NodeId>,
    epoch: Epoch,
    frame: Computed<Frame>,
) {
    let send = async {
        let frame = frame?;
        for target in &targets {
            node.peers.send(target, frame.clone()).await?;
        }
        Ok::<_, volary_core::compute::ComputeError>(())
    };
    if let Err(error) = send.await {
        drop(agent.cast(NodeMsg::Failed { epoch, reason: error.to_string() }));
    }
}
