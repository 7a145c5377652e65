//! A prepared corpus is complete, cached, independent of the cache and verified.
#![allow(clippy::unwrap_used, reason = "a helper that fails is a test that fails")]

mod common;

use std::collections::BTreeSet;
use std::fs::{self, OpenOptions};
use std::path::Path;

use common::{document, jsonl, options, prepare_16, source, write};
use tempfile::tempdir;
use volary_data::duplicates::DuplicateOptions;
use volary_data::manifest::Split;
use volary_data::{DataOptions, Dataset, Error, HeldOut, Manifest, PreparationStage, SourceOptions, prepare};

fn read_tokens(path: &Path) -> Vec<u32> {
    fs::read(path).unwrap().chunks_exact(4).map(|four| u32::from_le_bytes(four.try_into().unwrap())).collect()
}

fn documents(dir: &Path, name: &str, end: u32) -> BTreeSet<Vec<u32>> {
    read_tokens(&dir.join(name))
        .split(|&id| id == end)
        .filter(|d| !d.is_empty())
        .map(<[u32]>::to_vec)
        .collect()
}

#[test]
fn training_never_sees_a_validation_document() {
    let dir = tempdir().unwrap();
    // Every document occurs twice, in two sources.
    let a = write(dir.path(), "a.jsonl", jsonl(0..600));
    let b = write(dir.path(), "b.jsonl", jsonl(0..600));
    let mut options = options(dir.path(), vec![source("a", &a), source("b", &b)]);
    options.validation_fraction = 0.05;
    let run = dir.path().join("run");
    let manifest = prepare_16(&options, &run).unwrap().manifest;
    assert!(manifest.sources.iter().all(|s| s.held_out == HeldOut::Documents && s.documents == 600));
    let all = |part: &str| -> BTreeSet<_> {
        ["a", "b"]
            .iter()
            .flat_map(|s| documents(&run, &format!("{s}.{part}.tokens"), manifest.end_of_text))
            .collect()
    };
    let (train, validation) = (all("train"), all("validation"));
    assert!(train.is_disjoint(&validation));
    assert_eq!(train.len() + validation.len(), 600);
    assert!((10..60).contains(&validation.len()), "{}", validation.len());
}

#[test]
fn the_share_of_tokens_is_held_out_even_if_few_documents_hold_most_tokens() {
    let dir = tempdir().unwrap();
    // Nine documents of ten are short, and a few long ones have most of the tokens, as in a folder of source
    // files.
    let lengths = |n: usize| if n.is_multiple_of(10) { 1 + n / 100 } else { 1 };
    let lines = (0..3000).map(|n| {
        let text: String = (0..lengths(n)).map(|part| document(100 * n + part)).collect();
        serde_json::json!({ "text": text }).to_string() + "\n"
    });
    let file = write(dir.path(), "a.jsonl", lines.collect::<String>());
    for fraction in [0.01, 0.02, 0.05] {
        let mut options = options(dir.path(), vec![source("a", &file)]);
        options.validation_fraction = fraction;
        let run = dir.path().join(format!("run-{fraction}"));
        let manifest = prepare_16(&options, &run).unwrap().manifest;
        let source = &manifest.sources[0];
        assert_eq!(source.held_out, HeldOut::Documents);
        let total = (source.train.tokens + source.validation.tokens) as f64;
        let longest = total / 3000.0 * 30.0;
        let excess = source.validation.tokens as f64 - fraction * total;
        assert!((0.0..longest).contains(&excess), "{fraction}: {excess} tokens of {total} too many");
    }
}

