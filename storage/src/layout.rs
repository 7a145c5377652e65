//! The paths of a run directory.

use crate::error::{Error, Result};
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use volary_core::Step;

const DIRECTORIES: [&str; 5] = ["state", "blobs", "checkpoints", "data", "identity"];
const PROBE: &str = ".write-probe";

/// An existing run directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunDir {
    root: PathBuf,
}

impl RunDir {
    /// Creates the directory and its subdirectories where they are missing, and checks that it is writable.
    ///
    /// # Errors
    /// [`Error::NotWritable`].
    pub fn create(path: impl AsRef<Path>) -> Result<Self> {
        let root = path.as_ref().to_owned();
        let unwritable = |source| Error::NotWritable { path: root.clone(), source };
        for folder in DIRECTORIES {
            fs::create_dir_all(root.join(folder)).map_err(unwritable)?;
        }
        let dir = Self { root };
        dir.make_private(&dir.identity())?;
        dir.probe()?;
        Ok(dir)
    }

    /// Opens an existing run directory for writing.
    ///
    /// # Errors
    /// [`Error::NotARun`] or [`Error::NotWritable`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::find(&path)?;
        Self::create(path)
    }

    /// Opens an existing run directory for reading; writes nothing.
    ///
    /// # Errors
    /// [`Error::NotARun`].
    pub fn find(path: impl AsRef<Path>) -> Result<Self> {
        let root = path.as_ref().to_owned();
        // Only runs have this directory, and all runs have it from the start.
        if !root.join("state").is_dir() {
            return Err(Error::NotARun { path: root, missing: "state directory" });
        }
        Ok(Self { root })
    }

    /// The directory.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Removes everything but the run's identity and its logs, for a new start of a run without a committed
    /// step.
    ///
    /// # Errors
    /// [`Error::NotWritable`].
    pub fn clear(&self) -> Result<()> {
        let unwritable = |source| Error::NotWritable { path: self.root.clone(), source };
        let absent_is_removed = |removed: io::Result<()>| match removed {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(unwritable(error)),
            _ => Ok(()),
        };
        let folders =
            [self.state(), self.blobs(), self.checkpoints(), self.data(), self.tensorboard(), self.traces()];
        for folder in folders {
            absent_is_removed(fs::remove_dir_all(folder))?;
        }
        let files = [
            self.config(),
            self.metrics(),
            self.events(),
            self.validation(),
            self.tokenizer(),
            self.corpus(),
        ];
        for file in files {
            absent_is_removed(fs::remove_file(file))?;
        }
        Self::create(&self.root).map(drop)
    }

    /// The configuration of the run.
    #[must_use]
    pub fn config(&self) -> PathBuf {
        self.root.join("config.toml")
    }

    /// The directory of the database.
    #[must_use]
    pub fn state(&self) -> PathBuf {
        self.root.join("state")
    }

    /// The directory of the tensors.
    #[must_use]
    pub fn blobs(&self) -> PathBuf {
        self.root.join("blobs")
    }

    /// The directory of the checkpoints' manifests.
    #[must_use]
    pub fn checkpoints(&self) -> PathBuf {
        self.root.join("checkpoints")
    }

    /// The manifest of the checkpoint at `step`.
    #[must_use]
    pub fn manifest(&self, step: Step) -> PathBuf {
        self.checkpoints().join(format!("step-{step:08}.json"))
    }

    /// The directory of the prepared data set.
    #[must_use]
    pub fn data(&self) -> PathBuf {
        self.root.join("data")
    }

    /// The directory of the run's keys and certificates, accessible to its owner only.
    #[must_use]
    pub fn identity(&self) -> PathBuf {
        self.root.join("identity")
    }

    /// A JSON line per committed step.
    #[must_use]
    pub fn metrics(&self) -> PathBuf {
        self.root.join("metrics.jsonl")
    }

    /// A JSON line per cluster event.
    #[must_use]
    pub fn events(&self) -> PathBuf {
        self.root.join("events.jsonl")
    }

    /// A JSON line per validation.
    #[must_use]
    pub fn validation(&self) -> PathBuf {
        self.root.join("validation.jsonl")
    }

    /// The addresses of the running supervisor.
    #[must_use]
    pub fn supervisor(&self) -> PathBuf {
        self.root.join("supervisor.json")
    }

    /// The directory of the event files for TensorBoard.
    #[must_use]
    pub fn tensorboard(&self) -> PathBuf {
        self.root.join("tensorboard")
    }

    /// The directory of the stored traces.
    #[must_use]
    pub fn traces(&self) -> PathBuf {
        self.root.join("traces")
    }

    /// The tokenizer of the prepared data.
    #[must_use]
    pub fn tokenizer(&self) -> PathBuf {
        self.root.join("tokenizer.json")
    }

    /// The fingerprints of the prepared data.
    #[must_use]
    pub fn corpus(&self) -> PathBuf {
        self.root.join("corpus.json")
    }

    /// The lock file of the supervisor.
    #[must_use]
    pub fn lock(&self) -> PathBuf {
        self.root.join("lock")
    }

    /// Permissions are not sufficient (read-only mounts, quotas, root): only a write shows it.
    fn probe(&self) -> Result<()> {
        let file = self.root.join(PROBE);
        let written = fs::File::create(&file).and_then(|mut f| f.write_all(b"probe"));
        let removed = fs::remove_file(&file);
        written.and(removed).map_err(|source| Error::NotWritable { path: self.root.clone(), source })
    }

    fn make_private(&self, folder: &Path) -> Result<()> {
        fs::set_permissions(folder, fs::Permissions::from_mode(0o700))
            .map_err(|source| Error::NotWritable { path: self.root.clone(), source })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_created_run_is_found_and_no_other_directory() {
        let temp = tempfile::tempdir().unwrap();
        let missing = RunDir::open(temp.path()).unwrap_err();
        assert!(missing.to_string().contains(temp.path().to_str().unwrap()));
        let created = RunDir::create(temp.path().join("run")).unwrap();
        assert_eq!(RunDir::open(created.root()).unwrap(), created);
        assert_eq!(RunDir::find(created.root()).unwrap(), created);
        assert!(created.manifest(Step(42)).ends_with("checkpoints/step-00000042.json"));
        assert!(!created.root().join(PROBE).exists());
    }

    #[test]
    fn a_directory_that_is_not_writable_is_named() {
        // A file in place of the directory stops root too, unlike missing permissions.
        let temp = tempfile::tempdir().unwrap();
        let file = temp.path().join("file");
        fs::write(&file, b"in the way").unwrap();
        let error = RunDir::create(file.join("run")).unwrap_err();
        assert!(matches!(error, Error::NotWritable { .. }));
        assert!(error.to_string().contains(file.join("run").to_str().unwrap()), "{error}");
    }

    #[test]
    fn a_failed_probe_is_an_error() {
        let temp = tempfile::tempdir().unwrap();
        let dir = RunDir::create(temp.path()).unwrap();
        fs::create_dir(dir.root().join(PROBE)).unwrap();
        assert!(matches!(dir.probe().unwrap_err(), Error::NotWritable { .. }));
    }
}
