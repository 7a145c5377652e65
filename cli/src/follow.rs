//! Follows a run on this machine from its first step to its end: shows its progress, plays its script, and
//! restarts its processes.

use crate::cluster::Cluster;
use crate::commands::operate;
use crate::limits::{DESERTED_AFTER, RUN_POLL, RUN_POLL_SCRIPTED};
use crate::progress::{ProgressDisplay, StepMetrics, Tail};
use crate::script::Script;
use crate::signals::Interrupts;
use anyhow::bail;
use std::time::Instant;
use volary_storage::RunDir;

/// The end of a run on this machine.
#[derive(Clone, Copy, Debug)]
pub struct RunOutcome {
    /// Whether it reached its last step, instead of being interrupted.
    pub finished: bool,
    /// The last committed step of this process.
    pub last: Option<StepMetrics>,
}

/// Follows the run until its supervisor ends.
///
/// # Errors
/// When the supervisor failed, all nodes are gone, or the run was interrupted twice.
pub fn follow(
    cluster: &mut Cluster,
    dir: &RunDir,
    display: ProgressDisplay,
    script: Script,
    interrupts: &Interrupts,
) -> anyhow::Result<RunOutcome> {
    display.phase("waiting for nodes");
    let mut follower = Follower {
        cluster,
        dir,
        metrics: Tail::new(dir.metrics()),
        display,
        script,
        interrupts,
        stop_requested: false,
        step: 0,
        deserted: None,
    };
    let result = follower.run();
    follower.display.finish();
    result?;
    Ok(RunOutcome { finished: !follower.stop_requested, last: follower.display.last() })
}

struct Follower<'a> {
    cluster: &'a mut Cluster,
    dir: &'a RunDir,
    metrics: Tail,
    display: ProgressDisplay,
    script: Script,
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
            self.poll_nodes()?;
            let is_scripted = self.script.pending().len() > 0 || self.cluster.has_suspended_nodes();
            std::thread::sleep(if is_scripted { RUN_POLL_SCRIPTED } else { RUN_POLL });
        }
    }

    fn read_files(&mut self) {
        let lines = self.metrics.lines();
        for metrics in lines.iter().filter_map(|line| serde_json::from_str::<StepMetrics>(line).ok()) {
            self.step = self.step.max(metrics.step);
            self.display.step(metrics);
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
        if !self.cluster.is_deserted() {
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
