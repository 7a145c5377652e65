//! Task files, good and bad, and prompts with examples.
#![expect(clippy::expect_used, reason = "tests")]

use super::*;
use std::collections::BTreeSet;

fn read(text: &str) -> Result<Task> {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("animals.jsonl");
    fs::write(&path, text).expect("a file");
    Task::read(&path)
}

#[test]
fn a_file_has_records_of_one_kind() {
    let choices = read("{\"prompt\": \"p\", \"choices\": [\"a\", \"b\"], \"answer\": 1, \"id\": 7}\n\n")
        .expect("a task");
    let record = Choice { prompt: "p".into(), choices: vec!["a".into(), "b".into()], answer: 1 };
    assert_eq!(choices, Task { name: "animals".into(), kind: Kind::Choices(vec![record]) });
    let completions =
        "{\"prompt\": \"p\", \"answers\": \"a\"}\n{\"prompt\": \"q\", \"answers\": [\"b\", \"c\"]}";
    assert_eq!(read(completions).expect("a task").len(), 2);
    assert_eq!(read("{\"text\": \"x\"}").expect("a task").kind, Kind::Texts(vec!["x".into()]));
}

#[test]
fn a_bad_record_is_one_error_with_file_and_line() {
    let good = "{\"prompt\": \"p\", \"choices\": [\"a\", \"b\"], \"answer\": 1}\n";
    for (bad, reason) in [
        ("{\"prompt\": \"p\", \"choices\": [\"a\", \"b\"]}", "no field `answer`"),
        ("{\"prompt\": \"p\", \"choices\": [\"a\", \"b\"], \"answer\": 2}", "expected 0 to 1"),
        ("{\"prompt\": \"p\", \"choices\": [\"a\", \"b\"], \"answer\": -1}", "not a record"),
        ("{\"prompt\": \"p\", \"choices\": [\"a\"], \"answer\": 0}", "at least two"),
        ("{\"prompt\": \"p\"}", "no field `choices` or `answers`"),
        ("{\"choices\": [\"a\", \"b\"], \"answer\": 0}", "no field `prompt`"),
        ("{\"prompt\": \"p\", \"answers\": []}", "`answers` is empty"),
        ("{\"text\": \"\"}", "`text` is empty"),
        ("{\"text\": \"x\"}", "another kind"),
        ("{\"text\": 5}", "expected a string"),
        ("{\"prompt\": ", "not a record"),
        ("[]", "not a record"),
    ] {
        let error = read(&format!("{good}\n{bad}\n")).expect_err(bad).to_string();
        assert!(error.contains("animals.jsonl:3: ") && error.contains(reason), "{error}");
    }
    assert!(read("\n").expect_err("no records").to_string().contains("has no records"));
    assert!(Task::read(Path::new("/none.jsonl")).expect_err("no file").to_string().contains("/none.jsonl"));
}

#[test]
fn examples_are_other_records_and_the_same_for_the_same_seed() {
    for at in 0..9 {
        let drawn = examples(9, at, 4, 3);
        assert_eq!(drawn, examples(9, at, 4, 3));
        let distinct: BTreeSet<usize> = drawn.iter().copied().collect();
        assert!(distinct.len() == 4 && !distinct.contains(&at), "{at}: {drawn:?}");
    }
    assert_eq!(examples(3, 1, 9, 3).len(), 2);
    // Every other record has its turn.
    let all: BTreeSet<usize> = (0..200).flat_map(|seed| examples(9, 0, 1, seed)).collect();
    assert_eq!(all, (1..9).collect());
}

#[test]
fn a_prompt_has_examples_with_their_right_answers() {
    let line = |n: u32| format!("{{\"prompt\": \"Q{n}\", \"choices\": [\"no\", \"A{n}\"], \"answer\": 1}}\n");
    let task = read(&(0..2).map(line).collect::<String>()).expect("a task");
    assert_eq!(task.prompt(0, 0, 1), "Q0");
    assert_eq!(task.prompt(0, 5, 1), "Q1 A1\n\nQ0");
}

#[test]
fn prompt_and_answer_are_joined_by_one_space() {
    for (prompt, answer, joined) in
        [("a", "b", "a b"), ("a ", "b", "a b"), ("a\n", "b", "a\nb"), ("a", "\nb", "a\nb"), ("", "b", "b")]
    {
        assert_eq!(join(prompt, answer), joined);
    }
}
