//! Log-likelihoods of answers after prompts, and of texts.

use super::task::join;
use crate::error::Result;
use crate::limits::{EVALUATED_SEQUENCES, TOKENS_PER_PASS};
use volary_data::Tokenizer;
use volary_model::decoder::{Cache, Decoder, Input, Output, Score, Scoring};

/// Tokens of which the last ones are scored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Question {
    /// At least two.
    tokens: Vec<u32>,
    /// The index of the first scored token, at least 1.
    from: usize,
}

/// How likely an answer or a text is.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Likelihood {
    /// The sum of the tokens' log-probabilities, in nats.
    pub nats: f64,
    /// The number of tokens.
    pub tokens: usize,
    /// Whether each of them is the most likely one.
    pub is_greedy: bool,
}

/// Computes likelihoods with one model.
#[derive(Debug)]
pub struct Scorer<'a> {
    decoder: &'a Decoder,
    tokenizer: &'a Tokenizer,
    cache: Cache,
    truncated: usize,
}

impl<'a> Scorer<'a> {
    /// A scorer.
    ///
    /// # Errors
    /// [`crate::Error::Model`] when the device has no memory for its cache.
    pub fn new(decoder: &'a Decoder, tokenizer: &'a Tokenizer) -> Result<Self> {
        Ok(Self { decoder, tokenizer, cache: decoder.cache(EVALUATED_SEQUENCES)?, truncated: 0 })
    }

    /// The number of prompts of which the model saw the end only.
    pub(super) fn truncated(&self) -> usize {
        self.truncated
    }

    /// The tokens of a prompt, of which the model sees no more than its context.
    pub(super) fn prompt(&mut self, prompt: &str) -> Result<Vec<u32>> {
        let mut tokens = self.tokenizer.encode(prompt.trim_end())?;
        if tokens.is_empty() {
            tokens.push(self.tokenizer.end_of_text());
        }
        let unseen = tokens.len().saturating_sub(self.decoder.context());
        tokens.drain(..unseen);
        Ok(tokens)
    }

    /// An answer after a prompt. White space at the end of the prompt counts to the answer, since most
    /// tokenizers join it with the next word; an empty prompt is the end of another text.
    pub(super) fn question(&mut self, prompt: &str, answer: &str) -> Result<Question> {
        let whole = join(prompt, answer);
        let mut tokens = self.tokenizer.encode(prompt.trim_end())?;
        let mut both = self.tokenizer.encode(&whole)?;
        let mut answer_tokens = both.split_off(tokens.len().min(both.len()));
        if answer_tokens.is_empty() {
            // A tokenizer may write the whole with fewer tokens than the prompt.
            answer_tokens = self.tokenizer.encode(answer)?;
        }
        if tokens.is_empty() {
            tokens.push(self.tokenizer.end_of_text());
        }
        let from = tokens.len();
        tokens.append(&mut answer_tokens);
        Ok(self.within_context(Question { tokens, from }))
    }

    /// Drops what is too far from the end to be seen.
    fn within_context(&mut self, question: Question) -> Question {
        let Question { mut tokens, from } = question;
        // The last token is only scored.
        let unseen = tokens.len().saturating_sub(self.decoder.context() + 1);
        self.truncated += usize::from(unseen > 0);
        tokens.drain(..unseen);
        Question { tokens, from: from.saturating_sub(unseen).max(1) }
    }

    /// The likelihood of a whole text after the end of another. Texts longer than the context are scored in
    /// windows; each token once, with as much before it as its window has.
    ///
    /// # Errors
    /// [`crate::Error::Model`] or [`crate::Error::Tokenizer`].
    pub fn text(&mut self, text: &str) -> Result<Likelihood> {
        let mut tokens = vec![self.tokenizer.end_of_text()];
        tokens.extend(self.tokenizer.encode(text)?);
        let context = self.decoder.context();
        let mut windows = Vec::new();
        let mut scored = 1;
        while scored < tokens.len() {
            let end = (scored + context).min(tokens.len());
            let start = end.saturating_sub(context + 1);
            windows.push(Question { tokens: tokens[start..end].to_vec(), from: scored - start });
            scored = end;
        }
        let parts = self.likelihoods(&windows)?;
        Ok(Likelihood {
            nats: parts.iter().map(|part| part.nats).sum(),
            tokens: parts.iter().map(|part| part.tokens).sum(),
            is_greedy: parts.iter().all(|part| part.is_greedy),
        })
    }

    /// The likelihoods of answers, in their order.
    pub(super) fn likelihoods(&mut self, questions: &[Question]) -> Result<Vec<Likelihood>> {
        let mut likelihoods = Vec::with_capacity(questions.len());
        let mut rest = questions;
        while !rest.is_empty() {
            let (part, others) = rest.split_at(in_one_pass(rest));
            likelihoods.extend(self.pass(part)?);
            rest = others;
        }
        Ok(likelihoods)
    }

    fn pass(&mut self, questions: &[Question]) -> Result<Vec<Likelihood>> {
        let inputs: Vec<Input<'_>> = questions
            .iter()
            .enumerate()
            .map(|(slot, Question { tokens, from })| {
                let scoring = Some(Scoring { from: *from, top: 0 });
                Input { slot, tokens: &tokens[..tokens.len() - 1], scoring }
            })
            .collect();
        let outputs = self.decoder.advance(&mut self.cache, &inputs);
        (0..questions.len()).for_each(|slot| self.cache.clear(slot));
        Ok(outputs?.iter().zip(questions).map(|(output, question)| question.likelihood(output)).collect())
    }
}

/// How many of the next questions fit into one pass; at least one.
fn in_one_pass(questions: &[Question]) -> usize {
    let mut tokens = 0;
    let fits = |question: &&Question| {
        tokens += question.tokens.len();
        tokens <= TOKENS_PER_PASS
    };
    questions.iter().take(EVALUATED_SEQUENCES).take_while(fits).count().max(1)
}

impl Question {
    fn likelihood(&self, output: &Output) -> Likelihood {
        let last = self.tokens.last().copied().unwrap_or_default();
        let last = Score::by_logits(&output.logits, last, 0);
        let scores = output.scores.iter().chain([&last]);
        Likelihood {
            nats: scores.clone().map(|score| f64::from(score.log_probability)).sum(),
            tokens: self.tokens.len() - self.from,
            is_greedy: scores.clone().all(|score| score.is_greedy),
        }
    }
}
