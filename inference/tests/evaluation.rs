//! Scores on tasks against the reference model.
#![expect(clippy::expect_used, reason = "tests")]

mod common;

use common::{CONTEXT, Model, log_softmax};
use volary_inference::evaluation::{Evaluator, Metric, Report, Scorer, Settings, Task};

/// Sums of a few dozen f32 log-probabilities near 6.
const TOLERANCE: f64 = 1e-3;

fn evaluate(model: &Model, records: &str, shots: usize) -> Report {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("task.jsonl");
    std::fs::write(&path, records).expect("a file");
    let settings = Settings { shots, seed: 1, max_tokens: 6 };
    let evaluator = Evaluator::new(model.decoder.clone(), model.tokenizer.clone(), settings);
    let mut done = 0;
    let task = Task::read(&path).expect("a task");
    let report = evaluator.evaluate(&task, |count| done = count).expect("scores");
    assert_eq!(done, task.len());
    report
}

/// The log-likelihood of the tokens from `from` on by the reference model.
fn expected(model: &Model, tokens: &[u32], from: usize) -> f64 {
    let logits = model.reference.logits(&tokens[..tokens.len() - 1]).expect("logits");
    (from..tokens.len()).map(|at| log_softmax(&logits[at - 1])[tokens[at] as usize]).sum()
}

/// The log-likelihood of `answer` after `prompt`, tokenized together.
fn of_answer(model: &Model, prompt: &str, answer: &str) -> f64 {
    let before = model.tokenizer.encode(prompt).expect("tokens");
    let whole = model.tokenizer.encode(&format!("{prompt}{answer}")).expect("tokens");
    assert!(whole.starts_with(&before));
    expected(model, &whole, before.len())
}

#[test]
fn the_most_likely_choice_is_that_of_the_reference_model() {
    let model = Model::new(21);
    let choices = ["brown", "dogs", "the end", "a", "quick foxes", "zebra"];
    let prompt = "the lazy";
    let nats = choices.map(|choice| of_answer(&model, prompt, &format!(" {choice}")));
    let best = |scores: &[f64]| {
        let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        scores.iter().position(|score| *score == largest).expect("a largest")
    };
    let plain = best(&nats);
    let per_byte = best(&nats.iter().zip(choices).map(|(l, c)| l / c.len() as f64).collect::<Vec<_>>());
    let record = |prompt: &str, answer: usize| {
        serde_json::json!({"prompt": prompt, "choices": choices, "answer": answer}).to_string() + "\n"
    };
    // A space at the end of the prompt is part of the answer.
    for prompt in [prompt, "the lazy "] {
        for answer in [plain, per_byte, (plain + 1) % choices.len()] {
            let report = evaluate(&model, &record(prompt, answer), 0);
            let value = |metric| report.metrics[&metric].value;
            assert_eq!(value(Metric::Accuracy), f64::from(u8::from(answer == plain)));
            assert_eq!(value(Metric::AccuracyPerByte), f64::from(u8::from(answer == per_byte)));
            let difference = value(Metric::LogLikelihood) - nats[answer];
            assert!(difference.abs() < TOLERANCE, "{difference}");
            let bytes = choices[answer].len() as f64;
            assert!((value(Metric::LogLikelihoodPerByte) - nats[answer] / bytes).abs() < TOLERANCE);
        }
    }
}

#[test]
fn examples_stand_before_the_question() {
    let model = Model::new(22);
    let records = "{\"prompt\": \"a fox\", \"answers\": \"runs\"}\n{\"prompt\": \"the dog\", \"answers\": [\"sleeps\"]}\n";
    let report = evaluate(&model, records, 3);
    assert_eq!((report.shots, report.records, report.truncated), (1, 2, 0));
    let one = of_answer(&model, "the dog sleeps\n\na fox", " runs");
    let other = of_answer(&model, "a fox runs\n\nthe dog", " sleeps");
    let difference = report.metrics[&Metric::LogLikelihood].value - (one + other) / 2.0;
    assert!(difference.abs() < TOLERANCE, "{difference}");
}

#[test]
fn a_completion_is_the_greedy_line_of_the_reference_model() {
    let model = Model::new(23);
    let mut tokens = model.tokenizer.encode("the lazy").expect("tokens");
    let start = tokens.len();
    for _ in 0..6 {
        let logits = model.reference.logits(&tokens).expect("logits");
        let last = log_softmax(&logits[tokens.len() - 1])[..model.tokenizer.vocabulary()].to_vec();
        let largest = last.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        tokens.push(last.iter().position(|p| *p == largest).expect("a largest") as u32);
    }
    let text = model.tokenizer.decode_continuation(&tokens[..start], &tokens[start..]).expect("text");
    let line = text.lines().next().unwrap_or_default();
    let records = [line, "something else"].map(|answer| {
        serde_json::json!({"prompt": "the lazy", "answers": [format!("{answer} ")]}).to_string()
    });
    let report = evaluate(&model, &records.join("\n"), 0);
    assert_eq!(report.metrics[&Metric::ExactMatch].value, 0.5, "{text:?}");
    let error = report.metrics[&Metric::ExactMatch].standard_error.expect("two records");
    assert!((error - 0.5).abs() < 1e-12, "{error}");
}

#[test]
fn every_token_of_a_long_text_is_scored_once() {
    let model = Model::new(24);
    let text = "the quick brown foxes and the naïve dogs; ".repeat(18);
    let mut tokens = vec![model.tokenizer.end_of_text()];
    tokens.extend(model.tokenizer.encode(&text).expect("tokens"));
    assert!(tokens.len() > 2 * CONTEXT, "{} tokens", tokens.len());
    // Windows of CONTEXT tokens before the last one; the last window begins where another is scored.
    let mut nats = 0.0;
    let mut scored = 1;
    while scored < tokens.len() {
        let end = (scored + CONTEXT).min(tokens.len());
        let start = end.saturating_sub(CONTEXT + 1);
        nats += expected(&model, &tokens[start..end], scored - start);
        scored = end;
    }
    let mut scorer = Scorer::new(&model.decoder, &model.tokenizer).expect("a scorer");
    let ours = scorer.text(&text).expect("a likelihood");
    assert_eq!(ours.tokens, tokens.len() - 1);
    assert!((ours.nats - nats).abs() < TOLERANCE, "{} {nats}", ours.nats);
    let report = evaluate(&model, &serde_json::json!({"text": text}).to_string(), 2);
    let perplexity = report.metrics[&Metric::PerplexityPerWord];
    let words = text.split_whitespace().count() as f64;
    assert!((perplexity.value.ln() - -nats / words).abs() < TOLERANCE);
    assert_eq!((perplexity.standard_error, report.shots), (None, 0));
}

#[test]
fn of_a_prompt_beyond_the_context_the_end_is_seen() {
    let model = Model::new(25);
    let prompt = "the quick brown foxes ".repeat(20);
    let prompt = prompt.trim_end();
    let record = serde_json::json!({"prompt": prompt, "answers": "sleep"}).to_string();
    let report = evaluate(&model, &record, 0);
    assert_eq!(report.truncated, 1);
    let whole = model.tokenizer.encode(&format!("{prompt} sleep")).expect("tokens");
    let before = model.tokenizer.encode(prompt).expect("tokens").len();
    let unseen = whole.len() - (CONTEXT + 1);
    let nats = expected(&model, &whole[unseen..], before - unseen);
    let difference = report.metrics[&Metric::LogLikelihood].value - nats;
    assert!(difference.abs() < TOLERANCE, "{difference}");
}
