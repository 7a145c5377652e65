//! The use of a trained model: text, scores, and export.
#![expect(clippy::expect_used, reason = "tests")]

mod common;

use common::{World, python_with, text, volary};
use std::process::{Command, Output};
use std::sync::LazyLock;

/// A run whose model has seen a few steps.
static TRAINED: LazyLock<World> = LazyLock::new(|| {
    let world = World::new();
    world.run_train(&["--set", "training.steps=12", "--nodes", "1", "--quiet"]);
    world
});

fn run(args: &[&str]) -> Output {
    volary().current_dir(TRAINED.dir.path()).args(args).output().expect("the binary")
}

/// Standard output of a command that succeeds.
fn ok(args: &[&str]) -> String {
    let output = run(args);
    assert!(output.status.success(), "{args:?}: {}", text(&output.stderr));
    text(&output.stdout)
}

/// The one line on standard error of a command that fails.
fn fails(args: &[&str]) -> String {
    let output = run(args);
    let error = text(&output.stderr);
    assert!(!output.status.success(), "{args:?} succeeded: {}", text(&output.stdout));
    assert!(!error.contains("panicked"), "{error}");
    error
}

fn generate(more: &[&str]) -> String {
    ok(&[&["generate", "--run", "runs/tiny", "--max-tokens", "12"], more].concat())
}

#[test]
fn several_prompts_give_what_each_gives_alone() {
    let alone =
        ["the lane", "every expert"].map(|prompt| generate(&["--prompt", prompt, "--temperature", "0"]));
    let together = generate(&["--prompt", "the lane", "--prompt", "every expert", "--temperature", "0"]);
    assert_eq!(together, alone.join("---\n"));
    let choices = generate(&["--prompt", "the lane", "-n", "3", "--temperature", "2"]);
    let mut choices: Vec<&str> = choices.split("---\n").collect();
    assert!(choices.iter().all(|choice| choice.starts_with("the lane")), "{choices:?}");
    choices.sort_unstable();
    choices.dedup();
    assert_eq!(choices.len(), 3);
}

#[test]
fn a_text_ends_before_a_stop_string() {
    let whole = generate(&["--prompt", "the lane", "--temperature", "0"]);
    let stop: String = whole.chars().skip("the lane".len() + 3).take(2).collect();
    let at = "the lane".len() + whole["the lane".len()..].find(&stop).expect("a part of the text");
    let stopped = generate(&["--prompt", "the lane", "--temperature", "0", "--stop", &stop]);
    assert_eq!(stopped, format!("{}\n", &whole[..at]));
}

#[test]
fn restrictions_to_the_most_likely_token_are_greedy() {
    let greedy = generate(&["--prompt", "a step", "--temperature", "0"]);
    for restriction in [["--top-k", "1"], ["--top-p", "0"]] {
        let drawn = generate(&[&["--prompt", "a step", "--temperature", "1"], &restriction[..]].concat());
        assert_eq!(drawn, greedy, "{restriction:?}");
    }
    let penalized = generate(&["--prompt", "a step", "--temperature", "0", "--repetition-penalty", "1e6"]);
    assert_ne!(penalized, greedy);
    for [option, bad] in
        [["--top-p", "1.5"], ["--repetition-penalty", "0"], ["--temperature", "x"], ["-n", "0"]]
    {
        let error = fails(&["generate", "--run", "runs/tiny", "--prompt", "x", option, bad]);
        assert!(error.contains(bad) && error.contains(option), "{error}");
    }
}

#[test]
fn tasks_are_scored_as_a_table_and_as_json() {
    let tasks = TRAINED.path("tasks");
    std::fs::create_dir_all(&tasks).expect("a folder");
    let choice = r#"{"prompt": "the lane", "choices": ["runs a step", "zzzz qqqq"], "answer": 0}"#;
    std::fs::write(tasks.join("words.jsonl"), [choice; 3].join("\n")).expect("a file");
    let page = std::fs::read_to_string(TRAINED.path("corpus/7.txt")).expect("a document");
    let record = serde_json::json!({ "text": page }).to_string();
    std::fs::write(tasks.join("pages.jsonl"), record + "\n{\"text\": \"a step\"}\n").expect("a file");
    let table = ok(&["eval", "--run", "runs/tiny", "--tasks", "tasks"]);
    for part in ["checkpoint: step 12", "words", "accuracy_per_byte", "pages", "perplexity_per_word"] {
        assert!(table.contains(part), "{part}: {table}");
    }
    let json = ok(&["eval", "--run", "runs/tiny", "--tasks", "tasks", "--shots", "1", "--json"]);
    let json: serde_json::Value = serde_json::from_str(&json).expect("JSON");
    let [pages, words] = json["tasks"].as_array().expect("tasks").as_slice() else { panic!("{json}") };
    // A model that has seen the words of the corpus, and no others.
    assert_eq!(words["metrics"]["accuracy"]["value"], 1.0, "{json}");
    assert_eq!((&words["shots"], &words["records"], &pages["shots"]), (&1.into(), &3.into(), &0.into()));
    let perplexity = pages["metrics"]["perplexity_per_token"]["value"].as_f64().expect("a number");
    assert!(1.0 < perplexity && perplexity < 320.0, "{json}");
}

