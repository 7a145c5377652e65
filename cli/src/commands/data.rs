//! `volary data`: prepares a corpus before a run, trains its quality filter, and compares it with evaluation
//! tasks.

mod quality;

use crate::config::Config;
use crate::corpus_summary;
use crate::output;
use crate::preparation;
use crate::progress::ProgressDisplay;
use crate::signals::Interrupts;
use std::path::PathBuf;
use volary_data::Source;
use volary_inference::contamination::{Contamination, Search};
use volary_inference::evaluation::{Task, find_tasks};

/// Prepare a corpus, train its quality filter, or compare it with evaluation tasks.
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Tokenize the sources of a configuration into the cache, where runs find them.
    Prepare(PrepareArgs),
    /// Train the quality filter's classifier, or show its scores.
    Quality(quality::Args),
    /// List the questions of evaluation tasks that share runs of words with the sources.
    Contamination(ContaminationArgs),
}

/// Tokenize the sources of a configuration.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  volary data prepare examples/quickstart.toml
  volary data prepare my.toml --out corpus")]
struct PrepareArgs {
    /// The configuration.
    config: PathBuf,
    /// A TOML value for any key of the configuration.
    #[arg(long, value_name = "KEY.PATH=VALUE")]
    set: Vec<String>,
    /// A folder for a copy of the tokens, beside that in the cache.
    #[arg(long)]
    out: Option<PathBuf>,
    /// Refuse text that is not UTF-8 and records that cannot be read, instead of replacing and skipping them.
    #[arg(long)]
    strict: bool,
}

/// List questions that share runs of words with the sources.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  volary data contamination examples/quickstart.toml --tasks examples/eval --words 8")]
struct ContaminationArgs {
    /// The configuration.
    config: PathBuf,
    /// A TOML value for any key of the configuration.
    #[arg(long, value_name = "KEY.PATH=VALUE")]
    set: Vec<String>,
    /// A task file, or a folder of them; may be given several times.
    #[arg(long, required = true)]
    tasks: Vec<PathBuf>,
    /// The length of the compared runs of words.
    #[arg(long, default_value_t = 13, value_parser = clap::value_parser!(u64).range(1..=100))]
    words: u64,
    /// Print JSON instead of a table.
    #[arg(long)]
    json: bool,
}

/// Runs the command.
///
/// # Errors
/// When the configuration, a source or a task file is bad.
pub fn run(args: Args) -> anyhow::Result<()> {
    match args.command {
        Command::Prepare(args) => prepare(args),
        Command::Quality(args) => quality::run(&args),
        Command::Contamination(args) => contamination(&args),
    }
}

fn prepare(args: PrepareArgs) -> anyhow::Result<()> {
    let interrupts = Interrupts::listen()?;
    let mut config = Config::load(&args.config, &args.set)?;
    config.data.strict |= args.strict;
    let temporary = tempfile::tempdir()?;
    let out = args.out.unwrap_or_else(|| temporary.path().join("data"));
    let display = ProgressDisplay::new(0, false);
    let mut progress = preparation::progress(display.phases());
    let length = config.training.sequence_length;
    let data = config.data.clone();
    let work = move || Ok(volary_data::prepare(&data, length, &out, &mut progress)?);
    let prepared =
        interrupts.unless_interrupted(preparation::PREPARING, work, volary_data::remove_partial_folders)?;
    for line in corpus_summary::lines(&prepared.manifest) {
        output::line(line)?;
    }
    output::line(corpus_summary::epochs(&prepared.manifest, &config))?;
    output::line(match (prepared.resumed, prepared.from_cache) {
        (true, _) => "the folder had the tokens already",
        (_, true) => "the cache had the tokens already",
        _ => "the tokens are prepared",
    })?;
    Ok(())
}

fn contamination(args: &ContaminationArgs) -> anyhow::Result<()> {
    let config = Config::load(&args.config, &args.set)?;
    let mut tasks = Vec::new();
    for path in &args.tasks {
        for file in find_tasks(path)? {
            tasks.push(Task::read(&file)?);
        }
    }
    config.data.validate()?;
    let mut search = Search::new(&tasks, args.words as usize);
    for options in &config.data.sources {
        let mut source = Source::find(options)?;
        source.check()?;
        let mut documents = source.documents(config.data.strict);
        while let Some(document) = documents.next().transpose()? {
            search.add(&document);
        }
        documents.finish()?;
    }
    let found = search.finish();
    if args.json {
        output::line(serde_json::to_string_pretty(&found)?)?;
    } else {
        print_table(&found, args.words)?;
    }
    Ok(())
}

fn print_table(tasks: &[Contamination], words: u64) -> anyhow::Result<()> {
    let width = tasks.iter().map(|task| task.task.len()).max().unwrap_or(0).max("task".len());
    output::line(format_args!("{:width$}  records  too short  with {words} words of the sources", "task"))?;
    for task in tasks {
        let (records, short, found) = (task.records, task.short, task.found.len());
        let share = 100.0 * found as f64 / (records - short).max(1) as f64;
        output::line(format_args!(
            "{:width$}  {records:>7}  {short:>9}  {found} ({share:.1} % of those compared)",
            task.task
        ))?;
    }
    for task in tasks {
        for found in &task.found {
            output::line(format_args!(
                "\n{} record {}: {:.0} % of its runs of {words} words, the first in {}, {}:\n  {}",
                task.task,
                found.record,
                100.0 * found.share,
                found.path,
                found.place,
                found.words
            ))?;
        }
    }
    Ok(())
}
