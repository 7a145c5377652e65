//! Carries out a node's effects. Its device is played: the state of a shard is a number that every update changes.

use crate::world::{Happening, SILENCE_MS, World};
use std::collections::BTreeMap;
use volary_core::agent::{Agent, Effect, Event, Failure, STASH_MAX};
use volary_core::messages::{Assignment, LaneReport, NodeReport, Norm, Pass, Source};
use volary_core::placement::Placement;
use volary_core::random::{Purpose, Stream};
use volary_core::{Epoch, Lane, NodeId, ShardId, Step};

/// A node's process.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) process: u64,
    pub(crate) agent: Agent,
    pub(crate) session: Option<u64>,
    pub(crate) cut_until: u64,
    pub(crate) frozen_until: u64,
    /// How fast it works; 1 is ordinary.
    pub(crate) speed: f64,
    placement: Placement,
    weights: BTreeMap<ShardId, (Step, u64)>,
    copied: BTreeMap<ShardId, (Step, u64)>,
    /// What came for a placement and is used when the agent hears of it.
    fetched: BTreeMap<ShardId, (Step, u64)>,
    stash: BTreeMap<ShardId, Vec<(Step, u64)>>,
    /// What it works on, with its lanes.
    work: Option<(Epoch, Step, Vec<Lane>)>,
}

fn mix(a: u64, b: u64) -> u64 {
    Stream::new(a, Purpose::Faults, &[b]).next_u64()
}

fn lane_loss(step: Step, lane: Lane) -> f64 {
    Stream::new(9, Purpose::Faults, &[step.0, lane.0.into()]).next_f64()
}

/// Tokens per expert of one lane and layer: expert 1 has more than half.
fn uneven_load(experts: usize) -> Vec<u32> {
    (0..experts).map(|expert| if expert == 1 { 4 * experts as u32 } else { 3 }).collect()
}

/// A number for the update of a step, the same for everybody.
fn gradient(step: Step, rate: f64) -> u64 {
    mix(step.0, rate.to_bits())
}

impl Node {
    pub(crate) fn new(id: NodeId, process: u64) -> Self {
        Self {
            process,
            agent: Agent::new(id),
            session: None,
            cut_until: 0,
            frozen_until: 0,
            speed: 1.0,
            placement: Placement::default(),
            weights: BTreeMap::new(),
            copied: BTreeMap::new(),
            fetched: BTreeMap::new(),
            stash: BTreeMap::new(),
            work: None,
        }
    }

    /// What a node does that may not keep its state.
    pub(crate) fn start_anew(&mut self) {
        self.agent = Agent::new(self.agent.id().clone());
        self.placement = Placement::default();
        self.weights.clear();
        self.forget();
    }

    fn forget(&mut self) {
        self.work = None;
        self.copied.clear();
        self.fetched.clear();
        self.stash.clear();
    }

    fn apply(&mut self, shard: ShardId, step: Step, gradient: u64) {
        let Some((version, value)) = self.weights.get_mut(&shard) else {
            panic!("{shard} is to be changed by step {step} and is not here");
        };
        //
        assert_eq!(version.next(), step, "{shard} is at another version");
        (*version, *value) = (step, mix(*value, gradient));
    }
}

impl World {
    /// What a shard's state must be after a step.
    fn truth(&self, shard: ShardId, step: Step) -> u64 {
        let start = mix(77, volary_hash(shard));
        Step(1).through(step).fold(start, |value, s| {
            let (_, rate) = self.disk.ever.get(&s).unwrap_or_else(|| panic!("step {s} was never journalled"));
            mix(value, gradient(s, f64::from_bits(*rate)))
        })
    }

    pub(crate) fn node_event(&mut self, id: &NodeId, event: Event) {
        let Some(node) = self.nodes.get_mut(id) else { return };
        if matches!(&event, Event::Fetched { epoch, outcome: Ok(()) } if *epoch == node.agent.epoch()) {
            let fetched = std::mem::take(&mut node.fetched);
            node.weights.extend(fetched);
        }
        for effect in node.agent.handle(event) {
            self.node_does(id, effect);
        }
    }

