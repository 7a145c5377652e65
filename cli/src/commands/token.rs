//! `volary token`: manages the access tokens of a running supervisor.

use super::operate;
use crate::arguments::InvalidArgument;
use crate::limits::LABEL_BYTES_MAX;
use crate::output;
use crate::units;
use clap::ValueEnum;
use std::error::Error;
use std::fmt;
use std::time::Duration;
use volary_protocol::operator::{AccessTokenStatus, OperatorReply, OperatorRequest};
use volary_transport::{AccessRole, AccessTokenTerms};

/// Create, list and revoke access tokens of a running supervisor.
#[derive(clap::Args)]
#[command(after_help = "\
An access token is shown once, when it is created; the supervisor keeps a hash of it. A node exchanges its \
access token for a certificate, which it renews. A revoked access token admits no more nodes, but certificates \
stay valid: to remove a node, use `volary drain`.

Examples:
  volary token create --ttl 1h --uses 4 > node.token
  volary token create --labels zone=rack-2,owner=lab --dir runs/quickstart
  volary token create --role viewer --ttl 7d
  volary token list
  volary token revoke 5f0c8be2a1d04c77")]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Create an access token and print it.
    Create(CreateArgs),
    /// List the access tokens, without their secrets.
    List(ListArgs),
    /// Revoke an access token.
    Revoke(RevokeArgs),
}

#[derive(clap::Args)]
struct CreateArgs {
    /// The permission.
    #[arg(long, value_enum, default_value = "node")]
    role: RoleArg,
    /// Lifetime, e.g. 90s, 15m, 1h or 7d; by default unlimited.
    #[arg(long, value_name = "TIME", value_parser = lifetime)]
    ttl: Option<Duration>,
    /// How many nodes may join with it; by default unlimited.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    uses: Option<u32>,
    /// Labels. The label `zone` is the zone of nodes that join with the access token and have none.
    #[arg(long, value_name = "KEY=VALUE", value_delimiter = ',', value_parser = label)]
    labels: Vec<(String, String)>,
    #[command(flatten)]
    supervisor: operate::Args,
}

#[derive(clap::Args)]
struct ListArgs {
    /// Print one JSON array.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    supervisor: operate::Args,
}

#[derive(clap::Args)]
struct RevokeArgs {
    /// The access token's id: the third part of its text, as `token list` shows it.
    id: String,
    #[command(flatten)]
    supervisor: operate::Args,
}

/// [`AccessRole`] as an argument.
#[derive(Clone, Copy, ValueEnum)]
enum RoleArg {
    /// Join as a node.
    Node,
    /// Query and control the run.
    Operator,
    /// View the dashboard.
    Viewer,
}

impl From<RoleArg> for AccessRole {
    fn from(role: RoleArg) -> Self {
        match role {
            RoleArg::Node => Self::Node,
            RoleArg::Operator => Self::Operator,
            RoleArg::Viewer => Self::Viewer,
        }
    }
}

fn lifetime(text: &str) -> Result<Duration, Box<dyn Error + Send + Sync>> {
    let lifetime = units::duration(text)?;
    if lifetime.is_zero() {
        return Err(InvalidArgument::new("a time greater than 0").into());
    }
    Ok(lifetime)
}

fn label(text: &str) -> Result<(String, String), InvalidArgument> {
    match text.split_once('=') {
        Some((key, value))
            if !key.is_empty() && text.len() <= LABEL_BYTES_MAX && !text.contains(char::is_control) =>
        {
            Ok((key.to_owned(), value.to_owned()))
        }
        _ => Err(InvalidArgument::new(format!(
            "KEY=VALUE of at most {LABEL_BYTES_MAX} bytes, without control characters"
        ))),
    }
}

