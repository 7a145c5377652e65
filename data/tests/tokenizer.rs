//! The tokenizer is a function of its corpus, and text survives it.
#![allow(clippy::unwrap_used, reason = "a helper that fails is a test that fails")]

mod common;

use std::path::Path;
use std::time::{Duration, Instant};

use common::{document, write};
use proptest::prelude::*;
use tempfile::tempdir;
use volary_data::Tokenizer;

fn train(count: usize, vocabulary: usize) -> Tokenizer {
    Tokenizer::train((0..count).map(document), vocabulary).unwrap()
}

#[test]
fn the_same_corpus_gives_the_same_tokenizer() {
    let [first, second] = [train(300, 600), train(300, 600)];
    assert_eq!(first.fingerprint(), second.fingerprint());
    assert_ne!(first.fingerprint(), train(299, 600).fingerprint());
}

#[test]
fn a_saved_tokenizer_loads_as_the_same() {
    let dir = tempdir().unwrap();
    let tokenizer = train(50, 350);
    tokenizer.save(&dir.path().join("tokenizer.json")).unwrap();
    let loaded = Tokenizer::load(&dir.path().join("tokenizer.json")).unwrap();
    assert_eq!(loaded.fingerprint(), tokenizer.fingerprint());
    assert_eq!(loaded.vocabulary(), tokenizer.vocabulary());
    assert_eq!(loaded.encode(&document(9)).unwrap(), tokenizer.encode(&document(9)).unwrap());
}

#[test]
fn end_of_text_is_token_zero_and_cannot_be_spelled() {
    let tokenizer = train(50, 350);
    assert_eq!(tokenizer.end_of_text(), 0);
    assert_eq!(tokenizer.token(0), "<|endoftext|>");
    let text = "a <|endoftext|> b";
    let ids = tokenizer.encode(text).unwrap();
    assert!(!ids.contains(&0), "{ids:?}");
    assert_eq!(tokenizer.decode(&ids).unwrap(), text);
    assert!(ids.iter().all(|&id| (id as usize) < tokenizer.vocabulary()));
}

#[test]
fn a_batch_equals_its_texts_one_by_one_and_long_texts_equal_their_parts() {
    let tokenizer = train(300, 500);
    let long: String = (0..2000).map(document).collect();
    let texts = [long.clone(), String::new(), document(3)];
    let batch = tokenizer.encode_batch(&texts).unwrap();
    assert_eq!(batch[0], tokenizer.encode(&long).unwrap());
    assert_eq!(batch[1], [0; 0]);
    assert_eq!(batch[2], tokenizer.encode(&document(3)).unwrap());
    assert_eq!(tokenizer.decode(&batch[0]).unwrap(), long);
    // A document begins with a letter after a space, so its tokens do not depend on what is before it.
    let whole: Vec<u32> = (0..2000).flat_map(|n| tokenizer.encode(&document(n)).unwrap()).collect();
    assert_eq!(batch[0], whole);
}

#[test]
fn an_enormous_word_is_trained_on_and_encoded_in_seconds() {
    let mut state = 1_u64;
    let mut letter = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        char::from(b'a' + (state >> 60) as u8)
    };
    let word: String = (0..1 << 20).map(|_| letter()).collect();
    let began = Instant::now();
    let tokenizer = Tokenizer::train([word.clone(), " ".repeat(1 << 20)].into_iter(), 600).unwrap();
    let ids = tokenizer.encode(&word).unwrap();
    assert_eq!(tokenizer.decode(&ids).unwrap(), word);
    // A debug build on a loaded machine takes a few; the square of the length took minutes.
    assert!(began.elapsed() < Duration::from_secs(60), "{:?}", began.elapsed());
}

/// A tokenizer of another make: words are marked by a leading underscore, which the decoder drops at the
/// start of a text.
fn metaspace(dir: &Path) -> Tokenizer {
    let tokens = ["<unk>", "</s>", "<eos>", "▁", "▁a", "b", "a", "x"];
    let vocabulary: serde_json::Map<_, _> =
        tokens.iter().enumerate().map(|(id, token)| ((*token).to_string(), (id * 3).into())).collect();
    let special = |id: usize| {
        serde_json::json!({"id": 3 * id, "content": tokens[id], "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": true})
    };
    let metaspace = serde_json::json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": false});
    let json = serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null,
        "added_tokens": [special(0), special(1), special(2)],
        "pre_tokenizer": metaspace, "decoder": metaspace,
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "vocab": vocabulary, "merges": [["▁", "a"]]},
    });
    Tokenizer::load(&write(dir, "tokenizer.json", json.to_string())).unwrap()
}

#[test]
fn a_tokenizer_of_another_make_sees_long_texts_as_a_whole() {
    let dir = tempdir().unwrap();
    let tokenizer = metaspace(dir.path());
    // The mark of a word is added once, at the start: not at the start of every chunk.
    let text = "a b ".repeat(100_000) + "a";
    let ids = tokenizer.encode(&text).unwrap();
    let expected = [vec![12], [9, 15, 12].repeat(100_000)].concat();
    assert_eq!(ids, expected);
    assert_eq!(tokenizer.decode(&ids).unwrap(), text);
    assert_eq!((tokenizer.vocabulary(), tokenizer.end_of_text()), (22, 6), "holes, and two ends of text");
}

#[test]
fn a_continuation_is_decoded_together_with_its_prompt() {
    let dir = tempdir().unwrap();
    let tokenizer = metaspace(dir.path());
    assert_eq!(tokenizer.decode(&[12]).unwrap(), "a");
    assert_eq!(tokenizer.decode_continuation(&[15], &[12, 15]).unwrap(), " ab");
    let ours = train(50, 350);
    let ids = ours.encode("é").unwrap();
    assert_eq!(ours.decode_continuation(&[], &ids).unwrap(), "é");
}

#[test]
fn text_without_spaces_is_encoded_as_a_whole() {
    let tokenizer = train(300, 500);
    let text = "river".repeat(60_000);
    let words = tokenizer.encode("riverriver").unwrap();
    let ids = tokenizer.encode(&text).unwrap();
    // Any cut within the text would show as tokens that the repetition does not have.
    assert_eq!(ids, words[..words.len() / 2].repeat(60_000));
}

#[test]
fn a_file_that_is_not_a_tokenizer_is_named() {
    let dir = tempdir().unwrap();
    for body in ["", "{}", "{\"model\": 3}"] {
        let path = write(dir.path(), "bad.json", body);
        let message = Tokenizer::load(&path).unwrap_err().to_string();
        assert!(message.contains("bad.json"), "{message}");
    }
    assert!(Tokenizer::load(&dir.path().join("none.json")).unwrap_err().to_string().contains("none.json"));
}

proptest! {
    #[test]
    fn any_text_decodes_to_itself(text in "\\PC{0,200}|(\\s|\\S){0,100}") {
        thread_local!(static TOKENIZER: Tokenizer = train(50, 350));
        TOKENIZER.with(|tokenizer| {
            let ids = tokenizer.encode(&text).unwrap();
            assert_eq!(tokenizer.decode(&ids).unwrap(), text);
        });
    }
}
