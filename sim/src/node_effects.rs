//! Carries out a node's effects on a simulated device.

use crate::event::Event;
use crate::limits::SILENCE_MS;
use crate::node::{Node, Work, gradient, measured, mix, shard_hash, uneven_load};
use crate::world::World;
use std::collections::BTreeSet;
use volary_core::agent::{self, Effect, Failure};
use volary_core::costs::{Costs, lanes_in_flight};
use volary_core::messages::{Assignment, LaneReport, NodeReport, Norm, Pass, Source};
use volary_core::placement::Placement;
use volary_core::{Digest, Epoch, Lane, LayerId, NodeId, ShardId, Step};

impl World {
    /// The correct state of a shard after a step.
    fn expected(&self, shard: ShardId, step: Step) -> u64 {
        let start = mix(77, shard_hash(shard));
        Step(1).through(step).fold(start, |value, s| {
            let (_, rate) = self.disk.ever.get(&s).unwrap_or_else(|| panic!("step {s} was never journaled"));
            mix(value, gradient(s, f64::from_bits(*rate)))
        })
    }

    pub(crate) fn node_event(&mut self, id: &NodeId, event: agent::Event) {
        let Some(node) = self.nodes.get_mut(id) else { return };
        if matches!(&event, agent::Event::Fetched { epoch, outcome: Ok(()) } if *epoch == node.agent.epoch())
        {
            let fetched = std::mem::take(&mut node.fetched);
            node.weights.extend(fetched);
        }
        for effect in node.agent.handle(event) {
            self.carry_out_for_node(id, effect);
        }
    }

    fn carry_out_for_node(&mut self, id: &NodeId, effect: Effect) {
        let now = self.now;
        let Some(node) = self.nodes.get_mut(id) else { return };
        let process = node.process;
        match effect {
            Effect::Report(message) => {
                let Some(session) = node.session else { return };
                self.send(|| Event::ToSupervisor { node: id.clone(), session, message: message.clone() });
            }
            Effect::Apply { step, update, shards, stash, .. } => {
                self.apply(id, step, gradient(step, update.rate), &shards, &stash);
            }
            Effect::Discard { .. } => node.discard_work(),
            Effect::Enter(assignment) => self.enter(id, &assignment),
            Effect::Fetch { epoch, version, shards } => self.fetch(id, epoch, version, &shards),
            Effect::Copy { epoch, shard, from } => {
                let node = id.clone();
                self.after(2, 150, Event::ReadCopy { node, process, epoch, shard, from });
            }
            Effect::Install { shard, version, replay } => self.install(id, shard, version, &replay),
            Effect::Release(shards) => node.weights.retain(|shard, _| !shards.contains(shard)),
            Effect::Run { epoch, step, pass, lanes, compare } => {
                let lanes = lanes.into_iter().map(|(lane, _)| lane).collect();
                node.work = Some(Work { epoch, step, pass, lanes, compare });
                let (least, most) = ((30.0 / node.speed) as u64, (120.0 / node.speed) as u64);
                let node = id.clone();
                self.after(least, most, Event::Work { node, process, epoch, step, since: now });
            }
            Effect::Store { step, shards, .. } => self.store(id, step, shards),
            Effect::Leave { .. } => {
                self.left.insert(id.clone());
                self.nodes.remove(id);
            }
        }
    }

    fn apply(
        &mut self,
        id: &NodeId,
        step: Step,
        gradient: u64,
        shards: &[ShardId],
        stash: &[(ShardId, usize)],
    ) {
        assert!(self.disk.ever.contains_key(&step), "M-2: {id} applies step {step} before it is journaled");
        let Some(node) = self.nodes.get_mut(id) else { return };
        for &shard in shards {
            node.apply(shard, step, gradient);
            if node.corrupts.take_if(|corrupted| *corrupted == shard).is_some() {
                node.flip_bit(shard);
                self.corrupted_at.get_or_insert(step);
            }
        }
        for &(shard, most) in stash {
            let kept = node.stash.entry(shard).or_default();
            kept.push((step, gradient));
            if kept.len() > most {
                kept.remove(0);
            }
        }
        self.check(id);
    }