#[test]
fn a_single_document_holds_out_its_tail() {
    let dir = tempdir().unwrap();
    let text: String = (0..40).map(document).collect();
    let file = write(dir.path(), "book.txt", &text);
    let options = options(dir.path(), vec![source("book", &file)]);
    let run = dir.path().join("run");
    let manifest = prepare_16(&options, &run).unwrap().manifest;
    let book = &manifest.sources[0];
    assert_eq!(book.held_out, HeldOut::Tail);
    let total = book.train.tokens + book.validation.tokens;
    assert_eq!(book.validation.tokens, (total as f64 * 0.01).ceil().max(17.0) as u64);
    let tokenizer = manifest.load_tokenizer(&run).unwrap();
    let mut whole = read_tokens(&run.join("book.train.tokens"));
    whole.extend(read_tokens(&run.join("book.validation.tokens")));
    assert_eq!(whole.pop(), Some(manifest.end_of_text));
    assert_eq!(tokenizer.decode(&whole).unwrap(), text);
    // Longer sequences hold out more, without disturbing what the cache holds for shorter ones.
    let longer = prepare(&options, 100, &dir.path().join("longer"), &mut |_| {}).unwrap();
    assert!(!longer.from_cache && longer.manifest.sources[0].validation.tokens >= 101);
    assert!(prepare_16(&options, &dir.path().join("again")).unwrap().from_cache);
}

#[test]
fn the_second_run_takes_its_own_copy_of_the_corpus_from_the_cache() {
    let dir = tempdir().unwrap();
    let file = write(dir.path(), "a.jsonl", jsonl(0..400));
    let options = options(dir.path(), vec![source("a", &file)]);
    let runs = [dir.path().join("one"), dir.path().join("two")];
    let mut stages = Vec::new();
    let first = prepare(&options, 16, &runs[0], &mut |p| stages.push(p.stage)).unwrap();
    assert!(!first.from_cache && !first.resumed);
    assert!(stages.is_sorted_by_key(|s| *s as u8) && stages.contains(&PreparationStage::Tokenizing));
    let mut stages = Vec::new();
    let second = prepare(&options, 16, &runs[1], &mut |p| stages.push(p.stage)).unwrap();
    assert!(second.from_cache && !stages.contains(&PreparationStage::Tokenizing));
    assert_eq!(first.manifest, second.manifest);
    fs::remove_dir_all(dir.path().join("cache")).unwrap();
    fs::remove_file(&file).unwrap();
    assert!(runs.iter().all(|run| Manifest::verify(run).unwrap() == first.manifest));
    let resumed = prepare_16(&options, &runs[0]).unwrap();
    assert!(resumed.resumed && resumed.manifest == first.manifest);
    assert!(
        fs::read_dir(&runs[0]).unwrap().all(|e| !e.unwrap().file_name().to_string_lossy().starts_with('.'))
    );
}

#[test]
fn a_changed_file_or_option_causes_a_new_tokenization() {
    let dir = tempdir().unwrap();
    let file = write(dir.path(), "a.jsonl", jsonl(0..400));
    let mut options = options(dir.path(), vec![source("a", &file)]);
    prepare_16(&options, &dir.path().join("one")).unwrap();
    write(dir.path(), "a.jsonl", jsonl(0..401));
    assert!(!prepare_16(&options, &dir.path().join("two")).unwrap().from_cache);
    options.vocabulary += 1;
    assert!(!prepare_16(&options, &dir.path().join("three")).unwrap().from_cache);
}

#[test]
fn other_bytes_of_the_same_size_and_time_and_a_link_that_points_elsewhere_are_other_text() {
    let dir = tempdir().unwrap();
    let a = write(dir.path(), "a.jsonl", jsonl(100..700));
    let link = dir.path().join("link.jsonl");
    std::os::unix::fs::symlink(&a, &link).unwrap();
    let options = options(dir.path(), vec![source("link", &link)]);
    let from_cache = |run: &str| prepare_16(&options, &dir.path().join(run)).unwrap().from_cache;
    assert!(!from_cache("first") && from_cache("second"));
    // As an editor or a copy that preserves times leaves it.
    let modified = fs::metadata(&a).unwrap().modified().unwrap();
    write(dir.path(), "a.jsonl", jsonl(200..800));
    OpenOptions::new().write(true).open(&a).unwrap().set_modified(modified).unwrap();
    assert!(!from_cache("third") && from_cache("fourth"));
    // A copy of the same size and time.
    let b = dir.path().join("b.jsonl");
    fs::copy(&a, &b).unwrap();
    OpenOptions::new().write(true).open(&b).unwrap().set_modified(modified).unwrap();
    fs::remove_file(&link).unwrap();
    std::os::unix::fs::symlink(&b, &link).unwrap();
    assert!(!from_cache("fifth"));
}

