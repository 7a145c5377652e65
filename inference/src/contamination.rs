//! N-grams of words that tasks share with training text (GPT-3, arXiv 2005.14165, appendix C).
//!
//! A model that has read a question may know its answer by heart. A word is a run of letters and digits, in
//! lower case. A record with fewer words than an n-gram is not compared.

use crate::evaluation::Task;
use serde::Serialize;
use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use volary_data::Document;

/// The n-grams that the records of a task share with training text.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Contamination {
    /// The task's name.
    pub task: String,
    /// The number of its records.
    pub records: usize,
    /// Records that are too short to be compared.
    pub short: usize,
    /// Records that share n-grams, in their order.
    pub found: Vec<Found>,
}

/// A record that shares n-grams with training text.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Found {
    /// The number of the record in its task, from 1.
    pub record: usize,
    /// The share of its n-grams that occur in the training text.
    pub share: f64,
    /// The file with the first of them that was found.
    pub path: String,
    /// Where in the file that document is.
    pub place: String,
    /// That n-gram.
    pub words: String,
}

/// Looks for the n-grams of tasks in documents.
#[derive(Debug)]
pub struct Search {
    words_per_ngram: usize,
    tasks: Vec<(String, Vec<Searched>)>,
    /// Where the n-gram of a hash occurs in the tasks.
    index: HashMap<u64, Vec<At>>,
}

/// An n-gram of a task.
#[derive(Clone, Copy, Debug)]
struct At {
    task: usize,
    record: usize,
    ngram: usize,
}

/// A record and what was found of it.
#[derive(Debug)]
struct Searched {
    words: Vec<String>,
    /// Of each n-gram, whether it was found.
    is_found: Vec<bool>,
    first: Option<(String, String, usize)>,
}

impl Search {
    /// A search for the n-grams of `words_per_ngram` words, at least 1, of some tasks.
    #[must_use]
    pub fn new(tasks: &[Task], words_per_ngram: usize) -> Self {
        let words_per_ngram = words_per_ngram.max(1);
        let mut index: HashMap<u64, Vec<At>> = HashMap::new();
        let mut searched = Vec::new();
        for (task, of) in tasks.iter().enumerate() {
            let mut records = Vec::new();
            for record in 0..of.len() {
                let words = words(&of.text(record));
                let hashes: Vec<u64> = words.iter().map(|word| hash(word)).collect();
                let mut count = 0;
                for (ngram, hash) in ngrams(&hashes, words_per_ngram).enumerate() {
                    index.entry(hash).or_default().push(At { task, record, ngram });
                    count += 1;
                }
                records.push(Searched { words, is_found: vec![false; count], first: None });
            }
            searched.push((of.name.clone(), records));
        }
        Self { words_per_ngram, tasks: searched, index }
    }

    /// Looks through a document.
    pub fn add(&mut self, document: &Document) {
        let hashes: Vec<u64> = words(&document.text).iter().map(|word| hash(word)).collect();
        for ngram in ngrams(&hashes, self.words_per_ngram) {
            let Some(places) = self.index.get(&ngram) else { continue };
            for at in places {
                let record = &mut self.tasks[at.task].1[at.record];
                record.is_found[at.ngram] = true;
                record.first.get_or_insert_with(|| {
                    let origin = &document.origin;
                    (origin.path.display().to_string(), origin.place.to_string(), at.ngram)
                });
            }
        }
    }

    /// What was found.
    #[must_use]
    pub fn finish(self) -> Vec<Contamination> {
        let length = self.words_per_ngram;
        let of_task = |(task, records): (String, Vec<Searched>)| Contamination {
            task,
            records: records.len(),
            short: records.iter().filter(|record| record.is_found.is_empty()).count(),
            found: records.iter().enumerate().filter_map(|(at, record)| record.found(at, length)).collect(),
        };
        self.tasks.into_iter().map(of_task).collect()
    }
}

impl Searched {
    fn found(&self, at: usize, length: usize) -> Option<Found> {
        let (path, place, ngram) = self.first.clone()?;
        let found = self.is_found.iter().filter(|found| **found).count();
        Some(Found {
            record: at + 1,
            share: found as f64 / self.is_found.len() as f64,
            path,
            place,
            words: self.words[ngram..ngram + length].join(" "),
        })
    }
}

/// The words of a text, in lower case.
fn words(text: &str) -> Vec<String> {
    let words = text.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty());
    words.map(str::to_lowercase).collect()
}

fn hash(word: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    word.hash(&mut hasher);
    hasher.finish()
}

/// The hashes of all n-grams of words with these hashes: polynomials modulo 2^64, each from the one before.
fn ngrams(words: &[u64], length: usize) -> impl Iterator<Item = u64> {
    /// Odd, so that no word loses bits.
    const BASE: u64 = 0x9e37_79b9_7f4a_7c15;
    let oldest = (1..length).fold(1_u64, |power, _| power.wrapping_mul(BASE));
    let mut sum = 0_u64;
    words.iter().enumerate().filter_map(move |(at, word)| {
        if at >= length {
            sum = sum.wrapping_sub(words[at - length].wrapping_mul(oldest));
        }
        sum = sum.wrapping_mul(BASE).wrapping_add(*word);
        (at + 1 >= length).then_some(sum)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use volary_data::error::Place;
    use volary_data::source::Origin;

    fn document(text: &str) -> Document {
        let origin = Origin { path: "corpus/a.txt".into(), place: Place::Line(3) };
        Document { text: text.into(), replaced: 0, origin }
    }

    fn task(records: &str) -> Task {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t.jsonl");
        std::fs::write(&path, records).unwrap();
        Task::read(&path).unwrap()
    }

    #[test]
    fn shared_ngrams_are_found_with_their_place() {
        let records = concat!(
            "{\"prompt\": \"The Lazy dog\", \"answers\": \"sleeps all day, says Ann\"}\n",
            "{\"prompt\": \"Nothing of this\", \"answers\": \"is anywhere else\"}\n",
            "{\"prompt\": \"the\", \"answers\": \"dog\"}\n",
        );
        let mut search = Search::new(&[task(records)], 4);
        search.add(&document("An unrelated text."));
        search.add(&document("I heard: the LAZY dog sleeps, all day; or so."));
        let found = search.finish();
        assert_eq!((found[0].records, found[0].short, found[0].found.len()), (3, 1, 1));
        // Of eight words five n-grams: the first three occur.
        let expected = Found {
            record: 1,
            share: 0.6,
            path: "corpus/a.txt".into(),
            place: "line 3".into(),
            words: "the lazy dog sleeps".into(),
        };
        assert_eq!(found[0].found, [expected]);
    }

    proptest! {
        /// As a comparison of every n-gram with every other.
        #[test]
        fn exactly_the_shared_ngrams_are_found(
            question in prop::collection::vec("[ab]", 1..9),
            text in prop::collection::vec("[ab]", 0..30),
            length in 1..5usize,
        ) {
            let record = serde_json::json!({"text": question.join(" ")}).to_string();
            let mut search = Search::new(&[task(&record)], length);
            search.add(&document(&text.join("-")));
            let found = search.finish();
            let ngrams: Vec<&[String]> = question.windows(length).collect();
            let shared = ngrams.iter().filter(|ngram| text.windows(length).any(|other| other == **ngram)).count();
            let share = found[0].found.first().map_or(0.0, |found| found.share);
            prop_assert_eq!(found[0].short, usize::from(ngrams.is_empty()));
            if !ngrams.is_empty() {
                prop_assert_eq!(share, shared as f64 / ngrams.len() as f64);
            }
        }
    }
}
