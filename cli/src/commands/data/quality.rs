//! `volary data quality`: trains the classifier of the quality filter, and explains its scores.

use crate::output;
use serde::Serialize;
use std::path::PathBuf;
use volary_data::quality::{
    Classifier, Contribution, Evaluation, Trained, TrainingOptions, is_kept, keep_probability, train,
};
use volary_data::{DocumentHash, Source, SourceOptions};

/// Train the quality filter's classifier, or show its scores.
#[derive(clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Train a classifier that tells curated text from other text.
    Train(TrainArgs),
    /// Score documents, with the words that weigh most.
    Score(ScoreArgs),
}

/// Train a classifier.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  volary data quality train --positive wikipedia/ --negative 'web/*.jsonl.gz' --out quality.safetensors
  volary train my.toml --set 'data.quality={ classifier = \"quality.safetensors\", sources = [\"web\"] }'")]
struct TrainArgs {
    /// Curated text: a file, a folder or a glob; may be given several times.
    #[arg(long, required = true, value_name = "PATH")]
    positive: Vec<String>,
    /// Other text, such as a sample of web pages; may be given several times.
    #[arg(long, required = true, value_name = "PATH")]
    negative: Vec<String>,
    /// The classifier's file.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// The field or column with the text of JSONL and Parquet records.
    #[arg(long, default_value = "text")]
    column: String,
    /// The longest n-gram, in words.
    #[arg(long, default_value_t = TrainingOptions::default().ngram)]
    ngram: usize,
    /// The logarithm to base 2 of the number of buckets for n-grams.
    #[arg(long, default_value_t = TrainingOptions::default().bucket_bits)]
    bucket_bits: u32,
    /// Passes over the documents.
    #[arg(long, default_value_t = TrainingOptions::default().epochs)]
    epochs: u32,
    /// The share of the documents for the evaluation.
    #[arg(long, default_value_t = TrainingOptions::default().held_out)]
    held_out: f64,
    /// The most text of each kind, in bytes: a sample of larger sources.
    #[arg(long, default_value_t = TrainingOptions::default().sample_bytes)]
    sample_bytes: u64,
    /// The shape of the filter's Pareto distribution, for the kept shares.
    #[arg(long, default_value_t = TrainingOptions::default().alpha)]
    alpha: f64,
    /// Print JSON instead of a table.
    #[arg(long)]
    json: bool,
}

/// Score documents.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  volary data quality score pages.jsonl --classifier quality.safetensors | head")]
struct ScoreArgs {
    /// Text: files, folders or globs.
    #[arg(required = true, value_name = "PATH")]
    paths: Vec<String>,
    /// The classifier's file.
    #[arg(long, value_name = "FILE")]
    classifier: PathBuf,
    /// The field or column with the text of JSONL and Parquet records.
    #[arg(long, default_value = "text")]
    column: String,
    /// The shape of the filter's Pareto distribution.
    #[arg(long, default_value_t = TrainingOptions::default().alpha)]
    alpha: f64,
    /// The number of words and n-grams to show for each document.
    #[arg(long, default_value_t = 5)]
    top: usize,
    /// Print one JSON object for each document.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Args) -> anyhow::Result<()> {
    match &args.command {
        Command::Train(args) => train_classifier(args),
        Command::Score(args) => score(args),
    }
}

fn sources(paths: &[String], column: &str) -> anyhow::Result<Vec<Source>> {
    let find = |path: &String| {
        let options = SourceOptions { column: Some(column.to_owned()), ..SourceOptions::new(path, path) };
        let mut source = Source::find(&options)?;
        source.check()?;
        Ok(source)
    };
    paths.iter().map(find).collect()
}

fn train_classifier(args: &TrainArgs) -> anyhow::Result<()> {
    let positive = sources(&args.positive, &args.column)?;
    let negative = sources(&args.negative, &args.column)?;
    let options = TrainingOptions {
        ngram: args.ngram,
        bucket_bits: args.bucket_bits,
        epochs: args.epochs,
        held_out: args.held_out,
        sample_bytes: args.sample_bytes,
        alpha: args.alpha,
    };
    let Trained { classifier, evaluation } = train(&positive, &negative, &options)?;
    classifier.save(&args.out)?;
    if args.json {
        output::line(serde_json::to_string_pretty(&evaluation)?)?;
        return Ok(());
    }
    print_evaluation(&evaluation, args.alpha)?;
    output::line(format_args!("wrote {}", args.out.display()))?;
    Ok(())
}

fn print_evaluation(evaluation: &Evaluation, alpha: f64) -> anyhow::Result<()> {
    let Evaluation { trained, positive, negative, precision, recall, area_under_curve, .. } = evaluation;
    output::line(format_args!(
        "trained on {trained} documents; of {positive} positive and {negative} negative documents held out, counted as \
         equally frequent:\n  precision {precision:.4}  recall {recall:.4}  area under the curve {area_under_curve:.4}"
    ))?;
    output::line(format_args!(
        "  kept with alpha {alpha}: {:.1} % of the positive and {:.1} % of the negative documents\n",
        100.0 * evaluation.kept_positive,
        100.0 * evaluation.kept_negative
    ))?;
    output::line("score        documents  mean score  positive")?;
    for bin in &evaluation.calibration {
        output::line(format_args!(
            "{:.1} to {:.1}  {:>11}  {:>10.3}  {:>8.3}",
            bin.from, bin.to, bin.documents, bin.mean_score, bin.positive_share
        ))?;
    }
    Ok(())
}

/// The score of a document.
#[derive(Serialize)]
struct Scored {
    path: String,
    place: String,
    score: f64,
    keep_probability: f64,
    kept: bool,
    top: Vec<Contribution>,
}

fn score(args: &ScoreArgs) -> anyhow::Result<()> {
    let classifier = Classifier::load(&args.classifier)?;
    if !args.json {
        output::line(" score  kept by  is kept  document")?;
    }
    for source in sources(&args.paths, &args.column)? {
        let mut documents = source.documents(false);
        while let Some(document) = documents.next().transpose()? {
            let score = classifier.score(&document.text);
            let scored = Scored {
                path: document.origin.path.display().to_string(),
                place: document.origin.place.to_string(),
                score,
                keep_probability: keep_probability(score, args.alpha),
                kept: is_kept(&DocumentHash::of(&document.text), score, args.alpha),
                top: classifier.contributions(&document.text, args.top),
            };
            match args.json {
                true => output::line(serde_json::to_string(&scored)?)?,
                false => print_score(&scored)?,
            }
        }
        documents.finish()?;
    }
    Ok(())
}

fn print_score(scored: &Scored) -> anyhow::Result<()> {
    output::line(format_args!(
        "{:.4}  {:5.1} %  {:>7}  {}, {}",
        scored.score,
        100.0 * scored.keep_probability,
        if scored.kept { "yes" } else { "no" },
        scored.path,
        scored.place
    ))?;
    let part = |part: &Contribution| format!("{:+.3} {:?}", part.weight, part.ngram);
    let top: Vec<String> = scored.top.iter().map(part).collect();
    if !top.is_empty() {
        output::line(format_args!("        {}", top.join("  ")))?;
    }
    Ok(())
}
