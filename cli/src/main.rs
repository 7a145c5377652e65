//! The binary `volary`: parses the command line and runs a command.

use clap::{Parser, Subcommand};
use std::process::ExitCode;
use volary_cli::limits::{HALTED_STATUS, INTERRUPTED_STATUS};
use volary_cli::process::Halted;
use volary_cli::signals::Interrupted;
use volary_cli::{commands, environment, log, output, process};

/// Elastic training of mixture-of-experts language models.
#[derive(Parser)]
#[command(
    name = "volary",
    version,
    max_term_width = 110,
    after_help = "\
Examples:
  volary init --data ~/notes > my.toml                 a configuration that fits this machine
  volary train examples/quickstart.toml --nodes 3      a complete run on this machine
  volary plan --preset 64b-64e                         the costs of a model, before anything starts
  volary doctor                                        check this machine and suggest fixes"
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    /// Verbosity of the log on standard error: -v for info, -vv for debug (or RUST_LOG).
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    verbose: u8,
    /// The format of the log.
    #[arg(long, global = true, value_enum, default_value_t = log::Format::Text)]
    log: log::Format,
}

#[derive(Subcommand)]
enum Command {
    /// Write a configuration that fits this machine.
    Init(commands::init::Args),
    /// Train on this machine: a supervisor and N node processes.
    Train(commands::train::Args),
    /// Run the supervisor of a run.
    Supervisor(commands::supervisor::Args),
    /// Join a run as a node.
    Node(commands::node::Args),
    /// Show the status of a run.
    Status(commands::operate::StatusArgs),
    /// Show a live view of a run on the terminal.
    Top(commands::top::Args),
    /// Show the stored traces of a run.
    Trace(commands::trace::Args),
    /// Drain a node: it hands its shards over and leaves.
    Drain(commands::operate::DrainArgs),
    /// Write a checkpoint now.
    Checkpoint(commands::operate::Args),
    /// Write a checkpoint and end the run.
    Stop(commands::operate::Args),
    /// Manage access tokens.
    Token(commands::token::Args),
    /// Create a cluster's authority and access tokens before there is a supervisor.
    Identity(commands::identity::Args),
    /// Continue prompts with a trained model.
    Generate(commands::generate::Args),
    /// Answer completion requests over HTTP.
    Serve(commands::serve::Args),
    /// Score a trained model on tasks.
    Eval(commands::eval::Args),
    /// Prepare a corpus, train its quality filter, or compare it with evaluation tasks.
    Data(commands::data::Args),
    /// Write a trained model in a format of other programs.
    Export(commands::export::Args),
    /// Begin a run with a model from another program.
    Import(commands::import::Args),
    /// Hash the exact bits of a checkpoint.
    Digest(commands::digest::Args),
    /// Count parameters, operations and bytes of a model.
    Plan(commands::plan::Args),
    /// Check this machine and suggest fixes.
    Doctor(commands::doctor::Args),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    if let Err(error) = environment::prepare() {
        return exit_code(&error);
    }
    log::start(cli.verbose, cli.log);
    match run(cli.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => exit_code(&error),
    }
}

fn run(command: Command) -> anyhow::Result<()> {
    if matches!(command, Command::Train(_) | Command::Supervisor(_) | Command::Node(_)) {
        // Later, only a log would tell.
        volary_telemetry::check_environment()?;
        process::raise_open_files();
    }
    match command {
        Command::Init(args) => commands::init::run(args),
        Command::Train(args) => commands::train::run(args),
        Command::Supervisor(args) => commands::supervisor::run(args),
        Command::Node(args) => commands::node::run(args),
        Command::Status(args) => commands::operate::status(args),
        Command::Top(args) => commands::top::run(args),
        Command::Trace(args) => commands::trace::run(args),
        Command::Drain(args) => commands::operate::drain(args),
        Command::Checkpoint(args) => commands::operate::checkpoint(args),
        Command::Stop(args) => commands::operate::stop(args),
        Command::Token(args) => commands::token::run(args),
        Command::Identity(args) => commands::identity::run(args),
        Command::Generate(args) => commands::generate::run(args),
        Command::Serve(args) => commands::serve::run(args),
        Command::Data(args) => commands::data::run(args),
        Command::Eval(args) => commands::eval::run(args),
        Command::Export(args) => commands::export::run(args),
        Command::Import(args) => commands::import::run(args),
        Command::Digest(args) => commands::digest::run(args),
        Command::Plan(args) => commands::plan::run(args),
        Command::Doctor(args) => commands::doctor::run(args),
    }
}

/// Prints an error as one line. A reader that closed standard output early, as `head` does, is not an error.
fn exit_code(error: &anyhow::Error) -> ExitCode {
    if output::is_closed_by_reader(error) {
        return ExitCode::SUCCESS;
    }
    output::note(format_args!("volary: {}", output::with_causes(error)));
    match () {
        () if error.is::<Halted>() => ExitCode::from(HALTED_STATUS),
        () if error.is::<Interrupted>() => ExitCode::from(INTERRUPTED_STATUS),
        () => ExitCode::FAILURE,
    }
}