#[test]
fn a_damaged_cache_is_replaced_and_a_damaged_run_is_rejected() {
    let dir = tempdir().unwrap();
    let file = write(dir.path(), "a.jsonl", jsonl(0..400));
    let options = options(dir.path(), vec![source("a", &file)]);
    let run = dir.path().join("run");
    let whole = prepare_16(&options, &run).unwrap().manifest;
    // The files of the run and of the cache are the same, so one truncation damages both.
    let tokens = OpenOptions::new().write(true).open(run.join("a.train.tokens")).unwrap();
    tokens.set_len(1000).unwrap();
    let error = prepare_16(&options, &run).unwrap_err();
    assert!(matches!(&error, Error::Damaged { path, .. } if path.ends_with("a.train.tokens")), "{error}");
    assert!(matches!(Dataset::open(&run, 16, 1, 1, 0), Err(Error::Damaged { .. })));
    let again = prepare_16(&options, &dir.path().join("again")).unwrap();
    assert!(!again.from_cache && again.manifest == whole);

    let again = dir.path().join("again");
    let mut bytes = fs::read(again.join("a.validation.tokens")).unwrap();
    bytes[0] ^= 1;
    fs::write(again.join("a.validation.tokens"), bytes).unwrap();
    assert!(Manifest::verify(&again).unwrap_err().to_string().contains("hash"));
    fs::write(again.join("manifest.json"), "{\"version\": 99}").unwrap();
    assert!(prepare_16(&options, &again).unwrap_err().to_string().contains("version 99"));
    fs::write(again.join("manifest.json"), "{\"version\": 1, \"sou").unwrap();
    assert!(matches!(prepare_16(&options, &again), Err(Error::Damaged { .. })));
}

#[test]
fn a_given_tokenizer_is_used_as_it_is() {
    let dir = tempdir().unwrap();
    let file = write(dir.path(), "a.jsonl", jsonl(0..100));
    let mut options = options(dir.path(), vec![source("a", &file)]);
    let run = dir.path().join("run");
    let first = prepare_16(&options, &run).unwrap().manifest;
    options.tokenizer = Some(run.join("tokenizer.json"));
    let second = prepare_16(&options, &dir.path().join("two")).unwrap().manifest;
    assert_eq!(first, second);
}

#[test]
fn an_unwritable_cache_does_not_prevent_preparation() {
    let dir = tempdir().unwrap();
    let file = write(dir.path(), "a.jsonl", jsonl(0..100));
    let mut options = options(dir.path(), vec![source("a", &file)]);
    options.cache = Some(file.join("below-a-file"));
    let prepared = prepare_16(&options, &dir.path().join("run")).unwrap();
    assert_eq!(Manifest::verify(&dir.path().join("run")).unwrap(), prepared.manifest);
}

