//! A run on this machine, from its first step to its end: what it measures is shown, what a script says is done, and
//! processes that end are seen to.

use crate::cluster::Cluster;
use crate::commands::operate;
use crate::progress::{Display, Seen, Tail};
use crate::script::Script;
use anyhow::{Context, bail};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};
use volary_storage::RunDir;

/// How often the run is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// How often while something is to happen at a step or a time.
const LOOK_CLOSELY_EVERY: Duration = Duration::from_millis(5);
/// How long all nodes must have been gone before the run is given up: at its end they go before the supervisor.
const DESERTED_SETTLES: Duration = Duration::from_secs(1);

/// Follows the run until its supervisor ends. Returns whether it reached its last step or was interrupted, and the last
/// step that was seen.
///
/// # Errors
/// When the supervisor failed, all nodes are gone, or it was interrupted twice.
pub fn follow(
    cluster: &mut Cluster,
    dir: &RunDir,
    display: Display,
    script: Script,
) -> anyhow::Result<(bool, Option<Seen>)> {
    display.waiting("waiting for nodes");
    let mut follower = Follower {
        cluster,
        dir,
        metrics: Tail::new(dir.metrics()),
        display,
        script,
        interrupts: count_interrupts()?,
        asked: false,
        step: 0,
        deserted: None,
    };
    let outcome = follower.run();
    follower.display.finish();
    outcome?;
    Ok((!follower.asked, follower.display.last()))
}

struct Follower<'a> {
    cluster: &'a mut Cluster,
    dir: &'a RunDir,
    metrics: Tail,
    display: Display,
    script: Script,
    interrupts: Arc<AtomicU32>,
    /// The supervisor was asked to stop.
    asked: bool,
    /// The furthest step that was committed.
    step: u64,
    /// Since when there is no node.
    deserted: Option<Instant>,
}

impl Follower<'_> {
    fn run(&mut self) -> anyhow::Result<()> {
        loop {
            // Before the metrics, so that the last of them are seen.
            let ended = self.cluster.supervisor_ended();
            self.look_at_metrics();
            if let Some(status) = ended {
                if status.success() {
                    self.say_what_never_came();
                    return Ok(());
                }
                self.display.say(&self.cluster.restart_supervisor(status)?);
                // What the old one was asked, the new one does not know.
                self.asked = false;
            }
            self.look_at_interrupts()?;
            self.play()?;
            self.look_at_nodes()?;
            let closely = self.script.pending().len() > 0 || self.cluster.is_timed();
            std::thread::sleep(if closely { LOOK_CLOSELY_EVERY } else { LOOK_EVERY });
        }
    }

    fn look_at_metrics(&mut self) {
        for seen in self.metrics.lines().iter().filter_map(|line| serde_json::from_str::<Seen>(line).ok()) {
            self.step = self.step.max(seen.step);
            self.display.step(seen);
        }
    }

    fn look_at_interrupts(&mut self) -> anyhow::Result<()> {
        match self.interrupts.load(Ordering::Relaxed) {
            0 => {}
            1 if self.asked => {}
            1 => {
                self.asked = true;
                self.display.say("interrupted: writing a checkpoint (Ctrl-C again ends at once)");
                let dir = self.dir.root().to_path_buf();
                // It waits for the checkpoint; the bar goes on meanwhile.
                std::thread::spawn(move || operate::stop_quietly(&dir));
            }
            _ => bail!("interrupted twice: ended without a checkpoint"),
        }
        Ok(())
    }

    fn play(&mut self) -> anyhow::Result<()> {
        while let Some(event) = self.script.due(self.step) {
            self.display.say(&format!("step {}: {}", event.at_step, event.action));
            if let Some(failure) = self.cluster.act(&event.action)? {
                self.display.say(&failure);
            }
        }
        Ok(())
    }

    /// A script that was too long for its run has shown less than it promised.
    fn say_what_never_came(&self) {
        for event in self.script.pending() {
            self.display.say(&format!("never came: step {}: {}", event.at_step, event.action));
        }
    }

    fn look_at_nodes(&mut self) -> anyhow::Result<()> {
        for line in self.cluster.look()? {
            self.display.say(&line);
        }
        if !self.cluster.is_deserted() {
            self.deserted = None;
        } else if self.deserted.get_or_insert_with(Instant::now).elapsed() >= DESERTED_SETTLES
            && self.cluster.supervisor_ended().is_none()
        {
            bail!(
                "all nodes are gone; the run can go on with --resume. The last words: {}",
                self.cluster.last_words()
            );
        }
        Ok(())
    }
}

fn count_interrupts() -> anyhow::Result<Arc<AtomicU32>> {
    let count = Arc::new(AtomicU32::new(0));
    let counter = Arc::clone(&count);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (ready, listening) = std::sync::mpsc::channel();
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        runtime.block_on(async {
            use tokio::signal::unix::{SignalKind, signal};
            let (Ok(mut interrupt), Ok(mut terminate)) =
                (signal(SignalKind::interrupt()), signal(SignalKind::terminate()))
            else {
                return;
            };
            let _ = ready.send(());
            loop {
                tokio::select! {
                    _ = interrupt.recv() => {}
                    _ = terminate.recv() => {}
                }
                counter.fetch_add(1, Ordering::Relaxed);
            }
        });
    })?;
    listening.recv().context("signals cannot be caught")?;
    Ok(count)
}
