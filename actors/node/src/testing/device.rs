//! The test's hand on a fake device.

use parking_lot::{Condvar, Mutex};
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use volary_core::compute::{ComputeError, Computed};

/// What a fake device can be made to hold or fail.
#[expect(missing_docs, reason = "named for the methods of `Compute`")]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Operation {
    Embed,
    Loss,
    Dense,
    DenseBackward,
    Gate,
    Combine,
    Expert,
    ExpertBackward,
    ExpertGradient,
    Add,
    Norm,
    Apply,
    Load,
    Store,
}

/// The longest that a held call waits, so that a test that forgets to release one ends.
const HOLD_MAX: Duration = Duration::from_secs(30);

/// A fake device; clones are the same device.
#[derive(Clone, Default)]
pub struct FakeDevice(Arc<State>);

#[derive(Default)]
struct State {
    live: AtomicI64,
    live_max: AtomicI64,
    delay_us: AtomicU64,
    calls: Mutex<Calls>,
    changed: Condvar,
}

#[derive(Default)]
struct Calls {
    held: HashSet<Operation>,
    /// Calls that wait in a held operation.
    waiting: HashMap<Operation, usize>,
    failing: HashSet<Operation>,
    made: HashMap<Operation, u64>,
}

impl FakeDevice {
    /// Tensors and gradients that are alive.
    #[must_use]
    pub fn live_tensors(&self) -> usize {
        usize::try_from(self.0.live.load(Ordering::SeqCst)).unwrap_or(0)
    }

    /// The most that were alive at one time.
    #[must_use]
    pub fn live_tensors_max(&self) -> usize {
        usize::try_from(self.0.live_max.load(Ordering::SeqCst)).unwrap_or(0)
    }

    pub(super) fn count(&self, change: i64) {
        let now = self.0.live.fetch_add(change, Ordering::SeqCst) + change;
        self.0.live_max.fetch_max(now, Ordering::SeqCst);
    }

    /// Calls of an operation so far.
    #[must_use]
    pub fn calls(&self, operation: Operation) -> u64 {
        self.0.calls.lock().made.get(&operation).copied().unwrap_or(0)
    }

    /// Every call takes this long from now on.
    pub fn set_delay(&self, delay: Duration) {
        self.0.delay_us.store(u64::try_from(delay.as_micros()).unwrap_or(u64::MAX), Ordering::SeqCst);
    }

    /// Every call of an operation fails from now on.
    pub fn fail(&self, operation: Operation) {
        self.0.calls.lock().failing.insert(operation);
    }

    /// Holds every call of an operation until the returned value is dropped.
    #[must_use]
    pub fn hold(&self, operation: Operation) -> Hold {
        self.0.calls.lock().held.insert(operation);
        Hold { device: self.clone(), operation }
    }

    /// What every call does first.
    pub(super) fn enter(&self, operation: Operation) -> Computed<()> {
        let delay = self.0.delay_us.load(Ordering::SeqCst);
        if delay > 0 {
            std::thread::sleep(Duration::from_micros(delay));
        }
        let mut calls = self.0.calls.lock();
        *calls.made.entry(operation).or_default() += 1;
        if calls.held.contains(&operation) {
            *calls.waiting.entry(operation).or_default() += 1;
            let deadline = Instant::now() + HOLD_MAX;
            while calls.held.contains(&operation) {
                if self.0.changed.wait_until(&mut calls, deadline).timed_out() {
                    break;
                }
            }
            *calls.waiting.entry(operation).or_default() -= 1;
        }
        if calls.failing.contains(&operation) {
            return Err(ComputeError(format!("{operation:?} fails, as the test wants")));
        }
        Ok(())
    }
}

/// Calls of one operation are held for as long as this is alive.
pub struct Hold {
    device: FakeDevice,
    operation: Operation,
}

impl Hold {
    /// Whether a call waits in the operation.
    #[must_use]
    pub fn is_reached(&self) -> bool {
        self.device.0.calls.lock().waiting.get(&self.operation).is_some_and(|waiting| *waiting > 0)
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.device.0.calls.lock().held.remove(&self.operation);
        self.device.0.changed.notify_all();
    }
}
