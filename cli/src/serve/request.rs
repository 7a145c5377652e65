//! A completion request's body, and what is checked of it.

use super::Served;
use super::error::ApiError;
use crate::limits::{CHOICES_MAX, LOGPROBS_MAX};
use serde::Deserialize;
use volary_inference::limits::STOP_STRINGS;
use volary_inference::{ReportedTokens, Request};
use volary_model::sampling::Sampling;

/// The body of a completion request. Fields that are not here are ignored, as most servers do.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Body {
    model: Option<String>,
    prompt: Prompt,
    max_tokens: Option<u64>,
    temperature: Option<f64>,
    top_p: Option<f64>,
    n: Option<u64>,
    best_of: Option<u64>,
    stream: Option<bool>,
    stream_options: Option<StreamOptions>,
    logprobs: Option<u64>,
    echo: Option<bool>,
    stop: Option<OneOrMany<String>>,
    seed: Option<i64>,
    suffix: Option<String>,
    presence_penalty: Option<f64>,
    frequency_penalty: Option<f64>,
    /// Beyond OpenAI's interface, as other servers have it.
    top_k: Option<i64>,
    /// The same.
    repetition_penalty: Option<f64>,
    /// Whether the experts of each token are part of the answer; for the page.
    experts: Option<bool>,
}

#[derive(Clone, Debug, Default, Deserialize)]
struct StreamOptions {
    include_usage: Option<bool>,
}

/// One or several texts, or one or several lists of token ids.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
enum Prompt {
    Text(String),
    Tokens(Vec<u32>),
    Texts(Vec<String>),
    Many(Vec<Vec<u32>>),
}

#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
enum OneOrMany<T> {
    One(T),
    Many(Vec<T>),
}

/// A request that can be served.
#[derive(Debug)]
pub(crate) struct Checked {
    /// For each prompt, its choices one after the other.
    pub(crate) requests: Vec<Request>,
    /// The choices of each prompt.
    pub(crate) choices: usize,
    /// The tokens of all prompts.
    pub(crate) prompt_tokens: usize,
    /// Whether the prompt precedes its continuation in the answer.
    pub(crate) echo: bool,
    /// Whether log-probabilities are part of the answer.
    pub(crate) logprobs: bool,
    /// Whether the experts of each token are.
    pub(crate) experts: bool,
    pub(crate) stream: bool,
    /// Whether a stream ends with the numbers of tokens.
    pub(crate) include_usage: bool,
}

/// The number of new tokens where a request does not say, as of OpenAI's interface.
const DEFAULT_TOKENS: usize = 16;

