//! Continuations side by side: the same text as alone, and every request ends.
#![expect(clippy::expect_used, reason = "tests")]

mod common;

use common::{CONTEXT, Model, log_softmax};
use proptest::prelude::*;
use std::collections::BTreeMap;
use volary_inference::text::TextStream;
use volary_inference::{Error, Finish, Generator, ReportedTokens, Request, RequestId, Token};
use volary_model::sampling::Sampling;

fn generator(model: &Model, slots: usize) -> Generator {
    Generator::new(model.decoder.clone(), model.tokenizer.clone(), slots).expect("a generator")
}

fn greedy(prompt: Vec<u32>, max_tokens: usize) -> Request {
    let sampling = Sampling { temperature: 0.0, ..Sampling::default() };
    Request::new(prompt, max_tokens, sampling)
}

/// The text and end of every request.
fn run(generator: &mut Generator) -> BTreeMap<RequestId, (String, Finish)> {
    let (mut texts, mut ends) = (BTreeMap::<RequestId, String>::new(), BTreeMap::new());
    while !generator.is_idle() {
        for piece in generator.step().expect("a step") {
            assert!(!ends.contains_key(&piece.request), "a piece after the last one");
            texts.entry(piece.request).or_default().push_str(&piece.text);
            if let Some(finish) = piece.finish {
                ends.insert(piece.request, finish);
            }
        }
    }
    texts.into_iter().map(|(id, text)| (id, (text, ends[&id]))).collect()
}

/// The greedy continuation by the reference model, up to the end of the text.
fn expected(model: &Model, prompt: &[u32], max_tokens: usize) -> Vec<u32> {
    let mut tokens = prompt.to_vec();
    for _ in 0..max_tokens {
        let logits = model.reference.logits(&tokens).expect("logits");
        let last = &log_softmax(logits.last().expect("a row"))[..model.tokenizer.vocabulary()];
        let largest = last.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let next = last.iter().position(|p| *p == largest).expect("a largest") as u32;
        if next == model.tokenizer.end_of_text() {
            break;
        }
        tokens.push(next);
    }
    tokens.split_off(prompt.len())
}

#[test]
fn many_continuations_in_few_slots_equal_the_reference_models() {
    let model = Model::new(11);
    let prompts: Vec<Vec<u32>> = (0..9)
        .map(|n| model.tokenizer.encode(&"the naïve quick brown foxes "[..11 + 2 * n]).expect("tokens"))
        .collect();
    let mut generator = generator(&model, 3);
    let mut requests = BTreeMap::new();
    for (n, prompt) in prompts.iter().enumerate() {
        let id = generator.submit(greedy(prompt.clone(), 3 * n)).expect("a request");
        requests.insert(id, (prompt, 3 * n));
    }
    let texts = run(&mut generator);
    assert_eq!(texts.len(), requests.len());
    for (id, (prompt, max_tokens)) in requests {
        let tokens = expected(&model, prompt, max_tokens);
        let text = model.tokenizer.decode_continuation(prompt, &tokens).expect("text");
        let finish = if tokens.len() < max_tokens { Finish::Stop } else { Finish::Length };
        assert_eq!(texts[&id], (text, finish), "{max_tokens} tokens");
    }
}

#[test]
fn a_stop_string_ends_the_text_before_it() {
    let model = Model::new(11);
    let prompt = model.tokenizer.encode("the quick").expect("tokens");
    let mut generator = generator(&model, 2);
    let whole = generator.submit(greedy(prompt.clone(), 20)).expect("a request");
    let text = run(&mut generator)[&whole].0.clone();
    // Some characters from its middle.
    let stop: String = text.chars().skip(4).take(3).collect();
    let before = text.find(&stop).expect("part of the text");
    let request = Request { stop: vec![stop], ..greedy(prompt, 20) };
    let id = generator.submit(request).expect("a request");
    assert_eq!(run(&mut generator)[&id], (text[..before].to_owned(), Finish::Stop));
}

#[test]
fn a_cancelled_request_leaves_its_slot_to_the_next() {
    let model = Model::new(2);
    let prompt = model.tokenizer.encode("the").expect("tokens");
    let mut generator = generator(&model, 1);
    let [running, waiting, last] =
        [1000, 1000, 2].map(|tokens| generator.submit(greedy(prompt.clone(), tokens)).expect("a request"));
    generator.step().expect("a step");
    generator.cancel(waiting);
    generator.cancel(running);
    let texts = run(&mut generator);
    assert_eq!(texts.keys().collect::<Vec<_>>(), [&last]);
}

