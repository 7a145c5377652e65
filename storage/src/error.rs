//! The error of this crate: each variant names the operation and the place.

use std::io;
use std::path::{Path, PathBuf};
use volary_core::Digest;
use volary_core::{ShardId, Step};

/// The result of all functions of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// An error in a run directory.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An operation on a file failed.
    #[error("cannot {what} {}: {source}", path.display())]
    Io {
        /// The operation, as a verb: `read`, `rename`.
        what: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The error of the operating system.
        source: io::Error,
    },
    /// The disk is full. Existing checkpoints are not affected.
    #[error("no space left on device while writing {what} to {}: free some space there or keep fewer checkpoints", path.display())]
    NoSpace {
        /// The object: `shard layer.3.dense of step 42`.
        what: String,
        /// The destination.
        path: PathBuf,
    },
    /// The run directory is not writable.
    #[error("the run directory {} is not writable: {source}", path.display())]
    NotWritable {
        /// The directory.
        path: PathBuf,
        /// The error of the operating system.
        source: io::Error,
    },
    /// The directory is not a run directory.
    #[error("{} is not a run directory: it has no {missing}", path.display())]
    NotARun {
        /// The directory.
        path: PathBuf,
        /// The missing part of a run directory.
        missing: &'static str,
    },
    /// Another supervisor holds the run.
    #[error("{} is held by process {pid} at {address}: this run already has a supervisor", path.display())]
    Held {
        /// The holder's process identifier.
        pid: u32,
        /// The holder's listening address.
        address: String,
        /// The lock file.
        path: PathBuf,
    },
    /// Another process holds the run and has not written its identity.
    #[error("{} is held by an unknown process: it has not written its identity there", path.display())]
    HeldUnnamed {
        /// The lock file.
        path: PathBuf,
    },
    /// The database failed.
    #[error("cannot {what} in the database {}: {source}", path.display())]
    Database {
        /// The operation, as a verb.
        what: &'static str,
        /// The database's directory.
        path: PathBuf,
        /// The error of sled.
        source: sled::Error,
    },
    /// A record of the database is damaged.
    #[error("the record {key} of {tree} is damaged: {reason}")]
    DamagedRecord {
        /// The tree.
        tree: &'static str,
        /// The key in readable form.
        key: String,
        /// The reason.
        reason: String,
    },
    /// A value cannot be encoded, or is too large for the database.
    #[error("cannot store {what}: {reason}")]
    Unstorable {
        /// The value.
        what: String,
        /// The reason.
        reason: String,
    },
    /// A format of another version.
    #[error("{what} has format {found}, this version reads {known}")]
    Format {
        /// The object with the format.
        what: String,
        /// Its format.
        found: u16,
        /// The format of this version.
        known: u16,
    },
    /// The step is already committed with different content.
    #[error("step {step} is already committed with different content")]
    AlreadyCommitted {
        /// The step.
        step: Step,
    },
    /// The step does not follow the last committed one.
    #[error("step {step} cannot be committed: the journal ends at step {last}")]
    OutOfOrder {
        /// The step.
        step: Step,
        /// The last committed step.
        last: Step,
    },
    /// The journal has a gap.
    #[error("the journal in {} has a gap: steps {first} to {last} are missing", path.display())]
    Gap {
        /// The first missing step.
        first: Step,
        /// The last missing step.
        last: Step,
        /// The database's directory.
        path: PathBuf,
    },
    /// The run directory belongs to another run.
    #[error("this run directory belongs to another run: its {field} is {stored}, not {given}")]
    OtherRun {
        /// The field that differs.
        field: &'static str,
        /// The stored value.
        stored: String,
        /// The given value.
        given: String,
    },
    /// A blob is missing.
    #[error("the blob {} is missing", path.display())]
    NoBlob {
        /// Its path.
        path: PathBuf,
    },
    /// None of a checkpoint's blobs is in the folder of blobs.
    #[error(
        "{} has none of the blobs of the checkpoint at step {step}: is its file system mounted?",
        folder.display()
    )]
    NoBlobs {
        /// The folder.
        folder: PathBuf,
        /// The checkpoint.
        step: Step,
    },
    /// The content of a blob does not match its digest.
    #[error("the blob {} is damaged: its {bytes} bytes have the digest {found}", path.display())]
    DamagedBlob {
        /// The file, named by its expected digest.
        path: PathBuf,
        /// The digest of its content.
        found: Digest,
        /// Its size in bytes.
        bytes: u64,
    },
    /// A manifest is damaged.
    #[error("the checkpoint manifest {} is damaged: {reason}", path.display())]
    DamagedManifest {
        /// The manifest.
        path: PathBuf,
        /// The reason.
        reason: String,
    },
    /// There is no checkpoint at the step.
    #[error("there is no checkpoint at step {step}")]
    NoCheckpoint {
        /// The step.
        step: Step,
    },
    /// The checkpoint does not contain the shard.
    #[error("the checkpoint at step {step} does not contain shard {shard}")]
    NoShard {
        /// The step.
        step: Step,
        /// The shard.
        shard: ShardId,
    },
    /// Shards of the checkpoint are missing.
    #[error("{} shards of the checkpoint at step {step} are missing, first {:?}", missing.len(), missing.first())]
    Incomplete {
        /// The step.
        step: Step,
        /// The missing shards.
        missing: Vec<ShardId>,
    },
    /// A shard was added twice with different content.
    #[error("shard {shard} of step {step} was added twice with different content: its replicas differ")]
    ShardDiffers {
        /// The step.
        step: Step,
        /// The shard.
        shard: ShardId,
    },
    /// An object store refuses, or cannot be reached.
    #[error(transparent)]
    Objects(#[from] volary_objects::Error),
    /// A folder in an object store has copies of something else.
    #[error("{folder}: {reason}: choose another checkpoint.store, or resume with --from")]
    MirrorTaken {
        /// The folder.
        folder: String,
        /// What it has.
        reason: String,
    },
    /// An object has another size than what was written.
    #[error("{object}: it has {found} bytes, expected {expected}")]
    MirrorSize {
        /// The address of the object.
        object: String,
        /// Its size in bytes.
        found: u64,
        /// The size of what was written.
        expected: u64,
    },
    /// A folder in an object store has no checkpoint.
    #[error("{folder}: it has no checkpoint")]
    NoMirror {
        /// The folder.
        folder: String,
    },
    /// There is another checkpoint at the step.
    #[error("there is already another checkpoint at step {step}")]
    AlreadyCheckpointed {
        /// The step.
        step: Step,
    },
}

