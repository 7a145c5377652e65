//! The expert actor: owns one expert's parameters and runs it on the tokens that lanes send.
//!
//! Supervised by the agent; called through [`crate::handles::Expert`], by the routers of its node and,
//! through [`crate::inbound`], by those of others: it cannot tell which. Invariants:
//!
//! - a lane's rows are computed alone, so that their bits do not depend on who else sent rows;
//! - the weight gradient of a group of lanes is one product over their rows in ascending order of the
//!   lanes;
//! - a lane that sends no rows counts too.
//!
//! When the actor fails, its node reports the epoch as failed.

use crate::device::executor::Priority;
use crate::error::Result;
use crate::ids::LaneStep;
use crate::messages::{ExpertMsg, ReducerMsg, Reply, ShardMsg, notify, respond};
use crate::step::shard::{SavedActivations, ShardReplica};
use ractor::{Actor, ActorProcessingErr, ActorRef};
use std::collections::{BTreeMap, HashMap};
use std::marker::PhantomData;
use volary_core::compute::Compute;
use volary_core::{Epoch, Lane, Step};
use volary_telemetry::Meter;

/// The expert's state.
pub(crate) struct ExpertState<B: Compute> {
    me: ActorRef<ExpertMsg<B>>,
    replica: ShardReplica<B>,
    activations: SavedActivations<B::Saved>,
    /// Lanes whose backward pass is done, by attempt and leaf of the gradient.
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
    ) -> std::result::Result<Self::State, ActorProcessingErr> {
        let (activations, groups) = Default::default();
        Ok(ExpertState { me, replica, activations, groups })
    }

    async fn handle(
        &self,
        _: ActorRef<Self::Msg>,
        message: Self::Msg,
        state: &mut Self::State,
    ) -> std::result::Result<(), ActorProcessingErr> {
        match message {
            ExpertMsg::Forward { at, x, train, meter, reply } => {
                state.on_forward(at, x, train, &meter, reply);
            }
            ExpertMsg::Backward { at, dy, meter, reply } => state.on_backward(at, dy, &meter, reply),
            ExpertMsg::BackwardDone { at, saved } => state.on_backward_done(at, saved),
            ExpertMsg::Shard(message) => state.on_shard(message),
        }
        Ok(())
    }
}

impl<B: Compute> ExpertState<B> {
    fn on_forward(&self, at: LaneStep, x: B::Tensor, train: bool, meter: &Meter, reply: Reply<B::Tensor>) {
        let activations = self.activations.clone();
        let forward = move |backend: &B, params| {
            let (y, saved) = backend.expert(params, x, train)?;
            if train {
                activations.save(at, saved);
            }
            Ok(y)
        };
        self.replica.compute(meter, forward, |y| respond(reply, y));
    }

    fn on_backward(&self, at: LaneStep, dy: B::Tensor, meter: &Meter, reply: Reply<B::Tensor>) {
        let (activations, me) = (self.activations.clone(), self.me.clone());
        let backward = move |backend: &B, params| {
            let saved = activations.take(at)?;
            Ok(backend.expert_backward(params, saved, dy)?)
        };
        self.replica.compute(meter, backward, move |done: Result<_>| {
            let dx = done.map(|(dx, saved)| {
                notify(&me, ExpertMsg::BackwardDone { at, saved });
                dx
            });
            respond(reply, dx);
        });
    }

    /// The last lane of a group makes the group's weight gradient, later than what lanes wait for.
    fn on_backward_done(&mut self, at: LaneStep, saved: B::Saved) {
        let placement = self.replica.node.placement();
        if placement.epoch != at.epoch {
            return;
        }
        let LaneStep { epoch, step, lane } = at;
        let leaf = placement.group_of(lane);
        let group = self.groups.entry((epoch, step, leaf)).or_default();
        group.insert(lane, saved);
        if group.len() < placement.group_lanes(leaf).len() {
            return;
        }
        let Some(group) = self.groups.remove(&(epoch, step, leaf)) else { return };
        let (shard, reducer) = (self.replica.id, self.replica.node.reducer().clone());
        let (lanes, leaves) = (group.into_values().collect(), self.replica.node.open_leaves.clone());
        self.replica.node.executor.submit(Priority::Deferred, move |backend| {
            let gradient = backend.expert_gradient(lanes).map_err(Into::into);
            let credit = leaves.open();
            notify(&reducer, ReducerMsg::Leaf { epoch, step, shard, leaf, gradient, credit });
        });
    }

    fn on_shard(&mut self, message: ShardMsg<B>) {
        if let ShardMsg::Discard { epoch } = message {
            self.activations.discard_before(epoch);
            self.groups.retain(|(of, ..), _| *of >= epoch);
        }
        self.replica.on_shard(message);
    }
}
