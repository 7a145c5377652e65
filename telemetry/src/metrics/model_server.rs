//! Metrics of a server of completions.

use super::{Scrape, seconds_histogram};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};
use std::sync::atomic::AtomicU64;
use std::time::Duration;

/// The status of an answer.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StatusLabel {
    status: u16,
}

/// The metrics of a server of completions.
///
/// ```
/// use volary_telemetry::metrics::ModelServerMetrics;
///
/// let metrics = ModelServerMetrics::default();
/// metrics.add_answer(200);
/// assert!(metrics.scrape().encode().contains("volary_server_answers_total{status=\"200\"} 1"));
/// ```
#[derive(Debug)]
pub struct ModelServerMetrics {
    scrape: Scrape,
    answers: Family<StatusLabel, Counter>,
    prompt_tokens: Counter,
    completion_tokens: Counter,
    continuations: Gauge<u64, AtomicU64>,
    step: Gauge<u64, AtomicU64>,
    passes: Histogram,
}

impl Default for ModelServerMetrics {
    fn default() -> Self {
        let mut registry = Registry::default();
        let mut metrics = Self {
            scrape: Scrape::default(),
            answers: Family::default(),
            prompt_tokens: Counter::default(),
            completion_tokens: Counter::default(),
            continuations: Gauge::default(),
            step: Gauge::default(),
            passes: seconds_histogram(),
        };
        let Self { answers, prompt_tokens, completion_tokens, continuations, step, passes, .. } = &metrics;
        let help = "Answers to completion requests, by HTTP status";
        registry.register("volary_server_answers", help, answers.clone());
        let help = "Tokens of the prompts of accepted requests";
        registry.register("volary_server_prompt_tokens", help, prompt_tokens.clone());
        let help = "Tokens of continuations that have ended";
        registry.register("volary_server_completion_tokens", help, completion_tokens.clone());
        let help = "Continuations that are computed or wait";
        registry.register("volary_server_continuations", help, continuations.clone());
        registry.register("volary_server_step", "The step of the checkpoint for new requests", step.clone());
        let help = "Duration of a pass of the model over all continuations";
        registry.register_with_unit("volary_server_pass", help, Unit::Seconds, passes.clone());
        metrics.scrape.registry = registry;
        metrics
    }
}

impl ModelServerMetrics {
    /// The metrics as text.
    #[must_use]
    pub fn scrape(&self) -> &Scrape {
        &self.scrape
    }

    /// Counts an answer to a completion request.
    pub fn add_answer(&self, status: u16) {
        self.answers.get_or_create(&StatusLabel { status }).inc();
    }

    /// Counts the tokens of an accepted request's prompts.
    pub fn add_prompt_tokens(&self, tokens: usize) {
        self.prompt_tokens.inc_by(tokens as u64);
    }

    /// Counts the tokens of a continuation that has ended.
    pub fn add_completion_tokens(&self, tokens: usize) {
        self.completion_tokens.inc_by(tokens as u64);
    }

    /// Sets the number of continuations that are computed or wait.
    pub fn set_continuations(&self, count: usize) {
        self.continuations.set(count as u64);
    }

    /// Sets the step of the checkpoint for new requests.
    pub fn set_step(&self, step: u64) {
        self.step.set(step);
    }

    /// Records a pass of the model.
    pub fn pass(&self, duration: Duration) {
        self.passes.observe(duration.as_secs_f64());
    }
}
