//! The runs of this user on this machine, wherever their directories are: links to those whose supervisors
//! were started, by the number of the process.

use crate::rundir;
use std::path::PathBuf;
use volary_storage::RunDir;

/// The folder of the links: `$XDG_STATE_HOME/volary/runs`, else `~/.local/state/volary/runs`; `None` without
/// a home folder.
#[must_use]
pub fn folder() -> Option<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let state = set("XDG_STATE_HOME").or_else(|| Some(set("HOME")?.join(".local/state")))?;
    Some(state.join("volary/runs"))
}

/// Records that this process supervises a run. It is only for the convenience of others: where it cannot be
/// written, they name the directory.
pub fn add(dir: &RunDir) {
    let Some(folder) = folder() else { return };
    let linked = || {
        std::fs::create_dir_all(&folder)?;
        let link = folder.join(std::process::id().to_string());
        // Left by a process that had the same number.
        let _ = std::fs::remove_file(&link);
        std::os::unix::fs::symlink(std::path::absolute(dir.root())?, link)
    };
    if let Err(error) = linked() {
        tracing::debug!(%error, "the run is not known under {}", folder.display());
    }
}

/// The supervisor of this process has ended.
pub fn remove() {
    if let Some(folder) = folder() {
        // What cannot be removed is no longer alive at the next look.
        let _ = std::fs::remove_file(folder.join(std::process::id().to_string()));
    }
}

/// The runs whose supervisors are alive. Links to others are removed.
#[must_use]
pub fn runs() -> Vec<(RunDir, rundir::Contact)> {
    let entries = folder().and_then(|folder| std::fs::read_dir(folder).ok());
    let live = entries.into_iter().flatten().flatten().filter_map(|entry| {
        let target = std::fs::read_link(entry.path()).ok()?;
        let found = RunDir::find(&target).ok().and_then(|dir| Some((rundir::contact(&dir)?, dir)));
        let Some((contact, dir)) = found else {
            let number = entry.file_name().to_string_lossy().parse();
            // A supervisor that is starting has no contact yet.
            if number.is_ok_and(|number| !rundir::is_alive(number)) {
                let _ = std::fs::remove_file(entry.path());
            }
            return None;
        };
        Some((dir, contact))
    });
    live.collect()
}
