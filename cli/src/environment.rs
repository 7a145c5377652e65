//! What must be in the environment before libtorch is loaded.

use anyhow::Context;
use std::os::unix::process::CommandExt;
use std::process::Command;
use volary_model::device::ENVIRONMENT;

/// Set in a process that has been started anew with the right environment, so that it happens once.
const MARK: &str = "VOLARY_ENVIRONMENT_SET";

/// Starts this process anew, once, when a variable that libtorch reads as it is loaded is missing: OpenMP's and MKL's
/// threads, MKL's reproducibility, and where libtorch lies (`VOLARY_LIBTORCH`).
///
/// # Errors
/// When the program cannot be started again.
pub fn prepare() -> anyhow::Result<()> {
    let missing: Vec<_> = ENVIRONMENT.iter().filter(|(name, _)| std::env::var_os(name).is_none()).collect();
    let torch = std::env::var("VOLARY_LIBTORCH").ok();
    if std::env::var_os(MARK).is_some() || (missing.is_empty() && torch.is_none()) {
        return Ok(());
    }
    let mut again = Command::new(std::env::current_exe().context("this program's own path")?);
    again
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
        again.env("LD_LIBRARY_PATH", path);
    }
    // The process keeps its number; this returns only when it fails.
    Err(again.exec()).context("starting again with libtorch's settings")
}
