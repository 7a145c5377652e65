//! The thread that computes, and the requests that it is sent.

use super::error::ApiError;
use crate::limits::SERVED_ORDERS_MAX;
use std::collections::HashMap;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::oneshot;
use volary_inference::{Error, Generator, Piece, Request, RequestId};

/// Sends requests to the thread that computes. Clones share it.
#[derive(Clone, Debug)]
pub(crate) struct Scheduler {
    orders: SyncSender<Submission>,
}

/// A request with several continuations.
#[derive(Debug)]
struct Submission {
    requests: Vec<Request>,
    accepted: oneshot::Sender<Result<Pieces, ApiError>>,
}

/// The pieces of a submission's continuations, each with the place of its request. Its number is bounded by
/// the tokens of the requests. When it is dropped, the requests end.
pub(crate) type Pieces = UnboundedReceiver<Result<(usize, Piece), ApiError>>;

/// Where the pieces of a request go, and its place in its submission.
struct Destination {
    place: usize,
    pieces: UnboundedSender<Result<(usize, Piece), ApiError>>,
}

impl Scheduler {
    /// Starts the thread, which first makes its generator.
    ///
    /// # Errors
    /// When the thread does not start or has no generator.
    pub(crate) fn start(
        generator: impl FnOnce() -> anyhow::Result<Generator> + Send + 'static,
    ) -> anyhow::Result<Self> {
        let (orders, submitted) = sync_channel(SERVED_ORDERS_MAX);
        let (started, outcome) = sync_channel(1);
        std::thread::Builder::new().name("model".into()).spawn(move || match generator() {
            Ok(generator) => {
                drop(started.send(Ok(())));
                Worker { generator, destinations: HashMap::new() }.run(&submitted);
            }
            Err(error) => drop(started.send(Err(error))),
        })?;
        outcome.recv()??;
        Ok(Self { orders })
    }

    /// Submits requests, all or none.
    ///
    /// # Errors
    /// A 429 when there are too many; the error of the first request that is refused.
    pub(crate) async fn submit(&self, requests: Vec<Request>) -> Result<Pieces, ApiError> {
        let (accepted, outcome) = oneshot::channel();
        self.orders.try_send(Submission { requests, accepted }).map_err(|error| match error {
            TrySendError::Full(_) => ApiError::busy(),
            TrySendError::Disconnected(_) => ApiError::internal("the model's thread has ended"),
        })?;
        outcome.await.unwrap_or_else(|_| Err(ApiError::internal("the model's thread has ended")))
    }

    /// Whether the thread still takes requests.
    pub(crate) fn is_alive(&self) -> bool {
        let (accepted, _) = oneshot::channel();
        let probe = Submission { requests: Vec::new(), accepted };
        !matches!(self.orders.try_send(probe), Err(TrySendError::Disconnected(_)))
    }
}

struct Worker {
    generator: Generator,
    destinations: HashMap<RequestId, Destination>,
}

impl Worker {
    /// Takes requests and computes until nobody can send any more.
    fn run(mut self, submitted: &Receiver<Submission>) {
        loop {
            if self.generator.is_idle() {
                let Ok(submission) = submitted.recv() else { return };
                self.accept(submission);
            }
            while let Ok(submission) = submitted.try_recv() {
                self.accept(submission);
            }
            self.cancel_unwanted();
            match self.generator.step() {
                Ok(pieces) => pieces.into_iter().for_each(|piece| self.deliver(piece)),
                Err(error) => self.fail(&error),
            }
        }
    }

    fn accept(&mut self, submission: Submission) {
        let (pieces, receiver) = unbounded_channel();
        let mut ids = Vec::new();
        for request in submission.requests {
            match self.generator.submit(request) {
                Ok(id) => ids.push(id),
                Err(error) => {
                    ids.into_iter().for_each(|id| self.generator.cancel(id));
                    let error = if matches!(error, Error::Busy) {
                        ApiError::busy()
                    } else {
                        ApiError::invalid(error)
                    };
                    // The client may have left.
                    drop(submission.accepted.send(Err(error)));
                    return;
                }
            }
        }
        for (place, id) in ids.into_iter().enumerate() {
            self.destinations.insert(id, Destination { place, pieces: pieces.clone() });
        }
        drop(submission.accepted.send(Ok(receiver)));
    }

    /// Ends the requests of clients that have left.
    fn cancel_unwanted(&mut self) {
        let Self { generator, destinations } = self;
        destinations.retain(|id, destination| {
            let is_wanted = !destination.pieces.is_closed();
            if !is_wanted {
                generator.cancel(*id);
            }
            is_wanted
        });
    }

    fn deliver(&mut self, piece: Piece) {
        let (id, is_last) = (piece.request, piece.finish.is_some());
        if let Some(Destination { place, pieces }) = self.destinations.get(&id) {
            // A client that has left is found before the next step.
            drop(pieces.send(Ok((*place, piece))));
        }
        if is_last {
            self.destinations.remove(&id);
        }
    }

    /// Ends all requests: a pass that failed was for all of them.
    fn fail(&mut self, error: &Error) {
        tracing::error!(%error, "the model failed");
        for (id, destination) in self.destinations.drain() {
            self.generator.cancel(id);
            drop(destination.pieces.send(Err(ApiError::internal(error))));
        }
    }
}
