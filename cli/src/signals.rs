//! Signals that ask this process to end: SIGINT, SIGTERM, and SIGHUP, unless that was ignored from the start
//! as under `nohup`.
//!
//! The first one asks for an orderly end. The second one ends the process at once. Handlers are in place
//! before anything slow starts, because a process without them dies of SIGINT, and process 1 of a container
//! ignores SIGTERM.

use crate::output;
use crate::process;
use anyhow::Context;
use std::fmt;
use std::sync::mpsc::{RecvTimeoutError, channel};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, watch};

use crate::limits::{INTERRUPTED_STATUS, SIGNAL_POLL};

/// The end of a command by a signal before it had anything to save: it exits with [`INTERRUPTED_STATUS`].
#[derive(Debug)]
pub struct Interrupted(pub &'static str);

impl fmt::Display for Interrupted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "interrupted while {}", self.0)
    }
}

impl std::error::Error for Interrupted {}

/// The signals so far. Clones see the same ones.
#[derive(Clone, Debug)]
pub struct Interrupts {
    count: watch::Receiver<u32>,
}

impl Interrupts {
    /// Handles the signals from now on, on a thread of its own. At the second one the process ends with
    /// [`INTERRUPTED_STATUS`].
    ///
    /// # Errors
    /// When the handlers cannot be installed.
    pub fn listen() -> anyhow::Result<Self> {
        Self::start(|count| {
            if count >= 2 {
                output::note("volary: interrupted twice: ended at once");
                end_now();
            }
        })
    }

    /// Handles the signals from now on and sends each of them to `requests`.
    ///
    /// # Errors
    /// When the handlers cannot be installed.
    pub fn forward(requests: mpsc::Sender<()>) -> anyhow::Result<Self> {
        // A full queue means that requests wait already.
        Self::start(move |_| {
            let _ = requests.try_send(());
        })
    }

    fn start(on_signal: impl Fn(u32) + Send + 'static) -> anyhow::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let mut signals = {
            let _in_runtime = runtime.enter();
            handlers().context("cannot handle signals")?
        };
        let (sender, count) = watch::channel(0);
        std::thread::Builder::new().name("signals".into()).spawn(move || {
            runtime.block_on(async move {
                loop {
                    next(&mut signals).await;
                    sender.send_modify(|count| *count += 1);
                    on_signal(*sender.borrow());
                }
            });
        })?;
        Ok(Self { count })
    }

    /// Whether a signal has come.
    #[must_use]
    pub fn is_interrupted(&self) -> bool {
        *self.count.borrow() > 0
    }

    /// Resolves at the first signal.
    pub async fn first(&self) {
        let mut count = self.count.clone();
        if count.wait_for(|count| *count > 0).await.is_err() {
            // The thread of the signals is gone: none will come.
            std::future::pending::<()>().await;
        }
    }

    /// Does `work` on another thread, and gives up waiting for it at the first signal. The thread then ends
    /// with the process; `clean_up` removes what it has begun.
    ///
    /// # Errors
    /// As `work`; [`Interrupted`] with `phase`.
    pub fn unless_interrupted<T: Send + 'static>(
        &self,
        phase: &'static str,
        work: impl FnOnce() -> anyhow::Result<T> + Send + 'static,
        clean_up: impl FnOnce(),
    ) -> anyhow::Result<T> {
        let (sender, done) = channel();
        // The receiver is gone only after a signal.
        let work = move || drop(sender.send(work()));
        std::thread::Builder::new().name("work".into()).spawn(work)?;
        loop {
            match done.recv_timeout(SIGNAL_POLL) {
                Ok(done) => return done,
                Err(RecvTimeoutError::Disconnected) => anyhow::bail!("a thread panicked while {phase}"),
                Err(RecvTimeoutError::Timeout) if self.is_interrupted() => {
                    clean_up();
                    return Err(Interrupted(phase).into());
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
    }
}

/// Ends the process without any further work, except that what it has begun in shared places is removed.
fn end_now() -> ! {
    volary_data::remove_partial_folders();
    process::exit_now(INTERRUPTED_STATUS.into())
}

fn handlers() -> std::io::Result<Vec<Signal>> {
    let mut kinds = vec![SignalKind::interrupt(), SignalKind::terminate()];
    if !is_ignored(SignalKind::hangup()) {
        kinds.push(SignalKind::hangup());
    }
    kinds.into_iter().map(signal).collect()
}

/// Resolves at the next of several signals.
async fn next(signals: &mut [Signal]) {
    std::future::poll_fn(|context| {
        let any = signals.iter_mut().any(|signal| signal.poll_recv(context).is_ready());
        if any { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
    })
    .await;
}

/// Whether this process was started with a signal ignored.
fn is_ignored(kind: SignalKind) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or_default();
    mask & 1 << (kind.as_raw_value() - 1) != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn interrupts(count: u32) -> (watch::Sender<u32>, Interrupts) {
        let (sender, count) = watch::channel(count);
        (sender, Interrupts { count })
    }

    #[test]
    fn work_that_no_signal_interrupts_gives_its_result() {
        let (_sender, interrupts) = interrupts(0);
        let done = interrupts.unless_interrupted("counting", || Ok(7), || panic!("nothing to clean up"));
        assert_eq!(done.unwrap(), 7);
        let failed =
            interrupts.unless_interrupted("counting", || -> anyhow::Result<()> { panic!("a test") }, || {});
        assert_eq!(failed.unwrap_err().to_string(), "a thread panicked while counting");
    }

    #[test]
    fn work_that_takes_long_is_left_at_a_signal_and_cleaned_up() {
        let (_sender, interrupts) = interrupts(1);
        let mut cleaned = false;
        let (_hold, held) = channel::<()>();
        let work = move || Ok(held.recv().is_ok());
        let error = interrupts.unless_interrupted("waiting", work, || cleaned = true).unwrap_err();
        assert_eq!(error.to_string(), "interrupted while waiting");
        assert!(cleaned && error.is::<Interrupted>());
    }
}