    /// Every copy of every shard is the state that the journal implies.
    fn check(&self, id: &NodeId) {
        let Some(node) = self.nodes.get(id) else { return };
        for (&shard, &(version, value)) in &node.weights {
            assert_eq!(
                node.agent.shards().get(&shard),
                Some(&version),
                "{id}: the agent has another version of {shard}"
            );
            assert!(
                value == self.expected(shard, version) || self.corrupted_at.is_some(),
                "{id}: {shard} at step {version} is wrong"
            );
        }
    }

    fn enter(&mut self, id: &NodeId, assignment: &Assignment) {
        self.check_memory(id, assignment);
        let Some(node) = self.nodes.get_mut(id) else { return };
        node.placement = Placement::clone(&assignment.layout.placement);
    }

    /// What a node holds and copies fits into its memory.
    fn check_memory(&self, id: &NodeId, assignment: &Assignment) {
        let profile = (self.profiles)(id);
        let costs = Costs::new(&self.settings.architecture, &self.settings.training);
        let held = assignment.shards.iter().map(|(shard, _)| *shard);
        let shards: BTreeSet<ShardId> =
            held.chain(assignment.learn.iter().map(|(shard, _)| *shard)).collect();
        let experts = shards.iter().filter(|shard| shard.is_expert()).count() as u64;
        let in_flight = lanes_in_flight(profile.threads);
        let layers: BTreeSet<LayerId> =
            shards.iter().filter(|shard| !shard.is_expert()).map(|shard| shard.layer()).collect();
        let dense: u64 = layers.iter().map(|layer| costs.stage_bytes(layer.alone(), in_flight)).sum();
        let bytes = dense + experts * costs.expert_bytes;
        assert!(
            bytes <= profile.memory_bytes,
            "{id} has {} bytes for {bytes}: {layers:?}, {experts} experts",
            profile.memory_bytes
        );
    }

