//! `volary identity`: creates a cluster's authority and first access tokens before the cluster exists.

use crate::output;
use anyhow::{Context, bail};
use std::path::PathBuf;
use volary_transport::{AccessRole, AccessToken, AccessTokenTerms, Authority, write_secret};

/// Create a cluster's authority and access tokens before there is a supervisor.
#[derive(clap::Args)]
#[command(after_help = "\
For clusters with a secret store: `volary supervisor --identity` reads the folder.

Examples:
  volary identity create --out identity
  kubectl create secret generic volary-identity --from-file=identity")]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Write ca.crt, ca.key, join-token and operator-token into a new folder.
    Create {
        /// The folder.
        #[arg(long)]
        out: PathBuf,
    },
}

/// Runs the command.
///
/// # Errors
/// When the folder already holds an identity, or cannot be written.
pub fn run(args: Args) -> anyhow::Result<()> {
    let Command::Create { out } = args.command;
    if out.join("ca.key").exists() {
        bail!("--out {}: it already holds an identity", out.display());
    }
    let authority = Authority::create()?;
    let (certificate, key) = authority.to_pem();
    let write = |name: &str, text: &str| {
        write_secret(&out.join(name), text.as_bytes()).with_context(|| out.join(name).display().to_string())
    };
    for (role, name) in [(AccessRole::Node, "join-token"), (AccessRole::Operator, "operator-token")] {
        let (token, _) = AccessToken::issue(authority.fingerprint(), role, 0, AccessTokenTerms::default())?;
        write(name, &token.reveal())?;
    }
    write("ca.crt", &certificate)?;
    write("ca.key", &key)?;
    output::line(format_args!("wrote ca.crt, ca.key, join-token and operator-token to {}", out.display()))?;
    Ok(())
}
