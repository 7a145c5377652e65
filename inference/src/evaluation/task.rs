//! Task files and the prompts of their records.

use crate::error::{Error, Result};
use crate::limits::TASK_LINE_BYTES;
use serde::Deserialize;
use std::fs;
use std::path::{Path, PathBuf};
use volary_core::random::{Purpose, Stream};

/// What separates examples from each other and from the question.
const BETWEEN_EXAMPLES: &str = "\n\n";

/// A task: the records of one file.
#[derive(Clone, Debug, PartialEq)]
pub struct Task {
    /// The name of the file without its extension.
    pub name: String,
    pub(super) kind: Kind,
}

/// The records of a task, all of one kind.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Kind {
    Choices(Vec<Choice>),
    Completions(Vec<Completion>),
    Texts(Vec<String>),
}

/// A question with several answers, one of which is right.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Choice {
    pub(super) prompt: String,
    pub(super) choices: Vec<String>,
    pub(super) answer: usize,
}

/// A prompt with the right continuations.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Completion {
    pub(super) prompt: String,
    /// At least one.
    pub(super) answers: Vec<String>,
}

/// A line of a task file.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
pub struct Record {
    /// The text before an answer.
    pub prompt: Option<String>,
    /// The answers to choose from.
    pub choices: Option<Vec<String>>,
    /// The index of the right choice, from 0.
    pub answer: Option<usize>,
    /// The right completions.
    pub answers: Option<OneOrMany>,
    /// A text.
    pub text: Option<String>,
}

/// A string or a list of strings.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(untagged)]
pub enum OneOrMany {
    /// One string.
    One(String),
    /// Several.
    Many(Vec<String>),
}

/// One record, checked.
enum Checked {
    Choice(Choice),
    Completion(Completion),
    Text(String),
}

impl Task {
    /// Reads a task file.
    ///
    /// # Errors
    /// [`Error::Read`]; [`Error::Record`] with file and line for a record that is not JSON, lacks a field or
    /// is of another kind than those before it; [`Error::NoTask`] for a file without records.
    pub fn read(path: &Path) -> Result<Self> {
        let read = |source| Error::Read { path: path.into(), source };
        let text = fs::read_to_string(path).map_err(read)?;
        let fail = |line: usize, reason: String| Error::Record { path: path.into(), line, reason };
        let mut kind = None;
        for (at, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
            if line.len() > TASK_LINE_BYTES {
                let reason = format!("a line of {} bytes: expected at most {TASK_LINE_BYTES}", line.len());
                return Err(fail(at + 1, reason));
            }
            let record: Record =
                serde_json::from_str(line).map_err(|error| fail(at + 1, describe(&error)))?;
            let record = record.check().map_err(|reason| fail(at + 1, reason))?;
            add(&mut kind, record).map_err(|reason| fail(at + 1, reason))?;
        }
        let kind =
            kind.ok_or_else(|| Error::NoTask { path: path.into(), reason: "has no records".into() })?;
        let name = path.file_stem().map_or_else(String::new, |stem| stem.to_string_lossy().into_owned());
        Ok(Self { name, kind })
    }

    /// The number of records.
    #[must_use]
    pub fn len(&self) -> usize {
        match &self.kind {
            Kind::Choices(records) => records.len(),
            Kind::Completions(records) => records.len(),
            Kind::Texts(texts) => texts.len(),
        }
    }

    /// Whether it has no records; a task that was read has some.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The prompt of a record after `shots` other records of the task with their answers.
    pub(super) fn prompt(&self, at: usize, shots: usize, seed: u64) -> String {
        let mut prompt = String::new();
        for example in examples(self.len(), at, shots, seed) {
            let (question, answer) = self.example(example);
            prompt.push_str(&join(question, answer));
            prompt.push_str(BETWEEN_EXAMPLES);
        }
        prompt.push_str(self.example(at).0);
        prompt
    }

    /// All text of a record: prompt and answers, or the text.
    pub(crate) fn text(&self, at: usize) -> String {
        let parts = |prompt: &String, answers: &[String]| format!("{prompt} {}", answers.join(" "));
        match &self.kind {
            Kind::Choices(records) => parts(&records[at].prompt, &records[at].choices),
            Kind::Completions(records) => parts(&records[at].prompt, &records[at].answers),
            Kind::Texts(texts) => texts[at].clone(),
        }
    }

    /// A record's prompt and right answer.
    fn example(&self, at: usize) -> (&str, &str) {
        match &self.kind {
            Kind::Choices(records) => (&records[at].prompt, &records[at].choices[records[at].answer]),
            Kind::Completions(records) => (&records[at].prompt, &records[at].answers[0]),
            Kind::Texts(_) => ("", ""),
        }
    }
}

