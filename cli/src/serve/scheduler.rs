//! The thread that computes, and the requests that it is sent.

use super::error::ApiError;
use crate::limits::SERVED_ORDERS_MAX;
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::time::Instant;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::oneshot;
use volary_core::Step;
use volary_data::Tokenizer;
use volary_inference::{Error, Generator, Piece, Request, RequestId};
use volary_model::decoder::Decoder;
use volary_telemetry::metrics::ModelServerMetrics;

/// Sends requests to the thread that computes. Clones share it.
#[derive(Clone, Debug)]
pub(crate) struct Scheduler {
    orders: SyncSender<Order>,
}

#[derive(Debug)]
enum Order {
    Submit(Submission),
    /// Later requests are for these weights.
    Replace(Decoder, Step),
}

/// A request with several continuations.
#[derive(Debug)]
struct Submission {
    requests: Vec<Request>,
    accepted: oneshot::Sender<Result<Accepted, ApiError>>,
}

/// The answer to a submission.
#[derive(Debug)]
pub(crate) struct Accepted {
    /// The step of the weights.
    pub(crate) step: Step,
    pub(crate) pieces: Pieces,
}

/// The pieces of a submission's continuations, each with the place of its request. Its number is bounded by
/// the tokens of the requests. When it is dropped, the requests end.
pub(crate) type Pieces = UnboundedReceiver<Result<(usize, Piece), ApiError>>;

/// What the thread computes with.
#[derive(Debug)]
pub(crate) struct Setup {
    pub(crate) decoder: Decoder,
    pub(crate) step: Step,
    pub(crate) tokenizer: Tokenizer,
    /// Continuations that are computed at a time.
    pub(crate) slots: usize,
    pub(crate) metrics: Arc<ModelServerMetrics>,
}

impl Scheduler {
    /// Starts the thread.
    ///
    /// # Errors
    /// When the thread does not start, or the device has no memory for keys and values.
    pub(crate) fn start(setup: Setup) -> anyhow::Result<Self> {
        let (orders, received) = sync_channel(SERVED_ORDERS_MAX);
        let (started, outcome) = sync_channel(1);
        let run = move || match Worker::new(setup) {
            Ok(worker) => {
                drop(started.send(Ok(())));
                worker.run(&received);
            }
            Err(error) => drop(started.send(Err(error))),
        };
        std::thread::Builder::new().name("model".into()).spawn(run)?;
        outcome.recv()??;
        Ok(Self { orders })
    }

    /// Submits requests, all or none.
    ///
    /// # Errors
    /// A 429 when there are too many; the error of the first request that is refused.
    pub(crate) async fn submit(&self, requests: Vec<Request>) -> Result<Accepted, ApiError> {
        let ended = || ApiError::internal("the model's thread has ended");
        let (accepted, outcome) = oneshot::channel();
        self.orders.try_send(Order::Submit(Submission { requests, accepted })).map_err(
            |error| match error {
                TrySendError::Full(_) => ApiError::busy(),
                TrySendError::Disconnected(_) => ended(),
            },
        )?;
        outcome.await.unwrap_or_else(|_| Err(ended()))
    }

    /// Answers later requests with other weights. Those that were accepted before keep theirs.
    ///
    /// # Errors
    /// When the thread has ended.
    pub(crate) fn replace(&self, decoder: Decoder, step: Step) -> anyhow::Result<()> {
        let sent = self.orders.send(Order::Replace(decoder, step));
        sent.map_err(|_| anyhow::anyhow!("the model's thread has ended"))
    }

    /// Whether the thread still takes requests.
    pub(crate) async fn is_alive(&self) -> bool {
        // A full queue is one of a living thread.
        !matches!(self.submit(Vec::new()).await, Err(error) if error.is_internal())
    }
}

/// Continuations with one version of the weights.
struct Version {
    number: u64,
    step: Step,
    generator: Generator,
}

/// Where the pieces of a request go, and its place in its submission.
struct Destination {
    place: usize,
    pieces: UnboundedSender<Result<(usize, Piece), ApiError>>,
}

struct Worker {
    tokenizer: Tokenizer,
    slots: usize,
    metrics: Arc<ModelServerMetrics>,
    /// The newest version, for new requests.
    newest: Version,
    /// The version before, until its requests have ended.
    older: Option<Version>,
    /// Weights that came while there were two versions.
    next: Option<(Decoder, Step)>,
    /// By the number of the version and the request.
    destinations: HashMap<(u64, RequestId), Destination>,
}

impl Worker {
    fn new(setup: Setup) -> anyhow::Result<Self> {
        let Setup { decoder, step, tokenizer, slots, metrics } = setup;
        let generator = Generator::new(Rc::new(decoder), tokenizer.clone(), slots)?;
        metrics.set_step(step.0);
        let newest = Version { number: 0, step, generator };
        let destinations = HashMap::new();
        Ok(Self { tokenizer, slots, metrics, newest, older: None, next: None, destinations })
    }