#[test]
fn a_text_goes_on_beyond_the_context() {
    let model = Model::new(4);
    let prompt = vec![7; CONTEXT];
    let mut generator = generator(&model, 1);
    let request = Request { sampling: Sampling::default(), ..greedy(prompt, 3 * CONTEXT) };
    let id = generator.submit(request).expect("a request");
    assert!(run(&mut generator).contains_key(&id));
}

#[test]
fn requests_that_cannot_be_served_are_refused() {
    let model = Model::new(4);
    let mut generator = generator(&model, 1);
    let mut refused = |request| generator.submit(request).expect_err("an error").to_string();
    assert_eq!(refused(greedy(vec![], 1)), "the prompt is empty");
    assert_eq!(refused(greedy(vec![9; 49], 1)), "49 tokens are more than the model's context of 48");
    assert!(refused(greedy(vec![300], 1)).contains("token 300"));
    let stop = vec![String::new()];
    assert!(refused(Request { stop, ..greedy(vec![1], 1) }).contains("stop strings"));
    assert!(generator.is_idle());
    for _ in 0..volary_inference::limits::WAITING_REQUESTS {
        generator.submit(greedy(vec![1], 0)).expect("room");
    }
    assert!(matches!(generator.submit(greedy(vec![1], 0)), Err(Error::Busy)));
}

/// Prompts longer than one pass are read in parts, beside other sequences.
#[test]
fn reported_tokens_have_the_log_probabilities_of_the_reference_model() {
    let model = Model::new(13);
    let prompts: Vec<Vec<u32>> = (0..20).map(|n| [3 + n, 70, 80, 9, 100 + n].repeat(9)).collect();
    assert!(prompts.concat().len() > volary_inference::limits::TOKENS_PER_PASS);
    let mut generator = generator(&model, 20);
    let mut tokens: BTreeMap<RequestId, (Vec<u32>, Vec<Token>)> = BTreeMap::new();
    let mut read: BTreeMap<RequestId, usize> = BTreeMap::new();
    for (n, prompt) in prompts.into_iter().enumerate() {
        // Some ask for no new token.
        let request =
            Request { report: ReportedTokens::All(2), experts: true, ..greedy(prompt.clone(), n % 3) };
        tokens.insert(generator.submit(request).expect("a request"), (prompt, Vec::new()));
    }
    while !generator.is_idle() {
        for piece in generator.step().expect("a step") {
            *read.entry(piece.request).or_default() += piece.experts.len();
            assert!(piece.experts.iter().all(|layers| layers.len() == 1 && layers[0][0] != layers[0][1]));
            tokens.get_mut(&piece.request).expect("a request").1.extend(piece.tokens);
        }
    }
    // Every token but the last new one is read.
    for (id, (prompt, reported)) in &tokens {
        assert_eq!(read[id], (reported.len() - 1).max(prompt.len()), "{id:?}");
    }
    for (n, (prompt, reported)) in tokens.into_values().enumerate() {
        let ids: Vec<u32> = reported.iter().map(|token| token.id).collect();
        assert!(ids.starts_with(&prompt) && ids.len() <= prompt.len() + n % 3, "{n}: {ids:?}");
        let logits = model.reference.logits(&ids).expect("logits");
        assert_eq!(reported[0].score, None);
        for (at, token) in reported.iter().enumerate().skip(1) {
            let score = token.score.as_ref().expect("a score");
            let expected = log_softmax(&logits[at - 1]);
            let difference = f64::from(score.log_probability) - expected[token.id as usize];
            assert!(difference.abs() < 1e-4, "{n} at {at}: {difference}");
            let best = expected.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            assert!((f64::from(score.top[0].1) - best).abs() < 1e-4 && score.top.len() == 2, "{n} at {at}");
        }
    }
}

proptest! {
    /// Characters of several tokens, and prompts that end within one.
    #[test]
    fn the_pieces_of_a_text_are_the_text(text in "[the qñ☃🦊]{1,20}", cut in 0..40usize) {
        let tokenizer = common::tokenizer();
        let tokens = tokenizer.encode(&text).expect("tokens");
        let (prompt, rest) = tokens.split_at(cut.min(tokens.len()));
        let mut stream = TextStream::after(tokenizer.clone(), prompt);
        let mut pieces = String::new();
        for &id in rest {
            pieces.push_str(&stream.push(id).expect("text"));
        }
        pieces.push_str(&stream.finish().expect("text"));
        let before = tokenizer.decode(prompt).expect("text");
        let expected = text.strip_prefix(before.trim_end_matches(char::REPLACEMENT_CHARACTER));
        if rest.is_empty() {
            prop_assert_eq!(pieces, "");
        } else {
            prop_assert_eq!(Some(pieces.as_str()), expected);
        }
    }
}
