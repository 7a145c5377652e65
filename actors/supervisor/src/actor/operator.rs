//! Requests of operators, and their replies.

use super::SupervisorState;
use super::sessions::Session;
use crate::error::Result;
use crate::messages::respond;
use ractor::RpcReplyPort;
use std::panic::{AssertUnwindSafe, catch_unwind};
use volary_core::machine::{Activity, Event};
use volary_core::profile::Profile;
use volary_core::{NodeId, ShardId};
use volary_protocol::operator::{
    NodeStatus, OperatorReply, OperatorRequest, ShardStatus, SourceStatus, Status, SupervisorStatus,
};

/// The outcome of a request.
enum Handling {
    /// It is answered at once.
    Answer(OperatorReply),
    /// It becomes an event, and is answered when that has its effect.
    Event(Event),
}

impl SupervisorState {
    pub(super) async fn on_operator(
        &mut self,
        request: OperatorRequest,
        reply: RpcReplyPort<OperatorReply>,
    ) -> Result<()> {
        match self.handling(&request) {
            Handling::Answer(answer) => {
                respond(reply, answer);
                Ok(())
            }
            Handling::Event(event) => {
                self.pending_requests.push((request, reply));
                self.on_event(event).await
            }
        }
    }

    fn handling(&self, request: &OperatorRequest) -> Handling {
        let failed = |reason: String| Handling::Answer(OperatorReply::Failed { reason });
        match request {
            // A status request changes nothing, so a panic in it must not end the run.
            OperatorRequest::Status => Handling::Answer(
                catch_unwind(AssertUnwindSafe(|| OperatorReply::Status(Box::new(self.status()))))
                    .unwrap_or_else(|_| OperatorReply::Failed {
                        reason: "the status could not be computed; see the supervisor's log".into(),
                    }),
            ),
            OperatorRequest::Checkpoint if self.machine.durable() == Some(self.machine.committed()) => {
                Handling::Answer(OperatorReply::Done { step: self.machine.committed() })
            }
            // Nothing tells when one will be possible.
            OperatorRequest::Checkpoint if self.machine.activity() == Activity::Gathering => {
                failed("no checkpoint can be written while the run waits for nodes".into())
            }
            OperatorRequest::Checkpoint => Handling::Event(Event::CheckpointRequested),
            OperatorRequest::Stop => Handling::Event(Event::StopRequested),
            OperatorRequest::Drain { node } => {
                let node = NodeId::new(node);
                match self.sessions.get(&node) {
                    None => {
                        let connected: Vec<&str> =
                            self.sessions.iter().map(|(node, _)| node.0.as_str()).collect();
                        failed(format!("no node {node}; connected: {}", connected.join(", ")))
                    }
                    Some(session) if session.is_joining() => {
                        failed(format!("{node} has not joined yet: it is measuring itself"))
                    }
                    Some(_) => Handling::Event(Event::DrainRequested { node }),
                }
            }
            OperatorRequest::AccessTokenCreate { .. }
            | OperatorRequest::AccessTokenList
            | OperatorRequest::AccessTokenRevoke { .. } => {
                failed("access tokens are handled at admission".into())
            }
        }
    }

    /// Answers every pending request that equals `request`.
    pub(super) fn answer(&mut self, request: &OperatorRequest, answer: &OperatorReply) {
        for (_, reply) in self.pending_requests.extract_if(.., |(asked, _)| asked == request) {
            respond(reply, answer.clone());
        }
    }

    fn status(&self) -> Status {
        let placement = self.machine.placement();
        let shard = |shard: ShardId| ShardStatus {
            name: shard.to_string(),
            version: self.machine.committed(),
            replicas: self.machine.holders(shard).into_iter().map(|node| node.0).collect(),
        };
        Status {
            run: self.run.run.clone(),
            epoch: placement.epoch,
            step: self.machine.committed(),
            steps: self.settings.training.steps,
            activity: if self.end.is_some() { self.machine.activity() } else { Activity::Done },
            checkpoint: self.machine.durable(),
            failed_checkpoints: self.failed_checkpoints,
            skipped_steps: self.skipped_steps,
            trouble: self.machine.trouble().map(str::to_owned),
            load: self.load.clone(),
            loss: self.last_metrics.as_ref().map(|line| line.loss),
            tokens_per_second: self.last_metrics.as_ref().and_then(|line| line.tokens_per_second),
            sources: self.sources(),
            predicted_step_ms: 1e3 * self.machine.predicted_step_s(),
            supervisor: SupervisorStatus { pid: std::process::id(), address: self.address.clone() },
            nodes: self.sessions.iter().map(|(node, session)| self.node_status(node, session)).collect(),
            shards: self.settings.architecture.shards().into_iter().map(shard).collect(),
            events: self.recent_events.iter().cloned().collect(),
        }
    }

    fn sources(&self) -> Vec<SourceStatus> {
        let epochs = self.dataset.epochs(self.machine.data_step().0);
        epochs.into_iter().map(|(name, epochs)| SourceStatus { name, epochs }).collect()
    }

    fn node_status(&self, node: &NodeId, session: &Session) -> NodeStatus {
        let placement = self.machine.placement();
        let shards = self.settings.architecture.shards();
        NodeStatus {
            name: node.0.clone(),
            pid: session.info.pid,
            state: self.machine.node_state(node).into(),
            device: session.info.device.clone(),
            arithmetic: (self.machine.profile(node).and_then(|profile| profile.arithmetic))
                .map_or_else(String::new, |kind| kind.to_string()[..8].to_owned()),
            capacity: self.machine.profile(node).map_or(0.0, Profile::capacity),
            zone: session.info.profile.as_ref().map_or_else(String::new, |profile| profile.zone.clone()),
            shards: shards.into_iter().filter(|&shard| placement.holds(node, shard)).count(),
            lanes: placement.lanes_of(node),
            links: session.links.clone(),
            http: session.info.http.clone(),
        }
    }
}
