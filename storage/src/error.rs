//! The one error of this crate: each variant says what was tried and where.

use crate::digest::Digest;
use std::io;
use std::path::{Path, PathBuf};
use volary_core::{ShardId, Step};

/// What every function of this crate returns.
pub type Result<T> = std::result::Result<T, Error>;

/// What can go wrong in a run directory.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An operation on a file failed.
    #[error("cannot {what} {}: {source}", path.display())]
    Io {
        /// What was tried, as a verb: `read`, `rename`.
        what: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// The disk is full; what was catalogued before is unhurt.
    #[error("no space left on device while writing {what} to {}: free some space there or keep fewer checkpoints", path.display())]
    NoSpace {
        /// What was being written: `shard layer.3.dense of step 42`.
        what: String,
        /// Where it was going.
        path: PathBuf,
    },
    /// The run directory cannot be written.
    #[error("the run directory {} cannot be written: {source}", path.display())]
    NotWritable {
        /// The directory.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// There is no run here.
    #[error("{} is not a run directory: it has no {missing}", path.display())]
    NotARun {
        /// The directory.
        path: PathBuf,
        /// What a run directory would have.
        missing: &'static str,
    },
    /// Another supervisor runs here.
    #[error("{} is held by process {pid} at {address}: this run already has a supervisor", path.display())]
    Held {
        /// The holder's process.
        pid: u32,
        /// Where the holder listens.
        address: String,
        /// The lock file.
        path: PathBuf,
    },
    /// Another process holds the run and has not said who it is.
    #[error("{} is held by a process that has not written its number there", path.display())]
    HeldUnnamed {
        /// The lock file.
        path: PathBuf,
    },
    /// The database failed.
    #[error("cannot {what} in the database {}: {source}", path.display())]
    Database {
        /// What was tried, as a verb.
        what: &'static str,
        /// The database's folder.
        path: PathBuf,
        /// What sled said.
        source: sled::Error,
    },
    /// A record of the database does not carry what was written.
    #[error("the record {key} of {tree} is damaged: {reason}")]
    DamagedRecord {
        /// The tree.
        tree: &'static str,
        /// The key, readable.
        key: String,
        /// What does not fit.
        reason: String,
    },
    /// A value could not be put into bytes, or is too big for the database.
    #[error("cannot store {what}: {reason}")]
    Unstorable {
        /// What was to be stored.
        what: String,
        /// Why not.
        reason: String,
    },
    /// A format that this version does not know.
    #[error("{what} has format {found}, and this version reads {known}")]
    Format {
        /// What carries the format.
        what: String,
        /// The format found.
        found: u16,
        /// The format that this version writes.
        known: u16,
    },
    /// A step is committed once.
    #[error("step {step} is already committed with another content")]
    AlreadyCommitted {
        /// The step.
        step: Step,
    },
    /// A commit that would leave a hole, or go back.
    #[error("step {step} cannot be committed: the journal ends at step {last}")]
    OutOfOrder {
        /// The step given.
        step: Step,
        /// The last one in the journal.
        last: Step,
    },
    /// The journal lacks steps between those that it holds.
    #[error("the journal in {} has a hole: steps {first} to {last} are missing", path.display())]
    Hole {
        /// The first missing step.
        first: Step,
        /// The last missing step.
        last: Step,
        /// The database's folder.
        path: PathBuf,
    },
    /// The run directory belongs to another run.
    #[error("this run directory holds another run: its {field} is {kept}, not {given}")]
    OtherRun {
        /// What differs.
        field: &'static str,
        /// As it was written.
        kept: String,
        /// As it is now.
        given: String,
    },
    /// Not a BLAKE3 in hexadecimal.
    #[error("{text:?} is not a digest: 64 hexadecimal digits are")]
    BadDigest {
        /// What was given.
        text: String,
    },
    /// A blob is not there.
    #[error("the blob {} is missing", path.display())]
    NoBlob {
        /// Where it should be.
        path: PathBuf,
    },
    /// A blob does not hold what its name says.
    #[error("the blob {} is damaged: its {bytes} bytes have the digest {found}", path.display())]
    DamagedBlob {
        /// The file, named by the digest that it should have.
        path: PathBuf,
        /// The digest that it has.
        found: Digest,
        /// Its length.
        bytes: u64,
    },
    /// A manifest cannot be read.
    #[error("the checkpoint manifest {} is damaged: {reason}", path.display())]
    DamagedManifest {
        /// The manifest.
        path: PathBuf,
        /// What does not fit.
        reason: String,
    },
    /// There is no checkpoint at this step.
    #[error("there is no checkpoint at step {step}")]
    NoCheckpoint {
        /// The step.
        step: Step,
    },
    /// A checkpoint does not hold this shard.
    #[error("the checkpoint at step {step} holds no shard {shard}")]
    NoShard {
        /// The step.
        step: Step,
        /// The shard.
        shard: ShardId,
    },
    /// A checkpoint was to be completed without all its shards.
    #[error("the checkpoint at step {step} lacks {} shards, first {:?}", missing.len(), missing.first())]
    Incomplete {
        /// The step.
        step: Step,
        /// Those that were not added.
        missing: Vec<ShardId>,
    },
    /// A shard was added twice with different bytes.
    #[error("shard {shard} of step {step} was added twice with different bytes: replicas disagree")]
    ShardDiffers {
        /// The step.
        step: Step,
        /// The shard.
        shard: ShardId,
    },
    /// Another checkpoint is catalogued at this step.
    #[error("another checkpoint is already catalogued at step {step}")]
    AlreadyCheckpointed {
        /// The step.
        step: Step,
    },
}

impl Error {
    /// A file operation's failure; a full disk is told apart.
    pub(crate) fn io(what: &'static str, path: &Path, source: io::Error) -> Self {
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                Self::NoSpace { what: "a file".to_owned(), path: path.to_owned() }
            }
            _ => Self::Io { what, path: path.to_owned(), source },
        }
    }

    /// Says what was being written when the disk was full.
    pub(crate) fn while_writing(self, subject: impl FnOnce() -> String) -> Self {
        match self {
            Self::NoSpace { path, .. } => Self::NoSpace { what: subject(), path },
            other => other,
        }
    }

    /// A database failure; a full disk is told apart.
    pub(crate) fn database(what: &'static str, path: &Path, source: sled::Error) -> Self {
        match source {
            sled::Error::Io(e) if e.kind() == io::ErrorKind::StorageFull => {
                Self::NoSpace { what: "the journal".to_owned(), path: path.to_owned() }
            }
            source => Self::Database { what, path: path.to_owned(), source },
        }
    }
}
