//! The bodies of answers.

use super::Served;
use serde_json::{Map, Value, json};
use volary_core::{ExpertId, Step};
use volary_data::Tokenizer;
use volary_inference::{Finish, Token};

/// What is alike in all parts of one answer.
#[derive(Clone, Debug)]
pub(super) struct Header {
    id: String,
    created: u64,
    model: String,
    step: Step,
}

/// The numbers of tokens of an answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Usage {
    pub(super) prompt: usize,
    pub(super) completion: usize,
}

/// The reported tokens of one choice, with their places in its text.
#[derive(Clone, Debug, Default)]
pub(super) struct Logprobs {
    tokens: Vec<String>,
    token_logprobs: Vec<Value>,
    top_logprobs: Vec<Value>,
    text_offset: Vec<usize>,
}

impl Header {
    pub(super) fn new(served: &Served, step: Step, number: u64) -> Self {
        let created = crate::units::since_1970().as_secs();
        Self { id: format!("cmpl-{created:x}-{number:x}"), created, model: served.name.clone(), step }
    }

    /// An answer, or a part of one.
    pub(super) fn body(&self, choices: Vec<Value>, usage: Option<Usage>) -> Value {
        let mut body = json!({
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            // With the same seed, answers of the same weights are the same.
            "system_fingerprint": format!("step-{}", self.step),
            "choices": choices,
        });
        if let Some(Usage { prompt, completion }) = usage {
            body["usage"] = json!({
                "prompt_tokens": prompt,
                "completion_tokens": completion,
                "total_tokens": prompt + completion,
            });
        }
        body
    }
}

/// One choice of an answer.
pub(super) fn choice(
    index: usize,
    text: &str,
    logprobs: Option<Logprobs>,
    experts: Option<Vec<Vec<[ExpertId; 2]>>>,
    finish: Option<Finish>,
) -> Value {
    let finish = finish.map(|finish| match finish {
        Finish::Stop => "stop",
        Finish::Length => "length",
    });
    let mut choice = json!({
        "index": index,
        "text": text,
        "logprobs": logprobs.map(Logprobs::json),
        "finish_reason": finish,
    });
    if let Some(experts) = experts {
        choice["experts"] = json!(experts);
    }
    choice
}

impl Logprobs {
    /// Adds tokens. `offset` is the place of the next one in the text, in characters, and is moved on.
    pub(super) fn add(&mut self, tokens: &[Token], tokenizer: &Tokenizer, offset: &mut usize) {
        for Token { id, score } in tokens {
            let name = tokenizer.token(*id);
            self.text_offset.push(*offset);
            *offset += name.chars().count();
            self.tokens.push(name);
            self.token_logprobs.push(score.as_ref().map_or(Value::Null, |s| json!(s.log_probability)));
            let top = |(id, log_probability): &(u32, f32)| (tokenizer.token(*id), json!(log_probability));
            let top = score.as_ref().map(|s| s.top.iter().map(top).collect::<Map<_, _>>());
            self.top_logprobs.push(top.map_or(Value::Null, Value::Object));
        }
    }

    fn json(self) -> Value {
        let Self { tokens, token_logprobs, top_logprobs, text_offset } = self;
        json!({
            "tokens": tokens,
            "token_logprobs": token_logprobs,
            "top_logprobs": top_logprobs,
            "text_offset": text_offset,
        })
    }
}
