//! `volary generate`: continues prompts with a trained model, in this process.

use crate::arguments::InvalidArgument;
use crate::limits::GENERATED_SLOTS_MAX;
use crate::output;
use crate::trained::{ModelArgs, Trained};
use std::rc::Rc;
use volary_inference::{Generator, Request, RequestId};
use volary_model::sampling::Sampling;

/// Continue prompts with a trained model.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  volary generate --run runs/quickstart --prompt 'pub fn new('
  volary generate --run runs/quickstart --prompt '# ' --temperature 0 --max-tokens 40
  volary generate --run runs/quickstart --prompt 'fn a' --prompt 'fn b' --stop '}' --top-p 0.9")]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// The text to continue; may be given several times.
    #[arg(long, required = true)]
    prompt: Vec<String>,
    /// The maximum number of new tokens.
    #[arg(long, default_value_t = 64)]
    max_tokens: usize,
    /// Sampling temperature: 0 takes the most likely token, 1 samples from the model's distribution.
    #[arg(long, default_value_t = 0.8, value_parser = temperature, allow_negative_numbers = true)]
    temperature: f64,
    /// Draw from this many of the most likely tokens; 0 for all.
    #[arg(long, default_value_t = 0)]
    top_k: usize,
    /// Draw from the most likely tokens that together have this probability.
    #[arg(long, default_value_t = 1.0, value_parser = probability)]
    top_p: f64,
    /// Divide the logits of tokens that occurred before by this; 1 changes nothing.
    #[arg(long, default_value_t = 1.0, value_parser = penalty)]
    repetition_penalty: f64,
    /// End the text before this string; may be given several times.
    #[arg(long)]
    stop: Vec<String>,
    /// The seed of sampling.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Continuations per prompt.
    #[arg(short, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=64))]
    n: u64,
}

fn number(text: &str, is_good: impl Fn(f64) -> bool, expected: &'static str) -> Result<f64, InvalidArgument> {
    match text.parse::<f64>() {
        Ok(value) if value.is_finite() && is_good(value) => Ok(value),
        _ => Err(InvalidArgument::new(expected)),
    }
}

fn temperature(text: &str) -> Result<f64, InvalidArgument> {
    number(text, |value| value >= 0.0, "a number that is not negative")
}

fn probability(text: &str) -> Result<f64, InvalidArgument> {
    number(text, |value| (0.0..=1.0).contains(&value), "a number from 0 to 1")
}

fn penalty(text: &str) -> Result<f64, InvalidArgument> {
    number(text, |value| value > 0.0, "a positive number")
}

/// Runs the command. One continuation appears as it grows, several in their order as they are complete.
///
/// # Errors
/// When there is no such run or checkpoint, the tokenizer does not fit it, or libtorch fails.
pub fn run(args: Args) -> anyhow::Result<()> {
    let trained = Trained::open(&args.model)?;
    let count = args.prompt.len() * args.n as usize;
    let prompts: Vec<Vec<u32>> =
        args.prompt.iter().map(|prompt| trained.prompt(prompt)).collect::<anyhow::Result<_>>()?;
    let mut generator =
        Generator::new(Rc::new(trained.decoder), trained.tokenizer, count.min(GENERATED_SLOTS_MAX))?;
    let mut texts = Vec::with_capacity(count);
    for (prompt, tokens) in args.prompt.iter().zip(&prompts) {
        for choice in 0..args.n {
            let request = args.request(tokens.clone(), choice);
            texts.push(Growing { id: generator.submit(request)?, text: prompt.clone(), is_complete: false });
        }
    }
    if let [only] = texts.as_slice() {
        output::text(format_args!("{}", only.text))?;
    }
    let mut printed = 0;
    while !generator.is_idle() {
        for piece in generator.step()? {
            if count == 1 {
                output::text(format_args!("{}", piece.text))?;
                continue;
            }
            let Some(of) = texts.iter_mut().find(|text| text.id == piece.request) else { continue };
            of.text.push_str(&piece.text);
            of.is_complete = piece.finish.is_some();
        }
        while let Some(text) = texts.get(printed).filter(|text| text.is_complete) {
            let separator = if printed == 0 { "" } else { "---\n" };
            output::line(format_args!("{separator}{}", text.text))?;
            printed += 1;
        }
    }
    if count == 1 {
        output::line(format_args!(""))?;
    }
    Ok(())
}

/// A continuation that is not complete yet.
struct Growing {
    id: RequestId,
    text: String,
    is_complete: bool,
}

impl Args {
    fn request(&self, prompt: Vec<u32>, choice: u64) -> Request {
        let sampling = Sampling {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            repetition_penalty: self.repetition_penalty,
            seed: self.seed,
            choice,
            ..Sampling::default()
        };
        Request { stop: self.stop.clone(), ..Request::new(prompt, self.max_tokens, sampling) }
    }
}