/// The numbers of `shots` records other than `at`, or of all others where there are fewer; the same for the
/// same seed.
fn examples(records: usize, at: usize, shots: usize, seed: u64) -> Vec<usize> {
    let mut stream = Stream::new(seed, Purpose::Examples, &[at as u64]);
    let mut others: Vec<usize> = (0..records).filter(|other| *other != at).collect();
    let shots = shots.min(others.len());
    for drawn in 0..shots {
        let left = (others.len() - drawn) as u64;
        others.swap(drawn, drawn + stream.below(left) as usize);
    }
    others.truncate(shots);
    others
}

/// A prompt and what follows it, with a space between them unless either has white space there.
pub(super) fn join(prompt: &str, answer: &str) -> String {
    let has_space =
        prompt.is_empty() || prompt.ends_with(char::is_whitespace) || answer.starts_with(char::is_whitespace);
    format!("{prompt}{}{answer}", if has_space { "" } else { " " })
}

impl Record {
    fn check(self) -> std::result::Result<Checked, String> {
        let Self { prompt, choices, answer, answers, text } = self;
        match (prompt, choices, answers, text) {
            (Some(prompt), Some(choices), None, None) => check_choice(prompt, choices, answer),
            (Some(prompt), None, Some(answers), None) => {
                let answers = match answers {
                    OneOrMany::One(answer) => vec![answer],
                    OneOrMany::Many(answers) => answers,
                };
                if answers.is_empty() || answers.iter().any(|answer| answer.trim().is_empty()) {
                    return Err("`answers` is empty or has an empty string".into());
                }
                Ok(Checked::Completion(Completion { prompt, answers }))
            }
            (None, None, None, Some(text)) if text.is_empty() => Err("`text` is empty".into()),
            (None, None, None, Some(text)) => Ok(Checked::Text(text)),
            (None, _, _, None) => Err("no field `prompt`, and no field `text`".into()),
            (Some(_), None, None, None) => Err("no field `choices` or `answers` beside `prompt`".into()),
            _ => {
                Err("expected `prompt` with either `choices` and `answer` or `answers`, or `text` alone"
                    .into())
            }
        }
    }
}

fn check_choice(
    prompt: String,
    choices: Vec<String>,
    answer: Option<usize>,
) -> std::result::Result<Checked, String> {
    let Some(answer) = answer else { return Err("no field `answer` beside `choices`".into()) };
    if choices.len() < 2 || choices.iter().any(String::is_empty) {
        return Err("expected at least two `choices`, none of them empty".into());
    }
    if answer >= choices.len() {
        let last = choices.len() - 1;
        return Err(format!("`answer` is {answer}: expected 0 to {last}, the index of a choice"));
    }
    Ok(Checked::Choice(Choice { prompt, choices, answer }))
}

/// Adds a record to those before it.
fn add(kind: &mut Option<Kind>, record: Checked) -> std::result::Result<(), String> {
    match (kind, record) {
        (Some(Kind::Choices(records)), Checked::Choice(record)) => records.push(record),
        (Some(Kind::Completions(records)), Checked::Completion(record)) => records.push(record),
        (Some(Kind::Texts(texts)), Checked::Text(text)) => texts.push(text),
        (Some(_), _) => return Err("a record of another kind than those before it".into()),
        (kind, Checked::Choice(record)) => *kind = Some(Kind::Choices(vec![record])),
        (kind, Checked::Completion(record)) => *kind = Some(Kind::Completions(vec![record])),
        (kind, Checked::Text(text)) => *kind = Some(Kind::Texts(vec![text])),
    }
    Ok(())
}

/// A JSON error without its line, which is always the first.
fn describe(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let text = text.split(" at line 1").next().unwrap_or_default();
    format!("not a record: {text} at column {}", error.column())
}

/// The task files at a path: the file, or all `.jsonl` files of the folder by name.
///
/// # Errors
/// [`Error::Read`]; [`Error::NoTask`] for a folder without such files.
pub fn find_tasks(path: &Path) -> Result<Vec<PathBuf>> {
    let read = |source| Error::Read { path: path.into(), source };
    if !fs::metadata(path).map_err(read)?.is_dir() {
        return Ok(vec![path.into()]);
    }
    let mut files = Vec::new();
    for entry in fs::read_dir(path).map_err(read)? {
        let file = entry.map_err(read)?.path();
        if file.extension().is_some_and(|extension| extension == "jsonl") {
            files.push(file);
        }
    }
    if files.is_empty() {
        return Err(Error::NoTask { path: path.into(), reason: "has no .jsonl files".into() });
    }
    files.sort();
    Ok(files)
}

#[cfg(test)]
#[path = "task_tests.rs"]
mod tests;
