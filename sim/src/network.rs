//! The simulated network.

use crate::event::Event;
use crate::world::World;
use volary_core::NodeId;

impl World {
    /// Sends a message on a control stream: in order, unless a fault of the network says otherwise.
    pub(crate) fn send(&mut self, make: impl Fn() -> Event) {
        if self.chance(self.network.drop) {
            return;
        }
        if self.chance(self.network.duplicate) {
            self.after(5, 50, make());
        }
        if self.chance(self.network.reorder) {
            return self.after(5, 500, make());
        }
        self.put(self.now + 2, make());
    }

    fn chance(&mut self, share: f64) -> bool {
        share > 0.0 && self.random.next_f64() < share
    }

    /// Whether two nodes reach each other now, as requests and their answers must.
    pub(crate) fn reachable(&self, a: &NodeId, b: &NodeId) -> bool {
        self.delivers(a, b) && self.delivers(b, a)
    }

    /// Whether a frame of one node reaches another now.
    pub(crate) fn delivers(&self, from: &NodeId, to: &NodeId) -> bool {
        let speaks = |node: &NodeId| self.nodes.contains_key(node) && self.silent_until(node).is_none();
        let is_cut = self.cuts.get(&(from.clone(), to.clone())).is_some_and(|&until| until > self.now);
        let is_hidden = self.hidden.contains(from) || self.hidden.contains(to);
        speaks(from) && speaks(to) && !is_cut && !is_hidden
    }

    /// Whether the supervisor has this link to a node.
    pub(crate) fn is_linked(&self, node: &NodeId, session: u64) -> bool {
        self.sessions.get(node) == Some(&session)
    }

    /// The end of a node's silence, if it is cut off or frozen now.
    pub(crate) fn silent_until(&self, node: &NodeId) -> Option<u64> {
        let node = self.nodes.get(node)?;
        let until = node.cut_until.max(node.frozen_until);
        (until > self.now).then_some(until)
    }

    /// The time to which an event is delayed: a silent node's messages are retransmitted until the link is
    /// given up, and a frozen process acts later.
    pub(crate) fn delayed_until(&self, event: &Event) -> Option<u64> {
        let frozen_until = |node: &NodeId, process: Option<u64>, session: Option<u64>| {
            let node = self.nodes.get(node)?;
            let is_same = process.is_none_or(|process| node.process == process)
                && session.is_none_or(|session| node.session == Some(session));
            (is_same && node.frozen_until > self.now).then_some(node.frozen_until)
        };
        match event {
            Event::ToSupervisor { node, .. }
            | Event::ToNode { node, .. }
            | Event::CheckpointShards { node, .. } => self.silent_until(node),
            Event::Agent { node, process, .. } | Event::Work { node, process, .. } => {
                frozen_until(node, Some(*process), None)
            }
            Event::LinkEndsForNode { node, session } => frozen_until(node, None, Some(*session)),
            _ => None,
        }
    }
}
