//! Carries out what the machine decides, in its order.

use super::{CLUSTER, Outcome, RunEnd, SupervisorState};
use crate::checkpointer::{CheckpointerMsg, blocking};
use crate::limits::STATUS_EVENTS;
use crate::operator::{OperatorReply, OperatorRequest};
use crate::run_files::{EventLine, MetricsLine, ValidationLine, unix_ms};
use crate::wire::ToNode;
use serde::Serialize;
use std::time::Instant;
use volary_core::machine::{Committed, Effect, Notice};
use volary_core::messages::{NodeCommand, Pass};
use volary_core::{NodeId, Step};
use volary_storage::Table;

impl SupervisorState {
    pub(super) async fn carry_out(&mut self, effect: Effect) -> Outcome {
        match effect {
            Effect::Send { node, message } => self.send(&node, message).await,
            Effect::Fence { node, reason } => {
                self.fence(&node, &reason);
                self.revoke(node, format!("it was shut out: {reason}")).await
            }
            Effect::Journal(committed) => self.journal(*committed).await,
            Effect::Persist(persistent) => {
                let store = self.store.clone();
                blocking(move || store.put(Table::Facts, CLUSTER, &persistent)).await
            }
            Effect::OpenCheckpoint { step, epoch, shards } => {
                let scope = self.observed.traces.checkpoint(step, shards.len());
                let owner = |&shard: &volary_core::ShardId| {
                    Some((shard, self.machine.placement().owner(shard)?.clone()))
                };
                self.stores = shards.iter().filter_map(owner).collect();
                drop(self.checkpointer.cast(CheckpointerMsg::Open { step, epoch, shards, scope }));
                Ok(())
            }
            Effect::DropCheckpoint { step } => {
                drop(self.checkpointer.cast(CheckpointerMsg::Drop { step }));
                Ok(())
            }
            Effect::GoBack { step } => self.go_back(step).await,
            Effect::Validated { step, loss, tokens } => {
                self.last_commit = Instant::now();
                let line = ValidationLine { step, loss, tokens };
                self.observed.validated(&line);
                self.files.validation(&line).map_err(|e| e.to_string())
            }
            Effect::Notice(notice) => self.on_notice(notice).await,
            Effect::Done => {
                self.on_end(RunEnd::Done { step: self.machine.committed() });
                Ok(())
            }
            Effect::Fatal { reason } => {
                self.on_end(RunEnd::Fatal { reason });
                Ok(())
            }
        }
    }

    /// Whoever shows a certificate of this node from now on is refused.
    async fn revoke(&self, node: NodeId, reason: String) -> Outcome {
        let credentials = std::sync::Arc::clone(&self.credentials);
        let revoked =
            tokio::task::spawn_blocking(move || credentials.revoke_certificates(&node, &reason)).await;
        let hashes = revoked.unwrap_or_else(|error| Err(error.to_string()))?;
        if !hashes.is_empty() {
            self.sessions.values().for_each(|session| session.say(ToNode::Revoked(hashes.clone())));
        }
        Ok(())
    }

    async fn send(&mut self, node: &NodeId, mut message: NodeCommand) -> Outcome {
        self.durations.sent(&message);
        if let NodeCommand::Begin { step, pass, lanes, .. } = &mut message {
            for (lane, tokens) in lanes {
                let read = match pass {
                    Pass::Train => self.dataset.lane(*step, *lane),
                    Pass::Validate { round } => self.dataset.validation(*round, *lane),
                };
                *tokens = read.map_err(|error| format!("tokens of step {step}, lane {lane}: {error}"))?;
            }
        }
        let traced = self.observed.traces.sent(&message, &self.dataset);
        if let Some(session) = self.sessions.get(node) {
            session.say(ToNode::Protocol(message, traced));
        }
        Ok(())
    }

