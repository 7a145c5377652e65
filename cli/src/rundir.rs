//! Which run a command means, and how to reach its supervisor.

use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use volary_storage::RunDir;
use volary_transport::AccessToken;

/// Where new runs go unless `--dir` says otherwise.
pub const RUNS: &str = "runs";
/// How long a supervisor may take to listen.
pub(crate) const LISTEN_MAX: Duration = Duration::from_secs(60);
/// How often it is looked whether it does.
pub(crate) const LISTEN_LOOK_EVERY: Duration = Duration::from_millis(10);

/// `RUN_DIR/supervisor.json`: how to reach the supervisor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Contact {
    /// The run's name.
    pub run: String,
    /// The supervisor's process.
    pub pid: u32,
    /// Its QUIC address.
    pub address: String,
    /// Where its page is, if it has one.
    #[serde(default)]
    pub http: Option<String>,
}

/// The file with the token that nodes join with.
#[must_use]
pub fn node_token(dir: &RunDir) -> PathBuf {
    dir.identity().join("node.token")
}

/// The file with the token that people operate with.
#[must_use]
pub fn operator_token(dir: &RunDir) -> PathBuf {
    dir.identity().join("operator.token")
}

/// The file with the token that people look at the page with.
#[must_use]
pub fn viewer_token(dir: &RunDir) -> PathBuf {
    dir.identity().join("viewer.token")
}

/// A new directory for a run of this name: `runs/NAME`, or with a number when that is taken.
///
/// # Errors
/// When the directory cannot be written.
pub fn fresh(name: &str) -> anyhow::Result<RunDir> {
    let mut path = Path::new(RUNS).join(name);
    for number in 2.. {
        if !path.exists() {
            break;
        }
        path = Path::new(RUNS).join(format!("{name}-{number}"));
    }
    Ok(RunDir::create(&path)?)
}

/// The contact of a run whose supervisor is alive.
#[must_use]
pub fn contact(dir: &RunDir) -> Option<Contact> {
    let text = std::fs::read_to_string(dir.supervisor()).ok()?;
    let contact: Contact = serde_json::from_str(&text).ok()?;
    is_alive(contact.pid).then_some(contact)
}

/// Waits for the supervisor of a directory, which may be starting again; in vain no longer than [`LISTEN_MAX`].
pub(crate) fn wait_until_it_listens(dir: &Path) {
    let Ok(dir) = RunDir::find(dir) else { return };
    let start = Instant::now();
    while contact(&dir).is_none() && start.elapsed() < LISTEN_MAX {
        std::thread::sleep(LISTEN_LOOK_EVERY);
    }
}

/// Whether a process runs; one that has ended and that nobody has waited for does not.
pub(crate) fn is_alive(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.trim_start().starts_with(['Z', 'X']))
}

/// Writes the contact so that a reader never sees half of it.
///
/// # Errors
/// When the directory cannot be written.
pub fn write_contact(dir: &RunDir, contact: &Contact) -> anyhow::Result<()> {
    let (path, temporary) = (dir.supervisor(), dir.supervisor().with_extension("json.new"));
    std::fs::write(&temporary, serde_json::to_string(contact)?)
        .with_context(|| temporary.display().to_string())?;
    std::fs::rename(&temporary, &path).with_context(|| path.display().to_string())?;
    Ok(())
}

/// The runs under `runs/` whose supervisors are alive.
fn living() -> Vec<(RunDir, Contact)> {
    let Ok(entries) = std::fs::read_dir(RUNS) else { return Vec::new() };
    let found = entries.flatten().filter_map(|entry| {
        let dir = RunDir::find(entry.path()).ok()?;
        let contact = contact(&dir)?;
        Some((dir, contact))
    });
    found.collect()
}

/// The address of a supervisor and a token for it.
#[derive(Debug)]
pub struct Target {
    /// Its QUIC address.
    pub address: SocketAddr,
    /// The token.
    pub token: AccessToken,
}

/// Which token is needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// To join as a node.
    Node,
    /// To ask and order.
    Operator,
}

/// Finds the supervisor that a command means: by run directory, by address, or the only one alive under `runs/`.
///
/// # Errors
/// When there is none, when there are several, or when no token for it is at hand.
pub fn target(
    dir: Option<&Path>,
    address: Option<&str>,
    token: Option<&str>,
    role: Role,
) -> anyhow::Result<Target> {
    let (dir, address) = match (dir, address) {
        (Some(dir), address) => {
            let dir = RunDir::find(dir)?;
            let found = address.map(str::to_owned).or_else(|| contact(&dir).map(|contact| contact.address));
            let address =
                found.with_context(|| format!("no supervisor is running for {}", dir.root().display()))?;
            (Some(dir), address)
        }
        (None, Some(address)) => {
            let near = living().into_iter().find(|(_, contact)| contact.address == address);
            (near.map(|(dir, _)| dir), address.to_owned())
        }
        (None, None) => {
            let mut found = living();
            match found.len() {
                0 => bail!(
                    "no supervisor is running under {RUNS}/; name one with --dir RUN_DIR or --supervisor ADDR"
                ),
                1 => found.pop().map(|(dir, contact)| (Some(dir), contact.address)).unwrap_or_default(),
                _ => {
                    let names: Vec<_> =
                        found.iter().map(|(dir, _)| dir.root().display().to_string()).collect();
                    bail!("several runs are going on: name one with --dir ({})", names.join(", "));
                }
            }
        }
    };
    let token = match token {
        Some(token) => token.trim().to_owned(),
        None => own_token(dir.as_ref(), role, &address)?,
    };
    Ok(Target { address: resolve(&address)?, token: token.parse()? })
}

fn own_token(dir: Option<&RunDir>, role: Role, address: &str) -> anyhow::Result<String> {
    let Some(dir) = dir else {
        bail!(
            "no token for {address}: give --token-file (the supervisor's RUN_DIR/identity/{}) or VOLARY_TOKEN",
            if role == Role::Node { "node.token" } else { "operator.token" }
        );
    };
    let path = if role == Role::Node { node_token(dir) } else { operator_token(dir) };
    Ok(std::fs::read_to_string(&path).with_context(|| path.display().to_string())?.trim().to_owned())
}

/// The socket address of `HOST:PORT`.
///
/// # Errors
/// When it names none.
pub fn resolve(address: &str) -> anyhow::Result<SocketAddr> {
    let mut found =
        address.to_socket_addrs().with_context(|| format!("address {address}: expected HOST:PORT"))?;
    found.next().with_context(|| format!("address {address} names no host"))
}

/// The token from `--token-file`, if given.
///
/// # Errors
/// When the file cannot be read.
pub fn read_token(path: Option<&Path>) -> anyhow::Result<Option<String>> {
    let Some(path) = path else { return Ok(std::env::var("VOLARY_TOKEN").ok()) };
    Ok(Some(std::fs::read_to_string(path).with_context(|| format!("token file {}", path.display()))?))
}
