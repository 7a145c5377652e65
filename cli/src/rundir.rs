//! The run that a command addresses, and the contact and access token of its supervisor.

use crate::limits::{LISTEN_MAX, LISTEN_POLL};
use crate::preparation::ClaimedDir;
use crate::registry;
use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::time::Instant;
use volary_core::Step;
use volary_storage::{CheckpointReader, RunDir, RunLock};
use volary_transport::{AccessRole, AccessToken};

/// The folder of new runs, unless `--dir` is given.
pub const RUNS: &str = "runs";

/// `RUN_DIR/supervisor.json`: the contact of the supervisor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Contact {
    /// The run's name.
    pub run: String,
    /// The supervisor's process.
    pub pid: u32,
    /// Its QUIC address.
    pub address: String,
    /// The address of its dashboard, if it serves one.
    #[serde(default)]
    pub http: Option<String>,
}

/// The name of the file with an access token.
fn token_file_name(role: AccessRole) -> &'static str {
    match role {
        AccessRole::Node => "node.token",
        AccessRole::Operator => "operator.token",
        AccessRole::Viewer => "viewer.token",
    }
}

/// The file with a run's access token for a role.
#[must_use]
pub fn token_file(dir: &RunDir, role: AccessRole) -> PathBuf {
    dir.identity().join(token_file_name(role))
}

/// A directory for a new run: `runs/NAME`, or `runs/NAME-2` and so on where that holds a run or is in use.
///
/// # Errors
/// When the directory cannot be written.
pub fn claim_new(name: &str, address: &str) -> anyhow::Result<ClaimedDir> {
    let mut path = Path::new(RUNS).join(name);
    for number in 2.. {
        if !path.exists() || RunDir::find(&path).is_ok() {
            match ClaimedDir::take(&path, address) {
                Ok(claimed) if claimed.holds_run => {}
                Err(error) if is_held(&error) => {}
                taken => return taken,
            }
        }
        path = Path::new(RUNS).join(format!("{name}-{number}"));
    }
    bail!("{RUNS}/{name}: every number is taken")
}

fn is_held(error: &anyhow::Error) -> bool {
    use volary_storage::Error::{Held, HeldUnnamed};
    matches!(error.downcast_ref(), Some(Held { .. } | HeldUnnamed { .. }))
}

/// The contact of a run whose supervisor is alive.
#[must_use]
pub fn contact(dir: &RunDir) -> Option<Contact> {
    let text = std::fs::read_to_string(dir.supervisor()).ok()?;
    let contact: Contact = serde_json::from_str(&text).ok()?;
    // Another process may have the number of one that died: a supervisor holds the run's lock.
    (is_alive(contact.pid) && RunLock::is_held(dir)).then_some(contact)
}

/// Waits until the supervisor of a directory listens, which may be restarting; at most [`LISTEN_MAX`].
pub(crate) fn wait_until_listening(dir: &Path) {
    let Ok(dir) = RunDir::find(dir) else { return };
    let start = Instant::now();
    while contact(&dir).is_none() && start.elapsed() < LISTEN_MAX {
        std::thread::sleep(LISTEN_POLL);
    }
}

/// Whether a process runs. A zombie does not.
pub(crate) fn is_alive(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.trim_start().starts_with(['Z', 'X']))
}

/// Writes the contact atomically.
///
/// # Errors
/// When the directory cannot be written.
pub fn write_contact(dir: &RunDir, contact: &Contact) -> anyhow::Result<()> {
    registry::add(dir);
    Ok(volary_storage::write_file(&dir.supervisor(), serde_json::to_string(contact)?.as_bytes())?)
}

/// The runs under `runs/` whose supervisors are alive.
fn live_runs() -> Vec<(RunDir, Contact)> {
    let Ok(entries) = std::fs::read_dir(RUNS) else { return Vec::new() };
    let runs = entries.flatten().filter_map(|entry| {
        let dir = RunDir::find(entry.path()).ok()?;
        let contact = contact(&dir)?;
        Some((dir, contact))
    });
    runs.collect()
}

/// The address of a supervisor and an access token for it.
#[derive(Debug)]
pub struct Target {
    /// Its QUIC addresses, of which any will do.
    pub addresses: Vec<SocketAddr>,
    /// The access token.
    pub token: AccessToken,
}

