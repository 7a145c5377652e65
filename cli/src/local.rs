//! The processes of a run on one machine: a supervisor and its nodes, in process groups of their own, so that Ctrl-C
//! reaches only their parent. Each holds the other end of a pipe and ends when the parent does, however the parent died.

use anyhow::Context;
use rustix::process::{Pid, kill_process};
use std::fs::File;
use std::io::{BufRead, Read, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

pub use rustix::process::Signal;

/// How long a line on a child's standard input may be.
const LINE_BYTES_MAX: u64 = 1024;
/// How often a process that is to end is looked at.
const END_LOOK_EVERY: Duration = Duration::from_millis(20);

/// One process of a run.
#[derive(Debug)]
pub struct Process {
    /// What it is called: `supervisor`, `node-1`.
    pub name: String,
    /// Where its standard error goes; a process of the same name that came before it wrote there too.
    pub log: PathBuf,
    child: Child,
}

impl Process {
    /// Starts this program again with other arguments.
    ///
    /// # Errors
    /// When it does not start or its log cannot be written.
    pub fn start(name: &str, logs: &Path, args: &[&str]) -> anyhow::Result<Self> {
        let log = logs.join(format!("{name}.log"));
        let file = File::options()
            .create(true)
            .append(true)
            .open(&log)
            .with_context(|| log.display().to_string())?;
        let program = std::env::current_exe().context("this program's own path")?;
        let child = Command::new(program)
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(file)
            .process_group(0)
            .spawn()
            .with_context(|| format!("starting {name}"))?;
        Ok(Self { name: name.to_owned(), log, child })
    }

    /// Its process number.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// How it ended, if it did.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// Writes a line to its standard input.
    ///
    /// # Errors
    /// When it does not listen any more.
    pub fn tell(&mut self, line: &str) -> std::io::Result<()> {
        let pipe = self.child.stdin.as_mut().ok_or(std::io::ErrorKind::BrokenPipe)?;
        // In one write, so that it is never read by halves.
        pipe.write_all(format!("{line}\n").as_bytes())
    }

    /// Sends it a signal. Returns whether it was there to get it; one that has ended may have lost its number to
    /// somebody else.
    pub fn signal(&mut self, signal: Signal) -> bool {
        self.ended().is_none() && kill_process(Pid::from_child(&self.child), signal).is_ok()
    }

    /// What it said at its end: the last line of its log that is no ordinary event, without the program's name in front.
    #[must_use]
    pub fn reason(&self) -> String {
        let text = std::fs::read_to_string(&self.log).unwrap_or_default();
        let ordinary =
            |line: &str| line.trim().is_empty() || line.contains("  INFO ") || line.contains("\"INFO\"");
        // The network's own thread may warn of a connection after the last word was said.
        let warning = |line: &str| line.contains("  WARN ") || line.contains("\"WARN\"");
        let mut lines = text.lines().rev().filter(|line| !ordinary(line));
        let last = lines.clone().next();
        let words = lines.find(|line| !warning(line)).or(last).unwrap_or("it said nothing");
        words.strip_prefix("volary: ").unwrap_or(words).to_owned()
    }

    /// Waits for it to end, and kills it when it takes longer than `most`.
    pub fn wait_or_kill(&mut self, most: Duration) {
        let start = Instant::now();
        while start.elapsed() < most {
            if self.ended().is_some() {
                return;
            }
            std::thread::sleep(END_LOOK_EVERY);
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
        if self.ended().is_none() {
            self.kill();
        }
    }
}

/// Ends this process when its parent does, which holds the other end of standard input. Until then each line that the
/// parent writes goes to `on_line`.
pub fn end_with_parent(on_line: impl Fn(&str) + Send + 'static) {
    let watch = move || {
        read_lines(std::io::stdin().lock(), on_line);
        tracing::warn!("the parent process is gone");
        std::process::exit(3);
    };
    // Without the thread the process would outlive its parent; it must not start then.
    if std::thread::Builder::new().name("parent".into()).spawn(watch).is_err() {
        std::process::exit(3);
    }
}

/// Hands on whole lines until the input ends or fails; a line that is too long is left out.
fn read_lines(mut input: impl BufRead, on_line: impl Fn(&str)) {
    let mut line = Vec::new();
    let mut too_long = false;
    loop {
        line.clear();
        match (&mut input).take(LINE_BYTES_MAX).read_until(b'\n', &mut line) {
            // Whatever comes, an end or an error, means that nobody holds the other end.
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        let whole = line.ends_with(b"\n");
        match std::str::from_utf8(&line) {
            Ok(text) if whole && !too_long => on_line(text.trim_end()),
            _ if whole => tracing::warn!("a line on standard input is too long or no text"),
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
    fn whole_lines_are_handed_on_and_lines_without_a_bound_are_not() {
        let long = "x".repeat(3 * LINE_BYTES_MAX as usize);
        let seen = RefCell::new(Vec::new());
        let input = format!("one\n{long}\ntwo three\nhalf");
        read_lines(input.as_bytes(), |line| seen.borrow_mut().push(line.to_owned()));
        assert_eq!(*seen.borrow(), ["one", "two three"]);
    }
}
