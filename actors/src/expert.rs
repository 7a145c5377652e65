//! The expert actor: owns one expert's parameters and runs it on the tokens that lanes send.
//!
//! Supervised by the node's agent. Lanes on this node reach it through their router actor, lanes on other nodes
//! through [`crate::inbound`]; to both it looks the same. Invariants: a lane's rows are computed alone, so
//! that their bits do not depend on who else sent; the weight gradient of a group of lanes is one product over their rows in the order of
//! the lanes' numbers; a lane that sends no rows counts as well. When it fails, its node reports the epoch as failed.

use crate::executor::Priority;
use crate::reducer::ReducerMsg;
use crate::shard::{LaneStep, SavedActivations, ShardMsg, ShardReplica};
use ractor::{Actor, ActorProcessingErr, ActorRef, RpcReplyPort};
use std::collections::{BTreeMap, HashMap};
use std::marker::PhantomData;
use volary_core::compute::{Compute, Computed};
use volary_core::{Epoch, Lane, Step};
use volary_telemetry::Meter;

/// What an expert is asked.
pub(crate) enum ExpertMsg<B: Compute> {
    /// A lane's rows forward: `[tokens, hidden]`, which may be none.
    Forward {
        at: LaneStep,
        x: B::Tensor,
        train: bool,
        meter: Meter,
        reply: RpcReplyPort<Computed<B::Tensor>>,
    },
    /// The gradient of the output; the input's goes back at once.
    Backward { at: LaneStep, dy: B::Tensor, meter: Meter, reply: RpcReplyPort<Computed<B::Tensor>> },
    /// A lane's backward call is done, and this is what its weight gradient needs.
    Returned { at: LaneStep, saved: B::Saved },
    /// See [`ShardMsg`].
    Shard(ShardMsg<B>),
}

/// The expert's state.
pub(crate) struct ExpertState<B: Compute> {
    me: ActorRef<ExpertMsg<B>>,
    replica: ShardReplica<B>,
    activations: SavedActivations<B::Saved>,
    /// Lanes that have come back, by attempt and leaf.
    groups: HashMap<(Epoch, Step, u32), BTreeMap<Lane, B::Saved>>,
}

/// See the module.
pub(crate) struct ExpertActor<B>(pub(crate) PhantomData<B>);

impl<B: Compute> Actor for ExpertActor<B> {
    type Msg = ExpertMsg<B>;
    type State = ExpertState<B>;
    type Arguments = ShardReplica<B>;

    async fn pre_start(
        &self,
        me: ActorRef<Self::Msg>,
        replica: Self::Arguments,
    ) -> Result<Self::State, ActorProcessingErr> {
        Ok(ExpertState { me, replica, activations: SavedActivations::default(), groups: HashMap::new() })
    }

    async fn handle(
        &self,
        _: ActorRef<Self::Msg>,
        message: Self::Msg,
        state: &mut Self::State,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            ExpertMsg::Forward { at, x, train, meter, reply } => {
                state.on_forward(at, x, train, &meter, reply);
            }
            ExpertMsg::Backward { at, dy, meter, reply } => state.on_backward(at, dy, &meter, reply),
            ExpertMsg::Returned { at, saved } => state.on_returned(at, saved),
            ExpertMsg::Shard(message) => state.on_shard(message),
        }
        Ok(())
    }
}

impl<B: Compute> ExpertState<B> {
    fn on_forward(
        &self,
        at: LaneStep,
        x: B::Tensor,
        train: bool,
        meter: &Meter,
        reply: RpcReplyPort<Computed<B::Tensor>>,
    ) {
        let activations = self.activations.clone();
        let forward = move |backend: &B, params| {
            let (y, saved) = backend.expert(params, x, train)?;
            if train {
                activations.save(at, saved);
            }
            Ok(y)
        };
        self.replica.compute(meter, forward, |done| drop(reply.send(done)));
    }

    fn on_backward(
        &self,
        at: LaneStep,
        dy: B::Tensor,
        meter: &Meter,
        reply: RpcReplyPort<Computed<B::Tensor>>,
    ) {
        let (activations, me) = (self.activations.clone(), self.me.clone());
        let backward = move |backend: &B, params| {
            activations.take(at).and_then(|saved| backend.expert_backward(params, saved, dy))
        };
        self.replica.compute(meter, backward, move |done: Computed<_>| {
            drop(reply.send(done.map(|(dx, saved)| {
                drop(me.cast(ExpertMsg::Returned { at, saved }));
                dx
            })));
        });
    }

    fn on_returned(&mut self, at: LaneStep, saved: B::Saved) {
        let placement = self.replica.node.placement();
        if placement.epoch != at.epoch {
            return;
        }
        let leaf = at.lane / placement.lane_group.max(1);
        let key = (at.epoch, at.step, leaf);
        let group = self.groups.entry(key).or_default();
        group.insert(at.lane, saved);
        if group.len() < placement.group_lanes(leaf).len() {
            return;
        }
        let Some(group) = self.groups.remove(&key) else { return };
        let (shard, reducer) = (self.replica.id, self.replica.node.reducer());
        let lanes = group.into_values().collect();
        self.replica.node.executor.submit(Priority::Deferred, move |backend| {
            let gradient = backend.expert_gradient(lanes);
            drop(reducer.cast(ReducerMsg::Leaf { epoch: at.epoch, step: at.step, shard, leaf, gradient }));
        });
    }

    fn on_shard(&mut self, message: ShardMsg<B>) {
        if let ShardMsg::Forget { epoch } = message {
            self.activations.forget_before(epoch);
            self.groups.retain(|key, _| key.0 >= epoch);
        }
        self.replica.on_shard(message);
    }
}