#[test]
fn hopeless_requests_are_rejected_with_a_reason() {
    let dir = tempdir().unwrap();
    let file = write(dir.path(), "a.txt", "too short");
    let blank = write(dir.path(), "blank.txt", " \n\n");
    let run = dir.path().join("run");
    let refused = |sources: Vec<SourceOptions>, run: &Path| {
        prepare_16(&options(dir.path(), sources), run).unwrap_err().to_string()
    };
    let heavy = |weight| SourceOptions { weight, ..source("a", &file) };
    let contains = |message: String, words: &[&str]| {
        assert!(words.iter().all(|word| message.contains(word)), "{message}");
    };
    contains(refused(vec![], &run), &["sources"]);
    contains(refused(vec![source("a", &file)], &run), &["\"a\"", "16 tokens", "34"]);
    contains(refused(vec![source("a", &blank)], &run), &["holds no text"]);
    contains(refused(vec![source("a", &dir.path().join("none"))], &run), &["\"a\"", "none", "no such file"]);
    contains(refused(vec![source("a", &file), source("A", &file)], &run), &["two sources"]);
    contains(refused(vec![source("../a", &file)], &run), &["sources[0].name"]);
    for weight in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        contains(refused(vec![heavy(weight)], &run), &["sources[0].weight"]);
    }
    contains(refused(vec![source("a", &file)], &file.join("run")), &["cannot write"]);
    assert!(!run.join("manifest.json").exists());
}

#[test]
fn a_handful_of_documents_never_leaves_training_short() {
    let dir = tempdir().unwrap();
    for n in 0..20 {
        let file = write(dir.path(), &format!("{n}.jsonl"), jsonl(2 * n..2 * n + 2));
        let mut options = options(dir.path(), vec![source("a", &file)]);
        options.validation_fraction = 0.1;
        let manifest = prepare_16(&options, &dir.path().join(format!("run{n}"))).unwrap().manifest;
        assert!(manifest.sources[0].train.tokens > manifest.sources[0].validation.tokens, "{n}");
    }
}

#[test]
fn leftovers_of_a_killed_process_are_removed_and_not_mistaken_for_a_corpus() {
    let dir = tempdir().unwrap();
    let file = write(dir.path(), "a.jsonl", jsonl(0..100));
    let options = options(dir.path(), vec![source("a", &file)]);
    let run = dir.path().join("run");
    write(&run, ".partial-1-0/a.train.tokens", "half");
    write(&run, "a.train.tokens", "half");
    write(&run, ".tokenizer.json.new", "half");
    let manifest = prepare_16(&options, &run).unwrap().manifest;
    assert_eq!(Manifest::verify(&run).unwrap(), manifest);
    assert_eq!(fs::read_dir(&run).unwrap().count(), 4);
}

#[test]
fn near_duplicates_of_held_out_documents_are_not_trained_on() {
    let dir = tempdir().unwrap();
    // Two copies of every document under different headers: each held-out document has a twin.
    let folder = dir.path().join("text");
    for n in 0..200 {
        let body = (0..4).map(|part| document(n * 4 + part)).collect::<String>();
        write(&folder, &format!("{n}-a.txt"), format!("The first edition.\n{body}"));
        write(&folder, &format!("{n}-b.txt"), format!("Printed again, with a preface.\n{body}"));
    }
    let options =
        DataOptions { validation_fraction: 0.05, ..options(dir.path(), vec![source("s", &folder)]) };
    let run = dir.path().join("run");
    let manifest = prepare_16(&options, &run).unwrap().manifest;
    let source = &manifest.sources[0];
    assert_eq!(source.held_out, HeldOut::Documents);
    assert!(source.near_duplicates.left_out && source.near_duplicates.documents >= 15, "{source:?}");
    let share = source.validation.tokens as f64 / (source.train.tokens + source.validation.tokens) as f64;
    assert!((0.05..0.07).contains(&share), "{share}");
    let lines = |split| {
        let ids = read_tokens(&run.join(source.file_name(split)));
        let text = manifest.load_tokenizer(&run).unwrap().decode(&ids).unwrap();
        text.lines().filter(|line| line.len() > 100).map(String::from).collect::<BTreeSet<_>>()
    };
    let (train, held_out) = (lines(Split::Train), lines(Split::Validation));
    assert!(!held_out.is_empty() && train.is_disjoint(&held_out), "a held-out line is trained on");
}

