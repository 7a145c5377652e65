//! One node of a run on this machine, from its start to its end, and to its next start.

use crate::local::Process;
use std::process::ExitStatus;
use std::time::{Duration, Instant};

/// How often one node that died is started again.
const NODE_RESTARTS_MAX: u32 = 100;
/// The least time between two starts of one node.
const NODE_START_EVERY: Duration = Duration::from_secs(1);
/// How long a node must have been gone before it has left: at the run's end all nodes go a little before the supervisor.
const LEAVE_SETTLES: Duration = Duration::from_secs(1);

/// A node and how it fares.
#[derive(Debug)]
pub(crate) struct Member {
    /// Its process; the last one, when it was started again.
    pub(crate) process: Process,
    started: Instant,
    restarts: u32,
    state: State,
}

#[derive(Debug)]
enum State {
    Running,
    /// It ended unexpectedly, and is started again as soon as it may.
    StartsAgain,
    /// It ended well at this time: it was let go, unless the whole run ends.
    Ended(Instant),
    Gone,
}

impl Member {
    /// A node that was just started.
    pub(crate) fn new(process: Process) -> Self {
        Self { process, started: Instant::now(), restarts: 0, state: State::Running }
    }

    /// Whether it is to be started again, now.
    pub(crate) fn may_start_again(&self) -> bool {
        matches!(self.state, State::StartsAgain) && self.started.elapsed() >= NODE_START_EVERY
    }

    /// It was started again.
    pub(crate) fn start_again(&mut self, process: Process) {
        self.process = process;
        self.started = Instant::now();
        self.restarts += 1;
        self.state = State::Running;
    }

    /// Whether it ended and will not start again by itself.
    pub(crate) fn is_gone(&self) -> bool {
        matches!(self.state, State::Ended(_) | State::Gone)
    }

    /// What there is to say of it: that it ended, or left. With `respawn`, it starts again when it ended unexpectedly.
    pub(crate) fn look(&mut self, respawn: bool) -> Option<String> {
        match self.state {
            State::Running => {
                let status = self.process.ended()?;
                if status.success() {
                    self.state = State::Ended(Instant::now());
                    return None;
                }
                Some(self.on_death(status, respawn))
            }
            State::Ended(since) if since.elapsed() >= LEAVE_SETTLES => {
                self.state = State::Gone;
                Some(format!("{} left", self.process.name))
            }
            State::Ended(_) | State::StartsAgain | State::Gone => None,
        }
    }

    fn on_death(&mut self, status: ExitStatus, respawn: bool) -> String {
        let ended = format!("{} ended ({status})", self.process.name);
        if respawn && self.restarts < NODE_RESTARTS_MAX {
            self.state = State::StartsAgain;
            return format!("{ended}: it starts again");
        }
        self.state = State::Gone;
        let reason = self.process.reason();
        if respawn {
            format!("{ended} and was started again {NODE_RESTARTS_MAX} times already: {reason}")
        } else {
            format!("{ended}: {reason}")
        }
    }
}