#[test]
fn a_bad_task_file_is_one_line_with_file_and_line() {
    let path = TRAINED.path("bad.jsonl");
    std::fs::write(&path, "{\"prompt\": \"a\", \"answers\": \"b\"}\n{\"prompt\": \"a\"}\n").expect("a file");
    let error = fails(&["eval", "--run", "runs/tiny", "--tasks", "bad.jsonl"]);
    assert!(error.contains("bad.jsonl:2: no field `choices` or `answers`"), "{error}");
    assert_eq!(error.lines().count(), 1, "{error}");
    assert!(fails(&["eval", "--run", "runs/tiny", "--tasks", "none.jsonl"]).contains("none.jsonl"));
    assert!(fails(&["eval", "--run", "runs/tiny", "--tasks", "corpus"]).contains("no .jsonl files"));
}

#[test]
fn an_export_is_complete_or_not_there() {
    assert!(ok(&["export", "--format", "safetensors", "runs/tiny", "model"]).contains("step 12"));
    let folder = TRAINED.path("model");
    let mut names: Vec<_> = std::fs::read_dir(&folder)
        .expect("a folder")
        .map(|entry| entry.expect("an entry").file_name().into_string().expect("a name"))
        .collect();
    names.sort();
    let expected = [
        "README.md",
        "config.json",
        "model.safetensors",
        "run.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "validation.safetensors",
    ];
    assert_eq!(names, expected);
    let bytes = std::fs::read(folder.join("model.safetensors")).expect("a file");
    let tensors = safetensors::SafeTensors::deserialize(&bytes).expect("safetensors");
    let numbers: usize =
        tensors.tensors().iter().map(|(_, tensor)| tensor.shape().iter().product::<usize>()).sum();
    let run: serde_json::Value =
        serde_json::from_slice(&std::fs::read(folder.join("run.json")).expect("a file")).expect("JSON");
    assert_eq!(run["parameters"], numbers);
    assert_eq!(tensors.tensor("layers.0.experts.5.up").expect("an expert").shape()[0], 32);
    assert!(ok(&["digest", "runs/tiny"]).contains(run["digest"].as_str().expect("a digest")));
    let error = fails(&["export", "--format", "safetensors", "runs/tiny", "model"]);
    assert!(error.contains("model exists"), "{error}");
    assert!(fails(&["export", "--format", "safetensors", "runs/none", "other"]).contains("runs/none"));
    assert!(!TRAINED.path("other").exists());
}

#[test]
fn an_exported_model_has_the_same_validation_loss_in_pytorch() {
    let Some(python) = python_with("torch, safetensors.torch") else { return };
    ok(&["export", "--format", "safetensors", "runs/tiny", "for-python"]);
    let program = concat!(env!("CARGO_MANIFEST_DIR"), "/../examples/export/glam.py");
    let output = Command::new(python).arg(program).arg(TRAINED.path("for-python")).output().expect("python");
    let line = text(&output.stdout);
    let losses: Vec<f64> =
        line.split(|c: char| !c.is_ascii_digit() && c != '.').filter_map(|part| part.parse().ok()).collect();
    let [here, training] = losses[..] else { panic!("{line}{}", text(&output.stderr)) };
    // Sums of f32 in other orders.
    assert!((here - training).abs() < 1e-4, "{line}");
}

#[test]
fn a_corpus_that_is_prepared_before_a_run_is_the_runs_corpus() {
    let world = World::new();
    let here = |args: &[&str]| {
        let output = volary().current_dir(world.dir.path()).args(args).output().expect("the binary");
        assert!(output.status.success(), "{args:?}: {}", text(&output.stderr));
        text(&output.stdout)
    };
    assert!(
        here(&["data", "prepare", "tiny.toml", "--out", "corpus.out"]).contains("the tokens are prepared")
    );
    assert!(here(&["data", "prepare", "tiny.toml"]).contains("the cache had the tokens already"));
    assert!(
        here(&["data", "prepare", "tiny.toml", "--out", "corpus.out"]).contains("the folder had the tokens")
    );
    world.run_train(&["--nodes", "1", "--quiet"]);
    for name in ["words.train.tokens", "words.validation.tokens", "tokenizer.json"] {
        let [prepared, used] = ["corpus.out", "runs/tiny/data"]
            .map(|folder| std::fs::read(world.path(folder).join(name)).expect("a file"));
        assert!(prepared == used, "{name} differs");
    }
}

#[test]
fn questions_that_the_corpus_has_are_listed_with_their_place() {
    let page = std::fs::read_to_string(TRAINED.path("corpus/9.txt")).expect("a document");
    let words: Vec<&str> = page.split_whitespace().collect();
    let known = serde_json::json!({ "prompt": words[5..15].join(" "), "answers": words[15..20].join(" ") });
    let unknown = serde_json::json!({ "prompt": "one two three four five six", "answers": "seven eight nine ten eleven twelve thirteen" });
    std::fs::write(TRAINED.path("exam.jsonl"), format!("{unknown}\n{known}\n")).expect("a file");
    let json = ok(&["data", "contamination", "tiny.toml", "--tasks", "exam.jsonl", "--json"]);
    let json: serde_json::Value = serde_json::from_str(&json).expect("JSON");
    let [found] = json[0]["found"].as_array().expect("a list").as_slice() else { panic!("{json}") };
    assert_eq!((&found["record"], &found["share"]), (&2.into(), &1.0.into()), "{json}");
    assert!(found["path"].as_str().is_some_and(|path| path.ends_with("corpus/9.txt")), "{json}");
    let table = ok(&["data", "contamination", "tiny.toml", "--tasks", "exam.jsonl", "--words", "10"]);
    assert!(table.contains("exam record 2: 100 %"), "{table}");
}
