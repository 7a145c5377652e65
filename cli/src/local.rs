//! The processes of a run on one machine: a supervisor and its nodes, in process groups of their own, so that Ctrl-C
//! reaches only their parent. Each holds the other end of a pipe and ends when the parent does, however the parent died.

use anyhow::Context;
use std::fs::File;
use std::io::Read;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// How long a process may take to end when it is asked to.
const END_MAX: Duration = Duration::from_secs(10);

/// One process of a run.
#[derive(Debug)]
pub struct Process {
    /// What it is called: `supervisor`, `node-1`.
    pub name: String,
    /// Where its standard error goes.
    pub log: PathBuf,
    child: Child,
}

impl Process {
    /// Starts this program again with other arguments.
    ///
    /// # Errors
    /// When it does not start or its log cannot be written.
    pub fn start(name: &str, logs: &Path, args: &[String]) -> anyhow::Result<Self> {
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

    /// The last line of its log.
    #[must_use]
    pub fn last_words(&self) -> String {
        let text = std::fs::read_to_string(&self.log).unwrap_or_default();
        text.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("it said nothing").to_owned()
    }

    /// Waits for it to end, and kills it when it takes too long.
    pub fn wait_or_kill(&mut self) {
        let start = Instant::now();
        while start.elapsed() < END_MAX {
            if self.ended().is_some() {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
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

/// Ends this process when its parent does: the parent holds the other end of standard input and never writes.
pub fn end_with_parent() {
    let watch = || {
        let mut byte = [0];
        // Whatever comes, an end or an error, means that nobody holds the other end.
        while matches!(std::io::stdin().read(&mut byte), Ok(n) if n > 0) {}
        tracing::warn!("the parent process is gone");
        std::process::exit(3);
    };
    // Without the thread the process would outlive its parent; it must not start then.
    if std::thread::Builder::new().name("parent".into()).spawn(watch).is_err() {
        std::process::exit(3);
    }
}
