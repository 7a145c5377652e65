//! A run's checkpoints for processes that only read. sled admits one process; the manifests are readable by
//! all.

use crate::blobs::read_blob;
use crate::error::{Error, Result};
use crate::layout::RunDir;
use crate::manifest::{self, CheckpointDigest, CheckpointRecord};
use volary_core::Digest;
use volary_core::{ShardId, Step};

/// Reads checkpoints by their manifests, also while a supervisor writes new ones. It never writes.
#[derive(Clone, Debug)]
pub struct CheckpointReader {
    dir: RunDir,
}

impl CheckpointReader {
    /// Opens the checkpoints of a run.
    ///
    /// # Errors
    /// [`Error::NotARun`].
    pub fn open(dir: &RunDir) -> Result<Self> {
        let folder = dir.checkpoints();
        if !folder.is_dir() {
            return Err(Error::NotARun { path: dir.root().to_owned(), missing: "checkpoints directory" });
        }
        Ok(Self { dir: dir.clone() })
    }

    /// The newest checkpoint with a readable manifest. It logs a warning for each newer, damaged one.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn latest(&self) -> Result<Option<CheckpointRecord>> {
        for step in self.steps()?.into_iter().rev() {
            match manifest::read(&self.dir, step) {
                Ok(Some(record)) => return Ok(Some(record)),
                // It was removed after the listing.
                Ok(None) => {}
                Err(error) => tracing::warn!(%step, %error, "checkpoint is damaged; trying the previous one"),
            }
        }
        Ok(None)
    }

    /// The checkpoint at a step.
    ///
    /// # Errors
    /// [`Error::NoCheckpoint`], [`Error::DamagedManifest`], [`Error::Format`] or [`Error::Io`].
    pub fn at(&self, step: Step) -> Result<CheckpointRecord> {
        manifest::read(&self.dir, step)?.ok_or(Error::NoCheckpoint { step })
    }

    /// The steps with a manifest, ascending.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn steps(&self) -> Result<Vec<Step>> {
        manifest::steps(&self.dir)
    }

    /// A shard's bytes, verified.
    ///
    /// # Errors
    /// As [`CheckpointReader::at`]; [`Error::NoShard`], [`Error::NoBlob`] or [`Error::DamagedBlob`].
    pub fn read(&self, step: Step, shard: ShardId) -> Result<Vec<u8>> {
        self.at(step)?.read(|digest| self.blob(digest), shard)
    }

    /// The digest of a checkpoint's weights, computed from its verified bytes.
    ///
    /// # Errors
    /// As [`CheckpointReader::read`], for the first damaged shard.
    pub fn digest(&self, step: Step) -> Result<CheckpointDigest> {
        self.at(step)?.digest(|digest| self.blob(digest))
    }

    /// Verifies all bytes of a checkpoint.
    ///
    /// # Errors
    /// As [`CheckpointReader::read`], for the first damaged shard.
    pub fn verify(&self, step: Step) -> Result<()> {
        self.digest(step).map(drop)
    }

    fn blob(&self, digest: &Digest) -> Result<Vec<u8>> {
        read_blob(&self.dir.blobs(), digest)
    }
}
