//! Which node comes and which goes, when. A pure state machine: its caller tells it the time and the
//! committed steps, and carries out what it says.
//!
//! First the run is measured with each number of nodes, from the largest down, undisturbed. Then the trace is
//! played. A node whose instance is about to be taken away is drained `notice` before that, and killed when
//! the time has come; without notice it is only killed.

use super::report::Report;
use super::trace::Trace;
use crate::limits::{SPOT_QUIET, SPOT_SETTLING_STEPS};
use crate::script::node_name;
use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;
use volary_core::random::{Purpose, Stream};

/// The options of a replay.
#[derive(Clone, Copy, Debug)]
pub struct SpotOptions {
    /// The most nodes at a time.
    pub nodes_max: usize,
    /// Lanes in one step.
    pub lanes: u32,
    /// The time between the notice and the end of an instance, if there is a notice.
    pub notice: Option<Duration>,
    /// Of the choice of the nodes that go.
    pub seed: u64,
}

/// What happens to a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// A new node starts, under the next name.
    Join,
    /// The node is told to leave.
    Drain(String),
    /// The node's process ends, if it has not ended yet.
    Kill(String),
}

/// A replay in progress.
#[derive(Debug)]
pub struct Replay {
    trace: Trace,
    options: SpotOptions,
    /// Names of the nodes that are available, in the order of their start.
    nodes: Vec<String>,
    /// Nodes that were told to leave, each with the time of its end.
    leaving: VecDeque<(Duration, String)>,
    started: usize,
    stream: Stream,
    stage: Stage,
    /// The time for which each number of nodes is measured.
    quiet_time: Duration,
    /// Lane-steps per second with each number of nodes, undisturbed.
    quiet: BTreeMap<usize, f64>,
    /// The last committed step.
    step: u64,
    report: Report,
}

#[derive(Debug)]
enum Stage {
    /// Steps are committed with `nodes` nodes, undisturbed; after some steps, since a time and a step.
    Quiet {
        nodes: usize,
        settled: u64,
        since: Option<(Duration, u64)>,
    },
    /// The trace began at this time.
    Playing {
        began: Duration,
        last: Duration,
        last_commit: Duration,
    },
    Over,
}

impl Replay {
    /// A replay that begins with `options.nodes_max` nodes, which its caller has started.
    #[must_use]
    pub fn new(trace: Trace, options: SpotOptions) -> Self {
        let nodes: Vec<String> = (1..=options.nodes_max).map(node_name).collect();
        let quiet_time = (trace.end() / 20).clamp(*SPOT_QUIET.start(), *SPOT_QUIET.end());
        Self {
            trace,
            options,
            started: nodes.len(),
            nodes,
            leaving: VecDeque::new(),
            stream: Stream::new(options.seed, Purpose::Faults, &[]),
            stage: Stage::Quiet { nodes: options.nodes_max, settled: 0, since: None },
            quiet_time,
            quiet: BTreeMap::new(),
            step: 0,
            report: Report::default(),
        }
    }

    /// Whether the trace has been played to its end.
    #[must_use]
    pub fn is_over(&self) -> bool {
        matches!(self.stage, Stage::Over)
    }

    /// The stage, for a person.
    #[must_use]
    pub fn stage(&self) -> String {
        match self.stage {
            Stage::Quiet { nodes, .. } => format!("measuring {nodes} nodes, undisturbed"),
            Stage::Playing { .. } => {
                format!("the trace has {} nodes", self.nodes.len() + self.leaving.len())
            }
            Stage::Over => "the trace is over".into(),
        }
    }

    /// The report, of as much of the trace as was played.
    #[must_use]
    pub fn report(&self) -> Option<&Report> {
        (!matches!(self.stage, Stage::Quiet { .. })).then_some(&self.report)
    }

    /// A step was committed by a placement of `nodes` nodes.
    pub fn on_commit(&mut self, now: Duration, step: u64, nodes: usize) {
        if let Stage::Playing { last_commit, .. } = &mut self.stage {
            *last_commit = now;
        }
        if step <= self.step {
            // It runs again, after the run went back.
            return;
        }
        let lanes = f64::from(self.options.lanes);
        let committed = lanes * (step - self.step) as f64;
        self.step = step;
        match &mut self.stage {
            Stage::Quiet { nodes: wanted, settled, since } if nodes == *wanted => {
                *settled += 1;
                if *settled >= SPOT_SETTLING_STEPS {
                    let (began, first) = *since.get_or_insert((now, step));
                    if now - began >= self.quiet_time && step > first {
                        let rate = lanes * (step - first) as f64 / (now - began).as_secs_f64();
                        self.quiet.insert(*wanted, rate);
                    }
                }
            }
            Stage::Quiet { .. } | Stage::Over => {}
            Stage::Playing { began, .. } => self.report.committed(now - *began, committed),
        }
    }

    /// The run went back by some steps.
    pub fn on_lost_steps(&mut self, steps: u64) {
        if matches!(self.stage, Stage::Playing { .. }) {
            self.report.lost_steps += steps;
        }
    }