    fn fetch(&mut self, id: &NodeId, epoch: Epoch, version: Step, shards: &[(ShardId, Source)]) {
        let mut outcome = Ok(());
        for (shard, source) in shards {
            let value = match source {
                Source::Initial => self.expected(*shard, Step(0)),
                Source::Checkpoint(step) if Some(*step) == self.disk.durable => {
                    assert!(!self.disk.bad.contains(step), "a corrupted checkpoint of step {step} is loaded");
                    self.expected(*shard, *step)
                }
                Source::Checkpoint(step) => {
                    // A late message: the placement is over.
                    assert!(self.disk.durable > Some(*step));
                    let reason = format!("the checkpoint of step {step} is gone");
                    outcome = Err(Failure { reason, fatal: true, suspect: None });
                    continue;
                }
                Source::Peer(peer) if self.reachable(id, peer) => {
                    match self.nodes.get(peer).and_then(|p| p.weights.get(shard)) {
                        Some((at, value)) if *at == version => *value,
                        // The peer is ahead or restarted: a late message of a placement that is over.
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
                Source::Held => unreachable!("held shards are not fetched"),
            };
            if let Some(node) = self.nodes.get_mut(id) {
                node.fetched.insert(*shard, (version, value));
            }
        }
        let Some(process) = self.nodes.get(id).map(|n| n.process) else { return };
        self.after(
            1,
            80,
            Event::Agent { node: id.clone(), process, event: agent::Event::Fetched { epoch, outcome } },
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
        let event = agent::Event::Copied { epoch, shard, outcome };
        self.after(1, 200, Event::Agent { node: id.clone(), process, event });
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
        if shards.iter().any(|shard| node.weights[shard].1 != self.expected(*shard, step)) {
            self.disk.bad.insert(step);
        }
        self.after(5, 80, Event::CheckpointShards { node: id.clone(), session, step, shards });
    }

    /// Ends a node's part of a pass, once all members have begun it and are reachable. [`World::dispatch`]
    /// has checked that the process runs.
    pub(crate) fn work(&mut self, id: &NodeId, process: u64, epoch: Epoch, step: Step, since: u64) {
        let Some(node) = self.nodes.get(id).filter(|n| n.process == process) else { return };
        let retry = Event::Work { node: id.clone(), process, epoch, step, since };
        let Some(work) = node.work.clone().filter(|w| (w.epoch, w.step) == (epoch, step)) else { return };
        let held = node.agent.resident_state();
        if held.version >= step || held.prepared == Some((epoch, step)) {
            // Its command came twice.
            return;
        }
        let others = || node.placement.members.iter().filter(|member| *member != id);
        // The sender of a lost frame gets no acknowledgment and fails; the receiver cannot tell and waits.
        let broken = others().find(|member| !self.delivers(id, member)).cloned();
        let unheard = others().any(|member| !self.delivers(member, id));
        let begun = |member: &NodeId| {
            let at = self.nodes.get(member).map(|n| (n.work.as_ref(), n.agent.resident_state()));
            at.is_some_and(|(theirs, held)| {
                theirs.is_some_and(|theirs| theirs.at() >= work.at())
                    || held.prepared == Some((epoch, step))
                    || held.version >= step
            })
        };
        let early = others().any(|member| !begun(member));
        if let Some(peer) = broken {
            if self.now < since + SILENCE_MS {
                return self.put(self.now + 50, retry);
            }
            let event = agent::Event::Failed { epoch, failure: unreachable_peer(&peer) };
            return self.node_event(id, event);
        }
        if early || unheard {
            return self.put(self.now + 20, retry);
        }
        // A member that is in another placement by now refuses what this node sends.
        let is_over = others().any(|member| self.nodes.get(member).is_some_and(|n| n.agent.epoch() > epoch));
        if is_over {
            let failure = Failure { reason: "the placement is over".into(), fatal: false, suspect: None };
            return self.node_event(id, agent::Event::Failed { epoch, failure });
        }
        let message = self.report(id, node, &work);
        self.node_event(id, agent::Event::Done(message));
    }

    /// What a node reports after a pass.
    fn report(&self, id: &NodeId, node: &Node, work: &Work) -> NodeReport {
        let &Work { epoch, step, pass, .. } = work;
        let placement = &node.placement;
        let architecture = &self.settings.architecture;
        let load = vec![uneven_load(architecture.experts); architecture.moe_layers().count()];
        let lane_report = |&lane: &Lane| {
            let loss = measured(step, lane.0.into(), self.weights_of_lane(placement, lane, step));
            (lane, LaneReport { loss, load: load.clone(), ..LaneReport::default() })
        };
        let lanes = work.lanes.iter().map(lane_report).collect();
        if let Pass::Validate { round } = pass {
            return NodeReport::Validated { epoch, round, lanes };
        }
        let norm = |shard: ShardId| {
            let owner = placement.owner(shard).and_then(|owner| self.weight(owner, shard, step))?;
            let squared = measured(step, shard_hash(shard), owner);
            Some((shard, Norm { squared, finite: true }))
        };
        let digest = |shard: &ShardId| {
            let (version, value) = node.weights.get(shard)?;
            (version.next() == step).then(|| (*shard, Digest::of(&value.to_le_bytes())))
        };
        let kept = architecture.shards().into_iter().filter(|s| placement.holds_or_learns(id, *s));
        NodeReport::Prepared {
            epoch,
            step,
            norms: kept.filter_map(norm).collect(),
            digests: work.compare.iter().filter_map(digest).collect(),
            lanes,
            speed: Some(node.speed),
        }
    }

    /// The number that stands for all weights that a lane meets, on the nodes that serve it.
    fn weights_of_lane(&self, placement: &Placement, lane: Lane, step: Step) -> u64 {
        let node = |shard: ShardId| match shard {
            ShardId::Expert { .. } => placement.serving_replica(shard, lane),
            _ => placement.stage_of(shard.layer())?.stage_node(lane),
        };
        self.settings.architecture.shards().into_iter().fold(0, |sum, shard| {
            let Some(node) = node(shard) else { panic!("nobody serves {shard} to lane {lane}") };
            let weight = self.weight(node, shard, step);
            mix(sum, weight.unwrap_or_else(|| panic!("{node} serves {shard} and has another version")))
        })
    }

    /// The number that stands for a node's copy of a shard before a step.
    fn weight(&self, node: &NodeId, shard: ShardId, step: Step) -> Option<u64> {
        let (version, value) = self.nodes.get(node)?.weights.get(&shard)?;
        (version.next() == step).then_some(*value)
    }
}

fn unreachable_peer(peer: &NodeId) -> Failure {
    Failure { reason: format!("{peer} cannot be reached"), fatal: false, suspect: Some(peer.clone()) }
}
