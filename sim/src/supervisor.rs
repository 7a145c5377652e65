//! Carries out the supervisor's effects, and checks their invariants.

use crate::disk::PendingCheckpoint;
use crate::event::Event;
use crate::limits::VERIFY_MS;
use crate::world::World;
use std::collections::BTreeSet;
use volary_core::machine::{self, Committed, Effect, PersistentState};
use volary_core::messages::NodeCommand;
use volary_core::{NodeId, ShardId, Step};

impl World {
    pub(crate) fn carry_out_for_supervisor(&mut self, effect: Effect) {
        match effect {
            Effect::Send { node, message } => self.send_to_node(&node, &message),
            Effect::Fence { node, .. } => self.fence(&node),
            Effect::Journal(committed) => self.journal_step(*committed),
            Effect::Persist(persistent) => {
                assert!(
                    persistent.epoch > self.disk.persistent.epoch || persistent.members.is_empty(),
                    "the number of an epoch is used twice"
                );
                self.disk.persistent = persistent;
            }
            Effect::OpenCheckpoint { attempt, step, senders, .. } => {
                let wanted: BTreeSet<ShardId> = senders.into_keys().collect();
                assert_eq!(
                    wanted.len(),
                    self.settings.architecture.shards().len(),
                    "every shard has a sender"
                );
                let stored = BTreeSet::new();
                self.disk.pending = Some(PendingCheckpoint { attempt, step, wanted, stored });
            }
            Effect::DropCheckpoint { attempt } => {
                self.disk.pending.take_if(|pending| pending.attempt == attempt);
            }
            Effect::CheckpointAgreed { step } => self.disk.agreed = Some(step),
            Effect::VerifyCheckpoint { step } => {
                let life = self.life;
                self.after(1, VERIFY_MS, Event::Verified { life, step });
            }
            Effect::GoBack { step, state } => self.go_back(step, state),
            Effect::Validated { .. } => {}
            Effect::Notice(notice) => {
                if self.traced {
                    eprintln!("{:>7} -- {notice:?}", self.now);
                }
                self.notices.push(notice);
            }
            Effect::Done => self.done = true,
            Effect::Halt { .. } => self.kill_supervisor(),
            Effect::Fatal { reason } => self.fatal = Some(reason),
        }
    }

    fn send_to_node(&mut self, node: &NodeId, message: &NodeCommand) {
        let Some(&session) = self.sessions.get(node) else { return };
        if matches!(message, NodeCommand::Leave { .. }) {
            // Released in order: nothing that it holds or sends afterwards counts, and the link is closed.
            self.sessions.remove(node);
            self.reported.remove(node);
            self.after(1_000, 1_100, Event::LinkEndsForNode { node: node.clone(), session });
        }
        self.send(|| Event::ToNode { node: node.clone(), session, message: message.clone() });
    }

    fn fence(&mut self, node: &NodeId) {
        // Its copies do not count any more.
        self.reported.remove(node);
        if let Some(session) = self.sessions.remove(node) {
            self.after(1, 20, Event::LinkEndsForNode { node: node.clone(), session });
        }
    }

    fn journal_step(&mut self, committed: Committed) {
        // M-1. A repeated step must have the same result.
        assert_eq!(committed.step, self.disk.last_step().next(), "steps are committed in order, once");
        let bits = (committed.loss.to_bits(), committed.update.rate.to_bits());
        let before = self.disk.ever.insert(committed.step, bits).unwrap_or(bits);
        // Until it is found, a corrupted copy takes part in steps, which are then repeated.
        let is_met = self.corrupted_at.is_some_and(|at| committed.step > at);
        assert!(before == bits || is_met, "the repeated step {} has another result", committed.step);
        self.commits.push((committed.step, self.now));
        self.disk.journal.insert(committed.step, committed);
    }

    /// M-4, and its converse: never while the living nodes have a copy of every shard.
    fn go_back(&mut self, step: Step, state: PersistentState) {
        // An abandoned checkpoint that became durable after all is skipped.
        assert!(step <= self.disk.durable.unwrap_or_default());
        assert!(state.timeline > self.disk.persistent.timeline, "every going-back begins a new timeline");
        let is_kept = step == Step(0) || Some(step) == self.disk.durable || Some(step) == self.disk.agreed;
        assert!(is_kept, "the checkpoint of step {step} may be gone");
        self.disk.durable = (step > Step(0)).then_some(step);
        self.disk.bad.retain(|at| *at <= step);
        let timeline = std::mem::replace(&mut self.disk.persistent, state).timeline;
        let committed = self.disk.last_step();
        let last = self.disk.restored().last;
        let has = |node: &NodeId, shard: &ShardId| {
            if !self.reported.get(node).is_some_and(|shards| shards.contains(shard)) {
                return false;
            }
            let Some(known) = self.nodes.get(node) else { return false };
            let held = known.agent.resident_state();
            let rolls = last.is_some_and(|l| {
                held.prepared == Some((l.epoch, l.step)) && held.version.next() == committed
            });
            held.timeline == timeline && held.shards.contains(shard) && (held.version == committed || rolls)
        };
        let shards = self.settings.architecture.shards();
        let lost = shards.iter().any(|shard| !self.nodes.keys().any(|node| has(node, shard)));
        // With lost messages the supervisor may not know of a copy.
        assert!(
            lost || self.lossy || self.corrupted_at.is_some(),
            "went back from {committed} to {step} while a copy of every shard exists"
        );
        self.disk.journal.retain(|at, _| *at <= step);
    }

    pub(crate) fn shards_for_checkpoint(&mut self, step: Step, shards: Vec<ShardId>) {
        let Some(pending) = self.disk.pending.as_mut().filter(|pending| pending.step == step) else { return };
        pending.stored.extend(shards);
        if pending.stored.len() == pending.wanted.len() {
            let attempt = pending.attempt;
            self.disk.pending = None;
            let life = self.life;
            self.after(5, 60, Event::Stored { life, attempt, step });
        }
    }

    pub(crate) fn stored(&mut self, life: u64, attempt: u64, step: Step) {
        if self.life != life || self.machine.is_none() || self.disk.last_step() < step {
            return;
        }
        self.disk.durable = self.disk.durable.max(Some(step));
        self.machine_event(machine::Event::CheckpointStored { attempt });
    }
}