#[test]
fn documents_of_one_pattern_all_stay() {
    let dir = tempdir().unwrap();
    let folder = dir.path().join("text");
    for n in 0..100 {
        write(&folder, &format!("{n}.txt"), format!("{} {n}", document(0).repeat(4)));
    }
    let options =
        DataOptions { validation_fraction: 0.05, ..options(dir.path(), vec![source("s", &folder)]) };
    let manifest = prepare_16(&options, &dir.path().join("run")).unwrap().manifest;
    let near = manifest.sources[0].near_duplicates;
    assert!(!near.left_out && near.documents > 90, "{near:?}");
    assert!(manifest.sources[0].train.tokens > 10 * manifest.sources[0].validation.tokens);
}

#[test]
fn a_file_that_changes_while_it_is_read_is_refused_by_name() {
    let dir = tempdir().unwrap();
    let path = write(dir.path(), "growing.jsonl", jsonl(0..400));
    let options = options(dir.path(), vec![source("s", &path)]);
    let mut appended = false;
    let mut append = |progress: volary_data::Progress| {
        if progress.stage == PreparationStage::Tokenizing && !std::mem::replace(&mut appended, true) {
            let mut file = OpenOptions::new().append(true).open(&path).unwrap();
            std::io::Write::write_all(&mut file, jsonl(400..401).as_bytes()).unwrap();
        }
    };
    let error = prepare(&options, 16, &dir.path().join("run"), &mut append).unwrap_err().to_string();
    assert!(error.contains("growing.jsonl has changed while it was read"), "{error}");
    prepare_16(&options, &dir.path().join("run")).unwrap();
}

#[test]
fn a_preparation_that_was_cut_off_goes_on_and_gives_the_same_bytes() {
    let dir = tempdir().unwrap();
    let a = write(dir.path(), "a.jsonl", jsonl(0..600));
    let b = write(dir.path(), "b.jsonl", jsonl(600..1200));
    let mut options = options(dir.path(), vec![source("a", &a), source("b", &b)]);
    options.duplicates = Some(DuplicateOptions::default());
    let names =
        ["a.train.tokens", "a.validation.tokens", "b.train.tokens", "tokenizer.json", "manifest.json"];
    let files = |run: &Path| names.map(|name| fs::read(run.join(name)).unwrap());
    let elsewhere = DataOptions { cache: Some(dir.path().join("elsewhere")), ..options.clone() };
    let whole = dir.path().join("whole");
    prepare_16(&elsewhere, &whole).unwrap();

    // The process ends in every stage, one after the other, and each attempt goes further.
    let run = dir.path().join("run");
    let mut furthest = PreparationStage::Reading;
    for stage in
        [PreparationStage::Filtering, PreparationStage::TrainingTokenizer, PreparationStage::Tokenizing]
    {
        let mut progress = |now: volary_data::Progress| {
            let is_second_source = now.done_bytes > fs::metadata(&a).unwrap().len() / 2;
            let is_late = stage != PreparationStage::Tokenizing || is_second_source;
            assert!(now.stage >= furthest || now.stage == PreparationStage::Reading, "{:?} again", now.stage);
            assert!(!(now.stage == stage && is_late && now.done_bytes > 0), "the process ends");
        };
        let attempt = || prepare(&options, 16, &run, &mut progress);
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(attempt)).unwrap_err();
        furthest = stage;
    }
    assert!(!prepare_16(&options, &run).unwrap().from_cache);
    assert_eq!(files(&run), files(&whole));
    let kept: Vec<_> = fs::read_dir(dir.path().join("cache/data")).unwrap().flatten().collect();
    assert_eq!(kept.len(), 1, "{kept:?}");
    let names: BTreeSet<_> =
        fs::read_dir(kept[0].path()).unwrap().flatten().map(|entry| entry.file_name()).collect();
    assert_eq!(names.len(), 6, "{names:?}");
}
