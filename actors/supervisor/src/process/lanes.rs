//! The tokens of a node's lanes: read off the supervisor's actor, and one step ahead.

use crate::blocking::blocking;
use crate::error::{Error, Result};
use std::sync::Arc;
use tokio::task::JoinHandle;
use volary_core::messages::{NodeCommand, Pass};
use volary_core::{Lane, Step};
use volary_data::Dataset;
use volary_protocol::TraceRequest;

/// The tokens of lanes, each `[sequences, sequence_length + 1]` row by row.
type Tokens = Vec<Vec<u32>>;

/// Reads the lanes of one node.
pub(super) struct LaneReader {
    dataset: Arc<Dataset>,
    ahead: Option<ReadAhead>,
}

/// What the node will probably run next.
struct ReadAhead {
    step: Step,
    lanes: Vec<Lane>,
    tokens: JoinHandle<Result<Tokens>>,
}

impl LaneReader {
    pub(super) fn new(dataset: Arc<Dataset>) -> Self {
        Self { dataset, ahead: None }
    }

    /// Completes a command and its trace: a `Begin` gets the tokens of its lanes, a sampled token its text.
    ///
    /// # Errors
    /// [`Error::Tokens`] when the corpus cannot be read.
    pub(super) async fn complete(
        &mut self,
        command: &mut NodeCommand,
        trace: Option<&mut TraceRequest>,
    ) -> Result<()> {
        let NodeCommand::Begin { data: step, pass, lanes, .. } = command else { return Ok(()) };
        let numbers: Vec<Lane> = lanes.iter().map(|(lane, _)| *lane).collect();
        let tokens = match (self.ahead.take(), *pass) {
            (Some(ahead), Pass::Train) if (ahead.step, &ahead.lanes) == (*step, &numbers) => {
                ahead.tokens.await??
            }
            _ => self.read(*step, *pass, &numbers).await?,
        };
        if *pass == Pass::Train {
            self.read_ahead(step.next(), numbers);
        }
        for ((_, empty), tokens) in lanes.iter_mut().zip(tokens) {
            *empty = tokens;
        }
        if let Some(trace) = trace {
            self.name_tokens(trace, lanes);
        }
        Ok(())
    }

    fn read(&self, step: Step, pass: Pass, lanes: &[Lane]) -> impl Future<Output = Result<Tokens>> + use<> {
        let (dataset, lanes) = (Arc::clone(&self.dataset), lanes.to_vec());
        blocking(move || {
            let read = |&lane| {
                let tokens = match pass {
                    Pass::Train => dataset.lane(step, lane),
                    Pass::Validate { round } => dataset.validation(round, lane),
                };
                tokens.map_err(|error| Error::Tokens { step, lane, source: Box::new(error) })
            };
            lanes.iter().map(read).collect()
        })
    }

    fn read_ahead(&mut self, step: Step, lanes: Vec<Lane>) {
        let tokens = tokio::spawn(self.read(step, Pass::Train, &lanes));
        self.ahead = Some(ReadAhead { step, lanes, tokens });
    }

    fn name_tokens(&self, trace: &mut TraceRequest, lanes: &[(Lane, Vec<u32>)]) {
        let length = self.dataset.sequence_length();
        for sampled in &mut trace.sampled_tokens {
            let position = sampled.position as usize;
            // A row has one token more than the lane computes: the target of the last one.
            let at = position / length * (length + 1) + position % length;
            let tokens = lanes.iter().find(|(lane, _)| *lane == sampled.lane).map(|(_, tokens)| tokens);
            if let Some(&id) = tokens.and_then(|tokens| tokens.get(at)) {
                sampled.id = id;
                sampled.text = self.dataset.tokenizer().token(id);
            }
        }
    }
}
