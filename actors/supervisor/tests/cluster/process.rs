//! A process of a test: a runtime on a thread of its own that can be stopped between two polls.

use std::thread::JoinHandle;
use tokio::runtime::{Builder, Handle, Runtime};
use tokio::sync::oneshot;

/// A runtime that one thread drives.
///
/// A runtime with workers cannot be killed as `kill -9` kills: while it shuts down, tasks that still run see
/// the ends of those that were dropped, and could write them down.
pub(crate) struct Process {
    handle: Handle,
    stop: oneshot::Sender<()>,
    thread: JoinHandle<Runtime>,
}

/// A runtime for [`Process::drive`].
pub(crate) fn runtime() -> Runtime {
    Builder::new_current_thread().enable_all().build().expect("a runtime")
}

impl Process {
    /// Runs the tasks of a runtime from now on.
    pub(crate) fn drive(runtime: Runtime) -> Self {
        let handle = runtime.handle().clone();
        let (stop, stopped) = oneshot::channel();
        let thread = std::thread::spawn(move || {
            drop(runtime.block_on(stopped));
            runtime
        });
        Self { handle, stop, thread }
    }

    /// Waits for an answer of the process.
    pub(crate) fn block_on<F: Future>(&self, future: F) -> F::Output {
        self.handle.block_on(future)
    }

    /// Stops the process: none of its tasks is polled any more. They are dropped with the runtime.
    pub(crate) fn stop(self) -> Runtime {
        drop(self.stop);
        self.thread.join().expect("a process")
    }
}
