//! The process of one node of a run on this machine, with its restarts.

use crate::limits::{NODE_GONE_AFTER, NODE_RESTARTS_MAX, NODE_START_INTERVAL};
use crate::process::Process;
use std::process::ExitStatus;
use std::time::Instant;

/// A node's process and its state.
#[derive(Debug)]
pub(crate) struct NodeProcess {
    /// The process; the last one, when it was restarted.
    pub(crate) process: Process,
    started: Instant,
    restarts: u32,
    state: State,
}

#[derive(Debug)]
enum State {
    Running,
    /// It died, and restarts as soon as [`NODE_START_INTERVAL`] allows it.
    Restarting,
    /// It ended with success at this time: it was released, unless the whole run ends.
    Ended(Instant),
    Gone,
}

impl NodeProcess {
    /// A node that was just started.
    pub(crate) fn new(process: Process) -> Self {
        Self { process, started: Instant::now(), restarts: 0, state: State::Running }
    }

    /// Whether it must restart now.
    pub(crate) fn is_restart_due(&self) -> bool {
        matches!(self.state, State::Restarting) && self.started.elapsed() >= NODE_START_INTERVAL
    }

    /// Notes that it was restarted.
    pub(crate) fn restarted(&mut self, process: Process) {
        self.process = process;
        self.started = Instant::now();
        self.restarts += 1;
        self.state = State::Running;
    }

    /// Whether it ended and will not restart by itself.
    pub(crate) fn is_gone(&self) -> bool {
        matches!(self.state, State::Ended(_) | State::Gone)
    }

    /// Looks for a change, and returns a note about it: that the node died, or left. With `respawn` it
    /// restarts when it died.
    pub(crate) fn poll(&mut self, respawn: bool) -> Option<String> {
        match self.state {
            State::Running => {
                let status = self.process.exit_status()?;
                if status.success() {
                    self.state = State::Ended(Instant::now());
                    return None;
                }
                Some(self.on_death(status, respawn))
            }
            State::Ended(since) if since.elapsed() >= NODE_GONE_AFTER => {
                self.state = State::Gone;
                Some(format!("{} left", self.process.name))
            }
            State::Ended(_) | State::Restarting | State::Gone => None,
        }
    }

    /// Kills it, as its machine ends: its death is no news.
    pub(crate) fn take_away(&mut self) {
        self.process.kill();
        self.state = State::Gone;
    }

    fn on_death(&mut self, status: ExitStatus, respawn: bool) -> String {
        let ended = format!("{} ended ({status})", self.process.name);
        if respawn && self.restarts < NODE_RESTARTS_MAX {
            self.state = State::Restarting;
            return format!("{ended}: restarting");
        }
        self.state = State::Gone;
        let error = self.process.last_error();
        if respawn {
            format!("{ended} after {NODE_RESTARTS_MAX} restarts: {error}")
        } else {
            format!("{ended}: {error}")
        }
    }
}