impl Body {
    /// Parses a body.
    ///
    /// # Errors
    /// A 400 that says where it is not the JSON of a completion request.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, ApiError> {
        // An untagged enumeration cannot say what it expected.
        let value: serde_json::Value =
            serde_json::from_slice(bytes).map_err(|error| ApiError::invalid(format!("not JSON: {error}")))?;
        match value.get("prompt") {
            None => return Err(ApiError::parameter("prompt", "is missing")),
            Some(prompt) if Prompt::deserialize(prompt).is_err() => {
                return Err(ApiError::parameter(
                    "prompt",
                    "expected a string, a list of strings, a list of token ids, or a list of such lists",
                ));
            }
            Some(_) => {}
        }
        serde_path_to_error::deserialize(value).map_err(ApiError::invalid)
    }

    /// Checks everything against the model. `seed` is for requests without one.
    ///
    /// # Errors
    /// A 400 with the parameter, or a 404 for another model.
    pub(crate) fn check(self, served: &Served, seed: u64) -> Result<Checked, ApiError> {
        if let Some(name) = self.model.as_ref().filter(|name| **name != served.name) {
            return Err(ApiError::no_model(name, &served.name));
        }
        let choices = in_range("n", self.n.unwrap_or(1), 1, CHOICES_MAX)?;
        if self.best_of.is_some_and(|best_of| best_of != choices) {
            return Err(ApiError::parameter("best_of", "is not supported: expected the value of n"));
        }
        if self.suffix.as_ref().is_some_and(|suffix| !suffix.is_empty()) {
            return Err(ApiError::parameter("suffix", "is not supported"));
        }
        let logprobs = self.logprobs.map(|top| in_range("logprobs", top, 0, LOGPROBS_MAX)).transpose()?;
        let echo = self.echo.unwrap_or(false);
        let report = match (logprobs, echo) {
            (None, _) => ReportedTokens::Nothing,
            (Some(top), false) => ReportedTokens::New(top as usize),
            (Some(top), true) => ReportedTokens::All(top as usize),
        };
        let experts = self.experts.unwrap_or(false);
        let stop = self.stop()?;
        let sampling = self.sampling(seed)?;
        let prompts = self.prompt.tokens(served)?;
        let max_tokens = self.max_tokens.map_or(DEFAULT_TOKENS, |tokens| tokens as usize);
        let mut requests = Vec::new();
        for prompt in &prompts {
            check_prompt(prompt, max_tokens, served)?;
            for choice in 0..choices {
                let sampling = Sampling { choice, ..sampling };
                requests.push(Request {
                    prompt: prompt.clone(),
                    max_tokens,
                    sampling,
                    stop: stop.clone(),
                    report,
                    experts,
                });
            }
        }
        if requests.len() as u64 > CHOICES_MAX {
            let message = format!(
                "{} prompts with {choices} choices: expected at most {CHOICES_MAX} in all",
                prompts.len()
            );
            return Err(ApiError::parameter("prompt", message));
        }
        Ok(Checked {
            requests,
            choices: choices as usize,
            prompt_tokens: prompts.iter().map(Vec::len).sum(),
            echo,
            logprobs: logprobs.is_some(),
            experts,
            stream: self.stream.unwrap_or(false),
            include_usage: self.stream_options.and_then(|options| options.include_usage).unwrap_or(false),
        })
    }

    fn stop(&self) -> Result<Vec<String>, ApiError> {
        let stop = match self.stop.clone() {
            None => Vec::new(),
            Some(OneOrMany::One(stop)) => vec![stop],
            Some(OneOrMany::Many(stops)) => stops,
        };
        if stop.len() > STOP_STRINGS || stop.iter().any(String::is_empty) {
            let message = format!("expected at most {STOP_STRINGS} strings, none of them empty");
            return Err(ApiError::parameter("stop", message));
        }
        Ok(stop)
    }

    fn sampling(&self, seed: u64) -> Result<Sampling, ApiError> {
        let number = |name, value: Option<f64>, default, least: f64, most: f64| {
            let value = value.unwrap_or(default);
            match (least..=most).contains(&value) {
                true => Ok(value),
                false => Err(ApiError::parameter(name, format!("{value}: expected {least} to {most}"))),
            }
        };
        Ok(Sampling {
            temperature: number("temperature", self.temperature, 1.0, 0.0, 1e6)?,
            top_p: number("top_p", self.top_p, 1.0, 0.0, 1.0)?,
            repetition_penalty: number("repetition_penalty", self.repetition_penalty, 1.0, 1e-6, 1e6)?,
            presence_penalty: number("presence_penalty", self.presence_penalty, 0.0, -2.0, 2.0)?,
            frequency_penalty: number("frequency_penalty", self.frequency_penalty, 0.0, -2.0, 2.0)?,
            // Other servers write -1 for all tokens.
            top_k: usize::try_from(self.top_k.unwrap_or(0)).unwrap_or(0),
            seed: self.seed.map_or(seed, |seed| seed as u64),
            ..Sampling::default()
        })
    }
}

impl Prompt {
    /// The tokens of each prompt. An empty text is the end of another one.
    fn tokens(self, served: &Served) -> Result<Vec<Vec<u32>>, ApiError> {
        let encode = |text: &String| {
            let tokens =
                served.tokenizer.encode(text).map_err(|error| ApiError::parameter("prompt", error))?;
            Ok(if tokens.is_empty() { vec![served.tokenizer.end_of_text()] } else { tokens })
        };
        match self {
            Self::Text(text) => Ok(vec![encode(&text)?]),
            Self::Texts(texts) => texts.iter().map(encode).collect(),
            // An empty list is one of either kind.
            Self::Tokens(tokens) => Ok(vec![tokens]),
            Self::Many(lists) => Ok(lists),
        }
    }
}

fn check_prompt(prompt: &[u32], max_tokens: usize, served: &Served) -> Result<(), ApiError> {
    if prompt.is_empty() {
        return Err(ApiError::parameter("prompt", "a list without tokens"));
    }
    let vocabulary = served.tokenizer.vocabulary();
    if let Some(id) = prompt.iter().find(|id| **id as usize >= vocabulary) {
        let message = format!("token {id}: the tokenizer has {vocabulary} tokens");
        return Err(ApiError::parameter("prompt", message));
    }
    match prompt.len().saturating_add(max_tokens) > served.context {
        true => Err(ApiError::context(served.context, prompt.len(), max_tokens)),
        false => Ok(()),
    }
}

fn in_range(name: &'static str, value: u64, least: u64, most: u64) -> Result<u64, ApiError> {
    match (least..=most).contains(&value) {
        true => Ok(value),
        false => Err(ApiError::parameter(name, format!("{value}: expected {least} to {most}"))),
    }
}
