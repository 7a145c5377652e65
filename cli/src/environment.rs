//! Environment variables that must be set before libtorch loads.

use crate::output;
use anyhow::Context;
use std::os::unix::process::CommandExt;
use std::process::Command;
use volary_model::device;

/// Set in a process that was restarted with the right environment, so that it restarts once.
const MARK: &str = "VOLARY_ENVIRONMENT_SET";

/// Restarts this process, once, when a variable that libtorch reads at load time is missing: the threads of
/// OpenMP and MKL, the vector instructions of the libraries, and the folder of libtorch (`VOLARY_LIBTORCH`).
/// Values of the user's own stay, with a notice.
///
/// # Errors
/// When the program cannot be restarted.
pub fn prepare() -> anyhow::Result<()> {
    if std::env::var_os(MARK).is_some() {
        return Ok(());
    }
    let wanted = device::environment();
    for (name, value) in &wanted {
        if let Some(other) = std::env::var_os(name).filter(|other| other != value) {
            output::note(format_args!(
                "note: {name}={} is set, and not {value}: bits may differ from those of other machines",
                other.display()
            ));
        }
    }
    let missing: Vec<_> = wanted.iter().filter(|(name, _)| std::env::var_os(name).is_none()).collect();
    let torch = std::env::var("VOLARY_LIBTORCH").ok();
    if missing.is_empty() && torch.is_none() {
        return Ok(());
    }
    let mut restarted = Command::new(std::env::current_exe().context("the path of this program")?);
    restarted
        .args(std::env::args_os().skip(1))
        .env(MARK, "1")
        .envs(missing.iter().map(|(name, value)| (name, value)));
    if let Some(root) = torch {
        let before = std::env::var("LD_LIBRARY_PATH").unwrap_or_default();
        let path = if before.is_empty() {
            format!("{root}/lib:{root}")
        } else {
            format!("{root}/lib:{root}:{before}")
        };
        restarted.env("LD_LIBRARY_PATH", path);
    }
    // The process keeps its number; exec returns only when it fails.
    Err(restarted.exec()).context("cannot restart with libtorch's environment")
}
