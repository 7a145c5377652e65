//! Zero-, one- and few-shot scores of a model on tasks (GLaM, section 5; GPT-3, arXiv 2005.14165, section
//! 2.4).
//!
//! A task is a file of JSON lines; what a record has tells what it asks:
//!
//! | fields | task | metrics |
//! | --- | --- | --- |
//! | `prompt`, `choices`, `answer` (an index) | multiple choice | accuracy: plain, per token, per byte |
//! | `prompt`, `answers` (one or several) | completion | exact match and F1 of the greedy line |
//! | `text` | text | perplexity per token, byte and word |
//!
//! Other fields are ignored. Prompts, answers and the log-likelihood of an answer are treated as in the
//! lm-evaluation-harness: prompt and answer are joined by a space, spaces at the end of a prompt count to the
//! answer, and both are tokenized together.
//!
//! | file | content |
//! | --- | --- |
//! | `task` | reading task files; prompts with examples |
//! | `likelihood` | log-likelihoods of answers and texts |
//! | `answers` | exact match and F1 |
//! | `report` | means, standard errors, and the table |

mod answers;
mod likelihood;
mod report;
mod task;

pub use likelihood::{Likelihood, Scorer};
pub use report::{Estimate, Metric, Report};
pub use task::{Record, Task, find_tasks};

use crate::error::Result;
use crate::generator::{Generator, Request};
use crate::limits::EVALUATED_SEQUENCES;
use likelihood::Question;
use std::rc::Rc;
use task::{Choice, Completion, Kind};
use volary_data::Tokenizer;
use volary_model::decoder::Decoder;
use volary_model::sampling::Sampling;

/// How tasks are posed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Examples with their answers before each question, at most [`crate::limits::SHOTS`].
    pub shots: usize,
    /// The seed of the choice of examples.
    pub seed: u64,
    /// The maximum number of tokens of a completion.
    pub max_tokens: usize,
}

/// Scores models on tasks.
#[derive(Debug)]
pub struct Evaluator {
    decoder: Rc<Decoder>,
    tokenizer: Tokenizer,
    settings: Settings,
}

impl Evaluator {
    /// An evaluator of a model.
    #[must_use]
    pub fn new(decoder: Rc<Decoder>, tokenizer: Tokenizer, settings: Settings) -> Self {
        Self { decoder, tokenizer, settings }
    }

    /// The scores on a task. `progress` is told how many of its records are done.
    ///
    /// # Errors
    /// [`crate::Error::Model`] when libtorch fails or the model is broken; [`crate::Error::Tokenizer`].
    pub fn evaluate(&self, task: &Task, mut progress: impl FnMut(usize)) -> Result<Report> {
        let shots = self.settings.shots;
        let mut report = Report::new(task, if matches!(task.kind, Kind::Texts(_)) { 0 } else { shots });
        let mut scorer = Scorer::new(&self.decoder, &self.tokenizer)?;
        match &task.kind {
            Kind::Choices(records) => {
                for (at, record) in records.iter().enumerate() {
                    let prompt = task.prompt(at, self.settings.shots, self.settings.seed);
                    let scores = self.choice(&mut scorer, &prompt, record)?;
                    report.add_choice(record, &scores);
                    progress(at + 1);
                }
            }
            Kind::Completions(records) => {
                self.completions(task, records, &mut scorer, &mut report, progress)?
            }
            Kind::Texts(texts) => {
                for (at, text) in texts.iter().enumerate() {
                    report.add_text(text, &scorer.text(text)?);
                    progress(at + 1);
                }
            }
        }
        report.truncated = scorer.truncated();
        Ok(report.finish())
    }

    fn choice(&self, scorer: &mut Scorer<'_>, prompt: &str, record: &Choice) -> Result<Vec<Likelihood>> {
        let questions: Vec<Question> =
            record.choices.iter().map(|choice| scorer.question(prompt, choice)).collect::<Result<_>>()?;
        scorer.likelihoods(&questions)
    }

    /// Greedy continuations up to the end of the line, and the likelihood of the first answer.
    fn completions(
        &self,
        task: &Task,
        records: &[Completion],
        scorer: &mut Scorer<'_>,
        report: &mut Report,
        mut progress: impl FnMut(usize),
    ) -> Result<()> {
        let mut generator =
            Generator::new(self.decoder.clone(), self.tokenizer.clone(), EVALUATED_SEQUENCES)?;
        let Settings { shots, seed, max_tokens } = self.settings;
        let numbers: Vec<usize> = (0..records.len()).collect();
        for part in numbers.chunks(EVALUATED_SEQUENCES) {
            let mut texts = vec![String::new(); part.len()];
            let mut ids = Vec::new();
            for &at in part {
                let prompt = task.prompt(at, shots, seed);
                let question = scorer.question(&prompt, &records[at].answers[0])?;
                let likelihood = scorer.likelihoods(&[question])?;
                report.add_likelihood(&records[at].answers[0], &likelihood[0]);
                let sampling = Sampling { temperature: 0.0, ..Sampling::default() };
                let prompt = scorer.prompt(&prompt)?;
                let stop = vec!["\n".to_owned()];
                let request = Request { stop, ..Request::new(prompt, max_tokens, sampling) };
                ids.push(generator.submit(request)?);
            }
            while !generator.is_idle() {
                for piece in generator.step()? {
                    if let Some(at) = ids.iter().position(|id| *id == piece.request) {
                        texts[at].push_str(&piece.text);
                    }
                }
            }
            for (&at, text) in part.iter().zip(&texts) {
                report.add_completion(&records[at], text);
            }
            progress(part.last().map_or(0, |at| at + 1));
        }
        Ok(())
    }
}
