//! A run's checkpoints for a process that only reads: sled lets one process in, the manifests let all.

use crate::blobs::read_blob;
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::layout::RunDir;
use crate::manifest::{self, CheckpointDigest, CheckpointRecord};
use volary_core::{ShardId, Step};

/// Reads checkpoints by their manifests, also while a supervisor writes new ones. It writes nothing.
#[derive(Clone, Debug)]
pub struct CheckpointReader {
    dir: RunDir,
}

impl CheckpointReader {
    /// A reader of this run's checkpoints.
    pub fn open(dir: &RunDir) -> Result<Self> {
        let folder = dir.checkpoints();
        if !folder.is_dir() {
            return Err(Error::NotARun { path: dir.root().to_owned(), missing: "checkpoints folder" });
        }
        Ok(Self { dir: dir.clone() })
    }

    /// The newest checkpoint whose manifest can be read; newer ones are warned about.
    pub fn latest(&self) -> Result<Option<CheckpointRecord>> {
        for step in self.steps()?.into_iter().rev() {
            match manifest::read(&self.dir, step) {
                Ok(Some(record)) => return Ok(Some(record)),
                // Removed since it was listed.
                Ok(None) => {}
                Err(error) => tracing::warn!(%step, %error, "trying the checkpoint before"),
            }
        }
        Ok(None)
    }

    /// The checkpoint at a step.
    pub fn at(&self, step: Step) -> Result<CheckpointRecord> {
        manifest::read(&self.dir, step)?.ok_or(Error::NoCheckpoint { step })
    }

    /// The steps that have a manifest, in order.
    pub fn steps(&self) -> Result<Vec<Step>> {
        manifest::steps(&self.dir)
    }

    /// A shard's bytes, checked.
    pub fn read(&self, step: Step, shard: ShardId) -> Result<Vec<u8>> {
        self.at(step)?.read(|digest| self.blob(digest), shard)
    }

    /// The digest of a checkpoint's weights, from its bytes, every one of which is checked.
    pub fn digest(&self, step: Step) -> Result<CheckpointDigest> {
        self.at(step)?.digest(|digest| self.blob(digest))
    }

    /// Reads every byte of a checkpoint and says whether all are as they were written.
    pub fn verify(&self, step: Step) -> Result<()> {
        self.digest(step).map(drop)
    }

    fn blob(&self, digest: &Digest) -> Result<Vec<u8>> {
        read_blob(&self.dir.blobs(), digest)
    }
}