impl Error {
    /// A failed file operation. A full disk has a variant of its own.
    pub(crate) fn io(what: &'static str, path: &Path, source: io::Error) -> Self {
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                Self::NoSpace { what: "a file".to_owned(), path: path.to_owned() }
            }
            _ => Self::Io { what, path: path.to_owned(), source },
        }
    }

    /// Names the object for which the disk was full.
    pub(crate) fn while_writing(self, subject: impl FnOnce() -> String) -> Self {
        match self {
            Self::NoSpace { path, .. } => Self::NoSpace { what: subject(), path },
            other => other,
        }
    }

    /// Whether what was read is proven to be damaged or incomplete. Other errors may pass, and are no reason
    /// to give anything up.
    #[must_use]
    pub fn is_damage(&self) -> bool {
        matches!(
            self,
            Self::DamagedRecord { .. }
                | Self::DamagedBlob { .. }
                | Self::DamagedManifest { .. }
                | Self::NoBlob { .. }
                | Self::NoShard { .. }
        )
    }

    /// A failure of the database. A full disk has a variant of its own.
    pub(crate) fn database(what: &'static str, path: &Path, source: sled::Error) -> Self {
        match source {
            sled::Error::Io(e) if e.kind() == io::ErrorKind::StorageFull => {
                Self::NoSpace { what: "the journal".to_owned(), path: path.to_owned() }
            }
            source => Self::Database { what, path: path.to_owned(), source },
        }
    }
}
