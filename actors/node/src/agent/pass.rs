//! The pass in flight: which lanes it waits for, and what they report.

use super::AgentState;
use crate::error::{Error, Result};
use crate::ids::{LaneStep, PassId};
use crate::messages::{LaneMsg, NodeMsg, ReducerMsg, notify};
use crate::step::lane::LaneActor;
use crate::trace::LaneTrace;
use futures::future::try_join_all;
use ractor::{Actor, ActorRef};
use std::collections::HashSet;
use std::marker::PhantomData;
use std::sync::Arc;
use std::time::Instant;
use volary_core::agent::Event;
use volary_core::compute::Compute;
use volary_core::messages::{LaneReport, NodeReport, Norm, Pass};
use volary_core::{Digest, Epoch, Lane, ShardId, Step};
use volary_telemetry::Span;
use volary_telemetry::metrics::Phase;

/// This node's part of a pass.
pub(super) struct RunningPass {
    epoch: Epoch,
    step: Step,
    pass: Pass,
    waiting: HashSet<Lane>,
    lanes: Vec<(Lane, LaneReport)>,
    /// In training: the norms of all held gradients, once they are reduced.
    norms: Option<Vec<(ShardId, Norm)>>,
    comparison: Comparison,
    /// From the last lane's end until all gradients are reduced.
    reducing: Option<(Span, Instant)>,
}

/// The comparison of shards with their other replicas, in training.
enum Comparison {
    /// These shards are compared when all lanes are done.
    Pending(Vec<ShardId>),
    Running,
    Done(Vec<(ShardId, Digest)>),
}

impl<B: Compute> AgentState<B> {
    /// Begins a pass over this node's lanes.
    pub(super) async fn run(
        &mut self,
        (epoch, step): (Epoch, Step),
        pass: Pass,
        lanes: Vec<(Lane, Vec<u32>)>,
        compare: Vec<ShardId>,
    ) -> Result<()> {
        let waiting = lanes.iter().map(|(lane, _)| *lane).collect();
        self.pass = Some(RunningPass {
            epoch,
            step,
            pass,
            waiting,
            lanes: Vec::new(),
            norms: None,
            comparison: Comparison::Pending(compare),
            reducing: None,
        });
        self.node.metrics.step_started(epoch.0, step.0);
        let train = pass == Pass::Train;
        if train {
            let placement = self.node.placement();
            notify(self.node.reducer(), ReducerMsg::Begin { epoch, step, placement });
        }
        self.node.take_speed(0.0);
        // Frames of this pass may come in only now that the reducer has begun.
        self.node.set_begun(PassId { epoch, step, train });
        for (lane, tokens) in lanes {
            let actor = self.lane(lane).await?;
            let (whole, sampled_tokens) = self.traces.begun.of_lane(lane);
            let trace = LaneTrace { step: self.traces.step.clone(), whole, sampled_tokens };
            notify(&actor, LaneMsg::Run { at: LaneStep { epoch, step, lane }, pass, tokens, trace });
        }
        notify(&self.me, NodeMsg::Begun);
        Ok(())
    }

    /// The actor of a lane, which starts with the first pass that has the lane here.
    async fn lane(&mut self, lane: Lane) -> Result<ActorRef<LaneMsg>> {
        if let Some(actor) = self.lanes.get(&lane) {
            return Ok(actor.clone());
        }
        let start = (Arc::clone(&self.node), self.me.clone());
        let spawned = Actor::spawn_linked(None, LaneActor(PhantomData), start, self.me.get_cell()).await;
        let died = |error: ractor::SpawnErr| Error::ActorDied {
            actor: format!("of lane {lane}"),
            reason: error.to_string(),
        };
        let (actor, _) = spawned.map_err(died)?;
        self.lanes.insert(lane, actor.clone());
        Ok(actor)
    }

    pub(super) async fn on_lane_done(&mut self, at: LaneStep, pass: Pass, outcome: Result<LaneReport>) {
        let report = match outcome {
            Ok(report) => report,
            Err(error) => {
                let error = error.of(format_args!("lane {}", at.lane));
                return self.on_failed(at.epoch, &error).await;
            }
        };
        let Some(running) = &mut self.pass else { return };
        let current = (running.epoch, running.step, running.pass) == (at.epoch, at.step, pass);
        if current && running.waiting.remove(&at.lane) {
            running.lanes.push((at.lane, report));
            self.when_pass_done().await;
        }
    }

    pub(super) async fn on_reduced(&mut self, epoch: Epoch, step: Step, norms: Vec<(ShardId, Norm)>) {
        let Some(running) = &mut self.pass else { return };
        if (running.epoch, running.step) == (epoch, step) {
            running.norms = Some(norms);
            if let Some((_span, began)) = running.reducing.take() {
                self.node.metrics.phase(Phase::Reduce, began.elapsed());
            }
            self.when_pass_done().await;
        }
    }

    pub(super) async fn on_compared(&mut self, epoch: Epoch, step: Step, digests: Vec<(ShardId, Digest)>) {
        let Some(running) = &mut self.pass else { return };
        if (running.epoch, running.step) == (epoch, step) {
            running.comparison = Comparison::Done(digests);
            self.when_pass_done().await;
        }
    }

    /// Computes the digests of the shards to compare. By now all lanes of all nodes have used them.
    fn compare(&self, epoch: Epoch, step: Step, shards: Vec<ShardId>) {
        let (actors, me) = (self.node.shard_actors(), self.me.clone());
        tokio::spawn(async move {
            let digests = shards.into_iter().map(async |shard| {
                let digest = actors.get(shard)?.digest(step.previous()).await?;
                Ok::<_, Error>((shard, digest))
            });
            match try_join_all(digests).await {
                Ok(digests) => notify(&me, NodeMsg::Compared { epoch, step, digests }),
                Err(error) => notify(&me, NodeMsg::Failed { epoch, error }),
            }
        });
    }

    /// Reports to the supervisor when all lanes are done and, in training, all gradients are reduced.
    pub(super) async fn when_pass_done(&mut self) {
        let Some(running) = &mut self.pass else { return };
        if !running.waiting.is_empty() {
            return;
        }
        if running.pass == Pass::Train && running.norms.is_none() {
            let span = || self.traces.step.span("reduce").with("volary.step", running.step.0 as i64);
            running.reducing.get_or_insert_with(|| (span(), Instant::now()));
            return;
        }
        let digests = match std::mem::replace(&mut running.comparison, Comparison::Running) {
            Comparison::Pending(shards) if !shards.is_empty() => {
                let (epoch, step) = (running.epoch, running.step);
                return self.compare(epoch, step, shards);
            }
            Comparison::Pending(_) => Vec::new(),
            Comparison::Running => return,
            Comparison::Done(digests) => digests,
        };
        let Some(RunningPass { epoch, step, pass, lanes, norms, .. }) = self.pass.take() else { return };
        let report = match pass {
            Pass::Train => {
                let speed = self.node.take_speed(self.node.lane_work());
                self.prepared = Some(Instant::now());
                let norms = norms.unwrap_or_default();
                NodeReport::Prepared { epoch, step, norms, digests, lanes, speed }
            }
            Pass::Validate { round } => NodeReport::Validated { epoch, round, lanes },
        };
        self.on_event(Event::Done(report)).await;
    }
}