    /// What happens now.
    pub fn changes(&mut self, now: Duration) -> Vec<Change> {
        match self.stage {
            Stage::Quiet { nodes, .. } if self.quiet.contains_key(&nodes) => self.end_quiet(nodes, now),
            Stage::Quiet { .. } | Stage::Over => Vec::new(),
            Stage::Playing { began, last, last_commit } => {
                let available = self.nodes.len() + self.leaving.len();
                let rate = self.quiet.get(&available).copied().unwrap_or(0.0);
                // A stall is time without a commit while there are nodes.
                let stalled = if available == 0 { Duration::ZERO } else { now - last_commit };
                self.report.passed(now - began, now - last, available, rate, stalled);
                let last_commit = if available == 0 { now } else { last_commit };
                self.stage = Stage::Playing { began, last: now, last_commit };
                if now - began >= self.trace.end() {
                    self.stage = Stage::Over;
                    // The run ends with all nodes.
                    return self.resize(self.options.nodes_max, self.options.nodes_max, now);
                }
                let time = now - began;
                let notice = self.options.notice.unwrap_or_default();
                self.resize(self.trace.nodes_at(time), self.trace.nodes_until(time, notice), now)
            }
        }
    }

    /// The next smaller number of nodes, or the trace.
    fn end_quiet(&mut self, nodes: usize, now: Duration) -> Vec<Change> {
        if nodes > 1 {
            self.stage = Stage::Quiet { nodes: nodes - 1, settled: 0, since: None };
            let leaver = self.take_one();
            return vec![Change::Drain(leaver)];
        }
        self.stage = Stage::Playing { began: now, last: now, last_commit: now };
        self.resize(self.trace.nodes_at(Duration::ZERO), self.options.nodes_max, now)
    }

    /// Makes `wanted` nodes available, of which `staying` are not about to be taken away.
    fn resize(&mut self, wanted: usize, staying: usize, now: Duration) -> Vec<Change> {
        let mut changes = Vec::new();
        while self.leaving.front().is_some_and(|(until, _)| *until <= now) {
            changes.extend(self.leaving.pop_front().map(|(_, node)| Change::Kill(node)));
        }
        while self.nodes.len() > staying.min(wanted) {
            let node = self.take_one();
            match self.options.notice {
                Some(notice) => {
                    changes.push(Change::Drain(node.clone()));
                    self.leaving.push_back((now + notice, node));
                }
                None => changes.push(Change::Kill(node)),
            }
        }
        while self.nodes.len() + self.leaving.len() < wanted {
            self.started += 1;
            self.nodes.push(node_name(self.started));
            changes.push(Change::Join);
        }
        changes
    }

    /// A node that goes.
    fn take_one(&mut self) -> String {
        let index = self.stream.below(self.nodes.len() as u64) as usize;
        self.nodes.remove(index)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(seconds: f64) -> Duration {
        Duration::from_secs_f64(seconds)
    }

    /// Plays a trace with a step per second and node; returns what happened with its time since the trace
    /// began, and the replay.
    fn play(text: &str, notice: Option<Duration>) -> (Vec<(f64, Change)>, Replay) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("trace.csv");
        std::fs::write(&path, text).unwrap();
        let trace = Trace::load(&path, super::super::Unit::Seconds, 1.0, 3).unwrap();
        let options = SpotOptions { nodes_max: 3, lanes: 4, notice, seed: 7 };
        let mut replay = Replay::new(trace, options);
        let (mut nodes, mut happened, mut began, mut step, mut progress) = (3, Vec::new(), None, 0, 0.0);
        for tick in 0..4_000 {
            let now = seconds(f64::from(tick) * 0.1);
            progress += 0.1 * nodes as f64;
            if progress >= 1.0 {
                (step, progress) = (step + 1, progress - 1.0);
                replay.on_commit(now, step, nodes);
            }
            for change in replay.changes(now) {
                if !matches!(replay.stage, Stage::Quiet { .. }) {
                    let began = *began.get_or_insert(now);
                    happened.push(((now - began).as_secs_f64(), change.clone()));
                }
            }
            nodes = replay.nodes.len() + replay.leaving.len();
        }
        (happened, replay)
    }

    #[test]
    fn nodes_come_and_go_as_in_the_trace() {
        let (happened, replay) = play("0,3\n20,1\n30,2\n40,0\n50,3\n60,3\n", None);
        let at = |kind: fn(&Change) -> bool| -> Vec<f64> {
            happened.iter().filter(|(_, change)| kind(change)).map(|(at, _)| at.round()).collect()
        };
        assert_eq!(at(|change| matches!(change, Change::Join)), [0.0, 0.0, 30.0, 50.0, 50.0, 50.0]);
        assert_eq!(at(|change| matches!(change, Change::Kill(_))), [20.0, 20.0, 40.0, 40.0]);
        assert!(at(|change| matches!(change, Change::Drain(_))).is_empty());
        let report = replay.report().expect("it is over");
        // Nothing is lost, and nodes work from their first moment.
        assert!((report.goodput() - 1.0).abs() < 0.1, "{report:?}");
        assert!((report.node_seconds - 3.0 * 20.0 - 10.0 - 20.0 - 30.0).abs() < 2.0, "{report:?}");
    }

    #[test]
    fn with_notice_a_node_is_drained_before_its_end() {
        let (happened, _) = play("0,3\n20,1\n30,1\n", Some(seconds(5.0)));
        let rounded: Vec<(f64, bool)> = happened
            .iter()
            .filter(|(_, change)| !matches!(change, Change::Join))
            .map(|(at, change)| (at.round(), matches!(change, Change::Kill(_))))
            .collect();
        assert_eq!(rounded, [(15.0, false), (15.0, false), (20.0, true), (20.0, true)]);
    }

    #[test]
    fn steps_that_run_again_are_no_goodput() {
        let mut report = Report::default();
        report.passed(seconds(10.0), seconds(10.0), 2, 4.0, seconds(1.5));
        report.committed(seconds(10.0), 30.0);
        assert_eq!((report.goodput(), report.worst_stall_s), (0.75, 1.5));
    }
}
