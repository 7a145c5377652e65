//! The map of a run directory: which file lies where, and nothing about what is in it.

use crate::error::{Error, Result};
use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use volary_core::Step;

const FOLDERS: [&str; 5] = ["state", "blobs", "checkpoints", "data", "identity"];
const PROBE: &str = ".write-probe";

/// A run directory that is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunDir {
    root: PathBuf,
}

impl RunDir {
    /// Makes the directory and its folders where they are missing, and makes sure that they can be written.
    pub fn create(path: impl AsRef<Path>) -> Result<Self> {
        let root = path.as_ref().to_owned();
        let unwritable = |source| Error::NotWritable { path: root.clone(), source };
        for folder in FOLDERS {
            fs::create_dir_all(root.join(folder)).map_err(unwritable)?;
        }
        let dir = Self { root };
        dir.keep_private(&dir.identity())?;
        dir.probe()?;
        Ok(dir)
    }

    /// Opens the directory of a run that was created before, to write in it.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::find(&path)?;
        Self::create(path)
    }

    /// Finds the directory of a run to read from it: nothing is made or written.
    pub fn find(path: impl AsRef<Path>) -> Result<Self> {
        let root = path.as_ref().to_owned();
        // Nothing but a run has this folder, and every run has it from its first moment.
        if !root.join("state").is_dir() {
            return Err(Error::NotARun { path: root, missing: "state folder" });
        }
        Ok(Self { root })
    }

    /// The directory itself.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The options that the run was started with.
    #[must_use]
    pub fn config(&self) -> PathBuf {
        self.root.join("config.toml")
    }

    /// The database's folder.
    #[must_use]
    pub fn state(&self) -> PathBuf {
        self.root.join("state")
    }

    /// The folder of the tensors.
    #[must_use]
    pub fn blobs(&self) -> PathBuf {
        self.root.join("blobs")
    }

    /// The folder of the checkpoints' manifests.
    #[must_use]
    pub fn checkpoints(&self) -> PathBuf {
        self.root.join("checkpoints")
    }

    /// The manifest of the checkpoint at `step`.
    #[must_use]
    pub fn manifest(&self, step: Step) -> PathBuf {
        self.checkpoints().join(format!("step-{step:08}.json"))
    }

    /// The folder of the prepared data set.
    #[must_use]
    pub fn data(&self) -> PathBuf {
        self.root.join("data")
    }

    /// The folder of the run's keys and certificates; only its owner may look into it.
    #[must_use]
    pub fn identity(&self) -> PathBuf {
        self.root.join("identity")
    }

    /// One line for each committed step.
    #[must_use]
    pub fn metrics(&self) -> PathBuf {
        self.root.join("metrics.jsonl")
    }

    /// One line for each thing that happened to the cluster.
    #[must_use]
    pub fn events(&self) -> PathBuf {
        self.root.join("events.jsonl")
    }

    /// One line for each validation.
    #[must_use]
    pub fn validation(&self) -> PathBuf {
        self.root.join("validation.jsonl")
    }

    /// Where the running supervisor says how it is reached.
    #[must_use]
    pub fn supervisor(&self) -> PathBuf {
        self.root.join("supervisor.json")
    }

    /// The folder of the event files for TensorBoard.
    #[must_use]
    pub fn tensorboard(&self) -> PathBuf {
        self.root.join("tensorboard")
    }

    /// The folder of the traces that are kept.
    #[must_use]
    pub fn traces(&self) -> PathBuf {
        self.root.join("traces")
    }

    /// The tokenizer that the data was prepared with.
    #[must_use]
    pub fn tokenizer(&self) -> PathBuf {
        self.root.join("tokenizer.json")
    }

    /// The file that one supervisor at a time holds locked.
    #[must_use]
    pub fn lock(&self) -> PathBuf {
        self.root.join("lock")
    }

    /// Permissions do not tell (read-only mounts, quotas, root): only writing does.
    fn probe(&self) -> Result<()> {
        let file = self.root.join(PROBE);
        let written = fs::File::create(&file).and_then(|mut f| f.write_all(b"probe"));
        let removed = fs::remove_file(&file);
        written.and(removed).map_err(|source| Error::NotWritable { path: self.root.clone(), source })
    }

    fn keep_private(&self, folder: &Path) -> Result<()> {
        fs::set_permissions(folder, fs::Permissions::from_mode(0o700))
            .map_err(|source| Error::NotWritable { path: self.root.clone(), source })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_created_run_is_found_again_and_nothing_else_is() {
        let temp = tempfile::tempdir().unwrap();
        let missing = RunDir::open(temp.path()).unwrap_err();
        assert!(missing.to_string().contains(temp.path().to_str().unwrap()));
        let created = RunDir::create(temp.path().join("run")).unwrap();
        assert_eq!(RunDir::open(created.root()).unwrap(), created);
        assert_eq!(RunDir::find(created.root()).unwrap(), created);
        assert!(created.manifest(42).ends_with("checkpoints/step-00000042.json"));
        assert!(!created.root().join(PROBE).exists());
    }

    #[test]
    fn a_directory_that_cannot_be_written_is_named() {
        // A file in the way is refused to root as well, unlike a folder without the permission to write.
        let temp = tempfile::tempdir().unwrap();
        let file = temp.path().join("file");
        fs::write(&file, b"in the way").unwrap();
        let error = RunDir::create(file.join("run")).unwrap_err();
        assert!(matches!(error, Error::NotWritable { .. }));
        assert!(error.to_string().contains(file.join("run").to_str().unwrap()), "{error}");
    }

    #[test]
    fn a_probe_that_cannot_be_written_is_an_error() {
        let temp = tempfile::tempdir().unwrap();
        let dir = RunDir::create(temp.path()).unwrap();
        fs::create_dir(dir.root().join(PROBE)).unwrap();
        assert!(matches!(dir.probe().unwrap_err(), Error::NotWritable { .. }));
    }
}
