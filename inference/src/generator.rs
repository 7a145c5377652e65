//! Continuations of many prompts at a time.
//!
//! A generator has a fixed number of slots. Each pass takes one new token of every sequence in a slot, and
//! parts of prompts that were not read yet; a sequence that ends leaves its slot to the next request at once.

use crate::error::{Error, Result};
use crate::limits::{TOKENS_PER_PASS, WAITING_REQUESTS};
use crate::text::{StopStrings, TextStream};
use crate::workers::Workers;
use std::collections::VecDeque;
use std::rc::Rc;
use volary_core::ExpertId;
use volary_data::Tokenizer;
use volary_model::decoder::{Decoder, Input, Score, Scoring};
use volary_model::sampling::{Sampler, Sampling};

/// A prompt to continue.
#[derive(Clone, Debug)]
pub struct Request {
    /// The tokens of the prompt: at least one, at most the model's context.
    pub prompt: Vec<u32>,
    /// The maximum number of new tokens.
    pub max_tokens: usize,
    /// The draws. Tokens that the tokenizer does not have are never drawn.
    pub sampling: Sampling,
    /// Strings that end the text, and are not part of it.
    pub stop: Vec<String>,
    /// The tokens that are reported beside the text.
    pub report: ReportedTokens,
    /// Whether the experts of each token are reported.
    pub experts: bool,
}

impl Request {
    /// A request of text only, without stop strings.
    #[must_use]
    pub fn new(prompt: Vec<u32>, max_tokens: usize, sampling: Sampling) -> Self {
        let (stop, report) = (Vec::new(), ReportedTokens::Nothing);
        Self { prompt, max_tokens, sampling, stop, report, experts: false }
    }
}

/// The tokens that are reported beside the text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ReportedTokens {
    /// None.
    #[default]
    Nothing,
    /// The new tokens, each with this many of the most likely ones.
    New(usize),
    /// Those of the prompt as well.
    All(usize),
}

/// The number of a request of one generator.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub u64);

/// The end of a continuation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// The model ended the text, or a stop string did.
    Stop,
    /// [`Request::max_tokens`] were generated.
    Length,
}

/// What one pass adds to a continuation.
#[derive(Clone, Debug, PartialEq)]
pub struct Piece {
    /// The request.
    pub request: RequestId,
    /// The tokens of the pass, as far as they are reported.
    pub tokens: Vec<Token>,
    /// The experts of the tokens that the model has read in the pass: `[tokens][MoE layers]`, each with the
    /// first and the second choice. The model has not read the newest token yet.
    pub experts: Vec<Vec<[ExpertId; 2]>>,
    /// The number of new tokens so far, with one that ended the text.
    pub generated: usize,
    /// New text; may be empty while a character or a stop string is incomplete.
    pub text: String,
    /// Whether it is the last piece, and why.
    pub finish: Option<Finish>,
}

/// A token of a prompt or a continuation.
#[derive(Clone, Debug, PartialEq)]
pub struct Token {
    /// Its id.
    pub id: u32,
    /// How likely it was; the first token of a prompt has no score.
    pub score: Option<Score>,
}

/// A sequence in a slot.
#[derive(Debug)]
struct Active {
    id: RequestId,
    /// The prompt and what was generated.
    tokens: Vec<u32>,
    /// The number of tokens that the model has read.
    read: usize,
    /// New tokens so far.
    generated: usize,
    max_tokens: usize,
    report: ReportedTokens,
    experts: bool,
    /// The logits after the last token that was read, if the next one is to be scored.
    logits: Option<Vec<f32>>,
    sampler: Sampler,
    text: TextStream,
    stop: StopStrings,
}

/// Continues prompts with one model.
#[derive(Debug)]
pub struct Generator {
    model: Workers,
    tokenizer: Tokenizer,
    slots: Vec<Option<Active>>,
    waiting: VecDeque<Active>,
    submitted: u64,
}

