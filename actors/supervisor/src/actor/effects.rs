//! Carries out what the machine decides, in its order.

use super::recovery::{AGREED, CLUSTER, StoredState, newest_intact, persist};
use super::{RunEnd, SupervisorState};
use crate::blocking::blocking;
use crate::error::Result;
use crate::limits::{SHORT_NOTICE_S, STATUS_EVENTS};
use crate::messages::{CheckpointerMsg, CopyOutcome, SupervisorMsg, notify};
use crate::run_files::{CopyEvent, EventLine, MetricsLine, ValidationLine, unix_ms};
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Instant;
use volary_core::machine::{Committed, Effect, Notice, PersistentState};
use volary_core::messages::NodeCommand;
use volary_core::{Epoch, NodeId, ShardId, Step, Timeline};
use volary_data::validation;
use volary_protocol::ToNode;
use volary_protocol::operator::{OperatorReply, OperatorRequest};
use volary_storage::{Error as StorageError, Table};

impl SupervisorState {
    pub(super) async fn carry_out(&mut self, effect: Effect) -> Result<()> {
        match effect {
            Effect::Send { node, message } => self.send(&node, message),
            Effect::Fence { node, reason } => {
                self.disconnect(&node, &reason);
                self.revoke(node, format!("the node was fenced: {reason}")).await?;
            }
            Effect::Journal(committed) => self.journal(*committed).await?,
            Effect::Persist(state) => {
                let store = self.store.clone();
                blocking(move || persist(&store, state)).await?;
            }
            Effect::OpenCheckpoint { attempt, step, epoch, timeline, senders } => {
                self.open_checkpoint(attempt, (step, timeline, epoch), senders);
            }
            Effect::DropCheckpoint { attempt } => {
                notify(&self.checkpointer, CheckpointerMsg::Drop { attempt });
            }
            Effect::CheckpointAgreed { step } => {
                let store = self.store.clone();
                blocking(move || store.put(Table::Facts, AGREED, &step)).await?;
                notify(&self.checkpointer, CheckpointerMsg::Agreed { step });
            }
            Effect::VerifyCheckpoint { step } => self.verify_checkpoint(step),
            Effect::GoBack { step, state } => self.go_back(step, state).await?,
            Effect::Validated { step, loss, tokens, sequences } => {
                self.last_commit = Instant::now();
                let line = self.validation_line(step, (loss, tokens), &sequences);
                let is_first = self.files.validation(&line);
                self.telemetry.validated(&line, is_first);
            }
            Effect::Notice(notice) => self.on_notice(notice).await?,
            Effect::Done => self.on_end(RunEnd::Done { step: self.machine.committed() }),
            Effect::Halt { reason } => self.on_end(RunEnd::Halted { reason, may_pass: false }),
            Effect::Fatal { reason } => self.on_end(RunEnd::Fatal { reason }),
        }
        Ok(())
    }

    /// The loss with its uncertainty; `sequences` are the losses of the sequences by round and lane.
    fn validation_line(
        &self,
        step: Step,
        (loss, tokens): (f64, u64),
        sequences: &[Vec<f32>],
    ) -> ValidationLine {
        let lanes = self.validation_documents.iter().zip(sequences);
        let pairs = lanes.flat_map(|(documents, losses)| documents.iter().copied().zip(losses));
        let by_document: Vec<(u64, f64)> =
            pairs.map(|(document, loss)| (document, f64::from(*loss))).collect();
        let documents =
            by_document.iter().map(|(document, _)| document).collect::<BTreeSet<_>>().len() as u64;
        let standard_error = validation::standard_error(&by_document);
        ValidationLine { step, loss, standard_error, documents, tokens }
    }

    fn open_checkpoint(
        &mut self,
        attempt: u64,
        at: (Step, Timeline, Epoch),
        senders: BTreeMap<ShardId, NodeId>,
    ) {
        let scope = self.telemetry.traces.checkpoint(at.0, senders.len());
        let shards = senders.keys().copied().collect();
        self.checkpoint_senders = senders;
        notify(&self.checkpointer, CheckpointerMsg::Open { attempt, at, shards, scope });
    }

    /// Reads a checkpoint, which may take minutes, while the actor goes on.
    fn verify_checkpoint(&self, step: Step) {
        let (me, checkpoints, may_go_back) = (self.me.clone(), self.checkpoints.clone(), self.may_go_back);
        tokio::spawn(async move {
            let verified = blocking(move || newest_intact(&checkpoints, step, may_go_back)).await;
            notify(&me, SupervisorMsg::Verified(verified));
        });
    }

    /// Revokes a node's certificates, also between nodes.
    async fn revoke(&self, node: NodeId, reason: String) -> Result<()> {
        let credentials = Arc::clone(&self.credentials);
        let hashes = blocking(move || credentials.revoke_certificates(&node, &reason)).await?;
        if !hashes.is_empty() {
            self.sessions.send_to_all(&ToNode::Revoked(hashes));
        }
        Ok(())
    }

    /// Sends a command. The session's writer gives a `Begin` the tokens of its lanes.
    fn send(&mut self, node: &NodeId, command: NodeCommand) {
        self.timings.sent(&command);
        let trace = self.telemetry.traces.sent(&command);
        if let Some(session) = self.sessions.get(node) {
            session.send(ToNode::Protocol(command, trace));
        }
    }

