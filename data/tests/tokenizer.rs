//! The tokenizer is a function of its corpus, and text survives it.
#![allow(clippy::unwrap_used, reason = "a helper that fails is a test that fails")]

mod common;

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
