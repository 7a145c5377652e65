//! The binary `volary`: reads the command line and hands over to one file per command.

use clap::{Parser, Subcommand};
use std::process::ExitCode;
use volary_cli::{commands, environment, log};

/// Elastic training of mixture-of-experts language models.
#[derive(Parser)]
#[command(
    name = "volary",
    version,
    about,
    max_term_width = 110,
    after_help = "\
Examples:
  volary train examples/quickstart.toml --nodes 3      a whole run on this machine
  volary plan --preset 64b-64e                         what a model costs, before anything starts
  volary doctor                                        what this machine has, and what to mend"
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    /// More of the log on standard error: -v for info, -vv for debug (or RUST_LOG).
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    verbose: u8,
    /// How the log is written.
    #[arg(long, global = true, value_enum, default_value_t = log::Format::Text)]
    log: log::Format,
}

#[derive(Subcommand)]
enum Command {
    /// Train on this machine: a supervisor and N node processes.
    Train(commands::train::Args),
    /// Run the supervisor of a run by hand.
    Supervisor(commands::supervisor::Args),
    /// Join a run as a node.
    Node(commands::node::Args),
    /// Show how a run is going.
    Status(commands::operate::StatusArgs),
    /// Show a run on the terminal, live.
    Top(commands::top::Args),
    /// Show the traces that are kept with a run.
    Trace(commands::trace::Args),
    /// Let a node hand over what it has and leave.
    Drain(commands::operate::DrainArgs),
    /// Write a checkpoint now.
    Checkpoint(commands::operate::Args),
    /// Write a checkpoint and end the run.
    Stop(commands::operate::Args),
    /// Make, list and revoke the tokens that let nodes and people in.
    Token(commands::token::Args),
    /// Make a cluster's authority and tokens before there is a supervisor.
    Identity(commands::identity::Args),
    /// Continue a prompt with a trained model.
    Generate(commands::generate::Args),
    /// Hash the exact bits of a checkpoint.
    Digest(commands::digest::Args),
    /// Count parameters, operations and bytes of a model.
    Plan(commands::plan::Args),
    /// Say what this machine has and what to mend.
    Doctor(commands::doctor::Args),
}

/// A reader that has seen enough, as `head` has, is no error: the rest is not printed, without a word.
fn end_quietly_on_broken_pipes() {
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        if info.payload_as_str().is_some_and(|text| text.contains("Broken pipe")) {
            std::process::exit(0);
        }
        before(info);
    }));
}

fn main() -> ExitCode {
    end_quietly_on_broken_pipes();
    let cli = Cli::parse();
    if let Err(error) = environment::prepare() {
        eprintln!("volary: {error:#}");
        return ExitCode::FAILURE;
    }
    log::start(cli.verbose, cli.log);
    let done = match cli.command {
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
        Command::Digest(args) => commands::digest::run(args),
        Command::Plan(args) => commands::plan::run(args),
        Command::Doctor(args) => commands::doctor::run(args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("volary: {error:#}");
            ExitCode::FAILURE
        }
    }
}
