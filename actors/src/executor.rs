//! One device executor per node: the threads on which all of its tensor operations run.
//!
//! Actors submit work and await it; none ever blocks the async runtime. OS threads and not tasks, because libtorch
//! calls block and keep per-thread settings. Urgent work, which a lane waits for, goes before deferred work
//! (weight gradients, sums), which only the end of the step waits for.

use crate::limits::JOBS_MAX;
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use tokio::sync::oneshot;
use volary_core::compute::{Compute, ComputeError, Computed};

/// Whether somebody on the way of a lane waits for the work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Priority {
    /// A lane waits.
    Urgent,
    /// Only the end of the step waits.
    Deferred,
}

type Job<B> = Box<dyn FnOnce(&B) + Send>;

struct Queues<B> {
    urgent: VecDeque<Job<B>>,
    deferred: VecDeque<Job<B>>,
    closed: bool,
}

struct Shared<B> {
    backend: B,
    queues: Mutex<Queues<B>>,
    more: Condvar,
}

impl<B> Shared<B> {
    fn lock(&self) -> MutexGuard<'_, Queues<B>> {
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn next(&self) -> Option<Job<B>> {
        let mut queues = self.lock();
        loop {
            if let Some(job) = queues.urgent.pop_front() {
                return Some(job);
            }
            if let Some(job) = queues.deferred.pop_front() {
                return Some(job);
            }
            if queues.closed {
                return None;
            }
            queues = self.more.wait(queues).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// The threads of one device; they end when the executor is dropped.
pub(crate) struct Executor<B: Compute> {
    shared: Arc<Shared<B>>,
    threads: usize,
}

impl<B: Compute> Executor<B> {
    /// Starts `threads` threads, each of which first calls `prepare`.
    pub(crate) fn start(backend: B, threads: usize, prepare: fn()) -> std::io::Result<Self> {
        let queues = Queues { urgent: VecDeque::new(), deferred: VecDeque::new(), closed: false };
        let shared = Arc::new(Shared { backend, queues: Mutex::new(queues), more: Condvar::new() });
        for index in 0..threads {
            let shared = Arc::clone(&shared);
            std::thread::Builder::new().name(format!("device-{index}")).spawn(move || {
                prepare();
                while let Some(job) = shared.next() {
                    // A panic in one job must not take the thread from the others; its caller sees a dropped reply.
                    if catch_unwind(AssertUnwindSafe(|| job(&shared.backend))).is_err() {
                        tracing::error!("a computation panicked");
                    }
                }
            })?;
        }
        Ok(Self { shared, threads })
    }

    /// Threads of the device.
    pub(crate) fn threads(&self) -> usize {
        self.threads
    }

    /// Queues a job; its closure sends its own answers. Beyond the bound, which is far above what lanes in
    /// flight can ask for, the job is dropped and its caller sees a dropped reply.
    pub(crate) fn submit(&self, priority: Priority, job: impl FnOnce(&B) + Send + 'static) {
        let mut queues = self.shared.lock();
        if queues.urgent.len() + queues.deferred.len() >= JOBS_MAX {
            tracing::error!("the device executor's queue of {JOBS_MAX} jobs is full");
            return;
        }
        match priority {
            Priority::Urgent => queues.urgent.push_back(Box::new(job)),
            Priority::Deferred => queues.deferred.push_back(Box::new(job)),
        }
        drop(queues);
        self.shared.more.notify_one();
    }

    /// Runs a job and awaits its result.
    pub(crate) async fn run<T: Send + 'static>(
        &self,
        priority: Priority,
        job: impl FnOnce(&B) -> Computed<T> + Send + 'static,
    ) -> Computed<T> {
        let (sender, receiver) = oneshot::channel();
        self.submit(priority, move |backend| drop(sender.send(job(backend))));
        receiver.await.unwrap_or_else(|_| Err(ComputeError("a computation was dropped".into())))
    }
}

impl<B: Compute> Drop for Executor<B> {
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.shared.more.notify_all();
    }
}
