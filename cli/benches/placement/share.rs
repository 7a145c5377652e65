//! A share of one CPU, as a control group of version 1 or 2.

use std::path::{Path, PathBuf};

/// The period in microseconds, short relative to a step.
const PERIOD_US: u64 = 10_000;

/// A control group; dropping it removes the group, if it is empty.
pub(crate) struct Share(PathBuf);

impl Share {
    /// `None` if this machine or its user cannot create one.
    pub(crate) fn new(name: &str, share: f64) -> Option<Self> {
        let old = Path::new("/sys/fs/cgroup/cpu");
        let folder = if old.exists() { old } else { Path::new("/sys/fs/cgroup") }.join(name);
        std::fs::create_dir_all(&folder).ok()?;
        let quota_us = (share * PERIOD_US as f64) as u64;
        let set = if old.exists() {
            std::fs::write(folder.join("cpu.cfs_period_us"), PERIOD_US.to_string())
                .and_then(|()| std::fs::write(folder.join("cpu.cfs_quota_us"), quota_us.to_string()))
        } else {
            std::fs::write(folder.join("cpu.max"), format!("{quota_us} {PERIOD_US}"))
        };
        set.ok().map(|()| Self(folder))
    }

    /// The file to which a process writes its number to join the group.
    pub(crate) fn processes(&self) -> PathBuf {
        self.0.join("cgroup.procs")
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir(&self.0);
    }
}
