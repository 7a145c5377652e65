//! The trained model of a run, for the commands that use it.

use crate::config::Config;
use crate::output;
use crate::rundir::checkpoint_step;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use volary_core::Step;
use volary_data::Tokenizer;
use volary_inference::{Generator, Request};
use volary_model::decoder::Decoder;
use volary_model::device;
use volary_model::sampling::Sampling;
use volary_storage::{CheckpointReader, RunDir};

/// The model of a command.
#[derive(clap::Args)]
pub(crate) struct ModelArgs {
    /// The run's directory.
    #[arg(long)]
    pub(crate) run: PathBuf,
    /// The step of the checkpoint; by default the newest one.
    #[arg(long)]
    step: Option<u64>,
    /// Device: auto, cpu or cuda:N.
    #[arg(long, default_value = "cpu")]
    pub(crate) device: String,
    /// Threads of libtorch; by default one per CPU.
    #[arg(long)]
    threads: Option<u16>,
}

/// A model and its tokenizer.
pub(crate) struct Trained {
    pub(crate) decoder: Decoder,
    pub(crate) tokenizer: Tokenizer,
    /// The run's name.
    pub(crate) run: String,
    /// The step of the checkpoint.
    pub(crate) step: Step,
}

impl Trained {
    /// Loads the model that a command names.
    ///
    /// # Errors
    /// When there is no such run or checkpoint, or the tokenizer does not fit it.
    pub(crate) fn open(args: &ModelArgs) -> anyhow::Result<Self> {
        let cpus = std::thread::available_parallelism().map_or(1, |cpus| cpus.get() as u16);
        Self::load(&args.run, args.step, &args.device, args.threads.unwrap_or(cpus))
    }

    /// Loads the model of a run, at its newest checkpoint without a `step`.
    ///
    /// # Errors
    /// As [`Trained::open`].
    pub(crate) fn load(run: &Path, step: Option<u64>, device: &str, threads: u16) -> anyhow::Result<Self> {
        device::set_threads(threads);
        let dir = RunDir::find(run)?;
        let config = Config::load(&dir.config(), &[])?;
        let reader = CheckpointReader::open(&dir)?;
        let step = checkpoint_step(&reader, run, step)?;
        let tokenizer = Tokenizer::load(&dir.tokenizer())?;
        if tokenizer.vocabulary() > config.model.vocabulary {
            anyhow::bail!(
                "{} has {} tokens, but the checkpoint's model has a vocabulary of {}",
                dir.tokenizer().display(),
                tokenizer.vocabulary(),
                config.model.vocabulary
            );
        }
        let context = config.training.sequence_length;
        let fetch = |shard| reader.read(step, shard);
        let decoder = Decoder::load(&config.model, context, device::parse(device)?, fetch)?;
        Ok(Self { decoder, tokenizer, run: config.run.name, step })
    }

    /// The tokens of a prompt; an empty one is the end of another text. The model sees no more than its
    /// context, and a note says so.
    ///
    /// # Errors
    /// When the tokenizer cannot represent the text.
    pub(crate) fn prompt(&self, text: &str) -> anyhow::Result<Vec<u32>> {
        let mut tokens = self.tokenizer.encode(text)?;
        if tokens.is_empty() {
            tokens.push(self.tokenizer.end_of_text());
        }
        let (found, context) = (tokens.len(), self.decoder.context());
        if found > context {
            output::note(format_args!(
                "the prompt has {found} tokens: the model sees the last {context}, its training sequences' length"
            ));
            tokens.drain(..found - context);
        }
        Ok(tokens)
    }

    /// The continuation of a prompt, up to the end of the text.
    ///
    /// # Errors
    /// When libtorch fails or the model's output is not finite.
    pub(crate) fn continuation(
        self,
        prompt: &str,
        max_tokens: usize,
        sampling: Sampling,
    ) -> anyhow::Result<String> {
        let prompt = self.prompt(prompt)?;
        let mut generator = Generator::new(Rc::new(self.decoder), self.tokenizer, 1)?;
        generator.submit(Request::new(prompt, max_tokens, sampling))?;
        let mut text = String::new();
        while !generator.is_idle() {
            text.extend(generator.step()?.into_iter().map(|piece| piece.text));
        }
        Ok(text)
    }
}