/// Runs the command.
///
/// # Errors
/// When there is no supervisor, the operator's access token is invalid, or the supervisor refuses.
pub fn run(args: Args) -> anyhow::Result<()> {
    match args.command {
        Command::Create(args) => create(args),
        Command::List(args) => list(args),
        Command::Revoke(args) => revoke(args),
    }
}

fn create(CreateArgs { role, ttl, uses, labels, supervisor }: CreateArgs) -> anyhow::Result<()> {
    let terms = AccessTokenTerms { lifetime: ttl, uses, labels };
    match operate::ask(&supervisor, &OperatorRequest::AccessTokenCreate { role: role.into(), terms })? {
        OperatorReply::AccessToken { text } => output::line(text)?,
        other => return operate::unexpected(other),
    }
    Ok(())
}

fn list(ListArgs { json, supervisor }: ListArgs) -> anyhow::Result<()> {
    match operate::ask(&supervisor, &OperatorRequest::AccessTokenList)? {
        OperatorReply::AccessTokens(tokens) if json => {
            output::line(serde_json::to_string_pretty(&tokens)?)?;
        }
        OperatorReply::AccessTokens(tokens) => {
            let now = crate::units::since_1970().as_secs();
            output::text(TokenList { tokens: &tokens, now_unix_s: now })?;
        }
        other => return operate::unexpected(other),
    }
    Ok(())
}

fn revoke(RevokeArgs { id, supervisor }: RevokeArgs) -> anyhow::Result<()> {
    match operate::ask(&supervisor, &OperatorRequest::AccessTokenRevoke { id: id.clone() })? {
        OperatorReply::Done { .. } => output::line(format_args!("{id} revoked"))?,
        other => return operate::unexpected(other),
    }
    Ok(())
}

/// Access tokens as text, one line each.
struct TokenList<'a> {
    tokens: &'a [AccessTokenStatus],
    now_unix_s: u64,
}

impl fmt::Display for TokenList<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for token in self.tokens {
            let role = format!("{:?}", token.role).to_lowercase();
            write!(f, "{}  {role:<8}  ", token.id)?;
            match token.expires_unix_s {
                None => write!(f, "never expires")?,
                Some(end) if end <= self.now_unix_s => write!(f, "expired")?,
                Some(end) => write!(f, "expires in {} s", end - self.now_unix_s)?,
            }
            match token.uses_left {
                None => write!(f, ", unlimited uses")?,
                Some(uses) => write!(f, ", {uses} uses left")?,
            }
            for (number, (key, value)) in token.labels.iter().enumerate() {
                write!(f, "{}{key}={value}", if number == 0 { "  " } else { "," })?;
            }
            writeln!(f)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_has_a_line_per_access_token_without_its_secret() {
        let token = |id: &str, expires_unix_s, uses_left, labels| AccessTokenStatus {
            id: id.into(),
            role: AccessRole::Node,
            created_unix_s: 0,
            expires_unix_s,
            uses_left,
            labels,
        };
        let labels = vec![("zone".to_owned(), "rack-9".to_owned()), ("owner".to_owned(), "lab".to_owned())];
        let tokens = [
            token("a", None, None, Vec::new()),
            token("b", Some(99), Some(0), labels),
            token("c", Some(160), Some(2), Vec::new()),
        ];
        let lines = TokenList { tokens: &tokens, now_unix_s: 100 }.to_string();
        assert_eq!(
            lines,
            "a  node      never expires, unlimited uses\nb  node      expired, 0 uses left  zone=rack-9,owner=lab\n\
             c  node      expires in 60 s, 2 uses left\n"
        );
    }

    #[test]
    fn invalid_lifetimes_and_labels_are_refused_with_the_expected_form() {
        assert_eq!(lifetime("0s").unwrap_err().to_string(), "expected a time greater than 0");
        assert!(lifetime("soon").is_err() && lifetime("15m").is_ok());
        assert!(label("x").is_err() && label("=y").is_err());
        assert_eq!(label("zone=a"), Ok(("zone".into(), "a".into())));
    }
}
