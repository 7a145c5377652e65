//! A model on several threads: each takes the new tokens of some of the sequences.
//!
//! The kernels of a token are too small to be shared by threads, and the sequences of a pass are independent.
//! So every thread has a cache of its own, for every n-th slot of n threads, and computes with one thread of
//! libtorch; a pass in which only one has work gives it all of them.

use crate::error::{Error, Result};
use std::rc::Rc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::{self, JoinHandle};
use volary_model::decoder::{Cache, Decoder, Input, Output, Scoring};
use volary_model::device;

/// Jobs that wait for one thread: the cleared slots between two passes, and a pass.
const JOBS_AHEAD: usize = 1024;

/// The threads of a model.
#[derive(Debug)]
pub(crate) struct Workers {
    decoder: Rc<Decoder>,
    workers: Vec<Worker>,
    slots: usize,
}

#[derive(Debug)]
struct Worker {
    /// `None` once it is told to end.
    jobs: Option<SyncSender<Job>>,
    results: Receiver<volary_model::Result<Vec<Output>>>,
    thread: Option<JoinHandle<()>>,
}

enum Job {
    /// A pass, with so many threads of libtorch.
    Advance(Vec<Part>, u16),
    /// A slot is free.
    Clear(usize),
}

/// An [`Input`] that owns its tokens.
struct Part {
    slot: usize,
    tokens: Vec<u32>,
    scoring: Option<Scoring>,
}

impl Workers {
    /// `slots` sequences on as many threads as the calling thread's libtorch has, and one on a GPU.
    ///
    /// # Errors
    /// [`Error::Model`] when the device has no memory for keys and values.
    pub(crate) fn start(decoder: Rc<Decoder>, slots: usize) -> Result<Self> {
        let slots = slots.max(1);
        let threads = if decoder.is_on_cpu() { usize::from(device::threads()) } else { 1 };
        let count = threads.clamp(1, slots);
        let start = |first: usize| {
            let own = (first..slots).step_by(count).len();
            let (decoder, cache) = (decoder.share(), decoder.cache(own)?);
            let (jobs, to_do) = sync_channel(JOBS_AHEAD);
            let (done, results) = sync_channel(1);
            let thread = thread::Builder::new().name("model".into()).spawn(move || {
                work(&decoder, cache, &to_do, |result| done.send(result).is_ok());
            });
            Ok(Worker { jobs: Some(jobs), results, thread: Some(thread.map_err(Error::Thread)?) })
        };
        let workers = (0..count).map(start).collect::<Result<_>>()?;
        Ok(Self { decoder, workers, slots })
    }

    pub(crate) fn decoder(&self) -> &Decoder {
        &self.decoder
    }

    pub(crate) fn slots(&self) -> usize {
        self.slots
    }

    /// Empties a slot for another sequence.
    pub(crate) fn clear(&self, slot: usize) {
        let (worker, slot) = self.place(slot);
        // Without its thread the next pass fails.
        let _ = worker.send(Job::Clear(slot));
    }

    /// As [`Decoder::advance`]; after an error some sequences may have advanced.
    pub(crate) fn advance(&self, inputs: &[Input<'_>]) -> Result<Vec<Output>> {
        let mut parts: Vec<Vec<Part>> = self.workers.iter().map(|_| Vec::new()).collect();
        for input in inputs {
            let part = Part {
                slot: self.place(input.slot).1,
                tokens: input.tokens.to_vec(),
                scoring: input.scoring,
            };
            parts[input.slot % self.workers.len()].push(part);
        }
        let count = parts.iter().filter(|parts| !parts.is_empty()).count();
        let threads = if count == 1 { self.workers.len() as u16 } else { 1 };
        let begin = |(worker, parts): (&Worker, Vec<Part>)| {
            let has_work = !parts.is_empty();
            // A thread that has ended is noticed when its result is missing.
            let _ = has_work && worker.send(Job::Advance(parts, threads));
            has_work
        };
        let busy: Vec<bool> = self.workers.iter().zip(parts).map(begin).collect();
        // All of them, before the first error is told: a result must not wait for the next pass.
        let result = |(worker, busy): (&Worker, bool)| match busy {
            true => worker.results.recv().map_err(|_| Error::ThreadEnded)?.map_err(Error::from),
            false => Ok(Vec::new()),
        };
        let results: Vec<Result<Vec<Output>>> = self.workers.iter().zip(busy).map(result).collect();
        let results = results.into_iter().collect::<Result<Vec<_>>>()?;
        let mut results: Vec<_> = results.into_iter().map(Vec::into_iter).collect();
        let next = |input: &Input<'_>| results[input.slot % self.workers.len()].next();
        inputs.iter().map(next).collect::<Option<Vec<_>>>().ok_or(Error::ThreadEnded)
    }

    /// The thread of a slot, and its place in that thread's cache.
    fn place(&self, slot: usize) -> (&Worker, usize) {
        let count = self.workers.len();
        (&self.workers[slot % count], slot / count)
    }
}

impl Worker {
    fn send(&self, job: Job) -> bool {
        self.jobs.as_ref().is_some_and(|jobs| jobs.send(job).is_ok())
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            // A panic there was a failed pass here.
            let _ = thread.join();
        }
    }
}

/// The loop of one thread. It ends when one of its channels is closed.
fn work(
    decoder: &Decoder,
    mut cache: Cache,
    jobs: &Receiver<Job>,
    done: impl Fn(volary_model::Result<Vec<Output>>) -> bool,
) {
    let mut now = 0;
    while let Ok(job) = jobs.recv() {
        match job {
            Job::Clear(slot) => cache.clear(slot),
            Job::Advance(parts, threads) => {
                if threads != now {
                    device::set_threads(threads);
                    now = threads;
                }
                let inputs: Vec<Input<'_>> = parts
                    .iter()
                    .map(|part| Input { slot: part.slot, tokens: &part.tokens, scoring: part.scoring })
                    .collect();
                if !done(decoder.advance(&mut cache, &inputs)) {
                    return;
                }
            }
        }
    }
}
