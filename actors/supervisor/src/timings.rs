//! How long a change of the cluster took, part by part, for `events.jsonl`.

use serde::Serialize;
use std::time::{Duration, Instant};
use volary_core::machine::Notice;
use volary_core::messages::{NodeCommand, Pass};
use volary_core::{NodeId, Step};

/// The cost of a change, in milliseconds.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub(crate) enum Cost {
    /// A step was dropped, or the supervisor was away, and the run continues.
    Recovered {
        /// The cause.
        cause: String,
        /// The first step committed after it.
        step: Step,
        /// Committed steps that were lost and run again.
        steps_lost: u64,
        /// From the lost node's last message until its loss was detected.
        detected_ms: f64,
        /// From then until a new placement was assigned.
        planned_ms: f64,
        /// From then until every node held its shards.
        state_moved_ms: f64,
        /// From then until a step was committed.
        resumed_ms: f64,
    },
    /// Shards were copied during training, and a placement that uses them began.
    Resized {
        /// The cause.
        cause: String,
        /// The first step committed after it.
        step: Step,
        /// From the placement that started the copies until all were complete.
        copied_ms: f64,
        /// Between the last commit before the new placement and the first one after it.
        pause_ms: f64,
    },
}

impl Cost {
    /// The parts, by name.
    pub(crate) fn parts(&self) -> Vec<(&'static str, f64)> {
        match self {
            Self::Recovered { detected_ms, planned_ms, state_moved_ms, resumed_ms, .. } => vec![
                ("detected_ms", *detected_ms),
                ("planned_ms", *planned_ms),
                ("state_moved_ms", *state_moved_ms),
                ("resumed_ms", *resumed_ms),
            ],
            Self::Resized { copied_ms, pause_ms, .. } => {
                vec![("copied_ms", *copied_ms), ("pause_ms", *pause_ms)]
            }
        }
    }
}

#[derive(Debug)]
struct Recovery {
    cause: String,
    detected_ms: f64,
    known: Instant,
    planned: Option<Instant>,
    moved: Option<Instant>,
    steps_lost: u64,
}

#[derive(Debug)]
struct Resize {
    cause: String,
    began: Instant,
    copied: Option<Instant>,
    /// The last commit before the cutover.
    before: Option<Instant>,
}

/// The timings of changes in progress.
#[derive(Debug)]
pub(crate) struct Timings {
    recovery: Option<Recovery>,
    resize: Option<Resize>,
    last_commit: Option<Instant>,
    /// The last detected loss: its cause, and the silence before it.
    lost: Option<(String, Duration)>,
}

fn ms(from: Instant, to: Instant) -> f64 {
    to.saturating_duration_since(from).as_secs_f64() * 1e3
}

impl Timings {
    /// Starts with a recovery when a supervisor returns to a cluster.
    pub(crate) fn new(restarted: bool) -> Self {
        let mut timings = Self { recovery: None, resize: None, last_commit: None, lost: None };
        if restarted {
            timings.recover("the supervisor returned", Duration::ZERO);
        }
        timings
    }

    fn recover(&mut self, cause: &str, silent: Duration) {
        let recovery = self.recovery.get_or_insert_with(|| Recovery {
            cause: cause.to_owned(),
            detected_ms: silent.as_secs_f64() * 1e3,
            known: Instant::now(),
            planned: None,
            moved: None,
            steps_lost: 0,
        });
        // A recovery that is interrupted by another one restarts, and its time runs on.
        recovery.planned = None;
        recovery.moved = None;
    }

    /// A node's loss was detected, `silent` after its last message.
    pub(crate) fn lost(&mut self, node: &NodeId, reason: &str, silent: Duration) {
        self.lost = Some((format!("{node}: {reason}"), silent));
    }

    pub(crate) fn on_notice(&mut self, notice: &Notice) {
        match notice {
            Notice::Aborted { reason, .. } => {
                let (cause, silent) = self.lost.take().unwrap_or_else(|| (reason.clone(), Duration::ZERO));
                self.recover(&cause, silent);
                self.resize = None;
            }
            Notice::WentBack { from, to, .. }
            | Notice::WentBackFromNan { from, to, .. }
            | Notice::WentBackFromDifference { from, to, .. } => {
                let cause = match notice {
                    Notice::WentBackFromNan { .. } => "numbers are not finite",
                    Notice::WentBackFromDifference { .. } => "replicas differ",
                    _ => "the last replica of a shard is lost",
                };
                self.recover(cause, Duration::ZERO);
                if let Some(recovery) = &mut self.recovery {
                    recovery.steps_lost += *from - *to;
                }
            }
            Notice::Placed { learning, cause, .. } if *learning > 0 && self.resize.is_none() => {
                let cause = cause.clone();
                self.resize = Some(Resize { cause, began: Instant::now(), copied: None, before: None });
            }
            Notice::Migrated { .. } => {
                if let Some(resize) = &mut self.resize {
                    resize.copied = Some(Instant::now());
                    resize.before = self.last_commit;
                }
            }
            _ => {}
        }
    }

    /// A command is sent.
    pub(crate) fn sent(&mut self, message: &NodeCommand) {
        let Some(recovery) = &mut self.recovery else { return };
        match message {
            NodeCommand::Assign(_) => {
                recovery.planned.get_or_insert_with(Instant::now);
            }
            NodeCommand::Begin { pass: Pass::Train, .. } if recovery.planned.is_some() => {
                recovery.moved.get_or_insert_with(Instant::now);
            }
            _ => {}
        }
    }

    /// A step is committed: the changes that it completes.
    pub(crate) fn committed(&mut self, step: Step) -> Vec<Cost> {
        let now = Instant::now();
        let mut costs = Vec::new();
        if let Some(Recovery {
            cause,
            detected_ms,
            known,
            planned: Some(planned),
            moved: Some(moved),
            steps_lost,
        }) = self.recovery.take_if(|recovery| recovery.moved.is_some())
        {
            costs.push(Cost::Recovered {
                cause,
                step,
                steps_lost,
                detected_ms,
                planned_ms: ms(known, planned),
                state_moved_ms: ms(planned, moved),
                resumed_ms: ms(moved, now),
            });
        }
        if let Some(Resize { cause, began, copied: Some(copied), before }) =
            self.resize.take_if(|resize| resize.copied.is_some())
        {
            let pause_ms = ms(before.unwrap_or(copied), now);
            costs.push(Cost::Resized { cause, step, copied_ms: ms(began, copied), pause_ms });
        }
        self.last_commit = Some(now);
        costs
    }
}
