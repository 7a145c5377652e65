//! Injects faults.

use crate::event::Event;
use crate::fault::Fault;
use crate::limits::SILENCE_MS;
use crate::node::Node;
use crate::world::World;
use volary_core::NodeId;
use volary_core::machine;

impl World {
    pub(crate) fn inject(&mut self, fault: Fault) {
        if self.traced {
            eprintln!("{:>7} !! {fault:?}", self.now);
        }
        match fault {
            Fault::Kill(node) => self.kill(&node),
            Fault::Freeze(node, ms) => {
                let until = self.now + ms;
                self.silence(&node, ms, |known| known.frozen_until = known.frozen_until.max(until));
            }
            Fault::Partition(node, ms) => {
                let until = self.now + ms;
                self.silence(&node, ms, |known| known.cut_until = known.cut_until.max(until));
            }
            Fault::Cut(a, b, ms) => {
                self.cuts.insert((a.clone(), b.clone()), self.now + ms);
                self.cuts.insert((b, a), self.now + ms);
            }
            Fault::Mute(from, to, ms) => {
                self.cuts.insert((from, to), self.now + ms);
            }
            Fault::Join => _ = self.join(None),
            Fault::JoinHidden => {
                let node = self.join(None);
                self.hidden.insert(node);
            }
            Fault::Respawn(node) => {
                if !self.nodes.contains_key(&node) {
                    _ = self.join(Some(node));
                }
            }
            Fault::Drain(node) => self.machine_event(machine::Event::DrainRequested { node }),
            Fault::KillSupervisor(effects) => self.effects_until_death = Some(effects),
            Fault::KillEverything => {
                self.alive().iter().for_each(|node| self.kill(node));
                self.kill_supervisor();
            }
            Fault::Slow(node, speed) => {
                if let Some(node) = self.nodes.get_mut(&node) {
                    node.speed = speed;
                }
            }
            Fault::Corrupt(node, shard) => {
                if let Some(node) = self.nodes.get_mut(&node) {
                    node.corrupts = Some(shard);
                }
            }
            Fault::Stop => self.machine_event(machine::Event::StopRequested),
            Fault::Network(network) => {
                self.network = network;
                self.lossy |= network.drop > 0.0;
            }
        }
    }

    fn kill(&mut self, id: &NodeId) {
        let Some(node) = self.nodes.remove(id) else { return };
        if let Some(session) = node.session {
            self.after(1, SILENCE_MS, Event::LinkEnds { node: id.clone(), session });
        }
    }

    /// Silences a node for `ms` milliseconds; beyond the limit both ends give up the link.
    fn silence(&mut self, id: &NodeId, ms: u64, change: impl FnOnce(&mut Node)) {
        let Some(node) = self.nodes.get_mut(id) else { return };
        change(node);
        if let (Some(session), true) = (node.session, ms > SILENCE_MS) {
            let at = self.now + SILENCE_MS;
            self.put(at, Event::LinkEnds { node: id.clone(), session });
            self.put(at, Event::LinkEndsForNode { node: id.clone(), session });
        }
    }
}
