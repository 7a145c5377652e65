//! Follows a run on this machine from its first step to its end: shows its progress, plays its script, and
//! restarts its processes.

use crate::cluster::Cluster;
use crate::commands::operate;
use crate::limits::{DESERTED_AFTER, RUN_POLL, RUN_POLL_SCRIPTED};
use crate::progress::{ProgressDisplay, StepMetrics, Tail};
use crate::script::{Action, Script};
use crate::signals::Interrupts;
use crate::spot::{Change, Replay, Report};
use anyhow::bail;
use serde::Deserialize;
use std::time::Instant;
use volary_storage::RunDir;

/// The end of a run on this machine.
#[derive(Clone, Debug)]
pub struct RunOutcome {
    /// Whether it reached its last step, instead of being interrupted.
    pub finished: bool,
    /// The last committed step of this process.
    pub last: Option<StepMetrics>,
    /// The report of a trace of spot instances, as far as it was played.
    pub spot: Option<Report>,
}

/// Follows the run until its supervisor ends.
///
/// # Errors
/// When the supervisor failed, all nodes are gone, or the run was interrupted twice.
pub fn follow(
    cluster: &mut Cluster,
    dir: &RunDir,
    display: ProgressDisplay,
    (script, spot): (Script, Option<Replay>),
    interrupts: &Interrupts,
) -> anyhow::Result<RunOutcome> {
    display.phase("waiting for nodes");
    let mut follower = Follower {
        cluster,
        dir,
        metrics: Tail::new(dir.metrics()),
        display,
        script,
        spot,
        events: Tail::new(dir.events()),
        began: Instant::now(),
        stage: String::new(),
        interrupts,
        stop_requested: false,
        step: 0,
        deserted: None,
    };
    let result = follower.run();
    follower.display.finish();
    result?;
    let spot = follower.spot.as_ref().and_then(Replay::report).cloned();
    if let Some(report) = &spot {
        report.write(dir.root())?;
    }
    Ok(RunOutcome { finished: !follower.stop_requested, last: follower.display.last(), spot })
}

/// A line of `events.jsonl` on a run that went back: only those have both steps.
#[derive(Clone, Copy, Debug, Deserialize)]
struct Return {
    from: u64,
    to: u64,
}

struct Follower<'a> {
    cluster: &'a mut Cluster,
    dir: &'a RunDir,
    metrics: Tail,
    display: ProgressDisplay,
    script: Script,
    /// A trace of spot instances in play, the time of its beginning, and its stage.
    spot: Option<Replay>,
    events: Tail,
    began: Instant,
    stage: String,
    interrupts: &'a Interrupts,
    stop_requested: bool,
    /// The furthest committed step.
    step: u64,
    /// The time since which there is no node.
    deserted: Option<Instant>,
}

impl Follower<'_> {
    fn run(&mut self) -> anyhow::Result<()> {
        loop {
            // Before the metrics, so that none of them is missed.
            let exit_status = self.cluster.supervisor_exit_status();
            self.read_files();
            if let Some(status) = exit_status {
                if status.success() {
                    self.note_pending_events();
                    return Ok(());
                }
                self.display.note(&self.cluster.restart_supervisor(status)?);
                // The new supervisor does not know the request to the old one.
                self.stop_requested = false;
            }
            self.handle_interrupt();
            self.play_script()?;
            self.play_spot()?;
            self.poll_nodes()?;
            let is_scripted =
                self.script.pending().len() > 0 || self.cluster.has_suspended_nodes() || self.is_spot();
            std::thread::sleep(if is_scripted { RUN_POLL_SCRIPTED } else { RUN_POLL });
        }
    }

    fn read_files(&mut self) {
        let lines = self.metrics.lines();
        for metrics in lines.iter().filter_map(|line| serde_json::from_str::<StepMetrics>(line).ok()) {
            self.step = self.step.max(metrics.step);
            if let Some(spot) = &mut self.spot {
                spot.on_commit(self.began.elapsed(), metrics.step, metrics.nodes as usize);
            }
            self.display.step(metrics);
        }
        if let Some(spot) = &mut self.spot {
            let lines = self.events.lines();
            let lost = lines.iter().filter_map(|line| serde_json::from_str::<Return>(line).ok());
            lost.for_each(|back| spot.on_lost_steps(back.from.saturating_sub(back.to)));
        }
        for alert in self.cluster.alerts() {
            self.display.note(&alert);
        }
    }

    /// A second signal ends this process at once, and with it the others.
    fn handle_interrupt(&mut self) {
        if self.stop_requested || !self.interrupts.is_interrupted() {
            return;
        }
        self.stop_requested = true;
        self.display.note("interrupted: writing a checkpoint (a second Ctrl-C ends at once)");
        let dir = self.dir.root().to_path_buf();
        // The request waits for the checkpoint; the bar continues meanwhile.
        std::thread::spawn(move || operate::request_stop(&dir));
    }

    fn play_script(&mut self) -> anyhow::Result<()> {
        while let Some(event) = self.script.due(self.step) {
            self.display.note(&format!("step {}: {}", event.at_step, event.action));
            if let Some(failure) = self.cluster.perform(&event.action)? {
                self.display.note(&failure);
            }
        }
        Ok(())
    }

    /// Whether a trace of spot instances is in play.
    fn is_spot(&self) -> bool {
        self.spot.as_ref().is_some_and(|spot| !spot.is_over())
    }

    fn play_spot(&mut self) -> anyhow::Result<()> {
        let Some(spot) = self.spot.as_mut().filter(|_| !self.stop_requested) else { return Ok(()) };
        let changes = spot.changes(self.began.elapsed());
        let stage = spot.stage();
        if stage != self.stage {
            self.display.note(&stage);
            self.stage = stage;
        }
        for change in changes {
            match change {
                Change::Join => _ = self.cluster.perform(&Action::Join {})?,
                Change::Drain(node) => _ = self.cluster.perform(&Action::Drain { node })?,
                // It may have left in time.
                Change::Kill(node) => self.cluster.take_away(&node),
            }
        }
        Ok(())
    }

    /// Notes the events of a script that is longer than its run.
    fn note_pending_events(&self) {
        for event in self.script.pending() {
            self.display.note(&format!("not reached: step {}: {}", event.at_step, event.action));
        }
    }

    fn poll_nodes(&mut self) -> anyhow::Result<()> {
        for note in self.cluster.poll()? {
            self.display.note(&note);
        }
        if !self.cluster.is_deserted() || self.is_spot() {
            self.deserted = None;
        } else if self.deserted.get_or_insert_with(Instant::now).elapsed() >= DESERTED_AFTER
            && self.cluster.supervisor_exit_status().is_none()
        {
            bail!(
                "all nodes are gone; continue the run with --resume. Last error of a node: {}",
                self.cluster.last_error()
            );
        }
        Ok(())
    }
}