impl Generator {
    /// A generator of `slots` continuations at a time.
    ///
    /// # Errors
    /// [`Error::Model`] when the device has no memory for their keys and values; [`Error::Thread`].
    pub fn new(decoder: Rc<Decoder>, tokenizer: Tokenizer, slots: usize) -> Result<Self> {
        let model = Workers::start(decoder, slots)?;
        let slots = (0..model.slots()).map(|_| None).collect();
        Ok(Self { model, tokenizer, slots, waiting: VecDeque::new(), submitted: 0 })
    }

    /// Adds a request, which waits for a free slot.
    ///
    /// # Errors
    /// [`Error::Busy`]; [`Error::StopStrings`]; [`Error::Model`] for a prompt that is empty, longer than the
    /// context, or has a token outside the vocabulary.
    pub fn submit(&mut self, request: Request) -> Result<RequestId> {
        if self.waiting.len() >= WAITING_REQUESTS {
            return Err(Error::Busy);
        }
        self.model.decoder().check_prompt(&request.prompt)?;
        let id = RequestId(self.submitted);
        let vocabulary = request.sampling.vocabulary.min(self.tokenizer.vocabulary());
        self.waiting.push_back(Active {
            id,
            read: 0,
            generated: 0,
            max_tokens: request.max_tokens,
            report: request.report,
            experts: request.experts,
            logits: None,
            sampler: Sampler::new(Sampling { vocabulary, ..request.sampling }),
            text: TextStream::after(self.tokenizer.clone(), &request.prompt),
            stop: StopStrings::new(request.stop)?,
            tokens: request.prompt,
        });
        self.submitted += 1;
        Ok(id)
    }

    /// Ends a request early; its slot is free for another.
    pub fn cancel(&mut self, request: RequestId) {
        self.waiting.retain(|active| active.id != request);
        for slot in 0..self.slots.len() {
            if self.slots[slot].as_ref().is_some_and(|active| active.id == request) {
                self.release(slot);
            }
        }
    }

    /// Whether no request is left.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.slots.iter().all(Option::is_none)
    }

    /// One pass of the model over all sequences. Returns the pieces that it completes, by slot.
    ///
    /// # Errors
    /// [`Error::Model`] when libtorch fails or the model's output is not finite; [`Error::Tokenizer`] when
    /// tokens cannot be decoded.
    pub fn step(&mut self) -> Result<Vec<Piece>> {
        let mut pieces = self.admit();
        let parts = self.parts();
        let inputs: Vec<Input<'_>> = parts
            .iter()
            .filter_map(|&(slot, count)| {
                let active = self.slots[slot].as_ref()?;
                let tokens = &active.tokens[active.read..active.read + count];
                let scoring = active.scored_top().map(|top| Scoring { from: 1, top });
                Some(Input { slot, tokens, scoring })
            })
            .collect();
        let outputs = self.model.advance(&inputs)?;
        for ((slot, count), output) in parts.into_iter().zip(outputs) {
            let Some(active) = &mut self.slots[slot] else { continue };
            let tokens = active.read_tokens(count, output.scores);
            let experts = if active.experts { by_token(count, &output.experts) } else { Vec::new() };
            if active.read < active.tokens.len() {
                active.logits = Some(output.logits);
                if !tokens.is_empty() || !experts.is_empty() {
                    pieces.push(Piece { experts, ..active.piece(tokens, String::new(), None) });
                }
                continue;
            }
            let piece = active.extend(&output.logits, tokens, self.tokenizer.end_of_text())?;
            if piece.finish.is_some() {
                self.release(slot);
            }
            pieces.push(Piece { experts, ..piece });
        }
        Ok(pieces)
    }

    /// Moves waiting requests into free slots. Those that ask for no token end here.
    fn admit(&mut self) -> Vec<Piece> {
        let mut pieces = Vec::new();
        for slot in &mut self.slots {
            while slot.is_none() {
                let Some(active) = self.waiting.pop_front() else { return pieces };
                // A prompt whose tokens are reported is read even if nothing may follow it.
                if active.max_tokens > 0 || active.scored_top().is_some() {
                    *slot = Some(active);
                } else {
                    pieces.push(active.piece(Vec::new(), String::new(), Some(Finish::Length)));
                }
            }
        }
        pieces
    }

    /// The slots of the next pass with their numbers of new tokens: one token of each sequence first, then as
    /// much of the prompts as the pass has room for.
    fn parts(&self) -> Vec<(usize, usize)> {
        let unread =
            |slot: usize| self.slots[slot].as_ref().map_or(0, |active| active.tokens.len() - active.read);
        let mut parts: Vec<(usize, usize)> =
            (0..self.slots.len()).filter(|&slot| unread(slot) > 0).map(|slot| (slot, 1)).collect();
        let mut room = TOKENS_PER_PASS.saturating_sub(parts.len());
        for (slot, count) in &mut parts {
            let more = (unread(*slot) - 1).min(room);
            *count += more;
            room -= more;
        }
        parts
    }

    fn release(&mut self, slot: usize) {
        self.slots[slot] = None;
        self.model.clear(slot);
    }
}