/// Finds the supervisor that a command addresses: by run directory, by address, or the only live one under
/// `runs/`. The access token is `token`, or the one for `role` in the run's directory.
///
/// # Errors
/// When there is no supervisor, more than one, or no access token for it.
pub fn target(
    dir: Option<&Path>,
    address: Option<&str>,
    token: Option<&str>,
    role: AccessRole,
) -> anyhow::Result<Target> {
    let (dir, address) = match (dir, address) {
        (Some(dir), address) => {
            let dir = RunDir::find(dir)?;
            let address = address.map(str::to_owned).or_else(|| contact(&dir).map(|contact| contact.address));
            let address =
                address.with_context(|| format!("no supervisor is running for {}", dir.root().display()))?;
            (Some(dir), address)
        }
        (None, Some(address)) => {
            let dialed = resolve_all(address)?;
            let mut local = live_runs().into_iter().chain(registry::runs());
            let local = local.find(|(_, contact)| is_same(&contact.address, &dialed));
            (local.map(|(dir, _)| dir), address.to_owned())
        }
        (None, None) => {
            let (dir, contact) = only_live_run()?;
            (Some(dir), contact.address)
        }
    };
    let token = match token {
        Some(token) => token.trim().to_owned(),
        None => local_token(dir.as_ref(), role, &address)?,
    };
    Ok(Target { addresses: resolve_all(&address)?, token: token.parse()? })
}

/// Whether a supervisor of this machine at `address` is among those that are dialed. This machine has many
/// names: its port tells.
fn is_same(address: &str, dialed: &[SocketAddr]) -> bool {
    let Ok(listening) = address.parse::<SocketAddr>() else { return false };
    let is_here = |dialed: &SocketAddr| dialed.ip() == listening.ip() || dialed.ip().is_loopback();
    dialed.iter().any(|dialed| dialed.port() == listening.port() && is_here(dialed))
}

fn only_live_run() -> anyhow::Result<(RunDir, Contact)> {
    let mut runs = live_runs();
    match (runs.pop(), runs.as_slice()) {
        (None, _) => {
            bail!("no supervisor is running under {RUNS}/; name one with --dir RUN_DIR or --supervisor ADDR")
        }
        (Some(run), []) => Ok(run),
        (Some(run), others) => {
            let all = others.iter().chain(std::iter::once(&run));
            let names: Vec<String> = all.map(|(dir, _)| dir.root().display().to_string()).collect();
            bail!("several runs are active: name one with --dir ({})", names.join(", "))
        }
    }
}

fn local_token(dir: Option<&RunDir>, role: AccessRole, address: &str) -> anyhow::Result<String> {
    let Some(dir) = dir else {
        let known = registry::folder().map(|folder| format!(" and {}", folder.display())).unwrap_or_default();
        bail!(
            "no access token for {address}: no supervisor of this machine listens there (looked in {RUNS}/{known}); \
             give --token-file (the supervisor's RUN_DIR/identity/{}) or VOLARY_TOKEN",
            token_file_name(role)
        );
    };
    let path = token_file(dir, role);
    Ok(std::fs::read_to_string(&path).with_context(|| path.display().to_string())?.trim().to_owned())
}

/// The first socket address of `HOST:PORT`, to listen on.
///
/// # Errors
/// When it has another form, or the host is unknown.
pub fn resolve(address: &str) -> anyhow::Result<SocketAddr> {
    Ok(resolve_all(address)?[0])
}

/// All socket addresses of `HOST:PORT`, to dial; at least one.
///
/// # Errors
/// When it has another form, or the host is unknown.
pub fn resolve_all(address: &str) -> anyhow::Result<Vec<SocketAddr>> {
    let found =
        address.to_socket_addrs().with_context(|| format!("address {address}: expected HOST:PORT"))?;
    let found: Vec<_> = found.collect();
    anyhow::ensure!(!found.is_empty(), "address {address}: unknown host");
    Ok(found)
}

/// The access token of `--token-file` or `VOLARY_TOKEN`, if given.
///
/// # Errors
/// When the file cannot be read.
pub fn read_token(path: Option<&Path>) -> anyhow::Result<Option<String>> {
    let Some(path) = path else { return Ok(std::env::var("VOLARY_TOKEN").ok()) };
    Ok(Some(std::fs::read_to_string(path).with_context(|| format!("token file {}", path.display()))?))
}

/// The step of the checkpoint that a command names, or of the newest one.
///
/// # Errors
/// When the run has no checkpoint yet, or its folder cannot be read.
pub(crate) fn checkpoint_step(
    reader: &CheckpointReader,
    run: &Path,
    step: Option<u64>,
) -> anyhow::Result<Step> {
    if let Some(step) = step {
        return Ok(Step(step));
    }
    let none = || format!("{} has no checkpoint yet", run.display());
    Ok(reader.latest()?.with_context(none)?.step)
}
