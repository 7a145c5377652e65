//! Filters leave out what they should, say so, and depend on nothing but the text.
#![allow(clippy::unwrap_used, reason = "a helper that fails is a test that fails")]

mod common;

use std::fs;
use std::path::Path;
use std::slice::from_ref;

use common::{document, jsonl, options, prepare_16, source, write};
use tempfile::tempdir;
use volary_data::duplicates::DuplicateOptions;
use volary_data::quality::{Classifier, QualityOptions, Trained, TrainingOptions, keep_probability, train};
use volary_data::selection::Dropped;
use volary_data::{Error, Source};

/// Advertising: words that [`document`] does not use, in the same form.
fn advertisement(n: usize) -> String {
    let words = ["buy", "cheap", "now", "click", "offer", "the", "a", "free", "winner", "discount"];
    let pick = |at: usize| words[(n * 31 + at * at * 7 + at) % words.len()];
    format!("Document {n}.\n") + &(0..45).map(|at| format!("{} ", pick(at))).collect::<String>()
}

fn advertisements(range: std::ops::Range<usize>) -> String {
    range.map(|n| serde_json::json!({ "text": advertisement(n) }).to_string() + "\n").collect()
}

fn trained(dir: &Path) -> Trained {
    let good = write(dir, "good.jsonl", jsonl(1000..1400));
    let bad = write(dir, "bad.jsonl", advertisements(1000..1400));
    let [good, bad] = [good, bad].map(|path| Source::find(&source("s", &path)).unwrap());
    train(&[good], &[bad], &TrainingOptions::default()).unwrap()
}

fn dropped(manifest: &volary_data::Manifest) -> Vec<Dropped> {
    manifest.sources.iter().map(|source| source.dropped).collect()
}

#[test]
fn a_classifier_tells_curated_text_from_advertising_and_knows_how_sure_it_is() {
    let dir = tempdir().unwrap();
    let Trained { classifier, evaluation } = trained(dir.path());
    assert!(evaluation.precision > 0.98 && evaluation.recall > 0.98, "{evaluation:?}");
    assert!(evaluation.kept_positive > 0.8 && evaluation.kept_negative < 0.02, "{evaluation:?}");
    assert_eq!(evaluation.trained + evaluation.positive + evaluation.negative, 800);
    assert!((40..160).contains(&(evaluation.positive + evaluation.negative)), "{evaluation:?}");
    assert!(classifier.score(&document(7)) > 0.9 && classifier.score(&advertisement(7)) < 0.1);
    let top = classifier.contributions(&advertisement(7), 3);
    assert!(top.iter().all(|part| part.weight < 0.0), "{top:?}");
}

#[test]
fn the_same_text_in_another_order_and_on_other_threads_gives_the_same_classifier() {
    let dir = tempdir().unwrap();
    let first = trained(dir.path());
    let again = tempdir().unwrap();
    let lines = jsonl(1000..1400);
    let reversed: String = lines.lines().rev().map(|line| format!("{line}\n")).collect();
    let good = write(again.path(), "good.jsonl", reversed);
    let bad = write(again.path(), "bad.jsonl", advertisements(1000..1400));
    let [good, bad] = [good, bad].map(|path| Source::find(&source("s", &path)).unwrap());
    let alone = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    let second = alone.install(|| train(&[good], &[bad], &TrainingOptions::default()).unwrap());
    assert_eq!(first, second);
}

#[test]
fn kinds_without_documents_and_options_out_of_range_are_errors() {
    let dir = tempdir().unwrap();
    let one = write(dir.path(), "one.txt", "only one document");
    let one = Source::find(&source("one", &one)).unwrap();
    let error = train(from_ref(&one), &[], &TrainingOptions::default()).unwrap_err();
    assert!(matches!(error, Error::TooFewExamples { kind: "negative" | "positive", .. }), "{error}");
    for (bad, name) in [
        (TrainingOptions { ngram: 0, ..TrainingOptions::default() }, "ngram"),
        (TrainingOptions { bucket_bits: 40, ..TrainingOptions::default() }, "bucket_bits"),
        (TrainingOptions { epochs: 0, ..TrainingOptions::default() }, "epochs"),
        (TrainingOptions { held_out: 1.0, ..TrainingOptions::default() }, "held_out"),
        (TrainingOptions { alpha: f64::NAN, ..TrainingOptions::default() }, "alpha"),
    ] {
        let error = train(from_ref(&one), from_ref(&one), &bad).unwrap_err().to_string();
        assert!(error.contains(name), "{error}");
    }
}

