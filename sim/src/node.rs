//! A simulated node: its agent, and a number for each shard that every update changes.

use std::collections::BTreeMap;
use std::sync::Arc;
use volary_core::agent::Agent;
use volary_core::architecture::Architecture;
use volary_core::messages::Pass;
use volary_core::placement::Placement;
use volary_core::random::{Purpose, Stream};
use volary_core::{Epoch, Lane, NodeId, ShardId, Step};

/// A node's process.
#[derive(Debug)]
pub(crate) struct Node {
    /// The number of its process.
    pub(crate) process: u64,
    pub(crate) agent: Agent,
    architecture: Arc<Architecture>,
    /// Its link to the supervisor.
    pub(crate) session: Option<u64>,
    pub(crate) cut_until: u64,
    pub(crate) frozen_until: u64,
    /// Relative to the ordinary speed.
    pub(crate) speed: f64,
    pub(crate) placement: Placement,
    /// The version of each shard in memory, and the number that stands for its state.
    pub(crate) weights: BTreeMap<ShardId, (Step, u64)>,
    /// Shards read in the background.
    pub(crate) copied: BTreeMap<ShardId, (Step, u64)>,
    /// Shards fetched for a placement, until the agent takes them.
    pub(crate) fetched: BTreeMap<ShardId, (Step, u64)>,
    /// Gradients of shards that are being copied.
    pub(crate) stash: BTreeMap<ShardId, Vec<(Step, u64)>>,
    /// The shard of which a bit flips in the next update.
    pub(crate) corrupts: Option<ShardId>,
    /// The pass in progress.
    pub(crate) work: Option<Work>,
}

/// A pass in progress.
#[derive(Clone, Debug)]
pub(crate) struct Work {
    pub(crate) epoch: Epoch,
    pub(crate) step: Step,
    pub(crate) pass: Pass,
    pub(crate) lanes: Vec<Lane>,
    pub(crate) compare: Vec<ShardId>,
}

impl Work {
    /// Passes in their order.
    pub(crate) fn at(&self) -> (Epoch, Step, Option<u64>) {
        let round = match self.pass {
            Pass::Validate { round } => Some(round),
            // After the validations before the step.
            Pass::Train => Some(u64::MAX),
        };
        (self.epoch, self.step, round)
    }
}

/// A hash of two numbers.
pub(crate) fn mix(a: u64, b: u64) -> u64 {
    Stream::new(a, Purpose::Faults, &[b]).next_u64()
}

/// A measurement of a lane, or of a shard, in a step: a function of the weights.
pub(crate) fn measured(step: Step, place: u64, weights: u64) -> f64 {
    Stream::new(9, Purpose::Faults, &[step.0, place, weights]).next_f64()
}

/// Tokens per expert of one lane and layer: expert 1 has more than half.
pub(crate) fn uneven_load(experts: usize) -> Vec<u32> {
    (0..experts).map(|expert| if expert == 1 { 4 * experts as u32 } else { 3 }).collect()
}

/// The number that stands for the gradient of a step, the same on all nodes.
pub(crate) fn gradient(step: Step, rate: f64) -> u64 {
    mix(step.0, rate.to_bits())
}

impl Node {
    pub(crate) fn new(id: NodeId, process: u64, architecture: Arc<Architecture>) -> Self {
        Self {
            process,
            agent: Agent::new(id, Arc::clone(&architecture)),
            architecture,
            session: None,
            cut_until: 0,
            frozen_until: 0,
            speed: 1.0,
            placement: Placement::default(),
            weights: BTreeMap::new(),
            copied: BTreeMap::new(),
            fetched: BTreeMap::new(),
            stash: BTreeMap::new(),
            corrupts: None,
            work: None,
        }
    }

    /// Drops all state, as a node must that may not keep it.
    pub(crate) fn reset(&mut self) {
        self.agent = Agent::new(self.agent.id().clone(), Arc::clone(&self.architecture));
        self.placement = Placement::default();
        self.weights.clear();
        self.discard_work();
    }

    /// Drops all work in progress.
    pub(crate) fn discard_work(&mut self) {
        self.work = None;
        self.copied.clear();
        self.fetched.clear();
        self.stash.clear();
    }

    /// Corrupts a copy.
    pub(crate) fn flip_bit(&mut self, shard: ShardId) {
        if let Some((_, value)) = self.weights.get_mut(&shard) {
            *value ^= 1;
        }
    }

    /// Applies a step's gradient to one shard.
    pub(crate) fn apply(&mut self, shard: ShardId, step: Step, gradient: u64) {
        let Some((version, value)) = self.weights.get_mut(&shard) else {
            panic!("step {step} applies to {shard}, which is not here");
        };
        //
        assert_eq!(version.next(), step, "{shard} is at another version");
        (*version, *value) = (step, mix(*value, gradient));
    }
}

/// A hash of a shard's name.
pub(crate) fn shard_hash(shard: ShardId) -> u64 {
    shard.to_string().bytes().fold(7, |hash, byte| mix(hash, byte.into()))
}