/// The experts of each token, `[tokens][layers]`, of those of each layer.
fn by_token(tokens: usize, by_layer: &[Vec<[ExpertId; 2]>]) -> Vec<Vec<[ExpertId; 2]>> {
    (0..tokens).map(|token| by_layer.iter().map(|layer| layer[token]).collect()).collect()
}

impl Active {
    /// The most likely tokens to report with each token that is read, if it is scored.
    fn scored_top(&self) -> Option<usize> {
        match self.report {
            ReportedTokens::All(top) if self.generated == 0 => Some(top),
            _ => None,
        }
    }

    /// Counts `count` tokens as read, and returns those that are reported: their scores within the pass are
    /// `scores`, that of the first is by the logits of the pass before.
    fn read_tokens(&mut self, count: usize, scores: Vec<Score>) -> Vec<Token> {
        let tokens = self.read..self.read + count;
        self.read = tokens.end;
        let Some(top) = self.scored_top() else { return Vec::new() };
        let before = self.logits.take();
        let first = before.map(|logits| Score::by_logits(&logits, self.tokens[tokens.start], top));
        let scores = std::iter::once(first).chain(scores.into_iter().map(Some));
        self.tokens[tokens].iter().zip(scores).map(|(&id, score)| Token { id, score }).collect()
    }

    fn piece(&self, tokens: Vec<Token>, text: String, finish: Option<Finish>) -> Piece {
        Piece { request: self.id, tokens, experts: Vec::new(), generated: self.generated, text, finish }
    }

    /// Draws the next token and returns the text that it completes. `tokens` are those that the pass has
    /// read.
    fn extend(&mut self, logits: &[f32], mut tokens: Vec<Token>, end_of_text: u32) -> Result<Piece> {
        if self.max_tokens == 0 {
            return Ok(self.piece(tokens, String::new(), Some(Finish::Length)));
        }
        let (prompt, generated) = self.tokens.split_at(self.tokens.len() - self.generated);
        let token = self.sampler.draw(logits, prompt, generated).ok_or(volary_model::Error::NotFinite)?;
        if let ReportedTokens::New(top) | ReportedTokens::All(top) = self.report {
            tokens.push(Token { id: token, score: Some(Score::by_logits(logits, token, top)) });
        }
        self.generated += 1;
        let is_last = self.generated == self.max_tokens;
        let is_end = token == end_of_text;
        let new = if is_end {
            self.text.finish()?
        } else {
            self.tokens.push(token);
            let mut new = self.text.push(token)?;
            if is_last {
                new.push_str(&self.text.finish()?);
            }
            new
        };
        let (mut text, is_stopped) = self.stop.push(&new);
        let finish = match (is_end || is_stopped, is_last) {
            (true, _) => Some(Finish::Stop),
            (false, true) => Some(Finish::Length),
            (false, false) => None,
        };
        if finish.is_some() && !is_stopped {
            text.push_str(&self.stop.finish());
        }
        Ok(self.piece(tokens, text, finish))
    }
}