#[test]
fn the_filter_leaves_out_low_scores_of_its_sources_and_keeps_some() {
    let dir = tempdir().unwrap();
    let classifier = dir.path().join("quality.safetensors");
    trained(dir.path()).classifier.save(&classifier).unwrap();
    let web = write(dir.path(), "web.jsonl", jsonl(0..300) + &advertisements(0..3000));
    let books = write(dir.path(), "books.jsonl", advertisements(5000..5200));
    let mut options = options(dir.path(), vec![source("web", &web), source("books", &books)]);
    options.quality =
        Some(QualityOptions { sources: Some(vec!["web".into()]), ..QualityOptions::new(&classifier) });
    let manifest = prepare_16(&options, &dir.path().join("run")).unwrap().manifest;
    let [of_web, of_books] = dropped(&manifest)[..] else { panic!("two sources") };
    assert!(of_books.is_empty());
    let expected: f64 = {
        let classifier = Classifier::load(&classifier).unwrap();
        let texts = (0..300).map(document).chain((0..3000).map(advertisement));
        texts.map(|text| keep_probability(classifier.score(&text), 9.0)).sum()
    };
    let kept = manifest.sources[0].documents;
    assert_eq!(kept + of_web.low_quality.documents, 3300);
    // A sum of independent draws: its variance is at most its expectation.
    assert!((kept as f64 - expected).abs() <= 5.0 * expected.sqrt(), "{kept}, expected {expected}");
    assert!(kept > 250 && kept < 400, "{kept}");
}

#[test]
fn copies_leave_all_sources_but_the_first_whatever_the_number_of_threads() {
    let dir = tempdir().unwrap();
    let a = write(dir.path(), "a.jsonl", jsonl(0..400) + &jsonl(0..50));
    let edited: String = (0..400)
        .map(|n| {
            let text = document(n) + if n % 2 == 0 { "The end." } else { "" };
            serde_json::json!({ "text": text }).to_string() + "\n"
        })
        .collect();
    let b = write(dir.path(), "b.jsonl", edited + &jsonl(400..700));
    let mut options = options(dir.path(), vec![source("a", &a), source("b", &b)]);
    options.duplicates = Some(DuplicateOptions::default());
    options.cache = None;
    let files = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let run = dir.path().join(format!("run-{threads}"));
        let mut options = options.clone();
        options.cache = Some(dir.path().join(format!("cache-{threads}")));
        let manifest = pool.install(|| prepare_16(&options, &run).unwrap().manifest);
        let names =
            ["a.train.tokens", "b.train.tokens", "b.validation.tokens", "manifest.json", "tokenizer.json"];
        (names.map(|name| fs::read(run.join(name)).unwrap()), manifest)
    };
    let (one, manifest) = files(1);
    assert_eq!(one, files(4).0);
    let [of_a, of_b] = dropped(&manifest)[..] else { panic!("two sources") };
    assert_eq!((of_a.exact_copies.documents, of_a.near_copies.documents), (50, 0));
    assert_eq!((of_b.exact_copies.documents, of_b.near_copies.documents), (200, 200));
    assert_eq!(manifest.sources.iter().map(|s| s.documents).collect::<Vec<_>>(), [400, 300]);
    let report = manifest.duplicates.unwrap();
    assert_eq!((report.clusters, report.sizes[&2], report.sizes[&3]), (400, 350, 50));
    assert_eq!(report.largest[0].documents, 3);
}

#[test]
fn a_classifier_of_another_content_is_another_corpus_in_the_cache() {
    let dir = tempdir().unwrap();
    let classifier = dir.path().join("quality.safetensors");
    trained(dir.path()).classifier.save(&classifier).unwrap();
    let web = write(dir.path(), "web.jsonl", jsonl(0..300) + &advertisements(0..300));
    let mut options = options(dir.path(), vec![source("web", &web)]);
    options.quality = Some(QualityOptions::new(&classifier));
    assert!(!prepare_16(&options, &dir.path().join("first")).unwrap().from_cache);
    let moved = dir.path().join("moved.safetensors");
    fs::copy(&classifier, &moved).unwrap();
    options.quality = Some(QualityOptions::new(&moved));
    assert!(prepare_16(&options, &dir.path().join("second")).unwrap().from_cache);
    let other = [(1000, 1300)].map(|(from, to)| write(dir.path(), "other.jsonl", jsonl(from..to)));
    let bad = write(dir.path(), "bad.jsonl", advertisements(1000..1400));
    let [good, bad] = [&other[0], &bad].map(|path| Source::find(&source("s", path)).unwrap());
    train(&[good], &[bad], &TrainingOptions::default()).unwrap().classifier.save(&moved).unwrap();
    assert!(!prepare_16(&options, &dir.path().join("third")).unwrap().from_cache);
}

#[test]
fn bad_records_are_skipped_and_counted_or_stop_a_strict_preparation() {
    let dir = tempdir().unwrap();
    let text = jsonl(0..100) + "{\"text\": 7}\nnot JSON\n{\"other\": \"x\"}\n" + &jsonl(100..200);
    let file = write(dir.path(), "a.jsonl", text);
    let mut options = options(dir.path(), vec![source("a", &file)]);
    let manifest = prepare_16(&options, &dir.path().join("run")).unwrap().manifest;
    assert_eq!((manifest.sources[0].documents, manifest.sources[0].bad_records), (200, 3));
    options.strict = true;
    let error = prepare_16(&options, &dir.path().join("strict")).unwrap_err().to_string();
    assert!(error.contains("a.jsonl, line 101"), "{error}");
}

#[test]
fn a_source_of_bad_records_only_names_the_first() {
    let dir = tempdir().unwrap();
    let file = write(dir.path(), "a.jsonl", "{\"content\": \"x\"}\n".repeat(50));
    let error = prepare_16(&options(dir.path(), vec![source("a", &file)]), &dir.path().join("run"));
    let error = error.unwrap_err().to_string();
    assert!(error.contains("line 1:") && error.contains("content"), "{error}");
}