    fn node_does(&mut self, id: &NodeId, effect: Effect) {
        let now = self.now;
        let Some(node) = self.nodes.get_mut(id) else { return };
        let process = node.process;
        match effect {
            Effect::Report(message) => {
                let Some(session) = node.session else { return };
                self.send(|| Happening::ToSupervisor { node: id.clone(), session, message: message.clone() });
            }
            Effect::Apply { step, update, shards, stash, .. } => {
                self.apply(id, step, gradient(step, update.rate), &shards, &stash);
            }
            Effect::Discard { .. } => node.forget(),
            Effect::Enter(assignment) => self.enter(id, &assignment),
            Effect::Fetch { epoch, version, shards } => self.fetch(id, epoch, version, &shards),
            Effect::Copy { epoch, shard, from } => {
                let node = id.clone();
                self.after(2, 150, Happening::ReadCopy { node, process, epoch, shard, from });
            }
            Effect::Install { shard, version, replay } => self.install(id, shard, version, &replay),
            Effect::Release(shards) => node.weights.retain(|shard, _| !shards.contains(shard)),
            Effect::Run { epoch, step, pass, lanes } => {
                assert_eq!(pass, Pass::Train);
                node.work = Some((epoch, step, lanes.into_iter().map(|(lane, _)| lane).collect()));
                let (least, most) = ((30.0 / node.speed) as u64, (120.0 / node.speed) as u64);
                let node = id.clone();
                self.after(least, most, Happening::Work { node, process, epoch, step, since: now });
            }
            Effect::Store { step, shards, .. } => self.store(id, step, shards),
            Effect::Leave { .. } => {
                self.left.insert(id.clone());
                self.nodes.remove(id);
            }
        }
    }

    fn apply(&mut self, id: &NodeId, step: Step, gradient: u64, shards: &[ShardId], stash: &[ShardId]) {
        assert!(self.disk.ever.contains_key(&step), "M-2: {id} applies step {step} before it is journalled");
        let Some(node) = self.nodes.get_mut(id) else { return };
        for &shard in shards {
            node.apply(shard, step, gradient);
        }
        for &shard in stash {
            let kept = node.stash.entry(shard).or_default();
            kept.push((step, gradient));
            if kept.len() > STASH_MAX {
                kept.remove(0);
            }
        }
        self.check(id);
    }

    /// No copy of any shard is ever anything but what the journal says it is.
    fn check(&self, id: &NodeId) {
        let Some(node) = self.nodes.get(id) else { return };
        for (&shard, &(version, value)) in &node.weights {
            assert_eq!(node.agent.shards().get(&shard), Some(&version), "{id} is mistaken about {shard}");
            assert_eq!(value, self.truth(shard, version), "{id}: {shard} at step {version} is wrong");
        }
    }

    fn enter(&mut self, id: &NodeId, assignment: &Assignment) {
        let Some(node) = self.nodes.get_mut(id) else { return };
        node.placement = Placement::clone(&assignment.placement);
    }

    fn fetch(&mut self, id: &NodeId, epoch: Epoch, version: Step, shards: &[(ShardId, Source)]) {
        let mut outcome = Ok(());
        for (shard, source) in shards {
            let value = match source {
                Source::Initial => self.truth(*shard, Step(0)),
                Source::Checkpoint(step) if Some(*step) == self.disk.durable => self.truth(*shard, *step),
                Source::Checkpoint(step) => {
                    // A late word: the run is further on, and this one is not of its placement any more.
                    assert!(self.disk.durable > Some(*step));
                    let reason = format!("the checkpoint of step {step} is gone");
                    outcome = Err(Failure { reason, fatal: true, suspect: None });
                    continue;
                }
                Source::Peer(peer) if self.reachable(id, peer) => {
                    match self.nodes.get(peer).and_then(|p| p.weights.get(shard)) {
                        Some((at, value)) if *at == version => *value,
                        // The peer is further on, or anew: a late word of a placement that is over.
                        _ => {
                            outcome = Err(unreachable_peer(peer));
                            continue;
                        }
                    }
                }
                Source::Peer(peer) => {
                    outcome = Err(unreachable_peer(peer));
                    continue;
                }
                Source::Held => unreachable!("what is held is not fetched"),
            };
            if let Some(node) = self.nodes.get_mut(id) {
                node.fetched.insert(*shard, (version, value));
            }
        }
        let Some(process) = self.nodes.get(id).map(|n| n.process) else { return };
        self.after(
            1,
            80,
            Happening::Local { node: id.clone(), process, event: Event::Fetched { epoch, outcome } },
        );
    }