    /// Makes a step durable, then reports it.
    async fn journal(&mut self, committed: Committed) -> Result<()> {
        let (store, record) = (self.store.clone(), committed.clone());
        let (prepared, span) = self.telemetry.traces.committing();
        let (began, scope) = (Instant::now(), span.scope());
        blocking(move || scope.enter(|| store.commit(record.step, &record))).await?;
        drop(span);
        self.telemetry.metrics.journal_written(began.elapsed());
        if let Some(took) = prepared {
            self.telemetry.metrics.prepared(took);
        }
        self.skipped_steps += u64::from(!committed.update.apply);
        let seconds = self.last_commit.elapsed().as_secs_f64();
        self.last_commit = Instant::now();
        let costs = self.timings.committed(committed.step);
        for cost in &costs {
            self.write_event(cost);
        }
        let line = MetricsLine::new(&committed, Some(seconds));
        self.files.metrics(&line, &self.store);
        self.telemetry.committed(&committed, &line, &costs);
        if self.telemetry.is_sampled(line.step) {
            let (loss, busiest_expert) = (line.loss, line.busiest_expert);
            tracing::info!(step = %line.step, loss, seconds, busiest_expert, load = ?committed.load, "committed");
        }
        self.last_metrics = Some(line);
        self.load = committed.load;
        Ok(())
    }

    /// Removes everything after `step`: first the steps, with the new timeline in the same transaction, then
    /// the checkpoints, which are void from then on.
    async fn go_back(&mut self, step: Step, state: PersistentState) -> Result<()> {
        // A checkpoint that is just becoming durable is one of those that are removed.
        drop(self.checkpointer.call(|reply| CheckpointerMsg::Idle { reply }, None).await);
        let (store, checkpoints) = (self.store.clone(), self.checkpoints.clone());
        blocking(move || {
            let stored = StoredState::prepare(&store, state)?;
            store.go_back(step, CLUSTER, &stored)?;
            stored.tidy_up(&store)?;
            checkpoints.truncate_after(step)?;
            Ok::<_, StorageError>(())
        })
        .await?;
        self.files.go_back(step);
        self.telemetry.go_back(step);
        Ok(())
    }

    async fn on_notice(&mut self, notice: Notice) -> Result<()> {
        self.answer_requests(&notice);
        if let Notice::Left { node } = &notice {
            self.sessions.release(node.clone());
            self.revoke(node.clone(), "the node has left".into()).await?;
        }
        self.failed_checkpoints += u64::from(matches!(notice, Notice::CheckpointFailed { .. }));
        match &notice {
            Notice::WentBack { .. }
            | Notice::WentBackFromNan { .. }
            | Notice::WentBackFromDifference { .. }
            | Notice::GivingUp { .. }
            | Notice::NoRoom { .. }
            | Notice::ReplicasDiffer { .. }
            | Notice::CheckpointFailed { .. } => tracing::error!(?notice, "event"),
            Notice::Draining { node, seconds, .. } if *seconds > SHORT_NOTICE_S => {
                let reason = "a termination notice may be too short for what only this node holds";
                tracing::warn!(%node, seconds, reason, "event");
            }
            Notice::Lost { .. }
            | Notice::Fenced { .. }
            | Notice::ArithmeticMixed { .. }
            | Notice::MigrationFailed { .. }
            | Notice::DrainDeferred { .. }
            | Notice::LearnerLate { .. }
            | Notice::CheckpointPassed { .. }
            | Notice::Aborted { .. } => tracing::warn!(?notice, "event"),
            _ => tracing::info!(?notice, "event"),
        }
        self.timings.on_notice(&notice);
        self.telemetry.on_notice(&notice);
        self.write_event(&notice);
        Ok(())
    }

    /// Answers the operators who wait for what has just happened.
    fn answer_requests(&mut self, notice: &Notice) {
        match notice {
            Notice::Checkpoint { step } => {
                self.answer(&OperatorRequest::Checkpoint, &OperatorReply::Done { step: *step });
            }
            Notice::CheckpointFailed { reason, .. } => {
                let failed = OperatorReply::Failed { reason: reason.clone() };
                self.answer(&OperatorRequest::Checkpoint, &failed);
            }
            Notice::DrainDeferred { node, reason } => {
                let failed = OperatorReply::Failed { reason: reason.clone() };
                self.answer(&OperatorRequest::Drain { node: node.0.clone() }, &failed);
            }
            _ => {}
        }
    }

    /// Reports the end of a copy in the object store.
    pub(super) fn on_copied(&mut self, outcome: CopyOutcome) {
        if let Some(event) = CopyEvent::of(outcome, &self.reported_copy) {
            self.write_event(&event);
        }
    }

    /// Writes a line of `events.jsonl`, and publishes it.
    fn write_event(&mut self, event: &impl Serialize) {
        let line = EventLine { unix_ms: unix_ms(), at_step: self.machine.committed(), event };
        self.files.event(&line);
        self.telemetry.events.publish("event", &line);
        if let Ok(serde_json::Value::Object(fields)) = serde_json::to_value(&line)
            && let Some(name) = fields.get("event").and_then(serde_json::Value::as_str)
        {
            self.telemetry.metrics.event(name);
        }
        if let Ok(text) = serde_json::to_string(&line) {
            self.recent_events.push_back(text);
        }
        while self.recent_events.len() > STATUS_EVENTS {
            self.recent_events.pop_front();
        }
    }
}