    /// Takes requests and computes until every sender is dropped.
    fn run(mut self, orders: &Receiver<Order>) {
        loop {
            if self.newest.generator.is_idle() && self.older.is_none() {
                let Ok(order) = orders.recv() else { return };
                self.take(order);
            }
            while let Ok(order) = orders.try_recv() {
                self.take(order);
            }
            self.cancel_unwanted();
            self.step();
            if self.older.as_ref().is_some_and(|version| version.generator.is_idle()) {
                self.older = None;
                if let Some((decoder, step)) = self.next.take() {
                    self.replace(decoder, step);
                }
            }
        }
    }

    fn take(&mut self, order: Order) {
        match order {
            Order::Submit(submission) => self.accept(submission),
            Order::Replace(decoder, step) if self.older.is_some() => self.next = Some((decoder, step)),
            Order::Replace(decoder, step) => self.replace(decoder, step),
        }
    }

    fn replace(&mut self, decoder: Decoder, step: Step) {
        let generator = match Generator::new(Rc::new(decoder), self.tokenizer.clone(), self.slots) {
            Ok(generator) => generator,
            // The present weights go on; the next checkpoint may fit.
            Err(error) => return tracing::error!(%error, %step, "no memory for the new checkpoint"),
        };
        let version = Version { number: self.newest.number + 1, step, generator };
        let before = std::mem::replace(&mut self.newest, version);
        self.older = (!before.generator.is_idle()).then_some(before);
        self.metrics.set_step(step.0);
    }

    fn accept(&mut self, submission: Submission) {
        let (pieces, receiver) = unbounded_channel();
        let Version { number, step, generator } = &mut self.newest;
        let mut ids = Vec::new();
        let prompt_tokens: usize = submission.requests.iter().map(|request| request.prompt.len()).sum();
        for request in submission.requests {
            match generator.submit(request) {
                Ok(id) => ids.push(id),
                Err(error) => {
                    ids.into_iter().for_each(|id| generator.cancel(id));
                    let is_busy = matches!(error, Error::Busy);
                    let error = if is_busy { ApiError::busy() } else { ApiError::invalid(error) };
                    // The client may have left.
                    drop(submission.accepted.send(Err(error)));
                    return;
                }
            }
        }
        self.metrics.add_prompt_tokens(prompt_tokens);
        for (place, id) in ids.into_iter().enumerate() {
            self.destinations.insert((*number, id), Destination { place, pieces: pieces.clone() });
        }
        drop(submission.accepted.send(Ok(Accepted { step: *step, pieces: receiver })));
    }

    fn version(&mut self, number: u64) -> Option<&mut Version> {
        let older = self.older.as_mut().filter(|version| version.number == number);
        older.or_else(|| Some(&mut self.newest).filter(|version| version.number == number))
    }

    /// Ends the requests of clients that have left.
    fn cancel_unwanted(&mut self) {
        let is_unwanted =
            |(key, to): (&(u64, RequestId), &Destination)| to.pieces.is_closed().then_some(*key);
        let unwanted: Vec<(u64, RequestId)> = self.destinations.iter().filter_map(is_unwanted).collect();
        for key in unwanted {
            self.destinations.remove(&key);
            if let Some(version) = self.version(key.0) {
                version.generator.cancel(key.1);
            }
        }
    }

    /// One pass with each version that has requests.
    fn step(&mut self) {
        let versions = self.older.iter_mut().chain([&mut self.newest]);
        let began = Instant::now();
        let computed: Vec<_> = versions.map(|version| (version.number, version.generator.step())).collect();
        self.metrics.pass(began.elapsed());
        for (number, pieces) in computed {
            match pieces {
                Ok(pieces) => pieces.into_iter().for_each(|piece| self.deliver(number, piece)),
                Err(error) => self.fail(number, &error),
            }
        }
        self.metrics.set_continuations(self.destinations.len());
    }

    fn deliver(&mut self, version: u64, piece: Piece) {
        let key = (version, piece.request);
        let (generated, is_last) = (piece.generated, piece.finish.is_some());
        if let Some(Destination { place, pieces }) = self.destinations.get(&key) {
            // A client that has left is found before the next step.
            drop(pieces.send(Ok((*place, piece))));
        }
        if is_last {
            self.metrics.add_completion_tokens(generated);
            self.destinations.remove(&key);
        }
    }

    /// Ends all requests of a version: a pass that failed was for all of them.
    fn fail(&mut self, version: u64, error: &Error) {
        tracing::error!(%error, "the model failed");
        let failed: Vec<_> = self.destinations.extract_if(|key, _| key.0 == version).collect();
        for ((_, id), destination) in failed {
            if let Some(version) = self.version(version) {
                version.generator.cancel(id);
            }
            drop(destination.pieces.send(Err(ApiError::internal(error))));
        }
    }
}
