//! A process of a run on this machine: the supervisor or a node. It runs in a process group of its own, so
//! that Ctrl-C reaches only the parent. It holds one end of a pipe and ends when the parent does, however the
//! parent ended.

use crate::limits::{END_POLL, LINE_BYTES_MAX, OPEN_FILES_MIN, OUTPUT_LINES_AHEAD};
use crate::output;
use anyhow::Context;
use rustix::process::{Pid, kill_process};
use std::ffi::OsStr;
use std::fmt;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::{Duration, Instant};

pub use rustix::process::Signal;

/// The exit status of a process whose parent is gone.
const ORPHANED: i32 = 3;

/// A supervisor that cannot go on for now: it exits with [`HALTED_STATUS`](crate::limits::HALTED_STATUS).
#[derive(Debug)]
pub struct Halted(pub String);

impl fmt::Display for Halted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Halted {}

/// One process of a run.
#[derive(Debug)]
pub struct Process {
    /// Its name: `supervisor`, `node-1`.
    pub name: String,
    /// The file of its standard error, shared with earlier processes of the same name.
    pub log: PathBuf,
    child: Child,
    /// The lines of its standard output.
    lines: Receiver<String>,
}

impl Process {
    /// Starts this program with other arguments.
    ///
    /// # Errors
    /// When it does not start or its log cannot be written.
    pub fn start(name: &str, logs: &Path, args: &[impl AsRef<OsStr>]) -> anyhow::Result<Self> {
        let log = logs.join(format!("{name}.log"));
        let file = File::options()
            .create(true)
            .append(true)
            .open(&log)
            .with_context(|| log.display().to_string())?;
        let program = std::env::current_exe().context("the path of this program")?;
        let child = Command::new(program)
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(file)
            .process_group(0)
            .spawn()
            .with_context(|| format!("cannot start {name}"))?;
        let (sender, lines) = sync_channel(OUTPUT_LINES_AHEAD);
        let mut process = Self { name: name.to_owned(), log, child, lines };
        if let Some(output) = process.child.stdout.take() {
            // When the queue is full, lines are dropped: the process must not wait for this one.
            let read =
                move || read_lines(BufReader::new(output), |line| drop(sender.try_send(line.to_owned())));
            std::thread::Builder::new().name(format!("{name}-output")).spawn(read)?;
        }
        Ok(process)
    }

    /// The lines of its standard output since the last call.
    #[must_use]
    pub fn output_lines(&self) -> Vec<String> {
        self.lines.try_iter().collect()
    }

    /// Its process number.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Its exit status, if it has ended.
    pub fn exit_status(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// Writes a line to its standard input.
    ///
    /// # Errors
    /// When it has closed its standard input.
    pub fn send_line(&mut self, line: &str) -> std::io::Result<()> {
        let pipe = self.child.stdin.as_mut().ok_or(std::io::ErrorKind::BrokenPipe)?;
        // In one write, so that the process never reads a part of it.
        pipe.write_all(format!("{line}\n").as_bytes())
    }

    /// Sends it a signal. Returns whether it was alive: the number of an ended process may belong to another
    /// one.
    pub fn signal(&mut self, signal: Signal) -> bool {
        self.exit_status().is_none() && kill_process(Pid::from_child(&self.child), signal).is_ok()
    }

    /// The reason of its end: the last line of its log that is an error, without the program's name.
    #[must_use]
    pub fn last_error(&self) -> String {
        let text = std::fs::read_to_string(&self.log).unwrap_or_default();
        let is_info =
            |line: &str| line.trim().is_empty() || line.contains("  INFO ") || line.contains("\"INFO\"");
        // The network's own thread may warn of a connection after the last error.
        let is_warning = |line: &str| line.contains("  WARN ") || line.contains("\"WARN\"");
        let mut lines = text.lines().rev().filter(|line| !is_info(line));
        let last = lines.clone().next();
        let error = lines.find(|line| !is_warning(line)).or(last).unwrap_or("no error in its log");
        error.strip_prefix("volary: ").unwrap_or(error).to_owned()
    }

    /// Waits for its end, and kills it after `most`.
    pub fn wait_or_kill(&mut self, most: Duration) {
        let start = Instant::now();
        while start.elapsed() < most {
            if self.exit_status().is_some() {
                return;
            }
            std::thread::sleep(END_POLL);
        }
        self.kill();
    }

    /// Kills it.
    pub fn kill(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.exit_status().is_none() {
            self.kill();
        }
    }
}

/// Raises the limit of open files to what the system lets this process have, and warns where that is little.
pub fn raise_open_files() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    // A failure leaves the limit as it is.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
    if let Some(most) = getrlimit(Resource::Nofile).current
        && most < OPEN_FILES_MIN
    {
        output::note(format_args!(
            "warning: this process may open only {most} files (ulimit -n): links and checkpoints may fail; allow \
             {OPEN_FILES_MIN} or more"
        ));
    }
}

/// Ends this process without its exit handlers. Those of libtorch fail aloud while other threads compute.
#[expect(unsafe_code, reason = "the only way to skip exit handlers and keep the status")]
pub fn exit_now(status: i32) -> ! {
    // SAFETY: it takes any number, does not return, and touches no memory of this process.
    unsafe { libc::_exit(status) }
}

/// Ends this process when its parent does, which holds the other end of standard input. Until then each line
/// of standard input goes to `on_line`.
pub fn end_with_parent(on_line: impl Fn(&str) + Send + 'static) {
    let watch = move || {
        read_lines(std::io::stdin().lock(), on_line);
        tracing::warn!("the parent process has ended");
        exit_now(ORPHANED);
    };
    // Without the thread the process would outlive its parent; it must not start then.
    if std::thread::Builder::new().name("parent".into()).spawn(watch).is_err() {
        std::process::exit(ORPHANED);
    }
}

/// Passes whole lines on until the input ends or fails. Lines longer than [`LINE_BYTES_MAX`] are skipped.
fn read_lines(mut input: impl BufRead, on_line: impl Fn(&str)) {
    let mut line = Vec::new();
    let mut too_long = false;
    loop {
        line.clear();
        match (&mut input).take(LINE_BYTES_MAX).read_until(b'\n', &mut line) {
            // An end or an error means that the other end is closed.
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        let whole = line.ends_with(b"\n");
        match std::str::from_utf8(&line) {
            Ok(text) if whole && !too_long => on_line(text.trim_end()),
            _ if whole => tracing::warn!("skipping a line on standard input: too long or not UTF-8"),
            _ => {}
        }
        too_long = !whole;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;

    #[test]
    fn whole_lines_are_passed_on_and_lines_that_are_too_long_are_skipped() {
        let long = "x".repeat(3 * LINE_BYTES_MAX as usize);
        let seen = RefCell::new(Vec::new());
        let input = format!("one\n{long}\ntwo three\nhalf");
        read_lines(input.as_bytes(), |line| seen.borrow_mut().push(line.to_owned()));
        assert_eq!(*seen.borrow(), ["one", "two three"]);
    }
}
