//! `volary token`: who may join, operate and look.

use super::operate;
use crate::units;
use clap::ValueEnum;
use std::time::Duration;
use volary_protocol::operator::{AccessTokenStatus, OperatorReply, OperatorRequest};
use volary_transport::{AccessRole, AccessTokenTerms};

/// Make, list and revoke the tokens of a running supervisor.
#[derive(clap::Args)]
#[command(after_help = "\
A token is shown once, when it is made; the supervisor keeps a hash of it. A node exchanges its token for a certificate of its
own, which it renews; revoking a token keeps out who would join with it, and ends nobody's certificate: `volary drain` does.

Examples:
  volary token create --ttl 1h --uses 4 > node.token
  volary token create --labels zone=rack-2,owner=lab --dir runs/quickstart
  volary token create --role viewer --ttl 7d
  volary token list
  volary token revoke 5f0c8be2a1d04c77")]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(clap::Subcommand)]
enum What {
    /// Make a token and print it.
    Create(CreateArgs),
    /// List the tokens, without their secrets.
    List(ListArgs),
    /// Make a token good for nothing.
    Revoke(RevokeArgs),
}

#[derive(clap::Args)]
struct CreateArgs {
    /// What it allows.
    #[arg(long, value_enum, default_value = "node")]
    role: Role,
    /// How long it is good for, as 90s, 15m, 1h or 7d; for ever when left out.
    #[arg(long, value_name = "TIME", value_parser = ttl)]
    ttl: Option<Duration>,
    /// How many nodes may join with it; any number when left out.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    uses: Option<u32>,
    /// What to write on it. A zone is that of the nodes that join with it and name none themselves.
    #[arg(long, value_name = "KEY=VALUE", value_delimiter = ',', value_parser = label)]
    labels: Vec<(String, String)>,
    #[command(flatten)]
    which: operate::Args,
}

#[derive(clap::Args)]
struct ListArgs {
    /// One JSON array.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    which: operate::Args,
}

#[derive(clap::Args)]
struct RevokeArgs {
    /// The token's name: the third part of its text, as `token list` shows it.
    id: String,
    #[command(flatten)]
    which: operate::Args,
}

#[derive(Clone, Copy, ValueEnum)]
enum Role {
    /// To join as a node.
    Node,
    /// To ask and order.
    Operator,
    /// To look at the page.
    Viewer,
}

fn ttl(text: &str) -> Result<Duration, String> {
    let ttl = units::duration(text)?;
    if ttl.is_zero() { Err("a token that is good for no time at all".into()) } else { Ok(ttl) }
}

fn label(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() && text.len() <= 256 && !text.contains(char::is_control) => {
            Ok((key.to_owned(), value.to_owned()))
        }
        _ => Err("expected KEY=VALUE of at most 256 bytes, without control characters".into()),
    }
}

/// Runs the command.
///
/// # Errors
/// When there is no supervisor, the operator's token is no good, or the supervisor refuses.
pub fn run(args: Args) -> anyhow::Result<()> {
    match args.what {
        What::Create(CreateArgs { role, ttl, uses, labels, which }) => {
            let role = match role {
                Role::Node => AccessRole::Node,
                Role::Operator => AccessRole::Operator,
                Role::Viewer => AccessRole::Viewer,
            };
            let terms = AccessTokenTerms { lifetime: ttl, uses, labels };
            match operate::ask(&which, &OperatorRequest::AccessTokenCreate { role, terms })? {
                OperatorReply::AccessToken { text } => println!("{text}"),
                other => return operate::unexpected(other),
            }
        }
        What::List(ListArgs { json, which }) => {
            match operate::ask(&which, &OperatorRequest::AccessTokenList)? {
                OperatorReply::AccessTokens(tokens) if json => {
                    println!("{}", serde_json::to_string_pretty(&tokens)?)
                }
                OperatorReply::AccessTokens(tokens) => {
                    tokens.iter().for_each(|token| println!("{}", line(token)))
                }
                other => return operate::unexpected(other),
            }
        }
        What::Revoke(RevokeArgs { id, which }) => {
            match operate::ask(&which, &OperatorRequest::AccessTokenRevoke { id: id.clone() })? {
                OperatorReply::Done { .. } => println!("{id} is revoked"),
                other => return operate::unexpected(other),
            }
        }
    }
    Ok(())
}

fn line(token: &AccessTokenStatus) -> String {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let ends = match token.expires_unix_s {
        None => "never ends".to_owned(),
        Some(end) if end <= now => "has ended".to_owned(),
        Some(end) => format!("ends in {} s", end - now),
    };
    let uses =
        token.uses_left.map_or_else(|| "any number of uses".to_owned(), |uses| format!("{uses} uses left"));
    let labels: Vec<String> = token.labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
    let role = format!("{:?}", token.role).to_lowercase();
    format!("{}  {role:<8}  {ends}, {uses}  {}", token.id, labels.join(","))
}
