//! `volary identity`: a cluster's authority and first tokens, made before the cluster is.

use anyhow::{Context, bail};
use std::path::PathBuf;
use volary_transport::{AccessRole, AccessToken, AccessTokenTerms, Authority, write_secret};

/// Make a cluster's authority and tokens before there is a supervisor.
#[derive(clap::Args)]
#[command(after_help = "\
For clusters whose secrets are handed out by something else: the folder is what `volary supervisor --identity` reads.

Examples:
  volary identity create --out identity
  kubectl create secret generic volary-identity --from-file=identity")]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(clap::Subcommand)]
enum What {
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
/// When the folder holds an identity already, or cannot be written.
pub fn run(args: Args) -> anyhow::Result<()> {
    let What::Create { out } = args.what;
    if out.join("ca.key").exists() {
        bail!("--out {}: it holds an identity already", out.display());
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
    println!("ca.crt, ca.key, join-token and operator-token are in {}", out.display());
    Ok(())
}
