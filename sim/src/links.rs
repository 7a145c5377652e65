//! Links between nodes and the supervisor, and the supervisor's process.

use crate::event::Event;
use crate::limits::{REDIAL_MS, RESTART_MS, TICK_MS};
use crate::world::World;
use volary_core::machine::{self, LossCause, Machine};
use volary_core::messages::NodeReport;
use volary_core::profile::Profile;
use volary_core::{NodeId, agent};

impl World {
    pub(crate) fn start_supervisor(&mut self) {
        if self.machine.is_some() {
            return;
        }
        self.life += 1;
        self.machine = Some(Machine::new(self.settings.clone(), self.disk.restored()));
        let life = self.life;
        self.put(self.now + TICK_MS, Event::Tick { life });
    }

    pub(crate) fn kill_supervisor(&mut self) {
        if self.machine.take().is_none() {
            return;
        }
        self.effects_until_death = None;
        self.disk.pending = None;
        self.sessions.clear();
        // The next one learns of copies from the nodes that return to it.
        self.reported.clear();
        let sessions = self.nodes.iter().filter_map(|(node, known)| Some((node.clone(), known.session?)));
        for (node, session) in sessions.collect::<Vec<_>>() {
            self.after(1, 20, Event::LinkEndsForNode { node, session });
        }
        self.put(self.now + RESTART_MS, Event::SupervisorStarts);
    }

    pub(crate) fn on_link_ended(&mut self, node: NodeId, session: u64) {
        if self.is_linked(&node, session) {
            self.sessions.remove(&node);
            // The process noticed it first, lives and has not noticed yet, or is gone.
            let lives = self.nodes.get(&node).is_some_and(|n| n.session.is_none_or(|at| at == session));
            let cause = if lives { LossCause::Unlinked } else { LossCause::Ended };
            self.machine_event(machine::Event::Lost { node, cause, reason: "its link ended".into() });
        }
    }

    pub(crate) fn on_link_ended_for_node(&mut self, node: NodeId, session: u64) {
        let Some(known) = self.nodes.get_mut(&node).filter(|n| n.session == Some(session)) else { return };
        known.session = None;
        let process = known.process;
        self.node_event(&node, agent::Event::SupervisorLost);
        self.put(self.now + REDIAL_MS, Event::Dial { node, process });
    }

    /// A node connects to the supervisor and reports its state, or tries later.
    pub(crate) fn dial(&mut self, node: NodeId, process: u64) {
        let Some(known) = self.nodes.get(&node).filter(|n| n.process == process && n.session.is_none())
        else {
            return;
        };
        let held = known.agent.resident_state();
        if self.silent_until(&node).is_some() || self.machine.is_none() {
            return self.put(self.now + REDIAL_MS, Event::Dial { node, process });
        }
        if self.sessions.remove(&node).is_some() {
            let (cause, reason) = (LossCause::Unlinked, "it reconnected".to_owned());
            self.machine_event(machine::Event::Lost { node: node.clone(), cause, reason });
        }
        let Some(machine) = &self.machine else {
            return self.put(self.now + REDIAL_MS, Event::Dial { node, process });
        };
        let held = if machine.accepts_state(&held) { held } else { Default::default() };
        let session = self.next_sequence();
        self.sessions.insert(node.clone(), session);
        if let Some(known) = self.nodes.get_mut(&node) {
            known.session = Some(session);
            if held.shards.is_empty() {
                known.reset();
            }
        }
        self.reported.insert(node.clone(), held.shards.iter().copied().collect());
        let profile = Box::new((self.profiles)(&node));
        self.machine_event(machine::Event::Joined { node, profile, address: String::new(), held });
    }

    /// Takes a node's message to the supervisor.
    pub(crate) fn on_report(&mut self, node: NodeId, session: u64, message: NodeReport) {
        if self.is_linked(&node, session) {
            self.note_reported_shards(&node, &message);
            self.machine_event(machine::Event::Reported { node, message });
        }
    }

    fn note_reported_shards(&mut self, node: &NodeId, message: &NodeReport) {
        let current = self.machine.as_ref().map(|machine| machine.placement().epoch).unwrap_or_default();
        let reported = self.reported.entry(node.clone()).or_default();
        match message {
            NodeReport::Ready { epoch } if *epoch == current => {
                reported
                    .extend(self.nodes.get(node).into_iter().flat_map(|n| n.agent.resident_state().shards));
            }
            NodeReport::Learned { epoch, shards, .. } if *epoch == current => reported.extend(shards),
            _ => {}
        }
    }

    /// Gives the supervisor's machine an event and carries out its effects.
    pub(crate) fn machine_event(&mut self, event: machine::Event) {
        let Some(machine) = &mut self.machine else { return };
        // Most events are reports; what they change is also seen at the next tick.
        let is_looked_at = !matches!(event, machine::Event::Reported { .. });
        for effect in machine.handle(event) {
            if self.effects_until_death == Some(0) {
                return self.kill_supervisor();
            }
            self.effects_until_death = self.effects_until_death.map(|left| left - 1);
            self.carry_out_for_supervisor(effect);
        }
        if is_looked_at {
            self.ask_everything();
        }
    }

    /// What `volary status` asks, in every state of the machine: no answer panics or names a node that is
    /// gone.
    fn ask_everything(&self) {
        let Some(machine) = &self.machine else { return };
        let step_s = machine.predicted_step_s();
        assert!(step_s.is_finite() && step_s >= 0.0, "a step of {step_s} s");
        assert!(machine.durable() <= Some(machine.committed()));
        for shard in self.settings.architecture.shards() {
            let holders = machine.holders(shard);
            assert!(holders.iter().all(|node| machine.profile(node).is_some()), "{shard} on {holders:?}");
        }
        for node in self.nodes.keys() {
            assert!(!machine.node_state(node).is_empty());
            _ = machine.profile(node).map(Profile::capacity);
            _ = machine.placement().lanes_of(node);
        }
        _ = machine.activity();
    }
}