    pub(crate) fn read_copy(
        &mut self,
        id: &NodeId,
        process: u64,
        epoch: Epoch,
        shard: ShardId,
        from: &[NodeId],
    ) {
        if self.nodes.get(id).is_none_or(|n| n.process != process || n.agent.epoch() != epoch) {
            return;
        }
        let peer = from.first();
        let read = peer.filter(|peer| self.reachable(id, peer)).and_then(|peer| self.nodes.get(peer));
        let outcome = match read.and_then(|peer| peer.weights.get(&shard)) {
            Some(&copy) => {
                if let Some(node) = self.nodes.get_mut(id) {
                    node.copied.insert(shard, copy);
                }
                Ok(copy.0)
            }
            None => Err(unreachable_peer(peer.unwrap_or(id))),
        };
        let event = Event::Copied { epoch, shard, outcome };
        self.after(1, 200, Happening::Local { node: id.clone(), process, event });
    }

    fn install(&mut self, id: &NodeId, shard: ShardId, version: Step, replay: &[Step]) {
        let Some(node) = self.nodes.get_mut(id) else { return };
        let Some(copy) = node.copied.remove(&shard) else { panic!("{shard} was not copied") };
        assert_eq!(copy.0, version);
        node.weights.insert(shard, copy);
        let stash = node.stash.remove(&shard).unwrap_or_default();
        for step in replay {
            let Some((_, gradient)) = stash.iter().find(|(at, _)| at == step) else {
                panic!("{shard}: the gradient of step {step} was not kept");
            };
            node.apply(shard, *step, *gradient);
        }
        self.check(id);
    }

    fn store(&mut self, id: &NodeId, step: Step, mut shards: Vec<ShardId>) {
        let Some((node, session)) = self.nodes.get(id).and_then(|n| Some((n, n.session?))) else { return };
        shards.retain(|shard| node.weights.get(shard).is_some_and(|(at, _)| *at == step));
        self.after(5, 80, Happening::Blobs { node: id.clone(), session, step, shards });
    }

    /// The end of a node's part of a step, once everybody else has begun it and can be reached.
    pub(crate) fn work(&mut self, id: &NodeId, process: u64, epoch: Epoch, step: Step, since: u64) {
        let Some(node) = self.nodes.get(id).filter(|n| n.process == process) else { return };
        let again = Happening::Work { node: id.clone(), process, epoch, step, since };
        if node.frozen_until > self.now {
            return self.put(node.frozen_until, again);
        }
        let Some((_, _, lanes)) = node.work.clone().filter(|w| (w.0, w.1) == (epoch, step)) else { return };
        let others = || node.placement.members.iter().filter(|member| *member != id);
        let broken = others().find(|member| !self.reachable(id, member)).cloned();
        let begun = |member: &NodeId| {
            let at = self.nodes.get(member).map(|n| (n.work.as_ref(), n.agent.resident_state()));
            at.is_some_and(|(work, held)| {
                work.is_some_and(|w| (w.0, w.1) >= (epoch, step))
                    || held.prepared == Some((epoch, step))
                    || held.version >= step
            })
        };
        let early = others().any(|member| !begun(member));
        if let Some(peer) = broken {
            if self.now < since + SILENCE_MS {
                return self.put(self.now + 50, again);
            }
            let event = Event::Failed { epoch, failure: unreachable_peer(&peer) };
            return self.node_event(id, event);
        }
        if early {
            return self.put(self.now + 20, again);
        }
        let kept = self
            .settings
            .architecture
            .shards()
            .into_iter()
            .filter(|s| node.placement.holds_or_learns(id, *s));
        let (experts, layers) =
            (self.settings.architecture.experts, self.settings.architecture.moe_layers().count());
        let load = vec![uneven_load(experts); layers];
        let report = |lane| {
            (lane, LaneReport { loss: lane_loss(step, lane), load: load.clone(), ..LaneReport::default() })
        };
        let message = NodeReport::Prepared {
            epoch,
            step,
            norms: kept.map(|shard| (shard, Norm { squared: step.0 as f64, finite: true })).collect(),
            lanes: lanes.into_iter().map(report).collect(),
            speed: Some(node.speed),
        };
        self.node_event(id, Event::Done(message));
    }
}

fn unreachable_peer(peer: &NodeId) -> Failure {
    Failure { reason: format!("{peer} cannot be reached"), fatal: false, suspect: Some(peer.clone()) }
}

fn volary_hash(shard: ShardId) -> u64 {
    shard.to_string().bytes().fold(7, |hash, byte| mix(hash, byte.into()))
}
