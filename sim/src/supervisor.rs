//! Carries out the supervisor's effects, and checks what must hold of them. Its disk outlives it.

use crate::world::{Happening, World};
use std::collections::{BTreeMap, BTreeSet};
use volary_core::machine::{Committed, Effect, Event, PersistentState, Restored};
use volary_core::messages::{LastCommit, NodeCommand};
use volary_core::{NodeId, ShardId, Step};

/// What survives the supervisor.
#[derive(Debug, Default)]
pub(crate) struct Disk {
    pub(crate) journal: BTreeMap<Step, Committed>,
    /// What was ever committed at a step: doing it again must give the same.
    pub(crate) ever: BTreeMap<Step, (u64, u64)>,
    persistent: PersistentState,
    pub(crate) durable: Option<Step>,
    pub(crate) pending: Option<(Step, BTreeSet<ShardId>, BTreeSet<ShardId>)>,
}

impl Disk {
    pub(crate) fn last_step(&self) -> Step {
        self.journal.last_key_value().map(|(step, _)| *step).unwrap_or_default()
    }

    pub(crate) fn restored(&self) -> Restored {
        let last = self.journal.values().last();
        Restored {
            durable: self.durable,
            last: last.map(|c| LastCommit { epoch: c.epoch, step: c.step, update: c.update }),
            persistent: self.persistent.clone(),
        }
    }
}

impl World {
    pub(crate) fn supervisor_does(&mut self, effect: Effect) {
        match effect {
            Effect::Send { node, message } => self.tell(&node, &message),
            Effect::Fence { node, .. } => self.fence(&node),
            Effect::Journal(committed) => self.journal_step(*committed),
            Effect::Persist(persistent) => {
                assert!(persistent.epoch > self.disk.persistent.epoch, "an epoch's number is used twice");
                self.disk.persistent = persistent;
            }
            Effect::OpenCheckpoint { step, shards, .. } => {
                self.disk.pending = Some((step, shards.into_iter().collect(), BTreeSet::new()));
            }
            Effect::DropCheckpoint { step } => {
                self.disk.pending.take_if(|(open, ..)| *open == step);
            }
            Effect::GoBack { step } => self.go_back(step),
            Effect::Validated { .. } => {}
            Effect::Notice(notice) => {
                if self.traced {
                    eprintln!("{:>7} -- {notice:?}", self.now);
                }
                self.notices.push(notice);
            }
            Effect::Done => self.done = true,
            Effect::Fatal { reason } => self.fatal = Some(reason),
        }
    }

    fn tell(&mut self, node: &NodeId, message: &NodeCommand) {
        let Some(&session) = self.sessions.get(node) else { return };
        if matches!(message, NodeCommand::Leave { .. }) {
            // Let go for good, in order: nothing that it says after this counts.
            self.sessions.remove(node);
        }
        self.send(|| Happening::NodeCommand { node: node.clone(), session, message: message.clone() });
    }

    fn fence(&mut self, node: &NodeId) {
        if let Some(session) = self.sessions.remove(node) {
            self.after(1, 20, Happening::LinkEndsForNode { node: node.clone(), session });
        }
    }

    fn journal_step(&mut self, committed: Committed) {
        // M-1: once, in order; and the same as ever before.
        assert_eq!(committed.step, self.disk.last_step().next(), "steps are committed in order, once");
        let bits = (committed.loss.to_bits(), committed.update.rate.to_bits());
        let before = *self.disk.ever.entry(committed.step).or_insert(bits);
        assert_eq!(before, bits, "step {} done again is another", committed.step);
        self.commits.push((committed.step, self.now));
        self.disk.journal.insert(committed.step, committed);
    }

    /// M-4, and its other half: never while a copy of every shard lives among those who are here.
    fn go_back(&mut self, step: Step) {
        // One that was given up and became durable all the same is passed over.
        assert!(step <= self.disk.durable.unwrap_or_default());
        self.disk.durable = (step > Step(0)).then_some(step);
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
            held.shards.contains(shard) && (held.version == committed || rolls)
        };
        let linked: Vec<&NodeId> = self
            .sessions
            .iter()
            .filter(|(node, session)| self.nodes.get(*node).is_some_and(|n| n.session == Some(**session)))
            .map(|(node, _)| node)
            .collect();
        let shards = self.settings.architecture.shards();
        let lost = shards.iter().any(|shard| !linked.iter().any(|node| has(node, shard)));
        // Where words are lost, a copy may be there and nobody knows of it.
        assert!(lost || self.lossy, "went back from {committed} to {step} while a copy of every shard lives");
        self.disk.journal.retain(|at, _| *at <= step);
    }

    pub(crate) fn shards_for_checkpoint(&mut self, step: Step, shards: Vec<ShardId>) {
        let Some((open, wanted, here)) = &mut self.disk.pending else { return };
        if *open != step {
            return;
        }
        here.extend(shards);
        if here.len() == wanted.len() {
            self.disk.pending = None;
            let life = self.life;
            self.after(5, 60, Happening::Stored { life, step });
        }
    }

    pub(crate) fn stored(&mut self, life: u64, step: Step) {
        if self.life != life || self.machine.is_none() || self.disk.last_step() < step {
            return;
        }
        self.disk.durable = self.disk.durable.max(Some(step));
        self.event(Event::CheckpointStored { step });
    }
}