    async fn journal(&mut self, committed: Committed) -> Outcome {
        let (store, record) = (self.store.clone(), committed.clone());
        let (prepared, span) = self.observed.traces.committing();
        let (began, scope) = (Instant::now(), span.scope());
        blocking(move || scope.enter(|| store.commit(record.step, &record))).await?;
        drop(span);
        self.observed.metrics.journalled(began.elapsed());
        prepared.into_iter().for_each(|took| self.observed.metrics.prepared(took));
        let seconds = self.last_commit.elapsed().as_secs_f64();
        self.last_commit = Instant::now();
        let costs = self.durations.committed(committed.step);
        for line in &costs {
            self.event_line(line)?;
        }
        let line = MetricsLine::new(&committed, Some(seconds));
        self.files.metrics(&line).map_err(|error| error.to_string())?;
        self.observed.committed(&committed, &line, &costs);
        if self.observed.sample_every > 0 && line.step.is_multiple_of(self.observed.sample_every) {
            let (loss, busiest_expert) = (line.loss, line.busiest_expert);
            tracing::info!(step = line.step, loss, seconds, busiest_expert, load = ?committed.load, "committed");
        }
        self.last_metrics = Some(line);
        self.load = committed.load;
        Ok(())
    }

    async fn go_back(&mut self, step: Step) -> Outcome {
        let (store, checkpoints) = (self.store.clone(), self.checkpoints.clone());
        blocking(move || {
            checkpoints.truncate_after(step)?;
            store.truncate_after(step)
        })
        .await?;
        self.files.go_back(step).map_err(|error| error.to_string())
    }

    async fn on_notice(&mut self, notice: Notice) -> Outcome {
        match &notice {
            Notice::Checkpoint { step } => {
                self.answer(&OperatorRequest::Checkpoint, &OperatorReply::Done { step: *step })
            }
            Notice::CheckpointFailed { reason, .. } => {
                self.answer(&OperatorRequest::Checkpoint, &OperatorReply::Failed { reason: reason.clone() });
            }
            Notice::MigrationFailed { node, reason } => {
                let failed = OperatorReply::Failed { reason: reason.clone() };
                self.answer(&OperatorRequest::Drain { node: node.0.clone() }, &failed);
            }
            Notice::Left { node } => {
                self.left.insert(node.clone());
                self.revoke(node.clone(), "it has left".into()).await?;
            }
            _ => {}
        }
        match &notice {
            Notice::WentBack { .. }
            | Notice::NoRoom { .. }
            | Notice::ReplicasDiffer { .. }
            | Notice::CheckpointFailed { .. } => tracing::error!(?notice, "event"),
            Notice::Lost { .. }
            | Notice::Fenced { .. }
            | Notice::MigrationFailed { .. }
            | Notice::Aborted { .. } => tracing::warn!(?notice, "event"),
            _ => tracing::info!(?notice, "event"),
        }
        self.durations.noticed(&notice);
        self.observed.noticed(&notice);
        self.event_line(&notice)
    }

    fn event_line(&mut self, event: &impl Serialize) -> Outcome {
        let line = EventLine { unix_ms: unix_ms(), at_step: self.machine.committed(), event };
        self.files.event(&line).map_err(|error| error.to_string())?;
        self.observed.events.publish("event", &line);
        if let Ok(serde_json::Value::Object(fields)) = serde_json::to_value(&line)
            && let Some(name) = fields.get("event").and_then(serde_json::Value::as_str)
        {
            self.observed.metrics.event(name);
        }
        if let Ok(text) = serde_json::to_string(&line) {
            self.events.push_back(text);
        }
        while self.events.len() > STATUS_EVENTS {
            self.events.pop_front();
        }
        Ok(())
    }

    pub(super) fn on_end(&mut self, end: RunEnd) {
        let answer = match &end {
            RunEnd::Done { step } => OperatorReply::Done { step: *step },
            RunEnd::Fatal { reason } => OperatorReply::Failed { reason: reason.clone() },
        };
        self.waiting.drain(..).for_each(|(_, reply)| drop(reply.send(answer.clone())));
        if let Some(sender) = self.end.take() {
            drop(sender.send(end));
        }
        // The writers send what is queued, then close; the links stay until the process ends.
        self.sessions.clear();
    }
}
