//! One device executor per node: the threads on which all of its tensor operations run.
//!
//! Actors submit work and await it; none ever blocks the async runtime. OS threads and not tasks, because libtorch
//! calls block and keep per-thread settings. Urgent work, which a lane waits for, goes before deferred work
//! (weight gradients, sums), which only the end of the step waits for.

use crate::limits::JOBS_MAX;
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::oneshot;
use volary_core::compute::{Compute, ComputeError, Computed};
use volary_telemetry::Meter;
use volary_telemetry::metrics::ExecutorTotals;

/// Whether somebody on the way of a lane waits for the work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Priority {
    /// A lane waits.
    Urgent,
    /// Only the end of the step waits.
    Deferred,
}

type Job<B> = Box<dyn FnOnce(&B) + Send>;
type Waiting<B> = (Instant, Job<B>);

struct Queues<B> {
    urgent: VecDeque<Waiting<B>>,
    deferred: VecDeque<Waiting<B>>,
    closed: bool,
}

struct Shared<B> {
    backend: B,
    queues: Mutex<Queues<B>>,
    more: Condvar,
    /// What was done so far; times in nanoseconds.
    jobs: AtomicU64,
    busy: AtomicU64,
    waited: AtomicU64,
}

impl<B> Shared<B> {
    fn lock(&self) -> MutexGuard<'_, Queues<B>> {
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn next(&self) -> Option<Waiting<B>> {
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

    fn run(&self, (queued, job): Waiting<B>) {
        let began = Instant::now();
        // A panic in one job must not take the thread from the others; its caller sees a dropped reply.
        if catch_unwind(AssertUnwindSafe(|| job(&self.backend))).is_err() {
            tracing::error!("a computation panicked");
        }
        self.jobs.fetch_add(1, Ordering::Relaxed);
        self.busy.fetch_add(nanoseconds(began.elapsed()), Ordering::Relaxed);
        self.waited.fetch_add(nanoseconds(began - queued), Ordering::Relaxed);
    }
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
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
        let (queues, more) = (Mutex::new(queues), Condvar::new());
        let (jobs, busy, waited) = Default::default();
        let shared = Arc::new(Shared { backend, queues, more, jobs, busy, waited });
        for index in 0..threads {
            let shared = Arc::clone(&shared);
            std::thread::Builder::new().name(format!("device-{index}")).spawn(move || {
                prepare();
                while let Some(waiting) = shared.next() {
                    shared.run(waiting);
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
        let waiting: Waiting<B> = (Instant::now(), Box::new(job));
        match priority {
            Priority::Urgent => queues.urgent.push_back(waiting),
            Priority::Deferred => queues.deferred.push_back(waiting),
        }
        drop(queues);
        self.shared.more.notify_one();
    }

    /// Queues urgent work that is measured; what it makes goes to `then`, on the same thread.
    pub(crate) fn measured<T>(
        &self,
        meter: &Meter,
        work: impl FnOnce(&B) -> T + Send + 'static,
        then: impl FnOnce(T) + Send + 'static,
    ) {
        let (meter, queued) = (meter.clone(), Instant::now());
        self.submit(Priority::Urgent, move |backend| {
            let began = Instant::now();
            let made = work(backend);
            // Before anybody hears of it: whoever waits ends the span that the meter belongs to.
            meter.add(queued, began);
            then(made);
        });
    }

    /// What was done so far, and what waits.
    pub(crate) fn totals(&self) -> ExecutorTotals {
        let (urgent, deferred) = {
            let queues = self.shared.lock();
            (queues.urgent.len(), queues.deferred.len())
        };
        let seconds = |ns: &AtomicU64| ns.load(Ordering::Relaxed) as f64 / 1e9;
        ExecutorTotals {
            urgent,
            deferred,
            jobs: self.shared.jobs.load(Ordering::Relaxed),
            busy_seconds: seconds(&self.shared.busy),
            waited_seconds: seconds(&self.shared.waited),
        }
    }

    /// Runs an urgent job and awaits its result.
    pub(crate) async fn run<T: Send + 'static>(
        &self,
        meter: &Meter,
        job: impl FnOnce(&B) -> Computed<T> + Send + 'static,
    ) -> Computed<T> {
        let (sender, receiver) = oneshot::channel();
        self.measured(meter, job, |done| drop(sender.send(done)));
        receiver.await.unwrap_or_else(|_| Err(ComputeError("a computation was dropped".into())))
    }
}

impl<B: Compute> Drop for Executor<B> {
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.shared.more.notify_all();
    }
}
