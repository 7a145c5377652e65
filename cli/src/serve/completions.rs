//! Answers to completion requests, whole or as a stream of server-sent events.

use super::error::ApiError;
use super::request::{Body, Checked};
use super::response::{Header, Logprobs, Usage, choice};
use super::scheduler::{Accepted, Pieces};
use super::{Served, Server};
use axum::Json;
use axum::body::Bytes;
use axum::extract::State;
use axum::extract::rejection::BytesRejection;
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures::Stream;
use serde_json::Value;
use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use volary_core::ExpertId;
use volary_inference::{Finish, Piece};

/// `POST /v1/completions`.
pub(super) async fn complete(
    State(server): State<Server>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, ApiError> {
    let metrics = Arc::clone(&server.metrics);
    let answer = answer(server, body).await;
    metrics.add_answer(answer.as_ref().map_or_else(ApiError::status, |answer| answer.status().as_u16()));
    answer
}

async fn answer(server: Server, body: Result<Bytes, BytesRejection>) -> Result<Response, ApiError> {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let body = body.map_err(|error| ApiError::too_large(error.body_text()))?;
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    // Requests without a seed differ from each other.
    let seed = u64::from(crate::units::since_1970().subsec_nanos()) ^ number;
    let checked = Body::parse(&body)?.check(&server.served, seed)?;
    let prompts = checked.echoed(&server.served)?;
    let usage = Usage { prompt: checked.prompt_tokens, completion: 0 };
    let growing = checked.requests.iter().map(|_| Growing::default()).collect();
    let Accepted { step, pieces } = server.scheduler.submit(checked.requests).await?;
    let header = Header::new(&server.served, step, number);
    let answer = Answer {
        served: server.served,
        header,
        pieces,
        prompts,
        logprobs: checked.logprobs,
        experts: checked.experts,
        growing,
        usage,
    };
    if checked.stream {
        return Ok(answer.stream(checked.include_usage).into_response());
    }
    answer.whole().await.map(|body| Json(body).into_response())
}

impl Checked {
    /// What precedes each choice's text: its prompt with `echo`, or nothing.
    fn echoed(&self, served: &Served) -> Result<Vec<String>, ApiError> {
        if !self.echo {
            return Ok(vec![String::new(); self.requests.len()]);
        }
        let mut texts = Vec::with_capacity(self.requests.len());
        // The choices of one prompt follow each other.
        for request in self.requests.iter().step_by(self.choices) {
            let text = served.tokenizer.decode(&request.prompt).map_err(ApiError::internal)?;
            texts.extend(std::iter::repeat_n(text, self.choices));
        }
        Ok(texts)
    }
}

/// A choice so far.
#[derive(Debug, Default)]
struct Growing {
    text: String,
    logprobs: Logprobs,
    /// The experts of the tokens that the model has read: `[tokens][MoE layers]`.
    experts: Vec<Vec<[ExpertId; 2]>>,
    /// The characters of the reported tokens so far.
    offset: usize,
    generated: usize,
    finish: Option<Finish>,
    has_begun: bool,
}

/// An answer whose pieces are still being computed.
struct Answer {
    served: Arc<Served>,
    header: Header,
    pieces: Pieces,
    /// What precedes each choice's text.
    prompts: Vec<String>,
    logprobs: bool,
    experts: bool,
    growing: Vec<Growing>,
    usage: Usage,
}

impl Answer {
    /// The whole answer.
    async fn whole(mut self) -> Result<Value, ApiError> {
        while let Some(next) = self.pieces.recv().await {
            let (place, piece) = next?;
            let growing = &mut self.growing[place];
            growing.text.push_str(&piece.text);
            growing.logprobs.add(&piece.tokens, &self.served.tokenizer, &mut growing.offset);
            growing.experts.extend(piece.experts);
            growing.generated = piece.generated;
            growing.finish = piece.finish;
        }
        if self.growing.iter().any(|growing| growing.finish.is_none()) {
            return Err(ApiError::internal("the model's thread has ended"));
        }
        self.usage.completion = self.growing.iter().map(|growing| growing.generated).sum();
        let choices = self.growing.into_iter().zip(self.prompts).enumerate();
        let choice = |(index, (growing, prompt)): (usize, (Growing, String))| {
            let logprobs = self.logprobs.then_some(growing.logprobs);
            let experts = self.experts.then_some(growing.experts);
            choice(index, &(prompt + &growing.text), logprobs, experts, growing.finish)
        };
        Ok(self.header.body(choices.map(choice).collect(), Some(self.usage)))
    }

    /// The answer as server-sent events, one per piece.
    fn stream(self, include_usage: bool) -> Sse<impl Stream<Item = Result<Event, Infallible>>> {
        let state = (self, VecDeque::new(), include_usage, false);
        let events =
            futures::stream::unfold(state, |(mut answer, mut ready, usage, mut is_over)| async move {
                while ready.is_empty() && !is_over {
                    match answer.pieces.recv().await {
                        Some(Ok((place, piece))) => ready.extend(answer.part(place, piece)),
                        Some(Err(error)) => {
                            ready.push_back(error.json().to_string());
                            is_over = true;
                        }
                        None => {
                            if usage {
                                let body = answer.header.body(Vec::new(), Some(answer.usage));
                                ready.push_back(body.to_string());
                            }
                            ready.push_back("[DONE]".into());
                            is_over = true;
                        }
                    }
                }
                let data: String = ready.pop_front()?;
                Some((Ok(Event::default().data(data)), (answer, ready, usage, is_over)))
            });
        Sse::new(events).keep_alive(KeepAlive::default())
    }

    /// The part of a stream for a piece; none for one without news.
    fn part(&mut self, place: usize, piece: Piece) -> Option<String> {
        let growing = &mut self.growing[place];
        self.usage.completion += piece.generated - growing.generated;
        growing.generated = piece.generated;
        let has_news = !piece.text.is_empty()
            || !piece.tokens.is_empty()
            || !piece.experts.is_empty()
            || piece.finish.is_some();
        let prompt = if growing.has_begun { "" } else { self.prompts[place].as_str() };
        if !has_news && prompt.is_empty() {
            return None;
        }
        growing.has_begun = true;
        let logprobs = self.logprobs.then(|| {
            let mut logprobs = Logprobs::default();
            logprobs.add(&piece.tokens, &self.served.tokenizer, &mut growing.offset);
            logprobs
        });
        let experts = self.experts.then_some(piece.experts);
        let choice = choice(place, &format!("{prompt}{}", piece.text), logprobs, experts, piece.finish);
        Some(self.header.body(vec![choice], None).to_string())
    }
}
