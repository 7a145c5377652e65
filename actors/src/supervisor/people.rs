//! What people ask of a supervisor, and what it tells them.

use super::{Outcome, Session, SupervisorState};
use crate::operator::{NodeStatus, OperatorReply, OperatorRequest, ShardStatus, Status, SupervisorStatus};
use ractor::RpcReplyPort;
use volary_core::machine::{Activity, Event};
use volary_core::profile::Profile;
use volary_core::{NodeId, ShardId};

impl SupervisorState {
    pub(super) async fn on_operator(
        &mut self,
        request: OperatorRequest,
        reply: RpcReplyPort<OperatorReply>,
    ) -> Outcome {
        let event = match request {
            OperatorRequest::Status => {
                drop(reply.send(OperatorReply::Status(Box::new(self.status()))));
                return Ok(());
            }
            OperatorRequest::Checkpoint if self.machine.durable() == Some(self.machine.committed()) => {
                drop(reply.send(OperatorReply::Done { step: self.machine.committed() }));
                return Ok(());
            }
            OperatorRequest::Checkpoint => Event::CheckpointRequested,
            OperatorRequest::Stop => Event::StopRequested,
            OperatorRequest::Drain { ref node } if !self.sessions.contains_key(&NodeId::new(node)) => {
                let there: Vec<&str> = self.sessions.keys().map(|node| node.0.as_str()).collect();
                let reason = format!("there is no node {node}; there are: {}", there.join(", "));
                drop(reply.send(OperatorReply::Failed { reason }));
                return Ok(());
            }
            OperatorRequest::Drain { ref node } if self.sessions[&NodeId::new(node)].newcomer.is_some() => {
                let reason = format!("{node} has not joined yet: it is still measuring itself");
                drop(reply.send(OperatorReply::Failed { reason }));
                return Ok(());
            }
            OperatorRequest::AccessTokenCreate { .. }
            | OperatorRequest::AccessTokenList
            | OperatorRequest::AccessTokenRevoke { .. } => {
                let reason = "tokens are asked for at the door".into();
                drop(reply.send(OperatorReply::Failed { reason }));
                return Ok(());
            }
            OperatorRequest::Drain { ref node } => Event::DrainRequested { node: NodeId::new(node) },
        };
        self.waiting.push((request, reply));
        self.on_event(event).await
    }

    pub(super) fn answer(&mut self, request: &OperatorRequest, answer: &OperatorReply) {
        for (_, reply) in self.waiting.extract_if(.., |(asked, _)| asked == request) {
            drop(reply.send(answer.clone()));
        }
    }

    fn status(&self) -> Status {
        let placement = self.machine.placement();
        let node = |(node, session): (&NodeId, &Session)| NodeStatus {
            name: node.0.clone(),
            pid: session.info.pid,
            state: self.machine.node_state(node).into(),
            device: session.info.device.clone(),
            capacity: self.machine.profile(node).map_or(0.0, Profile::capacity),
            zone: session.info.profile.as_ref().map_or_else(String::new, |profile| profile.zone.clone()),
            shards: self
                .settings
                .architecture
                .shards()
                .into_iter()
                .filter(|&s| placement.holds(node, s))
                .count(),
            lanes: placement.lanes_of(node),
            links: session.links.clone(),
            http: session.info.http.clone(),
        };
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
            load: self.load.clone(),
            loss: self.last_metrics.as_ref().map(|line| line.loss),
            tokens_per_second: self.last_metrics.as_ref().and_then(|line| line.tokens_per_second),
            predicted_step_ms: 1e3 * self.machine.predicted_step_s(),
            supervisor: SupervisorStatus { pid: std::process::id(), address: self.address.clone() },
            nodes: self.sessions.iter().map(node).collect(),
            shards: self.settings.architecture.shards().into_iter().map(shard).collect(),
            events: self.events.iter().cloned().collect(),
        }
    }
}
