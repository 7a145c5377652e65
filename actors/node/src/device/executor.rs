//! One device executor per node: the threads on which all of its tensor operations run.
//!
//! Actors submit work and await it; none ever blocks the async runtime. OS threads and not tasks, because
//! libtorch calls block and keep per-thread settings. Urgent work, which a lane waits for, runs before
//! deferred work (weight gradients, sums), which only the end of the step waits for.

use crate::error::{Error, Result};
use crate::limits::JOBS_MAX;
use parking_lot::{Condvar, Mutex};
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::oneshot;
use volary_core::compute::Compute;
use volary_telemetry::Meter;
use volary_telemetry::metrics::ExecutorTotals;

/// Whether a lane waits for the work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Priority {
    /// A lane waits.
    Urgent,
    /// Only the end of the step waits.
    Deferred,
}

type Job<B> = Box<dyn FnOnce(&B) + Send>;

/// A job, and when it was submitted.
type QueuedJob<B> = (Instant, Job<B>);

struct Queues<B> {
    urgent: VecDeque<QueuedJob<B>>,
    deferred: VecDeque<QueuedJob<B>>,
    closed: bool,
}

struct Shared<B> {
    backend: B,
    queues: Mutex<Queues<B>>,
    submitted: Condvar,
    totals: Totals,
}

/// Work done so far.
#[derive(Default)]
struct Totals {
    jobs: AtomicU64,
    busy_ns: AtomicU64,
    waited_ns: AtomicU64,
}

impl<B> Shared<B> {
    /// The next job, or nothing when the executor is closed and drained.
    fn next(&self) -> Option<QueuedJob<B>> {
        let mut queues = self.queues.lock();
        loop {
            let job = queues.urgent.pop_front();
            if let Some(job) = job.or_else(|| queues.deferred.pop_front()) {
                return Some(job);
            }
            if queues.closed {
                return None;
            }
            self.submitted.wait(&mut queues);
        }
    }

    fn run(&self, (submitted, job): QueuedJob<B>) {
        let began = Instant::now();
        // A panic in one job must not take the thread from the others; its caller sees a dropped reply.
        if catch_unwind(AssertUnwindSafe(|| job(&self.backend))).is_err() {
            tracing::error!("a computation panicked");
        }
        self.totals.jobs.fetch_add(1, Ordering::Relaxed);
        self.totals.busy_ns.fetch_add(nanoseconds(began.elapsed()), Ordering::Relaxed);
        self.totals.waited_ns.fetch_add(nanoseconds(began - submitted), Ordering::Relaxed);
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
        let (submitted, totals) = (Condvar::new(), Totals::default());
        let shared = Arc::new(Shared { backend, queues: Mutex::new(queues), submitted, totals });
        for index in 0..threads {
            let shared = Arc::clone(&shared);
            std::thread::Builder::new().name(format!("device-{index}")).spawn(move || {
                prepare();
                while let Some(job) = shared.next() {
                    shared.run(job);
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
    /// flight can submit, the job is dropped and its caller sees a dropped reply.
    pub(crate) fn submit(&self, priority: Priority, job: impl FnOnce(&B) + Send + 'static) {
        let mut queues = self.shared.queues.lock();
        if queues.urgent.len() + queues.deferred.len() >= JOBS_MAX {
            tracing::error!("job dropped: the device executor's queue of {JOBS_MAX} jobs is full");
            return;
        }
        let queued: QueuedJob<B> = (Instant::now(), Box::new(job));
        match priority {
            Priority::Urgent => queues.urgent.push_back(queued),
            Priority::Deferred => queues.deferred.push_back(queued),
        }
        drop(queues);
        self.shared.submitted.notify_one();
    }

    /// Queues urgent work with its time measured; its result goes to `then`, on the same thread.
    pub(crate) fn measured<T>(
        &self,
        meter: &Meter,
        work: impl FnOnce(&B) -> T + Send + 'static,
        then: impl FnOnce(T) + Send + 'static,
    ) {
        let (meter, submitted) = (meter.clone(), Instant::now());
        self.submit(Priority::Urgent, move |backend| {
            let began = Instant::now();
            let result = work(backend);
            // Before `then`: its receiver ends the span that the meter belongs to.
            meter.add(submitted, began);
            then(result);
        });
    }

    /// Runs an urgent job and awaits its result.
    pub(crate) async fn run<T: Send + 'static>(
        &self,
        meter: &Meter,
        job: impl FnOnce(&B) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let (sender, receiver) = oneshot::channel();
        // A caller that has given up since then does not need the result.
        self.measured(meter, job, |done| drop(sender.send(done)));
        receiver.await.unwrap_or(Err(Error::ComputationDropped))
    }

    /// Work done so far, and the present queues.
    pub(crate) fn totals(&self) -> ExecutorTotals {
        let (urgent, deferred) = {
            let queues = self.shared.queues.lock();
            (queues.urgent.len(), queues.deferred.len())
        };
        let Totals { jobs, busy_ns, waited_ns } = &self.shared.totals;
        let seconds = |ns: &AtomicU64| ns.load(Ordering::Relaxed) as f64 / 1e9;
        ExecutorTotals {
            urgent,
            deferred,
            jobs: jobs.load(Ordering::Relaxed),
            busy_seconds: seconds(busy_ns),
            waited_seconds: seconds(waited_ns),
        }
    }
}

impl<B: Compute> Drop for Executor<B> {
    fn drop(&mut self) {
        self.shared.queues.lock().closed = true;
        self.shared.submitted.notify_all();
    }
}
